"""IP discovery and keepalives."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import MalformedPacket
from shared.protocol.ip_discovery import KEEPALIVE_BYTES, PACKET_BYTES, keepalive, parse_response, request

SSRC = 7276


def response(
    *, kind: int = 2, length: int = 70, ssrc: int = SSRC, address: bytes = b"203.0.113.45", port: int = 50321
) -> bytes:
    """Build a response field by field."""
    return struct.pack(">HHI64sH", kind, length, ssrc, address, port)


def test_a_request_is_zero_but_for_its_header() -> None:
    """Type 1, length 70, the SSRC, and nothing else: servers ignore a request with anything behind it."""
    packet = request(SSRC)
    assert len(packet) == PACKET_BYTES
    assert packet[:8].hex() == "0001004600001c6c"
    assert not any(packet[8:])


@pytest.mark.parametrize(
    ("address", "port"), [(b"203.0.113.45", 1), (b"2001:db8::1", 65535), (b"203.0.113.45\x00leftover", 50321)]
)
def test_address_and_port_are_read(address: bytes, port: int) -> None:
    """The address ends at its first NUL, whatever stands behind; both IP versions are literals."""
    expected = address.split(b"\x00")[0].decode()
    assert parse_response(response(address=address, port=port), SSRC) == (expected, port)


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        response()[:-1],
        response() + b"\x00",
        response(kind=1),
        response(length=74),
        response(ssrc=SSRC + 1),
        response(address=b""),
        response(address=b"example.org"),
        response(address=b"203.0.113.256"),
        response(address="203.0.113.4٥".encode()),
        response(address=b"fe80::1%" + b"e" * 56),  # a literal, but it fills the field and has no NUL
        response(port=0),
    ],
)
def test_anything_else_is_malformed(datagram: bytes) -> None:
    """A response of another length, type, SSRC, or without a usable address is ignored."""
    with pytest.raises(MalformedPacket):
        parse_response(datagram, SSRC)


@given(st.binary(max_size=80) | st.binary(min_size=66, max_size=66).map(lambda tail: response()[:8] + tail))
def test_any_bytes_raise_only_malformed_packet(datagram: bytes) -> None:
    """Whatever comes is an answer or is refused."""
    try:
        address, port = parse_response(datagram, SSRC)
    except MalformedPacket:
        return
    assert address
    assert port


@pytest.mark.parametrize(
    ("counter", "packet"),
    [(1, "0100000000000000"), (2**32 - 1, "ffffffff00000000"), (2**32, "0000000000000000")],
)
def test_the_keepalive_counter_wraps(counter: int, packet: str) -> None:
    """The counter is little endian and starts again after 2^32 - 1."""
    assert keepalive(counter).hex() == packet
    assert len(keepalive(counter)) == KEEPALIVE_BYTES
