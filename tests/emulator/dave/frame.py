"""What an encrypted frame looks like from outside. Pure.

Source: reference section 6.8.
"""

_MAGIC = b"\xfa\xfa"
_MAGIC_BYTES = 2
_TAG_BYTES = 8
_SMALLEST_SUPPLEMENT = _TAG_BYTES + 1 + _MAGIC_BYTES
_LONGEST_NONCE_BYTES = 5
OVERHEAD_BYTES = (12, 16)
"""Fewest and most bytes that encryption adds to an Opus frame."""


def is_protocol_frame(frame: bytes) -> bool:
    """Whether a frame has the layout of an encrypted one; a plain Opus frame has it by accident only."""
    if frame[-_MAGIC_BYTES:] != _MAGIC or len(frame) <= _SMALLEST_SUPPLEMENT:
        return False
    supplement = frame[-_MAGIC_BYTES - 1]
    if not _SMALLEST_SUPPLEMENT < supplement <= len(frame):
        return False
    body = frame[len(frame) - supplement + _TAG_BYTES : -_MAGIC_BYTES - 1]
    numbers = _leb128_numbers(body)
    if numbers is None or len(numbers) % 2 == 0:
        return False  # one nonce, then pairs of offset and size
    end = 0
    for offset, size in zip(numbers[1::2], numbers[2::2], strict=True):
        if offset < end:
            return False
        end = offset + size
    return end <= len(frame) - supplement


def _leb128_numbers(body: bytes) -> list[int] | None:
    numbers: list[int] = []
    value = shift = 0
    for octet in body:
        value |= (octet & 0x7F) << shift
        shift += 7
        if octet & 0x80:
            if shift >= 7 * _LONGEST_NONCE_BYTES:
                return None
            continue
        numbers.append(value)
        value = shift = 0
    return None if shift else numbers
