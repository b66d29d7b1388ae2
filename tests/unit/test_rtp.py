"""RTP headers and the first look at a datagram."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import MalformedPacket
from shared.protocol.rtp import (
    HEADER_BYTES,
    PAYLOAD_TYPE,
    PAYLOAD_TYPE_OFFSET,
    SEQUENCE_BYTES,
    SEQUENCE_OFFSET,
    SSRC_BYTES,
    SSRC_OFFSET,
    TIMESTAMP_BYTES,
    TIMESTAMP_OFFSET,
    VERSION_FLAGS,
    Kind,
    RtpHeader,
    classify,
    pack_header,
    parse_header,
)

PLAIN = bytes.fromhex("8078123400abcdefdeadbeef")


def test_a_header_is_packed_field_by_field() -> None:
    """Each field stands at its offset, big endian."""
    packed = pack_header(0x1234, 0x00ABCDEF, 0xDEADBEEF)
    assert packed == PLAIN
    assert (packed[0], packed[PAYLOAD_TYPE_OFFSET]) == (VERSION_FLAGS, PAYLOAD_TYPE)
    for offset, size, value in (
        (SEQUENCE_OFFSET, SEQUENCE_BYTES, 0x1234),
        (TIMESTAMP_OFFSET, TIMESTAMP_BYTES, 0x00ABCDEF),
        (SSRC_OFFSET, SSRC_BYTES, 0xDEADBEEF),
    ):
        assert int.from_bytes(packed[offset : offset + size], "big") == value


def test_sequence_and_timestamp_wrap() -> None:
    """After 65535 comes 0, and the timestamp goes on modulo 2^32 without losing a sample."""
    header = parse_header(pack_header(65_535 + 1, 4_294_966_336 + 960, 1))
    assert (header.sequence, header.timestamp) == (0, 0)
    header = parse_header(pack_header(65_535 + 2, 4_294_967_000 + 960, 1))
    assert (header.sequence, header.timestamp) == (1, 664)


def test_an_ssrc_of_more_than_32_bits_is_refused() -> None:
    """The SSRC is an identity, so it is never cut."""
    with pytest.raises(struct.error):
        pack_header(0, 0, 2**32)


@pytest.mark.parametrize(
    ("packet", "clear_bytes", "extension_bytes", "padding"),
    [
        ("8078123400abcdefdeadbeef", 12, 0, False),
        ("a078123400abcdefdeadbeef", 12, 0, True),
        ("8178123400abcdefdeadbeef11223344", 16, 0, False),
        ("8f78123400abcdefdeadbeef" + "00" * 60, 72, 0, False),
        ("9078123400abcdefdeadbeefbede0001", 16, 4, False),
        ("9078123400abcdefdeadbeefbede0000", 16, 0, False),
        ("b178123400abcdefdeadbeef11223344bede0102", 20, 4 * 0x102, True),
    ],
)
def test_the_clear_part_grows_with_csrc_and_extension(
    packet: str, clear_bytes: int, extension_bytes: int, padding: bool
) -> None:
    """Clear are 12 bytes, 4 for each CSRC and 4 for the extension word; the elements are not."""
    assert parse_header(bytes.fromhex(packet)) == RtpHeader(
        payload_type=120,
        sequence=0x1234,
        timestamp=0x00ABCDEF,
        ssrc=0xDEADBEEF,
        padding=padding,
        clear_bytes=clear_bytes,
        extension_bytes=extension_bytes,
    )


@pytest.mark.parametrize("packet", ["8178123400abcdefdeadbeef11223344", "b178123400abcdefdeadbeef11223344bede0001"])
def test_a_truncated_clear_part_is_malformed(packet: str) -> None:
    """A packet that ends inside its clear part is refused at every length."""
    whole = bytes.fromhex(packet)
    parse_header(whole)
    for size in range(len(whole)):
        with pytest.raises(MalformedPacket):
            parse_header(whole[:size])


@pytest.mark.parametrize("first", [0x00, 0x40, 0xC0])
def test_another_version_is_malformed(first: int) -> None:
    """Only version 2 is RTP."""
    with pytest.raises(MalformedPacket):
        parse_header(bytes([first]) + PLAIN[1:])


@pytest.mark.parametrize(
    ("datagram", "kind"),
    [
        (bytes.fromhex("00020046") + bytes(70), Kind.DISCOVERY),
        (bytes.fromhex("00020046") + bytes(69), Kind.UNKNOWN),
        (bytes.fromhex("00010046") + bytes(70), Kind.UNKNOWN),
        (bytes.fromhex("1337f00d00000007"), Kind.CONTROL),
        (bytes.fromhex("ffffffff00000000"), Kind.CONTROL),
        (bytes.fromhex("8078000100000001"), Kind.UNKNOWN),
        (b"", Kind.UNKNOWN),
        (PLAIN[: HEADER_BYTES - 1], Kind.UNKNOWN),
        (b"\x40" + PLAIN[1:], Kind.UNKNOWN),
        (PLAIN, Kind.AUDIO),
        (b"\xb0" + PLAIN[1:], Kind.AUDIO),
        (b"\x80\xf8" + PLAIN[2:], Kind.AUDIO),
        (b"\x80\xbf" + PLAIN[2:], Kind.OTHER_RTP),
        (b"\x80\xc0" + PLAIN[2:], Kind.RTCP),
        (b"\x80\xdf" + PLAIN[2:], Kind.RTCP),
        (b"\x80\xe0" + PLAIN[2:], Kind.OTHER_RTP),
        (b"\x80\x65" + PLAIN[2:], Kind.OTHER_RTP),
    ],
)
def test_a_datagram_is_told_by_its_clear_bytes(datagram: bytes, kind: Kind) -> None:
    """Length, version and second byte say what a datagram is."""
    assert classify(datagram) is kind


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_what_is_packed_is_read_back(sequence: int, timestamp: int, ssrc: int) -> None:
    """Packing and parsing are inverse."""
    header = parse_header(pack_header(sequence, timestamp, ssrc))
    assert (header.sequence, header.timestamp, header.ssrc) == (sequence, timestamp, ssrc)


@given(st.binary(max_size=90))
def test_any_bytes_raise_only_malformed_packet(datagram: bytes) -> None:
    """Whatever comes is classified, and parsed or refused."""
    kind = classify(datagram)
    try:
        header = parse_header(datagram)
    except MalformedPacket:
        return
    assert kind is not Kind.UNKNOWN
    assert header.clear_bytes <= len(datagram)
