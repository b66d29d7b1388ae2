"""Opus packets as they pass through: duration and framing, nothing of the audio inside.

Source: RFC 6716 section 3; voice protocol reference, section 5.
"""

from __future__ import annotations

from shared.errors import MalformedPacket

SAMPLE_RATE_HZ = 48_000
FRAME_SAMPLES = 960
FRAME_MS = 20
MAX_FRAME_BYTES = 1275
"""Largest frame that Opus can code (RFC 6716 section 3.2.1)."""

SILENCE_FRAME = b"\xf8\xff\xfe"
"""20 ms of silence; five of them end or interrupt a stream (voice protocol reference, section 5)."""

_CONFIG_SHIFT = 3
_FRAME_SAMPLES_BY_CONFIG = (
    *(480, 960, 1920, 2880) * 3,  # SILK, narrow to wide band: 10, 20, 40, 60 ms
    *(480, 960) * 2,  # hybrid, super wide and full band: 10, 20 ms
    *(120, 240, 480, 960) * 4,  # CELT, narrow to full band: 2.5, 5, 10, 20 ms
)
_MAX_PACKET_SAMPLES = 5_760  # 120 ms, requirement R5

_CODE_MASK = 0x03
_CODE_ONE_FRAME = 0
_CODE_TWO_EQUAL = 1
_CODE_TWO_DIFFERENT = 2

_COUNT_OFFSET = 1  # the frame count byte of code 3 follows the TOC byte
_COUNT_MASK = 0x3F
_COUNT_PADDING_FLAG = 0x40
_COUNT_VBR_FLAG = 0x80

_PADDING_CONTINUES = 255  # this length byte stands for 254 bytes and one more length byte
_LENGTH_TWO_BYTES = 252  # from here on a frame length has a second byte, counted in fours


def packet_samples(packet: bytes) -> int:
    """Duration of an Opus packet in samples per channel at 48 kHz.

    Args:
        packet: one Opus packet; only the TOC byte and the frame count byte are read.
    Raises: MalformedPacket: empty, no frame count, no frame, or longer than 120 ms.
    Source: RFC 6716 sections 3.1 and 3.2.5, requirements R1 and R5.
    """
    if not packet:
        raise MalformedPacket("an Opus packet has at least one byte")
    toc = packet[0]
    code = toc & _CODE_MASK
    if code == _CODE_ONE_FRAME:
        frames = 1
    elif code in (_CODE_TWO_EQUAL, _CODE_TWO_DIFFERENT):
        frames = 2
    elif len(packet) > _COUNT_OFFSET:
        frames = packet[_COUNT_OFFSET] & _COUNT_MASK
    else:
        raise MalformedPacket("Opus packet of code 3 ends before its frame count")
    samples = frames * _FRAME_SAMPLES_BY_CONFIG[toc >> _CONFIG_SHIFT]
    if not 0 < samples <= _MAX_PACKET_SAMPLES:
        raise MalformedPacket(f"Opus packet of {samples} samples, allowed are 1 to {_MAX_PACKET_SAMPLES}")
    return samples


def check_frame(packet: bytes) -> None:
    """Accept exactly one well-framed Opus packet of 20 ms, the only kind that is ever sent.

    Args:
        packet: one Opus packet, 1 to 1275 bytes.
    Raises: MalformedPacket: wrong size, not 960 samples, or its frame lengths do not add up.
    Source: RFC 6716 sections 3.2 to 3.4; voice protocol reference, section 5.
    """
    size = len(packet)
    if not 1 <= size <= MAX_FRAME_BYTES:
        raise MalformedPacket(f"Opus packet of {size} bytes, allowed are 1 to {MAX_FRAME_BYTES}")
    samples = packet_samples(packet)
    if samples != FRAME_SAMPLES:
        raise MalformedPacket(f"Opus packet of {samples} samples, wanted {FRAME_SAMPLES}")
    code = packet[0] & _CODE_MASK
    if code == _CODE_ONE_FRAME:
        return  # whatever follows the TOC byte is the frame, even nothing
    if code == _CODE_TWO_EQUAL:
        if (size - 1) % 2:
            raise MalformedPacket("Opus packet of code 1 cannot be halved")
    elif code == _CODE_TWO_DIFFERENT:
        length, start = _read_frame_length(packet, 1)
        if start + length > size:
            raise MalformedPacket("first frame is longer than its Opus packet")
    else:
        _check_counted_frames(packet)


def _check_counted_frames(packet: bytes) -> None:
    """Framing of code 3: count byte, padding length, frame lengths, frames, padding (RFC 6716 3.2.5, R6, R7)."""
    count = packet[_COUNT_OFFSET]
    frames = count & _COUNT_MASK
    offset = _COUNT_OFFSET + 1
    padding_bytes = 0
    if count & _COUNT_PADDING_FLAG:
        padding_bytes, offset = _read_padding_length(packet, offset)
    lengths_bytes = 0
    if count & _COUNT_VBR_FLAG:
        for _ in range(frames - 1):
            length, offset = _read_frame_length(packet, offset)
            lengths_bytes += length
    left = len(packet) - offset - padding_bytes - lengths_bytes
    if left < 0:
        raise MalformedPacket("frames and padding are longer than their Opus packet")
    if not count & _COUNT_VBR_FLAG and left % frames:
        raise MalformedPacket(f"Opus packet cannot be cut into {frames} equal frames")


def _read_padding_length(packet: bytes, offset: int) -> tuple[int, int]:
    """Number of padding bytes at the end, and the offset after the length bytes that say so."""
    padding_bytes = 0
    while offset < len(packet):
        value = packet[offset]
        offset += 1
        if value != _PADDING_CONTINUES:
            return padding_bytes + value, offset
        padding_bytes += _PADDING_CONTINUES - 1
    raise MalformedPacket("Opus packet ends inside its padding length")


def _read_frame_length(packet: bytes, offset: int) -> tuple[int, int]:
    """One frame length of one or two bytes, and the offset after it (RFC 6716 section 3.2.1)."""
    if offset < len(packet):
        first = packet[offset]
        if first < _LENGTH_TWO_BYTES:
            return first, offset + 1
        if offset + 1 < len(packet):
            return first + 4 * packet[offset + 1], offset + 2
    raise MalformedPacket("Opus packet ends inside a frame length")
