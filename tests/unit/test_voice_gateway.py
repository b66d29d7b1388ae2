"""The voice gateway's state machine."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ErrorCode, ProtocolError
from shared.protocol.close_codes import Action
from shared.protocol.voice_gateway import (
    BackendVersion,
    ClientDisconnected,
    ClientsConnected,
    CommitAnnounced,
    Credentials,
    Event,
    ExecuteTransition,
    ExternalSender,
    HeartbeatAcked,
    Hello,
    PrepareEpoch,
    PrepareTransition,
    Proposals,
    Ready,
    Resumed,
    SessionDescription,
    SessionUpdated,
    Speaking,
    State,
    VoiceGateway,
    Welcomed,
)
from shared.protocol.voice_messages import MAX_BINARY_BYTES, Opcode

SESSION_ID = "5e551011c0ffee00"
TOKEN = "70ce170ce170ce17"
KEY = bytes(range(200, 232))
SSRC = 7276
MODES = ["aead_aes256_gcm_rtpsize", "aead_xchacha20_poly1305_rtpsize"]
CREDENTIALS = Credentials(
    guild_id="41771983423143937",
    channel_id="127121515262115840",
    user_id="104694319306248192",
    session_id=SESSION_ID,
    token=TOKEN,
)

HELLO: dict[str, Any] = {"op": 8, "d": {"v": 8, "heartbeat_interval": 13750}}
READY: dict[str, Any] = {
    "op": 2,
    "d": {"ssrc": SSRC, "ip": "203.0.113.9", "port": 19311, "modes": MODES, "experiments": [], "streams": []},
}
DESCRIPTION: dict[str, Any] = {
    "op": 4,
    "d": {"mode": MODES[0], "secret_key": list(KEY), "dave_protocol_version": 1, "audio_codec": "opus"},
}
ACK: dict[str, Any] = {"op": 6, "d": {"t": 1000}}
RESUMED: dict[str, Any] = {"op": 9, "d": None}
REQUEST: dict[str, Any] = {"op": 3, "d": {"t": 5}}
CLIENTS: dict[str, Any] = {"op": 11, "d": {"user_ids": ["1", "22"]}, "seq": 1}
LEFT: dict[str, Any] = {"op": 13, "d": {"user_id": "22"}, "seq": 2}
SPEAKING: dict[str, Any] = {"op": 5, "d": {"speaking": 1, "ssrc": 99, "user_id": "22"}, "seq": 3}
FLAGS: dict[str, Any] = {"op": 18, "d": {"user_id": "22", "flags": None}, "seq": 4}
UPDATE: dict[str, Any] = {"op": 14, "d": {"audio_codec": "opus", "video_codec": "H264", "media_session_id": "5e55"}}
BACKEND: dict[str, Any] = {"op": 16, "d": {"voice": "0.11.0", "rtc_worker": "0.4.11"}}
PREPARE: dict[str, Any] = {"op": 21, "d": {"transition_id": 7, "protocol_version": 1}, "seq": 5}
EXECUTE: dict[str, Any] = {"op": 22, "d": {"transition_id": 7}, "seq": 6}
EPOCH: dict[str, Any] = {"op": 24, "d": {"epoch": 1, "protocol_version": 1}, "seq": 7}
UNKNOWN: dict[str, Any] = {"op": 250, "d": {"user_id": "22"}, "seq": 8}

MESSAGES = {
    "hello": HELLO,
    "ready": READY,
    "description": DESCRIPTION,
    "ack": ACK,
    "resumed": RESUMED,
    "request": REQUEST,
    "clients": CLIENTS,
    "left": LEFT,
    "speaking": SPEAKING,
    "flags": FLAGS,
    "update": UPDATE,
    "backend": BACKEND,
    "prepare": PREPARE,
    "execute": EXECUTE,
    "epoch": EPOCH,
    "unknown": UNKNOWN,
}
BINARY_MESSAGES: dict[bytes, list[Event]] = {
    b"\x00\x01\x19sender": [ExternalSender(b"sender")],
    b"\x00\x02\x1b\x00proposals": [Proposals(b"\x00proposals")],
    b"\x00\x03\x1b\x01": [Proposals(b"\x01")],
    b"\x00\x04\x1d\x01\x02commit": [CommitAnnounced(0x0102, b"commit")],
    b"\x00\x05\x1d\x00\x00": [CommitAnnounced(0, b"")],
    b"\x00\x06\x1e\xff\xffwelcome": [Welcomed(65535, b"welcome")],
    b"\x00\x07\x1a": [],
    b"\x00\x08\x1cours": [],
    b"\x00\x09\xfaunknown": [],
}
OPEN_STATES = (State.IDENTIFYING, State.RESUMING, State.READY, State.SELECTING, State.ESTABLISHED)
ALLOWED = {
    "ready": (State.IDENTIFYING,),
    "description": (State.SELECTING, State.ESTABLISHED),
    "resumed": (State.RESUMING,),
}


def feed(machine: VoiceGateway, message: dict[str, Any]) -> list[Event]:
    """Give the machine one message."""
    return machine.receive_text(json.dumps(message))


def sent(machine: VoiceGateway) -> list[dict[str, Any]]:
    """Take what the machine wants sent."""
    messages = machine.data_to_send()
    assert not any(isinstance(message, bytes) for message in messages)
    return [json.loads(message) for message in messages]


def machine_in(state: State, version: int = 8) -> VoiceGateway:
    """Bring a machine into a state by the way a session takes; nothing is left in its queue."""
    machine = VoiceGateway(CREDENTIALS, version=version)
    steps: list[tuple[State, Callable[[], object]]] = [
        (State.NEW, lambda: None),
        (State.IDENTIFYING, machine.connected),
        (State.READY, lambda: feed(machine, READY)),
        (State.SELECTING, lambda: machine.select_protocol("198.51.100.7", 50321, MODES[0])),
        (State.ESTABLISHED, lambda: feed(machine, DESCRIPTION)),
        (State.CLOSED, lambda: machine.disconnected(1006)),
        (State.RESUMING, machine.connected),
    ]
    for reached, step in steps:
        step()
        assert machine.state is reached
        if reached is state:
            break
    machine.data_to_send()
    return machine


def test_the_whole_handshake() -> None:
    """Identify, Ready, Select Protocol, Session Description, Speaking: each side says its words once."""
    machine = VoiceGateway(CREDENTIALS)
    machine.connected()
    assert sent(machine) == [
        {
            "op": 0,
            "d": {
                "server_id": CREDENTIALS.guild_id,
                "user_id": CREDENTIALS.user_id,
                "session_id": SESSION_ID,
                "token": TOKEN,
                "max_dave_protocol_version": 1,
            },
        }
    ]
    assert feed(machine, HELLO) == [Hello(13750)]
    assert feed(machine, READY) == [Ready(SSRC, "203.0.113.9", 19311, tuple(MODES))]
    assert (machine.state, machine.ssrc, machine.mode) == (State.READY, SSRC, None)
    machine.select_protocol("198.51.100.7", 50321, MODES[0])
    assert sent(machine) == [
        {
            "op": 1,
            "d": {"protocol": "udp", "data": {"address": "198.51.100.7", "port": 50321, "mode": MODES[0]}},
        }
    ]
    assert feed(machine, DESCRIPTION) == [SessionDescription(MODES[0], KEY, 1)]
    assert (machine.state, machine.ssrc, machine.mode) == (State.ESTABLISHED, SSRC, MODES[0])
    machine.speaking(1)
    assert sent(machine) == [{"op": 5, "d": {"speaking": 1, "delay": 0, "ssrc": SSRC}}]
    assert sent(machine) == []


@pytest.mark.parametrize("before_ready", [True, False])
def test_hello_may_come_at_any_time(before_ready: bool) -> None:
    """Identify waits for no Hello, and Ready for none either."""
    machine = machine_in(State.IDENTIFYING if before_ready else State.READY)
    state = machine.state
    before = machine.heartbeat_interval_ms
    assert feed(machine, HELLO) == [Hello(13750)]
    assert (before, machine.heartbeat_interval_ms, machine.state) == (None, 13750, state)


def test_an_interval_with_a_decimal_point_is_whole_milliseconds() -> None:
    """Some servers write the interval as 41250.0."""
    machine = machine_in(State.IDENTIFYING)
    assert feed(machine, {"op": 8, "d": {"heartbeat_interval": 41250.0}}) == [Hello(41250)]


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("name", MESSAGES)
def test_every_message_in_every_state(state: State, name: str) -> None:
    """A message is taken where it makes sense; elsewhere it is an error that changes nothing."""
    machine = machine_in(state)
    allowed = ALLOWED.get(name, OPEN_STATES)
    before = (machine.state, machine.ssrc, machine.mode, machine.heartbeat_interval_ms)
    if state in allowed:
        feed(machine, MESSAGES[name])
        return
    with pytest.raises(ProtocolError) as caught:
        feed(machine, MESSAGES[name])
    assert caught.value.code is ErrorCode.MALFORMED_MESSAGE
    assert f"op {MESSAGES[name]['op']}" in str(caught.value)
    assert state in str(caught.value)
    assert before == (machine.state, machine.ssrc, machine.mode, machine.heartbeat_interval_ms)
    assert machine.data_to_send() == []


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("data", BINARY_MESSAGES)
def test_every_binary_message_in_every_state(state: State, data: bytes) -> None:
    """The group's messages come at any time, and not at all without a connection."""
    machine = machine_in(state)
    if state in OPEN_STATES:
        assert machine.receive_binary(data) == BINARY_MESSAGES[data]
        assert machine.state is state
        return
    with pytest.raises(ProtocolError, match=str(data[2])):
        machine.receive_binary(data)
    assert machine.data_to_send() == []


CALLS: dict[str, tuple[Callable[[VoiceGateway], object], tuple[State, ...]]] = {
    "connected": (lambda machine: machine.connected(), (State.NEW, State.CLOSED)),
    "select_protocol": (lambda machine: machine.select_protocol("198.51.100.7", 1, MODES[0]), (State.READY,)),
    "heartbeat": (lambda machine: machine.heartbeat(1), OPEN_STATES),
    "speaking": (lambda machine: machine.speaking(1), (State.ESTABLISHED,)),
    "request_backend_version": (lambda machine: machine.request_backend_version(), OPEN_STATES),
    "key_package": (lambda machine: machine.key_package(b"k"), OPEN_STATES),
    "commit_welcome": (lambda machine: machine.commit_welcome(b"c"), OPEN_STATES),
    "transition_ready": (lambda machine: machine.transition_ready(1), OPEN_STATES),
    "invalid_commit_welcome": (lambda machine: machine.invalid_commit_welcome(1), OPEN_STATES),
}


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("name", CALLS)
def test_every_call_in_every_state(state: State, name: str) -> None:
    """A call queues exactly one message where it makes sense; elsewhere it is the caller's mistake."""
    machine = machine_in(state)
    call, allowed = CALLS[name]
    if state in allowed:
        call(machine)
        assert len(machine.data_to_send()) == 1
        return
    with pytest.raises(RuntimeError, match=name):
        call(machine)
    assert (machine.state, machine.data_to_send()) == (state, [])


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("close_code", [None, 1000, 4006, 4014, 4015, 4017])
def test_a_close_ends_in_closed_from_everywhere(state: State, close_code: int | None) -> None:
    """Only an established session stays resumable, and only when the code allows it."""
    machine = machine_in(state)
    machine_was_established = state in (State.ESTABLISHED, State.CLOSED, State.RESUMING)
    action = machine.disconnected(close_code)
    assert machine.state is State.CLOSED
    assert machine.can_resume is (machine_was_established and action is Action.RESUME)
    assert (machine.ssrc, machine.mode) == ((SSRC, MODES[0]) if machine.can_resume else (None, None))
    machine.connected()
    assert machine.state is (State.RESUMING if machine.can_resume else State.IDENTIFYING)


def test_a_close_drops_what_belonged_to_the_socket() -> None:
    """Queue, open heartbeats and interval do not live on in the next WebSocket."""
    machine = machine_in(State.ESTABLISHED)
    feed(machine, HELLO)
    machine.heartbeat(1000)
    assert machine.disconnected(None) is Action.RESUME
    assert (machine.data_to_send(), machine.unacked_heartbeats, machine.heartbeat_interval_ms) == ([], 0, None)


def test_a_resume_keeps_the_session() -> None:
    """Resume carries the last seq; SSRC and mode stay; replayed members are events; Resumed ends it."""
    machine = machine_in(State.ESTABLISHED)
    feed(machine, CLIENTS | {"seq": 10})
    machine.disconnected(4015)
    machine.connected()
    assert sent(machine) == [
        {
            "op": 7,
            "d": {"server_id": CREDENTIALS.guild_id, "session_id": SESSION_ID, "token": TOKEN, "seq_ack": 10},
        }
    ]
    assert feed(machine, HELLO) == [Hello(13750)]
    assert feed(machine, RESUMED) == [Resumed()]
    assert (machine.state, machine.ssrc, machine.mode) == (State.ESTABLISHED, SSRC, MODES[0])
    assert feed(machine, LEFT | {"seq": 11}) == [ClientDisconnected("22")]


def test_a_resume_that_breaks_is_tried_again() -> None:
    """A network failure while resuming leaves the session resumable, a refusal does not."""
    machine = machine_in(State.RESUMING)
    assert machine.disconnected(1006) is Action.RESUME
    machine.connected()
    assert [message["op"] for message in sent(machine)] == [7]
    assert machine.disconnected(4006) is Action.NEW_CREDENTIALS
    assert machine.disconnected(None) is Action.RESUME
    machine.connected()
    assert [message["op"] for message in sent(machine)] == [0]


def test_a_new_session_starts_without_seq() -> None:
    """After a fresh Identify the seq of the lost session is not acknowledged."""
    machine = machine_in(State.ESTABLISHED)
    feed(machine, CLIENTS | {"seq": 10})
    machine.disconnected(4006)
    machine.connected()
    machine.data_to_send()
    machine.heartbeat(1)
    assert sent(machine)[0]["d"]["seq_ack"] == -1


def test_seq_is_the_last_one_seen_from_text_and_binary() -> None:
    """Seq is kept as it comes: none is -1, 0 is a value, wrapping back is no error, binary counts too."""
    machine = machine_in(State.ESTABLISHED)
    seen: list[int] = []

    def note() -> None:
        machine.heartbeat(len(seen) + 1)
        seen.append(sent(machine)[0]["d"]["seq_ack"])

    note()
    feed(machine, CLIENTS | {"seq": 0})
    note()
    machine.receive_binary(b"\xff\xff\x1b\x00")
    note()
    feed(machine, UNKNOWN | {"seq": 0})
    note()
    feed(machine, ACK)
    feed(machine, HELLO | {"seq": None})
    note()
    machine.receive_binary(b"\x01\x02\x7f")
    note()
    assert seen == [-1, 0, 65535, 0, 0, 258]


def test_a_malformed_message_is_not_replayed() -> None:
    """Its seq counts as seen: a resume that brought it again would fail for ever."""
    machine = machine_in(State.ESTABLISHED)
    with pytest.raises(ProtocolError):
        feed(machine, {"op": 13, "d": {}, "seq": 9})
    machine.disconnected(None)
    machine.connected()
    assert sent(machine)[0]["d"]["seq_ack"] == 9


def test_heartbeats_are_counted_until_answered() -> None:
    """An ack settles its heartbeat and the older ones; a foreign t settles nothing."""
    machine = machine_in(State.ESTABLISHED)
    for now_ms in (1000, 2000, 3000):
        machine.heartbeat(now_ms)
    assert [message["d"]["t"] for message in sent(machine)] == [1000, 2000, 3000]
    assert machine.unacked_heartbeats == 3
    assert feed(machine, {"op": 6, "d": {"t": 1500}}) == []
    assert machine.unacked_heartbeats == 3
    assert feed(machine, {"op": 6, "d": {"t": 2000}}) == [HeartbeatAcked(2000)]
    assert machine.unacked_heartbeats == 1
    assert feed(machine, {"op": 6, "d": {"t": 2000}}) == []
    assert feed(machine, {"op": 6, "d": {"t": 3000}}) == [HeartbeatAcked(3000)]
    assert machine.unacked_heartbeats == 0


def test_a_requested_heartbeat_is_answered_at_once() -> None:
    """The answer is no measure of time: it is not counted, and its ack is no event."""
    machine = machine_in(State.ESTABLISHED)
    machine.heartbeat(1000)
    machine.data_to_send()
    assert feed(machine, REQUEST) == []
    assert sent(machine) == [{"op": 3, "d": {"t": 1001, "seq_ack": -1}}]
    assert machine.unacked_heartbeats == 1
    assert feed(machine, {"op": 6, "d": {"t": 1001}}) == []
    assert machine.unacked_heartbeats == 1


def test_a_second_description_changes_the_key() -> None:
    """Session Description on an established session is a key change."""
    machine = machine_in(State.ESTABLISHED)
    changed = {"op": 4, "d": DESCRIPTION["d"] | {"secret_key": list(KEY[::-1]), "mode": MODES[1]}}
    assert feed(machine, changed) == [SessionDescription(MODES[1], KEY[::-1], 1)]
    assert (machine.state, machine.mode) == (State.ESTABLISHED, MODES[1])


def test_a_description_without_dave_means_none() -> None:
    """A server that does not know end-to-end encryption leaves the version out."""
    machine = machine_in(State.SELECTING)
    d = {field: value for field, value in DESCRIPTION["d"].items() if field != "dave_protocol_version"}
    assert feed(machine, {"op": 4, "d": d}) == [SessionDescription(MODES[0], KEY, 0)]


@pytest.mark.parametrize("version", [3, 9, 0, -1])
def test_another_version_is_refused(version: int) -> None:
    """Versions below 4 are gone, 9 is not official."""
    with pytest.raises(ValueError, match=str(version)):
        VoiceGateway(CREDENTIALS, version=version)


@pytest.mark.parametrize("version", [4, 5, 6, 7])
def test_before_version_8_nothing_is_numbered(version: int) -> None:
    """Heartbeat and its answer are bare numbers, Resume and binary messages have no seq, and one in JSON is ignored."""
    machine = machine_in(State.ESTABLISHED, version)
    assert machine.version == version
    machine.heartbeat(1000)
    assert sent(machine) == [{"op": 3, "d": 1000}]
    assert feed(machine, REQUEST) == []
    assert sent(machine) == [{"op": 3, "d": 1001}]
    with pytest.raises(ProtocolError, match="op 6"):
        feed(machine, ACK)
    assert feed(machine, {"op": 6, "d": 1000}) == [HeartbeatAcked(1000)]
    assert feed(machine, CLIENTS) == [ClientsConnected(("1", "22"))]
    assert machine.receive_binary(b"\x1b\x00body") == [Proposals(b"\x00body")]
    with pytest.raises(ProtocolError):
        machine.receive_binary(b"")
    machine.disconnected(None)
    machine.connected()
    assert sent(machine) == [
        {"op": 7, "d": {"server_id": CREDENTIALS.guild_id, "session_id": SESSION_ID, "token": TOKEN}}
    ]
    feed(machine, RESUMED)
    assert feed(machine, CLIENTS) == [ClientsConnected(("1", "22"))]


def test_a_bare_number_is_no_heartbeat_ack_on_version_8() -> None:
    """From version 8 on the answer is an object."""
    machine = machine_in(State.ESTABLISHED)
    machine.heartbeat(1000)
    with pytest.raises(ProtocolError, match="op 6"):
        feed(machine, {"op": 6, "d": 1000})


def test_a_replay_that_begins_one_early_is_told_once() -> None:
    """The message from which the session was resumed is dropped when it comes again; the next one is not."""
    machine = machine_in(State.ESTABLISHED)
    machine.receive_binary(b"\x00\x00\x1d\x00\x01commit")
    machine.disconnected(None)
    machine.connected()
    feed(machine, RESUMED)
    assert machine.receive_binary(b"\x00\x00\x1d\x00\x01commit") == []
    assert machine.receive_binary(b"\x00\x01\x1d\x00\x02commit") == [CommitAnnounced(2, b"commit")]
    assert machine.receive_binary(b"\x00\x00\x1d\x00\x01commit") == [CommitAnnounced(1, b"commit")]


def test_a_replay_over_the_wrap_is_told() -> None:
    """After 65535 comes 0: a smaller number is no older message."""
    machine = machine_in(State.ESTABLISHED)
    machine.receive_binary(b"\xff\xff\x1b\x00")
    machine.disconnected(None)
    machine.connected()
    assert sent(machine)[0]["d"]["seq_ack"] == 65535
    feed(machine, RESUMED)
    assert feed(machine, LEFT | {"seq": 0}) == [ClientDisconnected("22")]


def test_the_backend_version_is_asked_for_once() -> None:
    """One question per session, over all its WebSockets; a new session asks again."""
    machine = machine_in(State.ESTABLISHED)
    machine.request_backend_version()
    machine.request_backend_version()
    assert sent(machine) == [{"op": 16, "d": {}}]
    assert feed(machine, BACKEND) == [BackendVersion("0.11.0", "0.4.11")]
    machine.disconnected(None)
    machine.connected()
    machine.data_to_send()
    machine.request_backend_version()
    assert sent(machine) == []
    machine.disconnected(4006)
    machine.connected()
    machine.data_to_send()
    machine.request_backend_version()
    assert sent(machine) == [{"op": 16, "d": {}}]


@pytest.mark.parametrize(("version", "asked"), [(4, 0), (5, 0), (6, 1), (7, 1)])
def test_an_old_server_is_not_asked_for_its_version(version: int, asked: int) -> None:
    """Before version 6 the question would be an unknown opcode, and close the connection."""
    machine = machine_in(State.ESTABLISHED, version)
    machine.request_backend_version()
    assert len(sent(machine)) == asked


def test_end_to_end_encryption_is_told_and_answered() -> None:
    """Transitions and epochs are text, key packages and commits binary without a number."""
    machine = machine_in(State.ESTABLISHED)
    assert feed(machine, PREPARE) == [PrepareTransition(7, 1)]
    assert feed(machine, EXECUTE) == [ExecuteTransition(7)]
    assert feed(machine, EPOCH) == [PrepareEpoch(1, 1)]
    machine.key_package(b"package")
    machine.commit_welcome(b"commit")
    machine.transition_ready(7)
    machine.invalid_commit_welcome(8)
    first, second, *rest = machine.data_to_send()
    assert (first, second) == (b"\x1apackage", b"\x1ccommit")
    assert [json.loads(text) for text in rest] == [
        {"op": 23, "d": {"transition_id": 7}},
        {"op": 31, "d": {"transition_id": 8}},
    ]


@pytest.mark.parametrize("op", [25, 26, 27, 28, 29, 30])
def test_a_binary_opcode_in_text_is_refused(op: int) -> None:
    """Messages of the group never come as JSON; the number of such a one counts as seen."""
    machine = machine_in(State.ESTABLISHED)
    with pytest.raises(ProtocolError, match=f"op {op} .* text frame"):
        feed(machine, {"op": op, "d": {"transition_id": 1}, "seq": 9})
    machine.heartbeat(1)
    assert sent(machine)[0]["d"]["seq_ack"] == 9


@pytest.mark.parametrize("op", sorted(set(Opcode) - {25, 26, 27, 28, 29, 30}))
def test_a_text_opcode_in_binary_is_refused(op: int) -> None:
    """What is JSON never comes as binary; the number of such a one counts as seen."""
    machine = machine_in(State.ESTABLISHED)
    with pytest.raises(ProtocolError, match=f"op {int(op)} .* binary frame"):
        machine.receive_binary(b"\x00\x09" + bytes([op]) + b"{}")
    machine.heartbeat(1)
    assert sent(machine)[0]["d"]["seq_ack"] == 9


@pytest.mark.parametrize("data", [b"\x00\x01\x1b", b"\x00\x01\x1d", b"\x00\x01\x1d\x00", b"\x00\x01\x1e\x00"])
def test_a_binary_message_shorter_than_its_framing_is_refused(data: bytes) -> None:
    """Proposals begin with their operation, commits and welcomes with a transition id."""
    with pytest.raises(ProtocolError, match=f"op {data[2]}"):
        machine_in(State.ESTABLISHED).receive_binary(data)


def test_a_binary_message_beyond_all_measure_is_refused() -> None:
    """The largest that is looked at is a constant."""
    machine = machine_in(State.ESTABLISHED)
    largest = b"\x00\x01\x19".ljust(MAX_BINARY_BYTES, b"\x00")
    assert machine.receive_binary(largest) == [ExternalSender(largest[3:])]
    with pytest.raises(ProtocolError, match=str(MAX_BINARY_BYTES)):
        machine.receive_binary(largest + b"\x00")


def test_a_channel_full_of_members_is_told() -> None:
    """A stage announces thousands at once."""
    users = [str(10**17 + number) for number in range(5_000)]
    assert feed(machine_in(State.ESTABLISHED), {"op": 11, "d": {"user_ids": users}}) == [ClientsConnected(tuple(users))]


def test_a_session_update_tells_what_changed() -> None:
    """What the server leaves out is None."""
    machine = machine_in(State.ESTABLISHED)
    assert feed(machine, UPDATE) == [SessionUpdated("opus", "H264", "5e55")]
    assert feed(machine, {"op": 14, "d": {"keyframe_interval": 1}}) == [SessionUpdated(None, None, None)]


@pytest.mark.parametrize("op", [10, 12, 15, 17, 18, 19, 20, 32])
@pytest.mark.parametrize("d", [None, [], 5, {"user_id": 3}, {"any": 100, "pixelCounts": {"1": None}}])
def test_what_matters_to_video_only_is_ignored_in_any_form(op: int, d: object) -> None:
    """Video, sink wants, flags and platforms are not looked into, so that none can break a voice connection."""
    assert feed(machine_in(State.ESTABLISHED), {"op": op, "d": d, "seq": 1}) == []


def test_members_are_told() -> None:
    """Who is there, who left, and whose SSRC is which."""
    machine = machine_in(State.ESTABLISHED)
    assert feed(machine, CLIENTS) == [ClientsConnected(("1", "22"))]
    assert feed(machine, LEFT) == [ClientDisconnected("22")]
    assert feed(machine, SPEAKING) == [Speaking("22", 99, 1)]


def test_unknown_opcodes_and_fields_are_ignored() -> None:
    """The protocol grows; what is not known changes nothing."""
    machine = machine_in(State.ESTABLISHED)
    assert feed(machine, UNKNOWN) == []
    assert feed(machine, {"op": 250}) == []
    assert feed(machine, {"op": -1, "d": [1], "s": 3, "t": "X"}) == []
    assert feed(machine, {"op": 13, "d": {"user_id": "1", "reason": {"x": []}}, "extra": None}) == [
        ClientDisconnected("1")
    ]


WRONG_FIELDS: list[tuple[State, dict[str, Any], str, list[Any]]] = [
    (State.IDENTIFYING, HELLO, "heartbeat_interval", [None, "13750", 0, -1, 1e300, True, [], "absent"]),
    (State.IDENTIFYING, READY, "ssrc", [None, "7276", -1, 2**32, 1.5, "absent"]),
    (State.IDENTIFYING, READY, "ip", [None, 5, "", "example.org", "203.0.113.256", "absent"]),
    (State.IDENTIFYING, READY, "port", [None, "1", 0, 65536, "absent"]),
    (State.IDENTIFYING, READY, "modes", [None, "aead", [1], "absent"]),
    (State.SELECTING, DESCRIPTION, "mode", [None, 1, "absent"]),
    (
        State.SELECTING,
        DESCRIPTION,
        "secret_key",
        [None, "a" * 32, [], list(KEY[1:]), [*KEY, 1], [*KEY[1:], 256], [*KEY[1:], -1], [*KEY[1:], "1"], "absent"],
    ),
    (State.SELECTING, DESCRIPTION, "dave_protocol_version", [None, "1", -1]),
    (State.ESTABLISHED, ACK, "t", [None, "1000", -1, 2**53, "absent"]),
    (State.ESTABLISHED, CLIENTS, "user_ids", [None, "1", [1], ["x"], ["1\n"], [""], ["1" * 21], "absent"]),
    (State.ESTABLISHED, LEFT, "user_id", [None, 22, "x", "absent"]),
    (State.ESTABLISHED, SPEAKING, "user_id", [None, 22, "absent"]),
    (State.ESTABLISHED, SPEAKING, "ssrc", [None, "99", -1, 2**32, "absent"]),
    (State.ESTABLISHED, SPEAKING, "speaking", [None, True, "1", -1, "absent"]),
    (State.ESTABLISHED, UPDATE, "audio_codec", [1, []]),
    (State.ESTABLISHED, BACKEND, "voice", [None, 1, "absent"]),
    (State.ESTABLISHED, BACKEND, "rtc_worker", [None, 1, "absent"]),
    (State.ESTABLISHED, PREPARE, "transition_id", [None, "7", -1, 2**16, "absent"]),
    (State.ESTABLISHED, PREPARE, "protocol_version", [None, "1", -1, "absent"]),
    (State.ESTABLISHED, EXECUTE, "transition_id", [None, "7", -1, 2**16, "absent"]),
    (State.ESTABLISHED, EPOCH, "epoch", [None, "1", -1, "absent"]),
    (State.ESTABLISHED, EPOCH, "protocol_version", [None, "1", -1, "absent"]),
]


@pytest.mark.parametrize(
    ("state", "message", "field", "value"),
    [
        pytest.param(state, message, field, value, id=f"op{message['op']}-{field}-{number}")
        for state, message, field, values in WRONG_FIELDS
        for number, value in enumerate(values)
    ],
)
def test_a_wrong_field_is_named(state: State, message: dict[str, Any], field: str, value: object) -> None:
    """A field that is missing, of another type or out of range is an error that names opcode and field."""
    machine = machine_in(state)
    d = {**message["d"], field: value}
    if value == "absent":
        del d[field]
    with pytest.raises(ProtocolError) as caught:
        feed(machine, message | {"d": d})
    assert caught.value.code is ErrorCode.MALFORMED_MESSAGE
    assert f"op {message['op']}" in str(caught.value)
    assert field in str(caught.value)
    assert machine.state is state


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        "null",
        "[]",
        "{}",
        '{"d":{}}',
        '{"op":"8","d":{}}',
        '{"op":null}',
        '{"op":8,"d":{"heartbeat_interval":1}',
        '{"op":8,"d":{"heartbeat_interval":1}}x',
        '{"op":8,"d":null}',
        '{"op":8}',
        '{"op":13,"seq":"1","d":{"user_id":"1"}}',
        '{"op":13,"seq":-1,"d":{"user_id":"1"}}',
        '{"op":13,"seq":9007199254740992,"d":{"user_id":"1"}}',
        '{"op":13,"d":{"user_id":"\\ud800"}}',
        '{"op":13,"d":{"user_id":"\ud800"}}',
        '{"op":13,"d":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"op":' + "9" * 10_000 + "}",
        '{"op":13,"d":{"user_id":"1"},"deep":' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}",
    ],
    ids=range(20),
)
def test_what_is_no_message_is_a_protocol_error(text: str) -> None:
    """Broken JSON, a broken envelope, broken Unicode and endless nesting all end in the one declared error."""
    machine = machine_in(State.ESTABLISHED)
    with pytest.raises(ProtocolError) as caught:
        machine.receive_text(text)
    assert caught.value.code is ErrorCode.MALFORMED_MESSAGE
    assert machine.state is State.ESTABLISHED


@pytest.mark.parametrize("size", [0, 1, 2])
def test_a_binary_message_shorter_than_its_header_is_refused(size: int) -> None:
    """Seq and opcode are three bytes."""
    machine = machine_in(State.ESTABLISHED)
    with pytest.raises(ProtocolError):
        machine.receive_binary(bytes(size))


def assert_no_secret(text: str) -> None:
    """None of the three secrets, in none of the forms in which they could be printed."""
    for secret in (SESSION_ID, TOKEN, KEY.hex(), repr(KEY), repr(list(KEY)), str(list(KEY))[1:40]):
        assert secret not in text


def test_secrets_stay_out_of_repr() -> None:
    """Neither credentials, nor the machine, nor the event with the key print a secret."""
    machine = machine_in(State.SELECTING)
    events = feed(machine, DESCRIPTION)
    for thing in (CREDENTIALS, machine, *events, events):
        assert_no_secret(repr(thing))
        assert_no_secret(str(thing))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"op": 4, "d": {"mode": TOKEN, "secret_key": [*KEY, 1]}}),
        json.dumps({"op": 4, "d": {"mode": 1, "secret_key": list(KEY), TOKEN: SESSION_ID}}),
        json.dumps({"op": 4, "d": {"secret_key": list(KEY)}}) + TOKEN,
        json.dumps({"op": 4, "d": {"secret_key": list(KEY)}})[:-1],
        '{"op":4,"d":{"mode":"' + TOKEN + '\ud800"}}',
        json.dumps({"op": 13, "d": {"user_id": TOKEN}}),
        json.dumps({"op": 11, "d": {"user_ids": [SESSION_ID]}}),
        json.dumps({"op": TOKEN, "d": SESSION_ID}),
        json.dumps({"op": 2, "d": {"ssrc": 1, "ip": TOKEN, "port": 1, "modes": []}}),
    ],
)
def test_secrets_stay_out_of_errors(text: str) -> None:
    """A message that holds a secret and is wrong does not print it: not in the error, not in what led to it."""
    machine = machine_in(State.IDENTIFYING if '"op": 2' in text else State.SELECTING)
    with pytest.raises(ProtocolError) as caught:
        machine.receive_text(text)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert_no_secret("".join(traceback.format_exception(caught.value)))
    assert_no_secret(repr(caught.value))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_mutated_messages_raise_only_protocol_error(data: st.DataObject) -> None:
    """A message with any field replaced is taken or refused in the one declared way."""
    machine = machine_in(data.draw(st.sampled_from(list(State))))
    message = dict(data.draw(st.sampled_from(list(MESSAGES.values()))))
    part = data.draw(st.sampled_from(["op", "d", "seq", *(message["d"] or {})]))
    value = data.draw(JSON_VALUES)
    if part in ("op", "d", "seq"):
        message[part] = value
    else:
        message["d"] = {**message["d"], part: value}
    with suppress(ProtocolError):
        feed(machine, message)
    if machine.state in OPEN_STATES:
        machine.heartbeat(1)  # what was taken in can be said back


@given(st.sampled_from(list(MESSAGES.values())), st.data())
def test_truncated_messages_raise_only_protocol_error(message: dict[str, Any], data: st.DataObject) -> None:
    """A message cut anywhere is refused in the one declared way."""
    text = json.dumps(message)
    machine = machine_in(State.SELECTING)
    with pytest.raises(ProtocolError):
        machine.receive_text(text[: data.draw(st.integers(0, len(text) - 1))])


@given(st.text(max_size=60), st.binary(max_size=20))
def test_any_frame_raises_only_protocol_error(text: str, binary: bytes) -> None:
    """Whatever a frame holds, the machine goes on or says so in the one declared way."""
    machine = machine_in(State.ESTABLISHED)
    with suppress(ProtocolError):
        machine.receive_text(text)
    with suppress(ProtocolError):
        machine.receive_binary(binary)
