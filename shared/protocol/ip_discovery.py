"""IP discovery, keepalives and pings: the plain datagrams beside the audio.

A request asks the voice server from which address and port it sees this socket. UDP loses packets: the caller repeats.

Source: voice protocol reference, sections 3.1 and 3.2.
"""

from __future__ import annotations

import struct
from ipaddress import ip_address

from shared.errors import MalformedPacket

PACKET_BYTES = 74
KEEPALIVE_BYTES = 8

_TYPE_REQUEST = 1
_TYPE_RESPONSE = 2
_LENGTH_FIELD = 70  # bytes after type and length
_ADDRESS_BYTES = 64

_HEADER = struct.Struct(">HHI")  # type, length, ssrc
_PORT = struct.Struct(">H")
_ADDRESS_OFFSET = _HEADER.size
_PORT_OFFSET = _ADDRESS_OFFSET + _ADDRESS_BYTES

_PING, _PONG = bytes.fromhex("1337cafe"), bytes.fromhex("1337f00d")
_COUNTER_BYTES = 4
_COUNTER_MASK = 0xFFFF_FFFF


def request(ssrc: int) -> bytes:
    """Build an IP discovery request.

    Args:
        ssrc: 32 bits, from Ready.
    Returns: 74 bytes; address and port are zero, because servers ignore a request with anything else there.
    Raises: struct.error: the SSRC does not fit 32 bits.
    Source: voice protocol reference, section 3.1.
    """
    return _HEADER.pack(_TYPE_REQUEST, _LENGTH_FIELD, ssrc).ljust(PACKET_BYTES, b"\x00")


def parse_response(datagram: bytes, ssrc: int) -> tuple[str, int]:
    """Read the external address out of an IP discovery response.

    Args:
        datagram: as received.
        ssrc: the one of the request.
    Returns: IP literal and port, both for Select Protocol.
    Raises: MalformedPacket: anything but a whole answer to this SSRC; the datagram is ignored.
    Source: voice protocol reference, section 3.1.
    """
    if len(datagram) != PACKET_BYTES:
        raise MalformedPacket(f"discovery response of {len(datagram)} bytes, wanted {PACKET_BYTES}")
    kind, length, echoed_ssrc = _HEADER.unpack_from(datagram)
    if kind != _TYPE_RESPONSE:
        raise MalformedPacket(f"discovery type {kind}, wanted {_TYPE_RESPONSE}")
    if length != _LENGTH_FIELD:
        raise MalformedPacket(f"discovery length field {length}, wanted {_LENGTH_FIELD}")
    if echoed_ssrc != ssrc:
        raise MalformedPacket(f"discovery response for SSRC {echoed_ssrc}, wanted {ssrc}")
    raw, terminator, _ = datagram[_ADDRESS_OFFSET:_PORT_OFFSET].partition(b"\x00")
    if not terminator:
        raise MalformedPacket("discovery address without a terminating NUL")
    try:
        address = raw.decode("ascii")
        ip_address(address)
    except ValueError:
        raise MalformedPacket("discovery address is not an IP literal") from None
    (port,) = _PORT.unpack_from(datagram, _PORT_OFFSET)
    if port == 0:
        raise MalformedPacket("discovery port is 0")
    return address, port


def keepalive(counter: int) -> bytes:
    """Build the keepalive that is sent every 5 s and needs no answer.

    Args:
        counter: +1 for each keepalive, taken modulo 2^32.
    Returns: 8 bytes: little-endian counter, four zero bytes.
    Source: voice protocol reference, section 3.2, keepalive A.
    """
    return (counter & _COUNTER_MASK).to_bytes(_COUNTER_BYTES, "little").ljust(KEEPALIVE_BYTES, b"\x00")


def ping(counter: int) -> bytes:
    """Build a ping, which servers answer.

    Args:
        counter: +1 for each ping, taken modulo 2^32.
    Returns: 8 bytes: `1337CAFE`, big-endian counter.
    Source: voice protocol reference, section 3.2, UDP ping, and section 11, 4.
    """
    return _PING + (counter & _COUNTER_MASK).to_bytes(_COUNTER_BYTES, "big")


def is_pong(datagram: bytes) -> bool:
    """Whether this answers a ping, whichever.

    Source: voice protocol reference, section 3.2, UDP ping.
    """
    return len(datagram) == KEEPALIVE_BYTES and datagram.startswith(_PONG)
