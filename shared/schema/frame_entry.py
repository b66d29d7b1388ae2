"""One entry of a frame stream: up to 100 ms of Opus with its place in time. Record <-> bytes, nothing else.

    u8 version | u8 flags | u16 count | u64 epoch_us | u32 item | u64 position_samples | count x (u16 length | packet)

All big endian. The entry's id on Redis is `<term>-<index of the first frame>`. An entry of a higher term voids every
frame of lower terms at and above its first index. Source: design section 4, "Frames".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntFlag
from typing import NamedTuple

from shared.errors import ErrorCode, ProtocolError
from shared.text import in_words

VERSION = 1
FIELD = "f"
"""Name of the one field of an entry."""
FRAMES_PER_ENTRY = 5
TICK_US = 20_000
"""Length of a frame, and grid of every `epoch_us`."""

_HEAD = struct.Struct(">BBHQIQ")
_LENGTH = struct.Struct(">H")


class Flags(IntFlag):
    """What follows the last frame of an entry, where it is not the next frame."""

    NONE = 0
    PAUSED = 1
    ENDED = 2
    GAP = 4


class FrameEntry(NamedTuple):
    """Frames `first_index ..` of one rendition.

    An entry without packets is a mark: its flags hold from `first_index` on.
    """

    term: int
    first_index: int
    epoch_us: int
    item: int
    position_samples: int
    packets: Sequence[bytes]
    flags: Flags = Flags.NONE

    @property
    def id(self) -> str:
        return f"{self.term}-{self.first_index}"

    @property
    def next_index(self) -> int:
        """Index of the frame after this entry."""
        return self.first_index + len(self.packets)


def pack(entry: FrameEntry) -> bytes:
    """Bytes of field `f`. Term and first index are not in it: they are the entry's id."""
    parts = [_HEAD.pack(VERSION, entry.flags, len(entry.packets), entry.epoch_us, entry.item, entry.position_samples)]
    for packet in entry.packets:
        parts += (_LENGTH.pack(len(packet)), packet)
    return b"".join(parts)


def unpack(entry_id: str, body: bytes) -> FrameEntry:
    """Read an entry; fields added behind the last packet by a later version are ignored.

    Raises: ProtocolError (`malformed_message`) for an id or bytes that are no frame entry.
    """
    try:
        term, first_index = (int(part) for part in entry_id.split("-"))
        version, flags, count, epoch_us, item, position_samples = _HEAD.unpack_from(body)
        at = _HEAD.size
        packets = []
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(body, at)
            at += _LENGTH.size + length
            packets.append(body[at - length : at])
        if at > len(body):
            raise ValueError("shorter than its lengths say")
    except (ValueError, struct.error) as error:
        raise ProtocolError(f"frame entry {entry_id}: {in_words(error)}", code=ErrorCode.MALFORMED_MESSAGE) from None
    if version != VERSION or epoch_us % TICK_US:
        raise ProtocolError(f"frame entry {entry_id}: version {version}, epoch_us {epoch_us}")
    return FrameEntry(term, first_index, epoch_us, item, position_samples, packets, Flags(flags))
