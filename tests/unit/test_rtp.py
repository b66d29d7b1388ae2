"""RTP headers and the first look at a datagram."""

from __future__ import annotations

import struct
from contextlib import suppress

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
    AudioLevel,
    Kind,
    RtpHeader,
    audio_level,
    classify,
    extension_elements,
    pack_header,
    parse_header,
    speaking_flags,
    split_packet,
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
    ("packet", "csrcs", "clear_bytes", "profile", "extension_bytes", "padding"),
    [
        ("8078123400abcdefdeadbeef", (), 12, None, 0, False),
        ("a078123400abcdefdeadbeef", (), 12, None, 0, True),
        ("8178123400abcdefdeadbeef11223344", (0x11223344,), 16, None, 0, False),
        ("8f78123400abcdefdeadbeef" + "00000001" * 15, (1,) * 15, 72, None, 0, False),
        ("9078123400abcdefdeadbeefbede0001", (), 16, 0xBEDE, 4, False),
        ("9078123400abcdefdeadbeefbede0000", (), 16, 0xBEDE, 0, False),
        ("b178123400abcdefdeadbeef1122334410000102", (0x11223344,), 20, 0x1000, 4 * 0x102, True),
    ],
)
def test_the_clear_part_grows_with_csrc_and_extension(
    packet: str,
    csrcs: tuple[int, ...],
    clear_bytes: int,
    profile: int | None,
    extension_bytes: int,
    padding: bool,
) -> None:
    """Clear are 12 bytes, 4 for each CSRC and 4 for the extension word; the elements are not."""
    assert parse_header(bytes.fromhex(packet)) == RtpHeader(
        payload_type=120,
        sequence=0x1234,
        timestamp=0x00ABCDEF,
        ssrc=0xDEADBEEF,
        padding=padding,
        csrcs=csrcs,
        clear_bytes=clear_bytes,
        extension_profile=profile,
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


def with_extension(elements: str, profile: str = "bede", payload: bytes = b"audio") -> bytes:
    """A plain packet with these extension elements."""
    data = bytes.fromhex(elements)
    return b"\x90" + PLAIN[1:] + bytes.fromhex(profile) + (len(data) // 4).to_bytes(2, "big") + data + payload


def test_a_packet_is_split_behind_its_inner_lengths() -> None:
    """CSRC list, extension and padding are no payload."""
    packet = bytes.fromhex("b178123400abcdefdeadbeef11223344bede000110b29002") + b"audio\x00\x00\x03"
    split = split_packet(packet)
    assert (split.extension.hex(), split.payload) == ("10b29002", b"audio")
    assert split.header == parse_header(packet)
    assert split_packet(PLAIN + b"audio\x01") == (parse_header(PLAIN), b"", b"audio\x01")
    assert split_packet(b"\xa0" + PLAIN[1:] + b"\x00\x02").payload == b""


@pytest.mark.parametrize(
    "packet",
    [
        b"\xa0" + PLAIN[1:],
        b"\xa0" + PLAIN[1:] + b"audio\x00",
        b"\xa0" + PLAIN[1:] + b"audio\x07",
        with_extension("10b29002", payload=b"")[:-1],
        b"\xb0" + with_extension("10b29002", payload=b"")[1:],
    ],
    ids=range(5),
)
def test_inner_lengths_that_do_not_fit_are_malformed(packet: bytes) -> None:
    """A packet whose padding or extension is longer than itself is dropped."""
    with pytest.raises(MalformedPacket):
        split_packet(packet)


@pytest.mark.parametrize(
    ("elements", "read"),
    [
        ("", {}),
        ("10b29002", {1: b"\xb2", 9: b"\x02"}),
        ("0010b200", {1: b"\xb2"}),
        ("12aabbcc9004000000000000", {1: b"\xaa\xbb\xcc", 9: b"\x04"}),
        ("10b2f090021000", {1: b"\xb2"}),
        ("10b210b3", {1: b"\xb3"}),
        ("3f" + "77" * 16 + "000000", {3: b"\x77" * 16}),
    ],
)
def test_elements_are_read_in_the_one_byte_form(elements: str, read: dict[int, bytes]) -> None:
    """Id and length share a byte, 0 pads, 15 ends, and of two with one id the later counts."""
    padded = elements + "00" * (-len(elements) // 2 % 4)
    assert extension_elements(split_packet(with_extension(padded))) == read
    assert extension_elements(split_packet(with_extension(padded, profile="1000"))) == {}
    assert extension_elements(split_packet(PLAIN)) == {}


@pytest.mark.parametrize("elements", ["00000010", "10b29102", "00003177"])
def test_an_element_beyond_its_extension_is_malformed(elements: str) -> None:
    """Data that would reach into the payload is no element."""
    with pytest.raises(MalformedPacket):
        extension_elements(split_packet(with_extension(elements)))


def test_audio_level_and_speaker_are_told() -> None:
    """The level has seven bits beside one for voice; who says nothing speaks into a microphone."""
    assert audio_level({1: b"\xb2"}) == AudioLevel(minus_dbov=0x32, voice=True)
    assert audio_level({1: b"\x7f"}) == AudioLevel(minus_dbov=127, voice=False)
    assert audio_level({}) is None
    assert [speaking_flags({9: bytes([byte])}) for byte in range(8)] == [1, 4, 1, 5, 2, 6, 3, 7]
    assert speaking_flags({}) == 1


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_what_is_packed_is_read_back(sequence: int, timestamp: int, ssrc: int) -> None:
    """Packing and parsing are inverse."""
    header = parse_header(pack_header(sequence, timestamp, ssrc))
    assert (header.sequence, header.timestamp, header.ssrc) == (sequence, timestamp, ssrc)


@given(st.binary(max_size=90) | st.binary(max_size=40).map(lambda tail: b"\xb1" + PLAIN[1:] + tail))
def test_any_bytes_raise_only_malformed_packet(datagram: bytes) -> None:
    """Whatever comes is classified, and taken apart or refused."""
    kind = classify(datagram)
    try:
        packet = split_packet(datagram)
    except MalformedPacket:
        return
    assert kind is not Kind.UNKNOWN
    assert packet.header.clear_bytes + len(packet.extension) + len(packet.payload) <= len(datagram)
    with suppress(MalformedPacket):
        elements = extension_elements(packet)
        assert sum(len(data) + 1 for data in elements.values()) <= len(packet.extension)
        audio_level(elements)
        assert 1 <= speaking_flags(elements) <= 7
