"""RTP headers of the voice connection, and the first look at a datagram.

Source: RFC 3550 section 5.1; voice protocol reference, sections 3.3, 4.1 to 4.3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum

from shared.errors import MalformedPacket

HEADER_BYTES = 12
FLAGS_OFFSET = 0
PAYLOAD_TYPE_OFFSET = 1
SEQUENCE_OFFSET = 2
SEQUENCE_BYTES = 2
TIMESTAMP_OFFSET = 4
TIMESTAMP_BYTES = 4
SSRC_OFFSET = 8
SSRC_BYTES = 4

VERSION_FLAGS = 0x80
"""First byte as sent: version 2, no padding, no extension, no CSRC."""
PAYLOAD_TYPE = 120
"""Opus; the marker bit above it stays 0."""

_VERSION = 2
_VERSION_SHIFT = 6
_PADDING_FLAG = 0x20
_EXTENSION_FLAG = 0x10
_CSRC_COUNT_MASK = 0x0F
_PAYLOAD_TYPE_MASK = 0x7F
_WORD_BYTES = 4
_EXTENSION_WORDS_OFFSET = 2  # inside the extension word, after the 16-bit profile
_EXTENSION_WORDS_BYTES = 2

_SEQUENCE_MASK = 0xFFFF
_TIMESTAMP_MASK = 0xFFFF_FFFF

_HEADER = struct.Struct(">BBHII")

_DISCOVERY_BYTES = 74
_DISCOVERY_RESPONSE_PREFIX = b"\x00\x02\x00\x46"
_CONTROL_BYTES = 8
_PONG_PREFIX = b"\x13\x37\xf0\x0d"
_KEEPALIVE_SUFFIX = bytes(4)
_RTCP_TYPES = range(192, 224)


@dataclass(frozen=True, slots=True)
class RtpHeader:
    """What the clear part of a received packet says.

    Attributes:
        payload_type: 7 bits, 120 for Opus.
        sequence: 16 bits.
        timestamp: 32 bits, samples at 48 kHz.
        ssrc: 32 bits, the sender.
        padding: whether the decrypted payload ends in padding.
        clear_bytes: length of the clear and authenticated part: fixed header, CSRC list, extension word.
        extension_bytes: length of the extension elements at the start of the decrypted payload.
    """

    payload_type: int
    sequence: int
    timestamp: int
    ssrc: int
    padding: bool
    clear_bytes: int
    extension_bytes: int


class Kind(StrEnum):
    """What a datagram is by its clear bytes."""

    DISCOVERY = "discovery"
    """Answer to an IP discovery request."""
    CONTROL = "control"
    """Keepalive or ping that the server sent back."""
    RTCP = "rtcp"
    AUDIO = "audio"
    """RTP with the payload type of Opus."""
    OTHER_RTP = "other_rtp"
    """RTP with another payload type: video, retransmission."""
    UNKNOWN = "unknown"
    """Too short or not version 2."""


def pack_header(sequence: int, timestamp: int, ssrc: int) -> bytes:
    """Pack the fixed RTP header of an Opus packet.

    Args:
        sequence: taken modulo 2^16.
        timestamp: samples at 48 kHz, taken modulo 2^32.
        ssrc: 32 bits, from Ready.
    Returns: 12 bytes.
    Raises: struct.error: the SSRC does not fit 32 bits.
    Source: RFC 3550 section 5.1; voice protocol reference, section 4.1.
    """
    return _HEADER.pack(VERSION_FLAGS, PAYLOAD_TYPE, sequence & _SEQUENCE_MASK, timestamp & _TIMESTAMP_MASK, ssrc)


def parse_header(packet: bytes) -> RtpHeader:
    """Read the clear part of an RTP packet in an "rtpsize" mode; nothing of it is authenticated yet.

    Args:
        packet: datagram from its first byte on.
    Raises: MalformedPacket: not version 2, or it ends before its clear part does.
    Source: RFC 3550 sections 5.1 and 5.3.1; voice protocol reference, sections 4.2 and 4.3.
    """
    size = len(packet)
    if size < HEADER_BYTES:
        raise MalformedPacket(f"RTP packet of {size} bytes, a header has {HEADER_BYTES}")
    flags, marked_type, sequence, timestamp, ssrc = _HEADER.unpack_from(packet)
    if flags >> _VERSION_SHIFT != _VERSION:
        raise MalformedPacket(f"RTP version {flags >> _VERSION_SHIFT}, wanted {_VERSION}")
    clear_bytes = HEADER_BYTES + _WORD_BYTES * (flags & _CSRC_COUNT_MASK)
    extension_bytes = 0
    if flags & _EXTENSION_FLAG:
        words_offset = clear_bytes + _EXTENSION_WORDS_OFFSET
        clear_bytes += _WORD_BYTES
        words = int.from_bytes(packet[words_offset : words_offset + _EXTENSION_WORDS_BYTES], "big")
        extension_bytes = _WORD_BYTES * words
    if size < clear_bytes:
        raise MalformedPacket(f"RTP packet of {size} bytes, its clear part has {clear_bytes}")
    return RtpHeader(
        payload_type=marked_type & _PAYLOAD_TYPE_MASK,
        sequence=sequence,
        timestamp=timestamp,
        ssrc=ssrc,
        padding=bool(flags & _PADDING_FLAG),
        clear_bytes=clear_bytes,
        extension_bytes=extension_bytes,
    )


def classify(datagram: bytes) -> Kind:
    """Tell by the clear bytes what a received datagram is, before any decryption.

    Source: voice protocol reference, section 3.3; RFC 5761 section 4 for RTCP beside RTP.
    """
    size = len(datagram)
    if size == _DISCOVERY_BYTES and datagram.startswith(_DISCOVERY_RESPONSE_PREFIX):
        return Kind.DISCOVERY
    if size == _CONTROL_BYTES and (datagram.startswith(_PONG_PREFIX) or datagram.endswith(_KEEPALIVE_SUFFIX)):
        return Kind.CONTROL
    if size < HEADER_BYTES or datagram[FLAGS_OFFSET] >> _VERSION_SHIFT != _VERSION:
        return Kind.UNKNOWN
    second = datagram[PAYLOAD_TYPE_OFFSET]
    if second in _RTCP_TYPES:
        return Kind.RTCP
    if second & _PAYLOAD_TYPE_MASK == PAYLOAD_TYPE:
        return Kind.AUDIO
    return Kind.OTHER_RTP
