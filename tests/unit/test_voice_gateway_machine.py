"""The voice gateway under any order of calls, messages and closes, beside a model of what it must remember."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shared.errors import ProtocolError
from shared.protocol.close_codes import Action, action_for
from shared.protocol.voice_gateway import (
    CommitAnnounced,
    Credentials,
    Event,
    ExternalSender,
    HeartbeatAcked,
    Proposals,
    SessionDescription,
    State,
    VoiceGateway,
    Welcomed,
)
from shared.protocol.voice_messages import BINARY_OPCODES, Opcode

CREDENTIALS = Credentials("41771983423143937", "127121515262115840", "104694319306248192", "session", "token")
MODE = "aead_aes256_gcm_rtpsize"
CONNECTED = {State.IDENTIFYING, State.RESUMING, State.READY, State.SELECTING, State.ESTABLISHED}
WHERE = {2: {State.IDENTIFYING}, 4: {State.SELECTING, State.ESTABLISHED}, 9: {State.RESUMING}}
D: dict[int, Any] = {
    2: {"ssrc": 7276, "ip": "203.0.113.9", "port": 19311, "modes": [MODE]},
    3: {"t": 5},
    4: {"mode": MODE, "secret_key": list(range(32)), "dave_protocol_version": 1},
    5: {"speaking": 1, "ssrc": 99, "user_id": "22"},
    8: {"v": 8, "heartbeat_interval": 13750},
    9: None,
    11: {"user_ids": ["1", "22"]},
    12: {"anything": []},
    13: {"user_id": "22"},
    14: {"audio_codec": "opus"},
    15: {"any": 100},
    16: {"voice": "0.11.0", "rtc_worker": "0.4.11"},
    18: {"user_id": "22", "flags": None},
    20: {"user_id": "22", "platform": 0},
    21: {"transition_id": 7, "protocol_version": 1},
    22: {"transition_id": 7},
    24: {"epoch": 1, "protocol_version": 1},
    99: {},
}
CLOSES = st.none() | st.sampled_from([1000, 1006, 4004, 4006, 4009, 4014, 4015, 4017, 4021, 4022, 4999])
SEQS = st.none() | st.integers(0, 3) | st.integers(65_533, 65_535)


class AnyOrder(RuleBasedStateMachine):
    """Feeds a machine in any order, and knows by its own simple means where it must stand."""

    @initialize(version=st.integers(4, 8))
    def begin(self, version: int) -> None:
        self.machine = VoiceGateway(CREDENTIALS, version=version)
        self.version = version
        self.state = State.NEW
        self.keyed = False
        self.seq = -1
        self.resumed_from: int | None = None
        self.now_ms = 1_000
        self.unacked: list[int] = []
        self.queued = 0

    # what the shell does

    @rule()
    def connect(self) -> None:
        if self.state not in (State.NEW, State.CLOSED):
            with pytest.raises(RuntimeError):
                self.machine.connected()
            return
        self.machine.connected()
        self.state = State.RESUMING if self.keyed else State.IDENTIFYING
        self.queued += 1
        if self.keyed:
            self.resumed_from = self.seq

    @rule(close_code=CLOSES)
    def close(self, close_code: int | None) -> None:
        action = self.machine.disconnected(close_code)
        assert action is action_for(close_code)
        self.state = State.CLOSED
        self.unacked = []
        self.queued = 0
        if action is not Action.RESUME or not self.keyed:
            self.keyed, self.seq, self.resumed_from = False, -1, None

    @rule()
    def select(self) -> None:
        if self.state is not State.READY:
            with pytest.raises(RuntimeError):
                self.machine.select_protocol("198.51.100.7", 50_321, MODE)
            return
        self.machine.select_protocol("198.51.100.7", 50_321, MODE)
        self.state = State.SELECTING
        self.queued += 1

    @precondition(lambda self: self.state in (State.NEW, State.CLOSED))
    @rule()
    def go_all_the_way(self) -> None:
        self.connect()
        if self.state is State.RESUMING:
            self.text(9, None)
        else:
            self.text(2, None)
            self.select()
            self.text(4, None)
        assert self.machine.state is State.ESTABLISHED

    @precondition(lambda self: self.state in CONNECTED)
    @rule()
    def beat(self) -> None:
        self.now_ms += 10
        self.machine.heartbeat(self.now_ms)
        self.unacked.append(self.now_ms)
        self.queued += 1

    @precondition(lambda self: self.state in CONNECTED)
    @rule(transition_id=st.integers(0, 65_535), body=st.binary(max_size=8))
    def answer_the_group(self, transition_id: int, body: bytes) -> None:
        self.machine.key_package(body)
        self.machine.commit_welcome(body)
        self.machine.transition_ready(transition_id)
        self.machine.invalid_commit_welcome(transition_id)
        self.queued += 4

    @rule()
    def drain(self) -> None:
        messages = self.machine.data_to_send()
        assert len(messages) == self.queued
        self.queued = 0
        for message in messages:
            if isinstance(message, bytes):
                assert message[0] in (26, 28)
                continue
            sent = json.loads(message)
            if sent["op"] == 3 and self.version < 8:
                assert isinstance(sent["d"], int)
            if sent["op"] == 7:
                assert ("seq_ack" in sent["d"]) is (self.version == 8)

    # what the server does

    @rule(op=st.sampled_from(sorted(D)), seq=SEQS)
    def text(self, op: int, seq: int | None) -> None:
        self.feed_text({"op": op, "d": D[op], "seq": seq}, op, seq)

    @rule(op=st.sampled_from(sorted(BINARY_OPCODES)), seq=SEQS)
    def binary_as_text(self, op: int, seq: int | None) -> None:
        self.feed_text({"op": op, "d": {}, "seq": seq}, None, seq)

    @rule(number=st.integers(0, 4))
    def acknowledge(self, number: int) -> None:
        t_ms = self.unacked[number] if number < len(self.unacked) else 1
        events = self.feed_text({"op": 6, "d": {"t": t_ms} if self.version == 8 else t_ms}, 6, None)
        if self.state in CONNECTED and number < len(self.unacked):
            assert events == [HeartbeatAcked(t_ms)]
            self.unacked = self.unacked[number + 1 :]
        else:
            assert events == []

    @rule(op=st.integers(0, 255), seq=st.integers(0, 65_535), body=st.binary(max_size=4))
    def binary(self, op: int, seq: int, body: bytes) -> None:
        prefix = seq.to_bytes(2, "big") if self.version == 8 else b""
        right = {25: 0, 27: 1, 29: 2, 30: 2}.get(op)
        known = op in set(Opcode)
        allowed = (right is not None and len(body) >= right) or op in (26, 28) or not known
        try:
            events = self.machine.receive_binary(prefix + bytes([op]) + body)
        except ProtocolError:
            assert self.state not in CONNECTED or not allowed
            self.saw(seq)
            return
        assert self.state in CONNECTED
        if self.saw(seq):
            assert events == []
            return
        assert allowed
        expected: list[Event] = []
        match op:
            case 25:
                expected = [ExternalSender(body)]
            case 27:
                expected = [Proposals(body)]
            case 29:
                expected = [CommitAnnounced(int.from_bytes(body[:2], "big"), body[2:])]
            case 30:
                expected = [Welcomed(int.from_bytes(body[:2], "big"), body[2:])]
        assert events == expected

    @rule(data=st.binary(max_size=8), text=st.text(max_size=20))
    def nonsense(self, data: bytes, text: str) -> None:
        with suppress(ProtocolError):
            assert self.machine.receive_text(text + "{") == []
        if len(data) < (3 if self.version == 8 else 1):
            with pytest.raises(ProtocolError):
                self.machine.receive_binary(data)

    def saw(self, seq: int | None) -> bool:
        """Remember a seq where it counts; tell whether the message repeats the one resumed from."""
        if self.state not in CONNECTED or seq is None or self.version < 8:
            return False
        self.seq = seq
        if self.state is not State.ESTABLISHED:
            return False
        resumed_from, self.resumed_from = self.resumed_from, None
        return seq == resumed_from

    def feed_text(self, message: dict[str, Any], op: int | None, seq: int | None) -> list[Event]:
        """Feed a message that is right in itself (op None: in the wrong kind of frame) and follow it in the model."""
        wanted = self.state in CONNECTED and op is not None and self.state in WHERE.get(op, CONNECTED)
        try:
            events = self.machine.receive_text(json.dumps(message))
        except ProtocolError:
            assert not wanted
            self.saw(seq)
            return []
        if self.saw(seq):
            assert events == []
            return events
        assert wanted
        match op:
            case 2:
                self.state = State.READY
            case 3:
                self.queued += 1
            case 4:
                self.state, self.keyed = State.ESTABLISHED, True
                assert isinstance(events[0], SessionDescription)
            case 9:
                self.state = State.ESTABLISHED
        return events

    @invariant()
    def stands_where_the_model_stands(self) -> None:
        if not hasattr(self, "machine"):
            return
        machine = self.machine
        assert machine.state is self.state
        assert machine.can_resume is self.keyed is (machine.mode is not None)
        assert machine.unacked_heartbeats == len(self.unacked)
        if machine.state is State.NEW:
            assert machine.ssrc is None

    @precondition(lambda self: self.state in CONNECTED)
    @rule()
    def acknowledges_the_last_seq(self) -> None:
        self.drain()
        self.beat()
        [message] = self.machine.data_to_send()
        self.queued = 0
        expected = {"t": self.now_ms, "seq_ack": self.seq} if self.version == 8 else self.now_ms
        assert json.loads(message) == {"op": 3, "d": expected}


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40)


def established(version: int) -> VoiceGateway:
    machine = VoiceGateway(CREDENTIALS, version=version)
    machine.connected()
    machine.receive_text(json.dumps({"op": 2, "d": D[2]}))
    machine.select_protocol("198.51.100.7", 50_321, MODE)
    machine.receive_text(json.dumps({"op": 4, "d": D[4]}))
    return machine


@given(
    st.integers(4, 8),
    st.sampled_from(sorted(D)),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    st.integers(0, 400),
)
def test_mutated_text_raises_only_protocol_error(version: int, op: int, flips: list[tuple[int, int]], cut: int) -> None:
    """Bytes changed anywhere and the end cut off: the machine goes on or says so in the one declared way."""
    data = bytearray(json.dumps({"op": op, "d": D[op], "seq": 1}).encode())
    for place, value in flips:
        data[place % len(data)] = value
    with suppress(ProtocolError):
        established(version).receive_text(data[: len(data) - cut % 3].decode(errors="replace"))
