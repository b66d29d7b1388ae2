"""JSON of the voice gateway: strict reading of what clients send, building of what the server sends. Pure.

Source: reference sections 2.2 to 2.5.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from tests.emulator.wire import Close, Op

GATEWAY_VERSIONS = range(4, 9)
"""What Discord still serves (reference section 2.1); songbird, for one, speaks 4."""
FIRST_NUMBERED_VERSION = 8
"""From here on messages have numbers, and a heartbeat acknowledges them."""
_LARGEST_EXACT_INTEGER = 2**53 - 1
_SEQ_MODULUS = 1 << 16


class Refused(Exception):
    """The client broke the protocol: its WebSocket closes with `code`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


class Envelope(msgspec.Struct):
    """Any message."""

    op: int
    d: msgspec.Raw = msgspec.Raw(b"null")


class Identify(msgspec.Struct):
    """Op 0."""

    server_id: str
    user_id: str
    session_id: str
    token: str
    max_dave_protocol_version: int = 0


class SelectedData(msgspec.Struct):
    """Address of the client as IP discovery told it, and the mode."""

    address: str
    port: int
    mode: str


class SelectProtocol(msgspec.Struct):
    """Op 1."""

    protocol: str
    data: SelectedData


class Heartbeat(msgspec.Struct):
    """Op 3."""

    t: int
    seq_ack: int | None = None


class Speaking(msgspec.Struct):
    """Op 5."""

    speaking: int
    ssrc: int
    delay: int = 0


class TransitionMessage(msgspec.Struct):
    """Op 23 and op 31."""

    transition_id: int


class Resume(msgspec.Struct):
    """Op 7."""

    server_id: str
    session_id: str
    token: str
    seq_ack: int | None = None


_Message = TypeVar("_Message", bound=msgspec.Struct)


def read(raw: str | msgspec.Raw, kind: type[_Message], code: Close = Close.UNDECODABLE) -> _Message:
    """Decode one message or its `d`. Raises: Refused: malformed JSON, a field missing or of a wrong type."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        raise Refused(code, str(error)) from error


def read_heartbeat(raw: msgspec.Raw, version: int) -> Heartbeat:
    """Decode the `d` of op 3. Raises: Refused with 4020 (reference section 2.4)."""
    if version < FIRST_NUMBERED_VERSION:
        raw = msgspec.Raw(b'{"t":' + bytes(raw) + b"}")
    heartbeat = read(raw, Heartbeat, Close.BAD_REQUEST)
    if not 0 <= heartbeat.t <= _LARGEST_EXACT_INTEGER:
        raise Refused(Close.BAD_REQUEST, "heartbeat nonce out of range")
    return heartbeat


def write(op: int, data: object, seq: int | None = None) -> str:
    """One message of the server."""
    message: dict[str, object] = {"op": int(op), "d": data}
    if seq is not None:
        message["seq"] = seq
    return msgspec.json.encode(message).decode()


def heartbeat_ack(heartbeat: Heartbeat, version: int) -> str:
    """Op 6."""
    return write(Op.HEARTBEAT_ACK, heartbeat.t if version < FIRST_NUMBERED_VERSION else {"t": heartbeat.t})


def hello(version: int, heartbeat_interval_ms: int) -> str:
    """Op 8."""
    return write(Op.HELLO, {"v": version, "heartbeat_interval": heartbeat_interval_ms})


def ready(ssrc: int, ip: str, port: int, modes: Sequence[str]) -> str:
    """Op 2."""
    return write(
        Op.READY,
        {
            "ssrc": ssrc,
            "ip": ip,
            "port": port,
            "modes": list(modes),
            "experiments": ["fixed_keyframe_interval"],
            "streams": [],
        },
    )


def session_description(mode: str, key: bytes, media_session_id: str, dave_version: int) -> str:
    """Op 4."""
    data: dict[str, Any] = {
        "mode": mode,
        "secret_key": list(key),
        "dave_protocol_version": dave_version,
        "secure_frames_version": dave_version,
        "audio_codec": "opus",
        "video_codec": "VP8",
        "media_session_id": media_session_id,
    }
    return write(Op.SESSION_DESCRIPTION, data)


class Outbox:
    """Numbers the server's sequenced messages and keeps the newest of them for a resume (reference section 2.5).

    With `numbered` false, for versions before 8, it does neither: a resume goes on with what comes next.
    """

    def __init__(self, first_seq: int = 1, limit: int = 1024, *, numbered: bool = True) -> None:
        self._numbered = numbered
        self._kept: deque[tuple[int, str | bytes]] = deque(maxlen=limit)
        self._forgotten: int | None = None
        self._next_seq = first_seq

    def add(self, op: int, data: object) -> str:
        """Number, keep and return a JSON message."""
        if not self._numbered:
            return write(op, data)
        seq = self._number()
        text = write(op, data, seq)
        self._kept.append((seq, text))
        return text

    def add_binary(self, op: int, body: bytes) -> bytes:
        """Number, keep and return a binary message."""
        return self.add_bytes(bytes((op,)) + body)

    def add_bytes(self, body: bytes) -> bytes:
        """Number, keep and return a binary frame of anything."""
        if not self._numbered:
            return body
        seq = self._number()
        message = seq.to_bytes(2, "big") + body
        self._kept.append((seq, message))
        return message

    def missed(self, seq_ack: int | None) -> list[str | bytes] | None:
        """Messages after the one acknowledged (None or -1: none was), or None where that cannot be told."""
        acknowledged = None if seq_ack == -1 else seq_ack
        if acknowledged == self._forgotten:
            return [message for _, message in self._kept]
        numbers = [seq for seq, _ in self._kept]
        if acknowledged not in numbers:
            return None
        return [message for _, message in list(self._kept)[numbers.index(acknowledged) + 1 :]]

    def acknowledges(self, seq_ack: int | None) -> bool:
        """Whether a heartbeat may carry this `seq_ack`."""
        return seq_ack is None or seq_ack == -1 or self.missed(seq_ack) is not None

    def _number(self) -> int:
        if len(self._kept) == self._kept.maxlen:
            self._forgotten = self._kept[0][0]
        seq = self._next_seq
        self._next_seq = (seq + 1) % _SEQ_MODULUS
        return seq
