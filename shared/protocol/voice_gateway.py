"""The voice gateway, version 8, as a state machine: messages in, events and messages out.

    NEW ──connected──▶ IDENTIFYING ──Ready──▶ READY ──select_protocol──▶ SELECTING ──Session Description──▶ ESTABLISHED
    CLOSED ──connected──▶ RESUMING ──Resumed──▶ ESTABLISHED            (after a close that allows it)
    any of them ──disconnected──▶ CLOSED ──connected──▶ IDENTIFYING    (otherwise)

A shell owns the WebSocket and the clock: it calls `connected`, feeds every message, sends `data_to_send`, and
calls `disconnected` with the close code. Whatever a peer sends, the machine raises nothing but ProtocolError.

Source: voice protocol reference, sections 2.2 to 2.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from ipaddress import ip_address
from typing import Annotated, NoReturn, TypeVar

import msgspec
from msgspec import Meta

from shared.errors import ProtocolError
from shared.protocol.close_codes import Action, action_for

_SEQ_BYTES = 2
_OPCODE_OFFSET = _SEQ_BYTES  # binary: seq u16 big endian, then one byte of opcode
_BINARY_HEADER_BYTES = _SEQ_BYTES + 1
_NO_SEQ = -1  # seq_ack of a session that has seen none
_MAX_INTEGER = 2**53 - 1  # the largest that every JSON reader keeps
_KEY_BYTES = 32


class Opcode(IntEnum):
    """Opcodes that this machine sends or understands (voice protocol reference, section 2.2)."""

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
    CLIENTS_CONNECT = 11
    CLIENT_DISCONNECT = 13


class State(StrEnum):
    """Where a voice session stands; the drawing is at the top of the module."""

    NEW = "new"
    IDENTIFYING = "identifying"
    RESUMING = "resuming"
    READY = "ready"
    SELECTING = "selecting"
    ESTABLISHED = "established"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the main gateway gave for one voice session; session id and token stay out of repr."""

    guild_id: str
    channel_id: str
    user_id: str
    session_id: str = field(repr=False)
    token: str = field(repr=False)


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


Event = Hello | Ready | SessionDescription | HeartbeatAcked | Resumed | ClientsConnected | ClientDisconnected | Speaking

_UserId = Annotated[str, Meta(pattern=r"^[0-9]{1,20}\Z")]
_Unsigned32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
_Unsigned53 = Annotated[int, Meta(ge=0, le=_MAX_INTEGER)]
_Port = Annotated[int, Meta(ge=1, le=65_535)]
_Octet = Annotated[int, Meta(ge=0, le=255)]


class _Envelope(msgspec.Struct):
    op: int
    d: msgspec.Raw = msgspec.Raw(b"null")
    seq: _Unsigned53 | None = None


class _Hello(msgspec.Struct):
    heartbeat_interval: Annotated[float, Meta(ge=1, le=_MAX_INTEGER)]  # some servers write it as 41250.0


class _Ready(msgspec.Struct):
    ssrc: _Unsigned32
    ip: str
    port: _Port
    modes: tuple[str, ...]


class _SessionDescription(msgspec.Struct):
    mode: str
    secret_key: Annotated[list[_Octet], Meta(min_length=_KEY_BYTES, max_length=_KEY_BYTES)]
    dave_protocol_version: _Unsigned32 = 0  # a server without DAVE leaves it out


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


_T = TypeVar("_T")

_ENVELOPE = msgspec.json.Decoder(_Envelope)
_HELLO = msgspec.json.Decoder(_Hello)
_READY = msgspec.json.Decoder(_Ready)
_SESSION_DESCRIPTION = msgspec.json.Decoder(_SessionDescription)
_HEARTBEAT_ACK = msgspec.json.Decoder(_HeartbeatAck)
_CLIENTS_CONNECT = msgspec.json.Decoder(_ClientsConnect)
_CLIENT_DISCONNECT = msgspec.json.Decoder(_ClientDisconnect)
_SPEAKING = msgspec.json.Decoder(_Speaking)


class VoiceGateway:
    """One voice session over one WebSocket after the other.

    Methods that belong to another state than the current one raise RuntimeError: that is a mistake of the caller.

    Args:
        credentials: of one session; new credentials need a new machine.
        max_dave_protocol_version: highest DAVE version the caller speaks, 0 for none.
    Source: voice protocol reference, sections 2.3 to 2.5.
    """

    def __init__(self, credentials: Credentials, *, max_dave_protocol_version: int = 0) -> None:
        self._credentials = credentials
        self._max_dave_protocol_version = max_dave_protocol_version
        self._state = State.NEW
        self._outgoing: list[str] = []
        self._heartbeat_interval_ms: int | None = None
        self._last_heartbeat_ms = 0
        self._unacked_ms: list[int] = []
        self._ssrc: int | None = None
        self._mode: str | None = None
        self._seq = _NO_SEQ

    @property
    def state(self) -> State:
        """Where the session stands."""
        return self._state

    @property
    def ssrc(self) -> int | None:
        """Our SSRC, from Ready on, kept over a resume."""
        return self._ssrc

    @property
    def mode(self) -> str | None:
        """Encryption mode in force, from Session Description on, kept over a resume."""
        return self._mode

    @property
    def can_resume(self) -> bool:
        """Whether the next `connected` resumes; only the process that owns the nonce counter may let it."""
        return self._mode is not None

    @property
    def heartbeat_interval_ms(self) -> int | None:
        """What Hello said on this WebSocket; None before it."""
        return self._heartbeat_interval_ms

    @property
    def unacked_heartbeats(self) -> int:
        """Heartbeats since the last one that was answered; three mean a dead peer (section 2.4)."""
        return len(self._unacked_ms)

    def connected(self) -> None:
        """A new WebSocket is open: queue Resume when the session allows it, else Identify. Neither waits for Hello.

        Source: voice protocol reference, sections 2.3 and 2.5.
        """
        self._require("connected", State.NEW, State.CLOSED)
        credentials = self._credentials
        if self.can_resume:
            self._state = State.RESUMING
            self._queue(
                Opcode.RESUME,
                {
                    "server_id": credentials.guild_id,
                    "session_id": credentials.session_id,
                    "token": credentials.token,
                    "seq_ack": self._seq,
                },
            )
            return
        self._state = State.IDENTIFYING
        self._queue(
            Opcode.IDENTIFY,
            {
                "server_id": credentials.guild_id,
                "user_id": credentials.user_id,
                "session_id": credentials.session_id,
                "token": credentials.token,
                "max_dave_protocol_version": self._max_dave_protocol_version,
            },
        )

    def disconnected(self, close_code: int | None) -> Action:
        """The WebSocket is gone, or could not be opened; what was queued for it is dropped.

        Args:
            close_code: None when the connection broke without one.
        Returns: what may follow. Only after RESUME does an established session stay resumable.
        Source: voice protocol reference, sections 2.5 and 2.6.
        """
        action = action_for(close_code)
        self._state = State.CLOSED
        self._outgoing.clear()
        self._unacked_ms.clear()
        self._heartbeat_interval_ms = None
        if action is not Action.RESUME or not self.can_resume:
            self._forget_session()
        return action

    def select_protocol(self, address: str, port: int, mode: str) -> None:
        """Queue Select Protocol.

        Args:
            address: external address, from IP discovery.
            port: external port, from IP discovery.
            mode: one of the modes of Ready.
        Source: voice protocol reference, sections 2.3 and 3.1.
        """
        self._require("select_protocol", State.READY)
        self._state = State.SELECTING
        self._queue(
            Opcode.SELECT_PROTOCOL, {"protocol": "udp", "data": {"address": address, "port": port, "mode": mode}}
        )

    def heartbeat(self, now_ms: int) -> None:
        """Queue a heartbeat and count it as unanswered.

        Args:
            now_ms: comes back in `HeartbeatAcked`; 0 to 2^53 - 1, each greater than the one before.
        Source: voice protocol reference, section 2.4.
        """
        self._require("heartbeat", *_OPEN)
        self._last_heartbeat_ms = now_ms
        self._unacked_ms.append(now_ms)
        self._queue_heartbeat(now_ms)

    def speaking(self, flags: int) -> None:
        """Queue Speaking: needed before the first packet, and again after a resume.

        Args:
            flags: 1 microphone, 2 soundshare, 4 priority; not 0 while packets are sent.
        Source: voice protocol reference, sections 2.3, 2.5 and 5.
        """
        self._require("speaking", State.ESTABLISHED)
        self._queue(Opcode.SPEAKING, {"speaking": flags, "delay": 0, "ssrc": self._ssrc})

    def data_to_send(self) -> list[str]:
        """Take all queued messages, oldest first; each is one text frame."""
        messages, self._outgoing = self._outgoing, []
        return messages

    def receive_text(self, text: str) -> list[Event]:
        """Take in one text frame.

        Args:
            text: one JSON message.
        Returns: what it means for the caller; nothing for unknown opcodes and for what the machine settles itself.
        Raises: ProtocolError: not JSON, a field missing or wrong, or out of place in this state. The error names
            opcode and field, never a value. Seq counts as seen all the same, so that a resume does not bring it again.
        Source: voice protocol reference, sections 2.2 and 2.5.
        """
        envelope = _decode(_ENVELOPE, text, "message")
        if self._state not in _OPEN:
            _reject(f"op {envelope.op}", f"received in state {self._state}")
        if envelope.seq is not None:
            self._seq = envelope.seq
        handler = _HANDLERS.get(envelope.op)
        if handler is None:
            return []
        states, handle = handler
        if self._state not in states:
            _reject(_name(envelope.op), f"received in state {self._state}")
        event = handle(self, envelope.d)
        return [] if event is None else [event]

    def receive_binary(self, data: bytes) -> list[Event]:
        """Take in one binary frame: the end-to-end encryption's messages, of which only seq is kept.

        Args:
            data: seq (u16 big endian) | opcode | body.
        Raises: ProtocolError: shorter than its header, or out of place in this state.
        Source: voice protocol reference, sections 2.2 and 2.5.
        """
        if len(data) < _BINARY_HEADER_BYTES:
            _reject("binary message", f"{len(data)} bytes, seq and op have {_BINARY_HEADER_BYTES}")
        if self._state not in _OPEN:
            _reject(f"binary op {data[_OPCODE_OFFSET]}", f"received in state {self._state}")
        self._seq = int.from_bytes(data[:_SEQ_BYTES], "big")
        return []

    def _on_hello(self, raw: msgspec.Raw) -> Event:
        hello = _decode(_HELLO, raw, _name(Opcode.HELLO))
        self._heartbeat_interval_ms = int(hello.heartbeat_interval)
        return Hello(self._heartbeat_interval_ms)

    def _on_ready(self, raw: msgspec.Raw) -> Event:
        ready = _decode(_READY, raw, _name(Opcode.READY))
        if not _is_ip(ready.ip):
            _reject(_name(Opcode.READY), "Expected an IP literal - at `$.ip`")
        self._ssrc = ready.ssrc
        self._state = State.READY
        return Ready(ready.ssrc, ready.ip, ready.port, ready.modes)

    def _on_session_description(self, raw: msgspec.Raw) -> Event:
        description = _decode(_SESSION_DESCRIPTION, raw, _name(Opcode.SESSION_DESCRIPTION))
        self._mode = description.mode
        self._state = State.ESTABLISHED
        return SessionDescription(description.mode, bytes(description.secret_key), description.dave_protocol_version)

    def _on_resumed(self, _: msgspec.Raw) -> Event:
        self._state = State.ESTABLISHED
        return Resumed()

    def _on_heartbeat(self, _: msgspec.Raw) -> None:
        # Answered at once. Without a clock the answer gets a value of its own, so its ack is no measure and is ignored.
        self._queue_heartbeat(self._last_heartbeat_ms + 1)

    def _on_heartbeat_ack(self, raw: msgspec.Raw) -> Event | None:
        t_ms = _decode(_HEARTBEAT_ACK, raw, _name(Opcode.HEARTBEAT_ACK)).t
        if t_ms not in self._unacked_ms:
            return None
        del self._unacked_ms[: self._unacked_ms.index(t_ms) + 1]  # the peer lives: older ones no longer matter
        return HeartbeatAcked(t_ms)

    def _on_clients_connect(self, raw: msgspec.Raw) -> Event:
        return ClientsConnected(_decode(_CLIENTS_CONNECT, raw, _name(Opcode.CLIENTS_CONNECT)).user_ids)

    def _on_client_disconnect(self, raw: msgspec.Raw) -> Event:
        return ClientDisconnected(_decode(_CLIENT_DISCONNECT, raw, _name(Opcode.CLIENT_DISCONNECT)).user_id)

    def _on_speaking(self, raw: msgspec.Raw) -> Event:
        speaking = _decode(_SPEAKING, raw, _name(Opcode.SPEAKING))
        return Speaking(speaking.user_id, speaking.ssrc, speaking.speaking)

    def _forget_session(self) -> None:
        self._ssrc = None
        self._mode = None
        self._seq = _NO_SEQ

    def _queue_heartbeat(self, t_ms: int) -> None:
        self._queue(Opcode.HEARTBEAT, {"t": t_ms, "seq_ack": self._seq})

    def _queue(self, op: Opcode, d: dict[str, object]) -> None:
        self._outgoing.append(msgspec.json.encode({"op": op, "d": d}).decode())

    def _require(self, method: str, *states: State) -> None:
        if self._state not in states:
            raise RuntimeError(f"{method} called in state {self._state}")


_OPEN = frozenset(State) - {State.NEW, State.CLOSED}

_HANDLERS: dict[int, tuple[frozenset[State], Callable[[VoiceGateway, msgspec.Raw], Event | None]]] = {
    Opcode.HELLO: (_OPEN, VoiceGateway._on_hello),
    Opcode.READY: (frozenset({State.IDENTIFYING}), VoiceGateway._on_ready),
    Opcode.SESSION_DESCRIPTION: (
        frozenset({State.SELECTING, State.ESTABLISHED}),
        VoiceGateway._on_session_description,
    ),
    Opcode.RESUMED: (frozenset({State.RESUMING}), VoiceGateway._on_resumed),
    Opcode.HEARTBEAT: (_OPEN, VoiceGateway._on_heartbeat),
    Opcode.HEARTBEAT_ACK: (_OPEN, VoiceGateway._on_heartbeat_ack),
    Opcode.CLIENTS_CONNECT: (_OPEN, VoiceGateway._on_clients_connect),
    Opcode.CLIENT_DISCONNECT: (_OPEN, VoiceGateway._on_client_disconnect),
    Opcode.SPEAKING: (_OPEN, VoiceGateway._on_speaking),
}
"""Where each message makes sense, and who takes it. Members are announced at any time, also while a resume replays."""


def _decode(decoder: msgspec.json.Decoder[_T], data: str | msgspec.Raw, what: str) -> _T:
    """Decode, or raise ProtocolError outside of the handler: the first error may hold the text, and thereby a key."""
    try:
        return decoder.decode(data)
    except UnicodeError:
        reason = "text is not Unicode"
    except (msgspec.DecodeError, RecursionError) as error:
        reason = str(error)  # types, limits and the path, never a value
    raise ProtocolError(f"{what}: {reason}")


def _reject(what: str, reason: str) -> NoReturn:
    raise ProtocolError(f"{what}: {reason}")


def _name(op: int) -> str:
    return f"op {int(op)} {Opcode(op).name.lower()}"


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
