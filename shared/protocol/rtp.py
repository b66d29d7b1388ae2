"""RTP packets of the voice connection, and the first look at a datagram.

Source: RFC 3550 section 5; RFC 8285 section 4.2; voice protocol reference, sections 3.3, 4.1 to 4.3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple

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

_ONE_BYTE_PROFILE = 0xBEDE
_ELEMENT_ID_SHIFT = 4
_ELEMENT_LENGTH_MASK = 0x0F
_ELEMENT_PADDING = 0
_ELEMENT_STOP = 15  # an id that is reserved to end the elements
_VOICE_ACTIVITY_FLAG = 0x80
_LEVEL_MASK = 0x7F
_SPEAKER_PRIORITY = 0x01
_FLAG_MICROPHONE = 1
_FLAG_PRIORITY = 4

_SEQUENCE_MASK = 0xFFFF
_TIMESTAMP_MASK = 0xFFFF_FFFF

_HEADER = struct.Struct(">BBHII")
_EXTENSION_WORD = struct.Struct(">HH")  # profile, words of elements

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
        csrcs: senders that were mixed into this one.
        clear_bytes: length of the clear and authenticated part: fixed header, CSRC list, extension word.
        extension_profile: form of the extension elements, 0xBEDE in practice; None without an extension.
        extension_bytes: length of the extension elements at the start of the decrypted payload.
    """

    payload_type: int
    sequence: int
    timestamp: int
    ssrc: int
    padding: bool
    csrcs: tuple[int, ...]
    clear_bytes: int
    extension_profile: int | None
    extension_bytes: int


class RtpPacket(NamedTuple):
    """A received packet, taken apart after decryption.

    Attributes:
        extension: elements as `extension_elements` reads them; empty without an extension.
        payload: without padding; empty for a packet that was padding only.
    """

    header: RtpHeader
    extension: bytes
    payload: bytes


class Element(IntEnum):
    """Extension elements that tell something about audio."""

    AUDIO_LEVEL = 1
    SPEAKER = 9


class AudioLevel(NamedTuple):
    """How loud a packet is, as its sender says: 0 is the loudest, 127 silence."""

    minus_dbov: int
    voice: bool


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
    clear_bytes = csrcs_end = HEADER_BYTES + _WORD_BYTES * (flags & _CSRC_COUNT_MASK)
    if flags & _EXTENSION_FLAG:
        clear_bytes += _WORD_BYTES
    if size < clear_bytes:
        raise MalformedPacket(f"RTP packet of {size} bytes, its clear part has {clear_bytes}")
    profile, words = _EXTENSION_WORD.unpack_from(packet, csrcs_end) if flags & _EXTENSION_FLAG else (None, 0)
    return RtpHeader(
        payload_type=marked_type & _PAYLOAD_TYPE_MASK,
        sequence=sequence,
        timestamp=timestamp,
        ssrc=ssrc,
        padding=bool(flags & _PADDING_FLAG),
        csrcs=struct.unpack_from(f">{flags & _CSRC_COUNT_MASK}I", packet, HEADER_BYTES),
        clear_bytes=clear_bytes,
        extension_profile=profile,
        extension_bytes=_WORD_BYTES * words,
    )


def split_packet(packet: bytes) -> RtpPacket:
    """Take a packet apart once all of it is plain: clear part, extension elements, payload, padding.

    Args:
        packet: clear part as received, and behind it what was encrypted, without tag and nonce.
    Raises: MalformedPacket: not version 2, or inner lengths do not add up.
    Source: RFC 3550 sections 5.1 and 5.3.1; voice protocol reference, section 4.5, steps 3 and 4.
    """
    header = parse_header(packet)
    extension_end = header.clear_bytes + header.extension_bytes
    if extension_end > len(packet):
        raise MalformedPacket(f"extension of {header.extension_bytes} bytes in a packet of {len(packet)}")
    extension, payload = packet[header.clear_bytes : extension_end], packet[extension_end:]
    if header.padding:
        # RFC 3550 section 5.1: the last octet counts the padding, itself included; it is ciphertext until here
        if not payload or not 1 <= payload[-1] <= len(payload):
            raise MalformedPacket(f"padding count does not fit a payload of {len(payload)} bytes")
        payload = payload[: -payload[-1]]
    return RtpPacket(header, extension, payload)


def extension_elements(packet: RtpPacket) -> dict[int, bytes]:
    """Read the extension elements in the one-byte form; another form is unknown, and so empty.

    Returns: data by id; of elements with the same id the last.
    Raises: MalformedPacket: an element is longer than what is left.
    Source: RFC 8285 section 4.2; voice protocol reference, section 4.2.
    """
    elements: dict[int, bytes] = {}
    if packet.header.extension_profile != _ONE_BYTE_PROFILE:
        return elements
    data = packet.extension
    at = 0
    while at < len(data):
        first = data[at]
        at += 1
        if first == _ELEMENT_PADDING:
            continue
        element = first >> _ELEMENT_ID_SHIFT
        if element == _ELEMENT_STOP:
            break
        end = at + (first & _ELEMENT_LENGTH_MASK) + 1
        if end > len(data):
            raise MalformedPacket(f"extension element {element} is longer than its extension")
        elements[element] = data[at:end]
        at = end
    return elements


def audio_level(elements: dict[int, bytes]) -> AudioLevel | None:
    """How loud the packet is; None where its sender does not say.

    Source: RFC 6464 section 3; voice protocol reference, section 4.2, element 1.
    """
    data = elements.get(Element.AUDIO_LEVEL)
    return None if data is None else AudioLevel(data[0] & _LEVEL_MASK, bool(data[0] & _VOICE_ACTIVITY_FLAG))


def speaking_flags(elements: dict[int, bytes]) -> int:
    """What a packet is spoken with, in the flags of op 5: 1 microphone, 2 soundshare, 4 priority.

    The element has the same three bits in another order; one that is missing or 0 means the microphone.
    Source: voice protocol reference, section 4.2, element 9.
    """
    data = elements.get(Element.SPEAKER, b"\x00")
    flags = data[0] >> 1 & 0x03
    if data[0] & _SPEAKER_PRIORITY:
        flags |= _FLAG_PRIORITY
    return flags or _FLAG_MICROPHONE


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
