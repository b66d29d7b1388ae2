"""The voice gateway, versions 4 to 8, as a state machine: messages in, events and messages out.

    NEW ──connected──▶ IDENTIFYING ──Ready──▶ READY ──select_protocol──▶ SELECTING ──Session Description──▶ ESTABLISHED
    CLOSED ──connected──▶ RESUMING ──Resumed──▶ ESTABLISHED            (after a close that allows it)
    any of them ──disconnected──▶ CLOSED ──connected──▶ IDENTIFYING    (otherwise)

A shell owns the WebSocket and the clock: it calls `connected`, feeds every message, sends `data_to_send`, and
calls `disconnected` with the close code. Whatever a peer sends, the machine raises nothing but ProtocolError.
End-to-end encryption passes through: its messages are events and calls, the group itself lives with the caller.

Source: voice protocol reference, sections 2.1 to 2.6, 6.4 and 6.5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from shared.errors import HandshakeBroken, ProtocolError
from shared.protocol.close_codes import Action, action_for
from shared.protocol.voice_messages import (
    BACKEND_VERSION_SINCE_VERSION,
    DEFAULT_VERSION,
    SEQ_SINCE_VERSION,
    VERSIONS,
    BackendVersion,
    ClientDisconnected,
    ClientsConnected,
    CommitAnnounced,
    Event,
    ExecuteTransition,
    ExternalSender,
    HeartbeatAcked,
    Hello,
    Opcode,
    PrepareEpoch,
    PrepareTransition,
    Proposals,
    Ready,
    Resumed,
    SessionDescription,
    SessionUpdated,
    Speaking,
    Welcomed,
    binary_event,
    name_of,
    pack_binary,
    pack_text,
    read_binary,
    read_text,
    reject,
    text_event,
)

__all__ = [
    "BackendVersion",
    "ClientDisconnected",
    "ClientsConnected",
    "CommitAnnounced",
    "Credentials",
    "Event",
    "ExecuteTransition",
    "ExternalSender",
    "HeartbeatAcked",
    "Hello",
    "PrepareEpoch",
    "PrepareTransition",
    "Proposals",
    "Ready",
    "Resumed",
    "SessionDescription",
    "SessionUpdated",
    "Speaking",
    "State",
    "VoiceGateway",
    "Welcomed",
]

_NO_SEQ = -1  # seq_ack of a session that has seen none


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


class VoiceGateway:
    """One voice session over one WebSocket after the other.

    Methods that belong to another state than the current one raise RuntimeError: that is a mistake of the caller.

    Args:
        credentials: of one session; new credentials need a new machine.
        version: of the protocol, 4 to 8; the shell names the same one in the address.
        max_dave_protocol_version: highest DAVE version the caller speaks, 0 for none.
    Raises: ValueError: a version that is not spoken.
    Source: voice protocol reference, sections 2.1 and 2.3 to 2.5.
    """

    def __init__(
        self, credentials: Credentials, *, version: int = DEFAULT_VERSION, max_dave_protocol_version: int = 1
    ) -> None:
        if version not in VERSIONS:
            raise ValueError(f"voice gateway version {version}, known are {VERSIONS[0]} to {VERSIONS[-1]}")
        self._credentials = credentials
        self._version = version
        self._max_dave_protocol_version = max_dave_protocol_version
        self._state = State.NEW
        self._outgoing: list[str | bytes] = []
        self._heartbeat_interval_ms: int | None = None
        self._last_heartbeat_ms = 0
        self._unacked_ms: list[int] = []
        self._ssrc: int | None = None
        self._mode: str | None = None
        self._seq = _NO_SEQ
        self._resumed_from: int | None = None
        self._backend_version_requested = False

    @property
    def version(self) -> int:
        """Version of the protocol."""
        return self._version

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
        """Heartbeats since the last one that was answered; too many mean a dead peer (section 2.4)."""
        return len(self._unacked_ms)

    def connected(self) -> None:
        """A new WebSocket is open: queue Resume when the session allows it, else Identify. Neither waits for Hello.

        Source: voice protocol reference, sections 2.3 and 2.5.
        """
        self._require("connected", State.NEW, State.CLOSED)
        if self.can_resume:
            self._resume()
        else:
            self._identify()

    def _resume(self) -> None:
        credentials = self._credentials
        resume: dict[str, object] = {
            "server_id": credentials.guild_id,
            "session_id": credentials.session_id,
            "token": credentials.token,
        }
        if self._counts:
            resume["seq_ack"] = self._resumed_from = self._seq
        self._state = State.RESUMING
        self._queue(Opcode.RESUME, resume)

    def _identify(self) -> None:
        credentials = self._credentials
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

    def request_backend_version(self) -> None:
        """Queue the question for the server's version, once per session; versions below 6 do not know it.

        Source: voice protocol reference, sections 2.1 and 2.2, op 16.
        """
        self._require("request_backend_version", *_OPEN)
        if self._backend_version_requested or self._version < BACKEND_VERSION_SINCE_VERSION:
            return
        self._backend_version_requested = True
        self._queue(Opcode.VOICE_BACKEND_VERSION, {})

    def key_package(self, body: bytes) -> None:
        """Queue our key package, with which others add us to their group.

        Args:
            body: bare MLS KeyPackage.
        Source: voice protocol reference, sections 6.4 and 6.5, op 26.
        """
        self._require("key_package", *_OPEN)
        self._outgoing.append(pack_binary(Opcode.MLS_KEY_PACKAGE, body))

    def commit_welcome(self, body: bytes) -> None:
        """Queue our answer to `Proposals`.

        Args:
            body: MLS commit, and behind it the Welcome where somebody is added.
        Source: voice protocol reference, sections 6.4 and 6.5, op 28.
        """
        self._require("commit_welcome", *_OPEN)
        self._outgoing.append(pack_binary(Opcode.MLS_COMMIT_WELCOME, body))

    def transition_ready(self, transition_id: int) -> None:
        """Queue that we are ready for a transition; none is sent for transition 0.

        Source: voice protocol reference, section 6.5, op 23.
        """
        self._require("transition_ready", *_OPEN)
        self._queue(Opcode.DAVE_TRANSITION_READY, {"transition_id": transition_id})

    def invalid_commit_welcome(self, transition_id: int) -> None:
        """Queue that a commit or Welcome could not be used; a new key package follows.

        Source: voice protocol reference, section 6.5, op 31.
        """
        self._require("invalid_commit_welcome", *_OPEN)
        self._queue(Opcode.MLS_INVALID_COMMIT_WELCOME, {"transition_id": transition_id})

    def data_to_send(self) -> list[str | bytes]:
        """Take all queued messages, oldest first: str is one text frame, bytes one binary frame."""
        messages, self._outgoing = self._outgoing, []
        return messages

    def receive_text(self, text: str) -> list[Event]:
        """Take in one text frame.

        Args:
            text: one JSON message.
        Returns: what it means for the caller; nothing for unknown opcodes and for what the machine settles itself.
        Raises: ProtocolError: not JSON, a field missing or wrong, an opcode that is binary, or out of place in this
            state. The error names opcode and field, never a value. Seq counts as seen all the same, so that a resume
            does not bring it again. HandshakeBroken, a kind of it: the Ready or Session Description that was waited
            for.
        Source: voice protocol reference, sections 2.2 and 2.5.
        """
        message = read_text(text)
        if self._state not in _OPEN:
            reject(f"op {message.op}", f"received in state {self._state}")
        if self._is_repeat(message.seq):
            return []
        if self._state not in _STATES.get(message.op, _OPEN):
            reject(name_of(message.op), f"received in state {self._state}")
        if message.op == Opcode.HEARTBEAT:
            # Answered at once. Without a clock the answer gets a value of its own: its ack is no measure, and ignored.
            self._queue_heartbeat(self._last_heartbeat_ms + 1)
            return []
        try:
            return self._take(text_event(message.op, message.d, self._version))
        except ProtocolError as error:
            if _AWAITED.get(self._state) != message.op:
                raise
            reason = error.message
        raise HandshakeBroken(reason)  # outside of the handler, whose error would hang on to what was sent

    def receive_binary(self, data: bytes) -> list[Event]:
        """Take in one binary frame: a message of the end-to-end encryption.

        Args:
            data: seq (u16 big endian, from version 8 on) | opcode | body.
        Returns: as `receive_text`.
        Raises: ProtocolError: too short, too large, an opcode that is text, or out of place in this state.
        Source: voice protocol reference, sections 2.2, 2.5 and 6.4.
        """
        message = read_binary(data, self._version)
        if self._state not in _OPEN:
            reject(f"binary op {message.op}", f"received in state {self._state}")
        if self._is_repeat(message.seq):
            return []
        return self._take(binary_event(message.op, message.body))

    @property
    def _counts(self) -> bool:
        """Whether messages are numbered in this version."""
        return self._version >= SEQ_SINCE_VERSION

    def _is_repeat(self, seq: int | None) -> bool:
        """Note a message's seq; tell whether it is the very one from which the session was resumed.

        Numbers wrap, so they are compared for equality and never for order. One that is seen twice in the same stream
        is no repeat: only a server's replay, which may begin one message early, is looked at.
        """
        if seq is None or not self._counts:
            return False
        self._seq = seq
        if self._state is not State.ESTABLISHED:
            return False
        resumed_from, self._resumed_from = self._resumed_from, None
        return seq == resumed_from

    def _take(self, event: Event | None) -> list[Event]:
        """Follow an event of the server."""
        match event:
            case None:
                return []
            case Hello():
                self._heartbeat_interval_ms = event.heartbeat_interval_ms
            case Ready():
                self._ssrc = event.ssrc
                self._state = State.READY
            case SessionDescription():
                self._mode = event.mode
                self._state = State.ESTABLISHED
            case Resumed():
                self._state = State.ESTABLISHED
            case HeartbeatAcked():
                if event.t_ms not in self._unacked_ms:
                    return []
                # the peer lives: older ones no longer matter
                del self._unacked_ms[: self._unacked_ms.index(event.t_ms) + 1]
        return [event]

    def _forget_session(self) -> None:
        self._ssrc = None
        self._mode = None
        self._seq = _NO_SEQ
        self._resumed_from = None
        self._backend_version_requested = False

    def _queue_heartbeat(self, t_ms: int) -> None:
        self._queue(Opcode.HEARTBEAT, {"t": t_ms, "seq_ack": self._seq} if self._counts else t_ms)

    def _queue(self, op: Opcode, d: object) -> None:
        self._outgoing.append(pack_text(op, d))

    def _require(self, method: str, *states: State) -> None:
        if self._state not in states:
            raise RuntimeError(f"{method} called in state {self._state}")


_OPEN = frozenset(State) - {State.NEW, State.CLOSED}
_AWAITED = {State.IDENTIFYING: Opcode.READY, State.SELECTING: Opcode.SESSION_DESCRIPTION}

_STATES: dict[int, frozenset[State]] = {
    Opcode.READY: frozenset({State.IDENTIFYING}),
    Opcode.SESSION_DESCRIPTION: frozenset({State.SELECTING, State.ESTABLISHED}),
    Opcode.RESUMED: frozenset({State.RESUMING}),
}
"""Messages that make sense in some states only. Members and their group are announced at any time, also while a resume
replays, and the gateway's signature key comes before or after Session Description."""
