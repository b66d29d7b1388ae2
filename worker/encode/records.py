"""What is said between an encode worker and the child that encodes one source.

Down (stdin, a file in memory): one line of JSON, a `ChildOrder`; behind it, at `RATE_AT_BYTES`, by how much faster live
input is to be played (i32, big endian, parts per million), which may change at any time; behind that, at
`LIFE_AT_BYTES`, the child's signs of life (`shared.life`). `NEXT_ORDER` is sent when another order stands there, after
END or ERROR.

Up (stdout): binary records, big endian,

    u8 kind | u8 rendition | i8 level_db | u16 length_bytes | u32 item | u64 position_samples | body

Both sides import this module, so it knows neither PyAV nor numpy.
"""

from __future__ import annotations

import os
import signal
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from shared.errors import MalformedPacket
from shared.schema.job import SourceKind, Strict
from shared.schema.records import OpusRecord
from shared.text import in_words

MAX_BODY_BYTES = 0xFFFF
"""Largest body: the length is 16 bits wide."""
MAX_MESSAGE_CHARS = 2_000
"""An error's message is cut here; at six bytes a character in JSON it always fits a body."""
MAX_ORDER_BYTES = 64 * 1024
"""A longer order is refused."""

NEXT_ORDER = signal.SIGUSR1
SILENT_DB = -128
"""Level of zeros."""
RATE_AT_BYTES = MAX_ORDER_BYTES
_RATE = struct.Struct(">i")
LIFE_AT_BYTES = RATE_AT_BYTES + _RATE.size
BEAT_EVERY_S = 0.25
"""How often the child says that it lives."""
_Body = TypeVar("_Body")
_HEADER = struct.Struct(">BBbHIQ")
HEADER_BYTES = _HEADER.size


class ChildOrder(Strict, frozen=True):
    """What a child is to encode.

    Attributes:
        url: absolute path of a local file, or an http(s) URL; already checked by the worker.
        kind: what a web source is taken for; `auto`: for live input where it does not tell its length.
        loop: begin again at the end, without a break. Live input is opened again by the worker alone.
        start_samples: how far into the source to begin, at 48 kHz.
        opus: how to encode.
        place: of live input, what was told last in a PLACE record: what was heard up to there is not heard again.
        folder: where files lie that a source which is a file may name; empty: none but those beside it.
        headers: to be sent with each request.
    """

    url: Annotated[str, Meta(min_length=1)]
    kind: SourceKind = "auto"
    loop: bool = False
    start_samples: Annotated[int, Meta(ge=0)] = 0
    opus: OpusRecord = OpusRecord()
    place: int | None = None
    folder: str = ""
    headers: dict[str, str] = msgspec.field(default_factory=dict)


class Looks(msgspec.Struct, frozen=True):
    """Body of an OPENED record, as JSON: what the source looks like.

    Attributes:
        live: it looks like live input.
        certain: without doubt.
        chunk_ms: how long a pause in it may be; 0: not known.
        burst_ms: so much of it comes as fast as it can be fetched; 0: not known.
    """

    live: bool = False
    certain: bool = True
    chunk_ms: int = 0
    burst_ms: int = 0


class ErrorBody(msgspec.Struct, frozen=True):
    """Body of an ERROR record, as JSON. `code` is an `ErrorCode`."""

    code: str
    message: str


class Kind(IntEnum):
    """What a record carries."""

    FRAME = 1
    ERROR = 2
    END = 3
    OPENED = 4
    TITLE = 5
    """What is on air now, as UTF-8."""
    PLACE = 6
    """Where in live input this is: to be told to the next child."""


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed part of a record; `length_bytes` bytes of body follow it."""

    kind: Kind
    rendition: int
    level_db: int
    length_bytes: int
    item: int
    position_samples: int


def pack(
    kind: Kind,
    body: bytes = b"",
    *,
    rendition: int = 0,
    level_db: int = SILENT_DB,
    item: int = 0,
    position_samples: int = 0,
) -> bytes:
    """Build one record.

    Args:
        kind: what the body is.
        body: one Opus packet (FRAME), JSON (ERROR, OPENED), text (TITLE), digits (PLACE), or of END one byte where that
            is one for certain; at most `MAX_BODY_BYTES`.
        rendition: of which the packet is, from 0; 8 bits.
        level_db: peak of the frame before it was encoded, in dB of full scale.
        item: place in the playlist, from 0; 32 bits.
        position_samples: first sample of the frame within the item, at 48 kHz; 64 bits.
    Raises: ValueError: a value does not fit its field.
    """
    try:
        return _HEADER.pack(kind, rendition, level_db, len(body), item, position_samples) + body
    except struct.error as error:
        raise ValueError(
            f"record of {len(body)} bytes, item {item}, position {position_samples} does not fit: {in_words(error)}"
        ) from error


def pack_error(code: str, message: str) -> bytes:
    """Build an ERROR record; a long message is cut to `MAX_MESSAGE_CHARS`."""
    # FFmpeg's words may hold bytes of the source: keep only what is valid UTF-8.
    text = message[:MAX_MESSAGE_CHARS].encode("utf-8", "replace").decode("utf-8")
    return pack(Kind.ERROR, msgspec.json.encode(ErrorBody(code=code, message=text)))


def write_order(order_fd: int, order: ChildOrder) -> None:
    """Put an order where the child reads it, and no rate."""
    os.ftruncate(order_fd, 0)
    os.pwrite(order_fd, msgspec.json.encode(order) + b"\n", 0)


def read_order(order_fd: int) -> ChildOrder:
    """The order that stands there.

    Raises: msgspec.MsgspecError: it is none.
    """
    return msgspec.json.decode(os.pread(order_fd, MAX_ORDER_BYTES, 0).partition(b"\n")[0], type=ChildOrder)


def write_rate(order_fd: int, rate_ppm: int) -> None:
    """Tell the child by how much faster to play."""
    os.pwrite(order_fd, _RATE.pack(rate_ppm), RATE_AT_BYTES)


def read_rate(order_fd: int) -> int:
    """What was told last; 0 before that."""
    told = os.pread(order_fd, _RATE.size, RATE_AT_BYTES)
    return int(_RATE.unpack(told)[0]) if len(told) == _RATE.size else 0


def unpack_header(data: bytes) -> Header:
    """Read the fixed part of a record.

    Args: data: exactly `HEADER_BYTES` bytes.
    Raises: MalformedPacket: wrong size, or a kind nobody defined.
    """
    if len(data) != HEADER_BYTES:
        raise MalformedPacket(f"record header of {len(data)} bytes, not {HEADER_BYTES}")
    kind, rendition, level_db, length_bytes, item, position_samples = _HEADER.unpack(data)
    try:
        known = Kind(kind)
    except ValueError as error:
        raise MalformedPacket(f"record of unknown kind {kind}") from error
    return Header(known, rendition, level_db, length_bytes, item, position_samples)


def unpack_error(body: bytes) -> ErrorBody:
    """Read the body of an ERROR record.

    Raises: MalformedPacket: not the JSON it should be.
    """
    return _unpacked(body, ErrorBody)


def unpack_looks(body: bytes) -> Looks:
    """Read the body of an OPENED record.

    Raises: MalformedPacket: not the JSON it should be.
    """
    return _unpacked(body, Looks)


def _unpacked(body: bytes, kind: type[_Body]) -> _Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise MalformedPacket(f"unreadable record of {kind.__name__}: {in_words(error)}") from error
