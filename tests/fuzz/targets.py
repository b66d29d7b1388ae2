"""What is fuzzed: every reader of bytes that come from elsewhere, with what it may raise.

An input is bytes and nothing else, so that one that was found is kept and run again as hex. Where a reader needs more
than bytes (a mode, a state), the first bytes of the input say which.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

from shared.errors import JobError, MalformedPacket, ProtocolError, SourceError
from shared.protocol import dave_frame, ip_discovery, opus
from shared.protocol.rtp import Kind, audio_level, classify, extension_elements, speaking_flags, split_packet
from shared.protocol.transport_crypto import MODES, open_rtcp, open_rtp, seal_packet
from shared.protocol.voice_gateway import Credentials, State, VoiceGateway
from shared.protocol.voice_messages import VERSIONS
from shared.schema import frame_entry
from shared.schema.job import check_sense, decode_job, digest, job_id_of, unserved
from tests.fuzz import mls, mutate
from tests.fuzz.target import Target
from tests.vectors.vectors import KEY, VECTORS
from worker.encode.playlist import MOST_ENTRIES, MediaPlaylist, parse_hls, parse_list, sniff
from worker.encode.web import title_of


def _hex(*texts: str) -> list[bytes]:
    return [bytes.fromhex(text) for text in texts]


# voice gateway

_CREDENTIALS = Credentials("41771983423143937", "127121515262115840", "104694319306248192", "session", "token")
_STATES = (State.IDENTIFYING, State.READY, State.SELECTING, State.ESTABLISHED, State.CLOSED, State.RESUMING)
_READY = {"op": 2, "d": {"ssrc": 7276, "ip": "203.0.113.9", "port": 19311, "modes": list(MODES)}}
_DESCRIPTION = {"op": 4, "d": {"mode": MODES[0], "secret_key": list(KEY), "dave_protocol_version": 1}}
_READY_TEXT, _DESCRIPTION_TEXT = json.dumps(_READY), json.dumps(_DESCRIPTION)
_MESSAGES: list[dict[str, Any]] = [
    _READY,
    {"op": 3, "d": {"t": 5}},
    _DESCRIPTION,
    {"op": 5, "d": {"speaking": 1, "ssrc": 99, "user_id": "22"}, "seq": 3},
    {"op": 6, "d": {"t": 1}},
    {"op": 6, "d": 1},
    {"op": 8, "d": {"v": 8, "heartbeat_interval": 13750}},
    {"op": 9, "d": None},
    {"op": 11, "d": {"user_ids": ["1", "22"]}, "seq": 1},
    {"op": 12, "d": {"audio_ssrc": 1, "video_ssrc": 0, "streams": []}, "seq": 65535},
    {"op": 13, "d": {"user_id": "22"}, "seq": 0},
    {"op": 14, "d": {"audio_codec": "opus", "media_session_id": "5e55"}},
    {"op": 15, "d": {"any": 100}, "seq": 2},
    {"op": 16, "d": {"voice": "0.11.0", "rtc_worker": "0.4.11"}},
    {"op": 18, "d": {"user_id": "22", "flags": None}},
    {"op": 20, "d": {"user_id": "22", "platform": 0}},
    {"op": 21, "d": {"transition_id": 7, "protocol_version": 1}, "seq": 5},
    {"op": 22, "d": {"transition_id": 7}, "seq": 6},
    {"op": 24, "d": {"epoch": 1, "protocol_version": 1}, "seq": 7},
    {"op": 25, "d": {}},
]
_MLS = VECTORS["mls_recorded"]
_BODIES = [
    bytes([op]) + bytes.fromhex(_MLS[name])
    for op, name in (
        (25, "external_sender_package_op25_payload_hex"),
        (27, "op27_payload_hex"),
        (27, "op27_revoke_payload_hex"),
        (29, "op29_payload_tid1_hex"),
        (30, "op30_payload_tid1_hex"),
        (26, "key_package_p_hex"),
        (28, "op28_payload_hex"),
    )
]
_BINARY = [*_BODIES, *(b"\x00\x01" + body for body in _BODIES), *(b"\xff\xff" + body[:40] for body in _BODIES)]


def _machine(version: int, state: State) -> VoiceGateway:
    """A machine of a version, brought into a state."""
    machine = VoiceGateway(_CREDENTIALS, version=VERSIONS[version % len(VERSIONS)])
    machine.connected()
    steps: list[tuple[State, Callable[[], object]]] = [
        (State.READY, lambda: machine.receive_text(_READY_TEXT)),
        (State.SELECTING, lambda: machine.select_protocol("198.51.100.7", 50_321, MODES[0])),
        (State.ESTABLISHED, lambda: machine.receive_text(_DESCRIPTION_TEXT)),
        (State.CLOSED, lambda: machine.disconnected(None)),
        (State.RESUMING, machine.connected),
    ]
    for reached, step in steps:
        if machine.state is state:
            break
        step()
        assert machine.state is reached
    return machine


def _say_back(machine: VoiceGateway) -> None:
    """What a machine took in can be told again: a heartbeat, and a resume where there is one."""
    if machine.state is not State.CLOSED:
        machine.heartbeat(1)
        machine.disconnected(None)
    machine.connected()
    for message in machine.data_to_send():
        assert isinstance(message, str)
        json.loads(message)


def _make_gateway_text(random: Random) -> bytes:
    messages = [mutate.json_of(random, _MESSAGES) for _ in range(random.randint(1, 3))]
    return random.randbytes(2) + b"\n".join(messages)


def _take_gateway_text(data: bytes) -> None:
    head = data[:2].ljust(2, b"\x00")
    machine = _machine(head[0], _STATES[head[1] % len(_STATES)])
    for text in data[2:].split(b"\n"):
        with suppress(ProtocolError):
            machine.receive_text(text.decode(errors="surrogateescape" if head[0] & 1 else "replace"))
    _say_back(machine)


def _make_gateway_binary(random: Random) -> bytes:
    return random.randbytes(2) + mutate.bytes_of(random, _BINARY)


def _take_gateway_binary(data: bytes) -> None:
    head = data[:2].ljust(2, b"\x00")
    machine = _machine(head[0], _STATES[head[1] % len(_STATES)])
    with suppress(ProtocolError):
        machine.receive_binary(data[2:])
    _say_back(machine)


# datagrams

_SEALED = [bytes([MODES.index(v["mode"])]) + bytes.fromhex(v["packet_hex"]) for v in VECTORS["transport_rtp"]]
_SEALED_RTCP = [bytes([MODES.index(v["mode"])]) + bytes.fromhex(v["packet_hex"]) for v in VECTORS["transport_rtcp"]]
_PLAIN = [bytes.fromhex(v["clear_header_hex"] + v["plaintext_hex"]) for v in VECTORS["transport_rtp"]]
_CONTROL = VECTORS["udp_control"]
_SSRC: int = _CONTROL["ssrc"]
_DATAGRAMS = [
    *_hex(*(text for name, text in _CONTROL.items() if name.endswith("_hex"))),
    *_hex(*(vector["plain_packet_hex"] for vector in VECTORS["transport_rtcp"])),
    *_PLAIN,
]


def _make_transport(random: Random) -> bytes:
    """A spoilt packet, or an authentic one whose inside is spoilt."""
    if random.random() < 0.5:
        return mutate.bytes_of(random, _SEALED)
    number = random.randrange(len(MODES))
    whole = mutate.bytes_of(random, _PLAIN)
    cut = random.choice([12, 12, 16, 20])
    return bytes([number]) + seal_packet(MODES[number], KEY, whole[:cut], whole[cut:], random.getrandbits(32))


def _take_transport(data: bytes) -> None:
    with suppress(MalformedPacket):
        packet = open_rtp(MODES[data[0] % len(MODES)] if data else MODES[0], KEY, data[1:])
        _look_into(extension_elements(packet))


def _take_rtcp(data: bytes) -> None:
    with suppress(MalformedPacket):
        open_rtcp(MODES[data[0] % len(MODES)] if data else MODES[0], KEY, data[1:])


def _take_rtp(data: bytes) -> None:
    kind = classify(data)
    with suppress(MalformedPacket):
        packet = split_packet(data)
        assert kind is not Kind.UNKNOWN
        _look_into(extension_elements(packet))


def _look_into(elements: dict[int, bytes]) -> None:
    audio_level(elements)
    assert 1 <= speaking_flags(elements) <= 7


def _take_discovery(data: bytes) -> None:
    with suppress(MalformedPacket):
        address, port = ip_discovery.parse_response(data, _SSRC)
        assert address
        assert port


# frames

_FRAMES = [
    *_hex(*(frame["frame_hex"] for frame in VECTORS["dave_frame"]["frames"])),
    *_hex(*(frame["frame_hex"] for frame in _MLS["frames_from_a"])),
    bytes(20) + bytes(8) + b"\x05\x00\x02\x04\x01\x0f\xfa\xfa",
    opus.SILENCE_FRAME,
]
_OPUS = [
    opus.SILENCE_FRAME,
    *_hex("78838889", "fc", "f9ffff", "fa0102ffff", "ff03" + "00" * 9, "ff83010203", "ffc30502"),
]
_ENTRY = frame_entry.FrameEntry(258, 250, 1_700_000_000_000_000, 7, 240_000, [b"\xfc\xaa", b"", b"\xfc"])
_ENTRIES = [
    _ENTRY.id.encode() + b"\x00" + frame_entry.pack(_ENTRY),
    b"1-0\x00" + frame_entry.pack(_ENTRY._replace(packets=[], flags=frame_entry.Flags.ENDED)),
]


def _take_dave(data: bytes) -> None:
    told = dave_frame.is_protocol_frame(data)
    try:
        frame = dave_frame.parse_frame(data)
    except MalformedPacket:
        assert not told
        return
    assert told
    assert len(frame.authenticated) <= len(frame.ciphertext)
    assert len(frame.gcm_nonce) == 12


def _take_opus(data: bytes) -> None:
    with suppress(MalformedPacket):
        opus.packet_samples(data)
        opus.check_frame(data)


def _take_entry(data: bytes) -> None:
    entry_id, _, body = data.partition(b"\x00")
    with suppress(ProtocolError):
        entry = frame_entry.unpack(entry_id.decode("latin-1"), body)
        assert entry.next_index - entry.first_index == len(entry.packets)


# jobs

_GUILD = {"v": 1, "id": "a", "guild": "123456789012345678"}
_VOICE = {"user_id": "123456789012345678", "session_id": "s", "token": "t", "endpoint": "voice.example:443"}
_JOBS: list[dict[str, Any]] = [
    {"v": 1, "id": "a", "type": "broadcast.start", "broadcast": "news", "source": {"url": "file:a.ogg", "loop": True}},
    {"v": 1, "id": "a", "type": "broadcast.stop", "broadcast": "news", "leave": True},
    {**_GUILD, "type": "guild.join", "channel": "123456789012345678", "broadcast": "news", "voice": _VOICE},
    {**_GUILD, "type": "guild.voice", "channel": "123456789012345678", "voice": "sealed:xyz"},
    {**_GUILD, "type": "guild.leave"},
    {"v": 1, "id": "a", "type": "announce", "announce": "x", "source": {"playlist": ["a"]}, "to": {"guilds": []}},
    {"v": 1, "id": "a", "type": "worker.drain", "worker": "w", "deadline_ms": 5},
]


def _take_job(data: bytes) -> None:
    body = data.decode(errors="replace")
    job_id_of(body)
    assert len(digest(body)) == 64
    with suppress(JobError):
        job = decode_job(body)
        unserved(job)
        check_sense(job)


# playlists

_MEDIA_PLAYLIST = b"""#EXTM3U
#EXT-X-TARGETDURATION:4
#EXT-X-MEDIA-SEQUENCE:7
#EXT-X-KEY:METHOD=AES-128,URI="k",IV=0x01
#EXT-X-MAP:URI="init.mp4"
#EXTINF:4.0,
#EXT-X-BYTERANGE:500@0
a.ts?x=1
#EXT-X-DISCONTINUITY
#EXTINF:3.9,title
b.ts
#EXT-X-ENDLIST
"""
_MASTER_PLAYLIST = b"""#EXTM3U
#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="a",NAME="b",DEFAULT=YES,URI="a.m3u8"
#EXT-X-STREAM-INF:BANDWIDTH=128000,CODECS="mp4a.40.2"
low.m3u8
#EXT-X-STREAM-INF:BANDWIDTH=900000,RESOLUTION=1x1,AUDIO="a"
video.m3u8
"""
_PLAYLISTS = [
    _MEDIA_PLAYLIST,
    _MASTER_PLAYLIST,
    b"#EXTM3U\n#EXTINF:-1,Station\nhttp://a/b.mp3\n",
    b"[playlist]\nFile1=http://a/b\nTitle1=c\nNumberOfEntries=1\n",
    b'<?xml version="1.0"?><playlist xmlns="http://xspf.org/ns/0/"><location>http://a/b</location></playlist>',
]


def _take_playlist(data: bytes) -> None:
    sniff(data, "audio/x-mpegurl", "http://host/list.m3u8?a")
    title_of(data)
    text = data.decode("utf-8", "replace")
    assert len(parse_list(text, "http://host/")) <= MOST_ENTRIES
    with suppress(SourceError):
        told = parse_hls(text, "http://host/list.m3u8")
        if isinstance(told, MediaPlaylist):
            assert 0 < told.target_s <= 60
            assert all(one.duration_s >= 0 and one.first_byte >= 0 and one.length >= 0 for one in told.segments)


TARGETS = (
    Target("gateway text", _make_gateway_text, _take_gateway_text),
    Target("gateway binary", _make_gateway_binary, _take_gateway_binary),
    Target("transport packet", _make_transport, _take_transport),
    Target("transport rtcp", lambda random: mutate.bytes_of(random, _SEALED_RTCP), _take_rtcp),
    Target("rtp packet", lambda random: mutate.bytes_of(random, _DATAGRAMS), _take_rtp),
    Target("ip discovery", lambda random: mutate.bytes_of(random, _DATAGRAMS[:2]), _take_discovery),
    Target("dave frame", lambda random: mutate.bytes_of(random, _FRAMES), _take_dave),
    Target("opus packet", lambda random: mutate.bytes_of(random, _OPUS), _take_opus),
    Target("frame entry", lambda random: mutate.bytes_of(random, _ENTRIES), _take_entry),
    Target("job", lambda random: mutate.json_of(random, _JOBS), _take_job),
    Target("playlist", lambda random: mutate.bytes_of(random, _PLAYLISTS), _take_playlist),
    mls.GROUP,
)
