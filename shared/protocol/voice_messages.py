"""Messages of the voice gateway: opcodes, what the server's mean as events, and how they are read. No state.

    text frame    {"op": .., "d": .., "seq": ..}        seq from version 8 on, not on every message
    binary frame  seq u16 | op u8 | body                from the server; seq from version 8 on
                  op u8 | body                          to the server

Whatever a peer sends, reading raises nothing but ProtocolError, and no error holds a value of the message.

Source: voice protocol reference, sections 2.1, 2.2 and 2.5; of end-to-end encryption 6.4 and 6.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from ipaddress import IPv4Address
from typing import Annotated, NoReturn, TypeVar

import msgspec
from msgspec import Meta

from shared.errors import ProtocolError

VERSIONS = range(4, 9)
"""Versions of the voice gateway that are spoken here; older ones are gone since 2024."""
DEFAULT_VERSION = 8
SEQ_SINCE_VERSION = 8
"""From here on messages carry `seq`, and heartbeats are objects."""
BACKEND_VERSION_SINCE_VERSION = 6
MAX_INTEGER = 2**53 - 1
"""The largest integer that every JSON reader keeps."""
MAX_BINARY_BYTES = 256 * 1024
"""Largest binary frame that is looked at: far above a Welcome to the fullest channel."""

_SEQ_BYTES = 2
_OPCODE_BYTES = 1
_TRANSITION_ID_BYTES = 2
_KEY_BYTES = 32


class Opcode(IntEnum):
    """All opcodes that are known (voice protocol reference, section 2.2); unknown ones are ignored."""

    IDENTIFY = 0
    SELECT_PROTOCOL = 1
    READY = 2
    HEARTBEAT = 3
    SESSION_DESCRIPTION = 4
    SPEAKING = 5
    HEARTBEAT_ACK = 6
    RESUME = 7
    HELLO = 8
    RESUMED = 9
    SIGNAL = 10
    CLIENTS_CONNECT = 11
    VIDEO = 12
    CLIENT_DISCONNECT = 13
    SESSION_UPDATE = 14
    MEDIA_SINK_WANTS = 15
    VOICE_BACKEND_VERSION = 16
    CHANNEL_OPTIONS_UPDATE = 17
    CLIENT_FLAGS = 18
    SPEED_TEST = 19
    CLIENT_PLATFORM = 20
    DAVE_PREPARE_TRANSITION = 21
    DAVE_EXECUTE_TRANSITION = 22
    DAVE_TRANSITION_READY = 23
    DAVE_PREPARE_EPOCH = 24
    MLS_EXTERNAL_SENDER = 25
    MLS_KEY_PACKAGE = 26
    MLS_PROPOSALS = 27
    MLS_COMMIT_WELCOME = 28
    MLS_ANNOUNCE_COMMIT_TRANSITION = 29
    MLS_WELCOME = 30
    MLS_INVALID_COMMIT_WELCOME = 31
    NO_ROUTE = 32


BINARY_OPCODES = frozenset(
    {
        Opcode.MLS_EXTERNAL_SENDER,
        Opcode.MLS_KEY_PACKAGE,
        Opcode.MLS_PROPOSALS,
        Opcode.MLS_COMMIT_WELCOME,
        Opcode.MLS_ANNOUNCE_COMMIT_TRANSITION,
        Opcode.MLS_WELCOME,
    }
)
"""These travel in binary frames only, all others in text frames only."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The server said how often it wants heartbeats."""

    heartbeat_interval_ms: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Identify was accepted: next come IP discovery towards ip and port, and `VoiceGateway.select_protocol`."""

    ssrc: int
    ip: str
    port: int
    modes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SessionDescription:
    """The key of the transport encryption. A later one replaces it: new key, counter from the start."""

    mode: str
    secret_key: bytes = field(repr=False)
    dave_protocol_version: int


@dataclass(frozen=True, slots=True)
class SessionUpdated:
    """Codecs or media session changed; None is what the server left out."""

    audio_codec: str | None
    video_codec: str | None
    media_session_id: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class HeartbeatAcked:
    """The heartbeat that was sent at t_ms was answered."""

    t_ms: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """Key, SSRC and UDP socket stay; `VoiceGateway.speaking` is due again before the next packet."""


@dataclass(frozen=True, slots=True)
class ClientsConnected:
    """These users are in the channel: all others at the start, then each newcomer."""

    user_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClientDisconnected:
    """This user left the channel."""

    user_id: str


@dataclass(frozen=True, slots=True)
class Speaking:
    """This user sends with this SSRC; flags: 1 microphone, 2 soundshare, 4 priority."""

    user_id: str
    ssrc: int
    flags: int


@dataclass(frozen=True, slots=True)
class BackendVersion:
    """Versions of the voice server's parts."""

    voice: str
    rtc_worker: str


@dataclass(frozen=True, slots=True)
class PrepareTransition:
    """End-to-end encryption will change to this version: be ready for it, then say so (op 21); transition 0 is now."""

    transition_id: int
    protocol_version: int


@dataclass(frozen=True, slots=True)
class ExecuteTransition:
    """The announced transition takes place now (op 22)."""

    transition_id: int


@dataclass(frozen=True, slots=True)
class PrepareEpoch:
    """A group begins: with mls_epoch 1 the old one is dropped and a new key package is due (op 24)."""

    mls_epoch: int
    protocol_version: int


@dataclass(frozen=True, slots=True)
class ExternalSender:
    """Signature key and credential of the gateway, who proposes all changes of the group (op 25)."""

    package: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Proposals:
    """Proposals to append (first byte 0) or revoke (first byte 1); the body includes that byte (op 27)."""

    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class CommitAnnounced:
    """The commit that won and takes every member to the next mls_epoch (op 29)."""

    transition_id: int
    commit: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The invitation into a group for a member that was just added (op 30)."""

    transition_id: int
    welcome: bytes = field(repr=False)


Event = (
    Hello
    | Ready
    | SessionDescription
    | SessionUpdated
    | HeartbeatAcked
    | Resumed
    | ClientsConnected
    | ClientDisconnected
    | Speaking
    | BackendVersion
    | PrepareTransition
    | ExecuteTransition
    | PrepareEpoch
    | ExternalSender
    | Proposals
    | CommitAnnounced
    | Welcomed
)

_UserId = Annotated[str, Meta(pattern=r"^[0-9]{1,20}\Z")]
_Unsigned16 = Annotated[int, Meta(ge=0, le=2**16 - 1)]
_Unsigned32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
_Unsigned53 = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
_Port = Annotated[int, Meta(ge=1, le=65_535)]
_Octet = Annotated[int, Meta(ge=0, le=255)]


class TextMessage(msgspec.Struct):
    """Envelope of a text frame; `d` is not read yet."""

    op: int
    d: msgspec.Raw = msgspec.Raw(b"null")
    seq: _Unsigned53 | None = None  # 16 bits in all captures; only ever echoed, so a wider counter does no harm


class BinaryMessage(msgspec.Struct):
    """A binary frame without its header; `seq` is None below version 8."""

    op: int
    body: bytes
    seq: int | None


class _Hello(msgspec.Struct):
    heartbeat_interval: Annotated[float, Meta(ge=1, le=MAX_INTEGER)]  # some servers write it as 41250.0


class _Ready(msgspec.Struct):
    ssrc: _Unsigned32
    ip: str
    port: _Port
    modes: tuple[str, ...]


class _SessionDescription(msgspec.Struct):
    mode: str
    secret_key: Annotated[list[_Octet], Meta(min_length=_KEY_BYTES, max_length=_KEY_BYTES)]
    dave_protocol_version: _Unsigned16 = 0  # a server without DAVE leaves it out


class _SessionUpdate(msgspec.Struct):
    audio_codec: str | None = None
    video_codec: str | None = None
    media_session_id: str | None = None


class _HeartbeatAck(msgspec.Struct):
    t: _Unsigned53


class _ClientsConnect(msgspec.Struct):
    user_ids: tuple[_UserId, ...]


class _ClientDisconnect(msgspec.Struct):
    user_id: _UserId


class _Speaking(msgspec.Struct):
    user_id: _UserId
    ssrc: _Unsigned32
    speaking: _Unsigned32


class _BackendVersion(msgspec.Struct):
    voice: str
    rtc_worker: str


class _PrepareTransition(msgspec.Struct):
    transition_id: _Unsigned16
    protocol_version: _Unsigned16


class _ExecuteTransition(msgspec.Struct):
    transition_id: _Unsigned16


class _PrepareEpoch(msgspec.Struct):
    epoch: _Unsigned53
    protocol_version: _Unsigned16


_T = TypeVar("_T")

_TEXT_MESSAGE = msgspec.json.Decoder(TextMessage)
_HELLO = msgspec.json.Decoder(_Hello)
_READY = msgspec.json.Decoder(_Ready)
_SESSION_DESCRIPTION = msgspec.json.Decoder(_SessionDescription)
_SESSION_UPDATE = msgspec.json.Decoder(_SessionUpdate)
_HEARTBEAT_ACK = msgspec.json.Decoder(_HeartbeatAck)
_HEARTBEAT_NONCE = msgspec.json.Decoder(_Unsigned53)
_CLIENTS_CONNECT = msgspec.json.Decoder(_ClientsConnect)
_CLIENT_DISCONNECT = msgspec.json.Decoder(_ClientDisconnect)
_SPEAKING = msgspec.json.Decoder(_Speaking)
_BACKEND_VERSION = msgspec.json.Decoder(_BackendVersion)
_PREPARE_TRANSITION = msgspec.json.Decoder(_PrepareTransition)
_EXECUTE_TRANSITION = msgspec.json.Decoder(_ExecuteTransition)
_PREPARE_EPOCH = msgspec.json.Decoder(_PrepareEpoch)


def read_text(text: str) -> TextMessage:
    """Read the envelope of a text frame.

    Raises: ProtocolError: not JSON, no opcode, or a seq that is none.
    """
    return _decode(_TEXT_MESSAGE, text, "message")


def read_binary(data: bytes, version: int) -> BinaryMessage:
    """Split a binary frame of the server.

    Raises: ProtocolError: shorter than its header, or larger than any honest one.
    Source: voice protocol reference, sections 2.1 and 2.5.
    """
    seq_bytes = _SEQ_BYTES if version >= SEQ_SINCE_VERSION else 0
    header_bytes = seq_bytes + _OPCODE_BYTES
    if len(data) < header_bytes:
        reject("binary message", f"{len(data)} bytes, its header has {header_bytes}")
    if len(data) > MAX_BINARY_BYTES:
        reject("binary message", f"{len(data)} bytes, allowed are {MAX_BINARY_BYTES}")
    seq = int.from_bytes(data[:seq_bytes], "big") if seq_bytes else None
    return BinaryMessage(data[seq_bytes], data[header_bytes:], seq)


def text_event(op: int, d: msgspec.Raw, version: int) -> Event | None:
    """Say what a text message of the server means; None where it means nothing here.

    Raises: ProtocolError: a field is missing or wrong, or the opcode belongs into a binary frame.
    """
    if op in BINARY_OPCODES:
        reject(name_of(op), "came in a text frame")
    if op == Opcode.HEARTBEAT_ACK:
        return _heartbeat_acked(d, version)
    read = _TEXT_EVENTS.get(op)
    return None if read is None else read(d)


def binary_event(op: int, body: bytes) -> Event | None:
    """Say what a binary message of the server means; only its framing is looked at, the rest is MLS.

    Raises: ProtocolError: the body is too short for its framing, or the opcode belongs into a text frame.
    """
    match op:
        case Opcode.MLS_EXTERNAL_SENDER:
            return ExternalSender(body)
        case Opcode.MLS_PROPOSALS:
            if not body:
                reject(name_of(op), "no operation type")
            return Proposals(body)
        case Opcode.MLS_ANNOUNCE_COMMIT_TRANSITION:
            return CommitAnnounced(*_split_transition_id(op, body))
        case Opcode.MLS_WELCOME:
            return Welcomed(*_split_transition_id(op, body))
    if op in _TEXT_OPCODES:
        reject(name_of(op), "came in a binary frame")
    return None


def pack_text(op: Opcode, d: object) -> str:
    """A text frame for the server."""
    return msgspec.json.encode({"op": op, "d": d}).decode()


def pack_binary(op: Opcode, body: bytes) -> bytes:
    """A binary frame for the server; clients number none."""
    return bytes((op,)) + body


def name_of(op: int) -> str:
    """An opcode as errors name it."""
    try:
        return f"op {int(op)} {Opcode(op).name.lower()}"
    except ValueError:
        return f"op {op}"


def reject(what: str, reason: str) -> NoReturn:
    """Raise the one declared error."""
    raise ProtocolError(f"{what}: {reason}")


def _hello(d: msgspec.Raw) -> Event:
    return Hello(int(_decode(_HELLO, d, name_of(Opcode.HELLO)).heartbeat_interval))


def _ready(d: msgspec.Raw) -> Event:
    ready = _decode(_READY, d, name_of(Opcode.READY))
    if not _is_ipv4(ready.ip):
        reject(name_of(Opcode.READY), "Expected an IPv4 literal - at `$.ip`")
    return Ready(ready.ssrc, ready.ip, ready.port, ready.modes)


def _session_description(d: msgspec.Raw) -> Event:
    description = _decode(_SESSION_DESCRIPTION, d, name_of(Opcode.SESSION_DESCRIPTION))
    return SessionDescription(description.mode, bytes(description.secret_key), description.dave_protocol_version)


def _session_updated(d: msgspec.Raw) -> Event:
    update = _decode(_SESSION_UPDATE, d, name_of(Opcode.SESSION_UPDATE))
    return SessionUpdated(update.audio_codec, update.video_codec, update.media_session_id)


def _heartbeat_acked(d: msgspec.Raw, version: int) -> Event:
    if version >= SEQ_SINCE_VERSION:
        return HeartbeatAcked(_decode(_HEARTBEAT_ACK, d, name_of(Opcode.HEARTBEAT_ACK)).t)
    return HeartbeatAcked(_decode(_HEARTBEAT_NONCE, d, name_of(Opcode.HEARTBEAT_ACK)))


def _clients_connected(d: msgspec.Raw) -> Event:
    return ClientsConnected(_decode(_CLIENTS_CONNECT, d, name_of(Opcode.CLIENTS_CONNECT)).user_ids)


def _client_disconnected(d: msgspec.Raw) -> Event:
    return ClientDisconnected(_decode(_CLIENT_DISCONNECT, d, name_of(Opcode.CLIENT_DISCONNECT)).user_id)


def _speaking(d: msgspec.Raw) -> Event:
    speaking = _decode(_SPEAKING, d, name_of(Opcode.SPEAKING))
    return Speaking(speaking.user_id, speaking.ssrc, speaking.speaking)


def _backend_version(d: msgspec.Raw) -> Event:
    versions = _decode(_BACKEND_VERSION, d, name_of(Opcode.VOICE_BACKEND_VERSION))
    return BackendVersion(versions.voice, versions.rtc_worker)


def _prepare_transition(d: msgspec.Raw) -> Event:
    transition = _decode(_PREPARE_TRANSITION, d, name_of(Opcode.DAVE_PREPARE_TRANSITION))
    return PrepareTransition(transition.transition_id, transition.protocol_version)


def _execute_transition(d: msgspec.Raw) -> Event:
    return ExecuteTransition(_decode(_EXECUTE_TRANSITION, d, name_of(Opcode.DAVE_EXECUTE_TRANSITION)).transition_id)


def _prepare_epoch(d: msgspec.Raw) -> Event:
    epoch = _decode(_PREPARE_EPOCH, d, name_of(Opcode.DAVE_PREPARE_EPOCH))
    return PrepareEpoch(epoch.epoch, epoch.protocol_version)


_TEXT_EVENTS: dict[int, Callable[[msgspec.Raw], Event]] = {
    Opcode.HELLO: _hello,
    Opcode.READY: _ready,
    Opcode.SESSION_DESCRIPTION: _session_description,
    Opcode.SESSION_UPDATE: _session_updated,
    Opcode.RESUMED: lambda _: Resumed(),
    Opcode.CLIENTS_CONNECT: _clients_connected,
    Opcode.CLIENT_DISCONNECT: _client_disconnected,
    Opcode.SPEAKING: _speaking,
    Opcode.VOICE_BACKEND_VERSION: _backend_version,
    Opcode.DAVE_PREPARE_TRANSITION: _prepare_transition,
    Opcode.DAVE_EXECUTE_TRANSITION: _execute_transition,
    Opcode.DAVE_PREPARE_EPOCH: _prepare_epoch,
}
"""Without an entry, and so ignored whatever they hold: video, what others want of it, flags, platforms, the dead."""

_TEXT_OPCODES = frozenset(Opcode) - BINARY_OPCODES


def _split_transition_id(op: int, body: bytes) -> tuple[int, bytes]:
    if len(body) < _TRANSITION_ID_BYTES:
        reject(name_of(op), f"{len(body)} bytes, a transition id has {_TRANSITION_ID_BYTES}")
    return int.from_bytes(body[:_TRANSITION_ID_BYTES], "big"), body[_TRANSITION_ID_BYTES:]


def _decode(decoder: msgspec.json.Decoder[_T], data: str | msgspec.Raw, what: str) -> _T:
    """Decode, or raise ProtocolError outside of the handler: the first error may hold the text, and thereby a key."""
    try:
        return decoder.decode(data)
    except UnicodeError:
        reason = "text is not Unicode"
    except (msgspec.DecodeError, RecursionError) as error:
        reason = str(error)  # types, limits and the path, never a value
    raise ProtocolError(f"{what}: {reason}")


def _is_ipv4(text: str) -> bool:
    try:
        IPv4Address(text)
    except ValueError:
        return False
    return True
