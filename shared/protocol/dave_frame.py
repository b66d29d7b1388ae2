"""Frames of the end-to-end encryption: what can be told of them without a key.

    ciphertext | tag 8 | ULEB128 nonce | ULEB128 ranges | size u8 | fa fa
                 ╰────────────── supplement: `size` bytes ──────────────╯

Ranges are (offset, size) pairs of what stays clear inside the ciphertext; audio has none. Encrypting itself is the
library's work, which holds the group: this is for counting, checking and reading.

Source: voice protocol reference, section 6.8.
"""

from __future__ import annotations

from typing import NamedTuple

from shared.errors import MalformedPacket

MAGIC = b"\xfa\xfa"
TAG_BYTES = 8
"""The first half of the tag of AES-128-GCM."""
MAX_NONCE = 2**32 - 1
SMALLEST_SUPPLEMENT_BYTES = TAG_BYTES + 1 + len(MAGIC)
"""By the rule; with the one byte of nonce that is always there it is one more."""

_SIZE_BYTES = 1
_TRAILER_BYTES = _SIZE_BYTES + len(MAGIC)
_GENERATION_SHIFT = 24
_ULEB_PAYLOAD_BITS = 7
_ULEB_PAYLOAD_MASK = 0x7F
_ULEB_CONTINUES = 0x80
_ULEB_LONGEST_BYTES = 5  # 32 bits
_GCM_NONCE_BYTES = 12


class ClearRange(NamedTuple):
    """A part of the ciphertext that is not encrypted."""

    offset: int
    size: int


class DaveFrame(NamedTuple):
    """An encrypted frame, taken apart.

    Attributes:
        ciphertext: as long as the plain frame; clear ranges stand in it in their places.
        nonce: truncated to 32 bits, as it travels.
    """

    ciphertext: bytes
    tag: bytes
    nonce: int
    ranges: tuple[ClearRange, ...]

    @property
    def generation(self) -> int:
        """Generation of the sender's ratchet, but for wraps of the nonce."""
        return self.nonce >> _GENERATION_SHIFT

    @property
    def authenticated(self) -> bytes:
        """The clear ranges, one behind the other: additional data of the cipher."""
        return b"".join(self.ciphertext[offset : offset + size] for offset, size in self.ranges)

    @property
    def gcm_nonce(self) -> bytes:
        """The nonce as the cipher takes it."""
        return self.nonce.to_bytes(4, "little").rjust(_GCM_NONCE_BYTES, b"\x00")


def is_protocol_frame(frame: bytes) -> bool:
    """Tell an encrypted frame from a plain one by its form; nothing is authenticated.

    Source: voice protocol reference, section 6.8, protocol-frame test.
    """
    if frame[-len(MAGIC) :] != MAGIC:
        return False  # nearly all plain frames end here
    try:
        parse_frame(frame)
    except MalformedPacket:
        return False
    return True


def parse_frame(frame: bytes) -> DaveFrame:
    """Take an encrypted frame apart.

    Raises: MalformedPacket: it is none.
    Source: voice protocol reference, section 6.8.
    """
    size = len(frame)
    if frame[-len(MAGIC) :] != MAGIC:
        raise MalformedPacket("frame does not end as an encrypted one")
    if size < _TRAILER_BYTES:
        raise MalformedPacket(f"encrypted frame of {size} bytes")
    supplement_bytes = frame[-_TRAILER_BYTES]
    if not SMALLEST_SUPPLEMENT_BYTES <= supplement_bytes <= size:
        raise MalformedPacket(f"supplement of {supplement_bytes} bytes in a frame of {size}")
    ciphertext, supplement = frame[:-supplement_bytes], frame[-supplement_bytes:-_TRAILER_BYTES]
    nonce, at = _read_uleb(supplement, TAG_BYTES)
    if nonce > MAX_NONCE:
        raise MalformedPacket("nonce does not fit 32 bits")
    ranges = []
    end = 0
    while at < len(supplement):
        offset, at = _read_uleb(supplement, at)
        length, at = _read_uleb(supplement, at)
        if offset < end or offset + length > len(ciphertext):
            raise MalformedPacket("clear ranges overlap or reach out of their frame")
        end = offset + length
        ranges.append(ClearRange(offset, length))
    return DaveFrame(ciphertext, supplement[:TAG_BYTES], nonce, tuple(ranges))


def overhead_bytes(nonce: int) -> int:
    """What encryption adds to an audio frame: 12 to 16 bytes.

    Args:
        nonce: truncated to 32 bits.
    """
    return TAG_BYTES + uleb_bytes(nonce) + _TRAILER_BYTES


def uleb_bytes(value: int) -> int:
    """Length of a number in ULEB128."""
    return max(1, -(-value.bit_length() // _ULEB_PAYLOAD_BITS))


def _read_uleb(data: bytes, offset: int) -> tuple[int, int]:
    """One number in ULEB128, and the offset behind it."""
    value = 0
    for position, byte in enumerate(data[offset : offset + _ULEB_LONGEST_BYTES]):
        value |= (byte & _ULEB_PAYLOAD_MASK) << _ULEB_PAYLOAD_BITS * position
        if not byte & _ULEB_CONTINUES:
            return value, offset + position + 1
    raise MalformedPacket("a number of the supplement does not end")
