"""Transport encryption: modes, sealing, opening, and what must not happen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ErrorCode, MalformedPacket, NonceExhausted, VoiceError
from shared.protocol.rtp import pack_header
from shared.protocol.transport_crypto import (
    AES_GCM,
    AES_GCM_FIXED,
    KEY_BYTES,
    MODES,
    TAG_BYTES,
    XCHACHA,
    XSALSA,
    XSALSA_LITE,
    XSALSA_LITE_RTPSIZE,
    XSALSA_SUFFIX,
    choose_mode,
    nonce_bytes,
    open_packet,
    open_rtcp,
    open_rtp,
    seal_packet,
    seal_rtcp,
    suffix_bytes,
)

KEY = bytes(range(KEY_BYTES))
HEADER = pack_header(7, 960, 42)
FRAME = bytes(range(200)) + b"\xfe" * 40

AEAD_MODES = (AES_GCM, XCHACHA, AES_GCM_FIXED)
SUFFIX_BYTES = dict.fromkeys(MODES, 4) | {XSALSA_SUFFIX: 24, XSALSA: 0}

every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.mark.parametrize(
    ("offered", "mode"),
    [
        ([AES_GCM, XCHACHA], AES_GCM),
        ([XCHACHA, AES_GCM], AES_GCM),
        (["xsalsa20_poly1305", XCHACHA], XCHACHA),
        ([AES_GCM], AES_GCM),
        (["of_a_later_day", *reversed(MODES)], AES_GCM),
    ],
)
def test_aes_is_preferred(offered: list[str], mode: str) -> None:
    """AES-GCM is taken where offered, else XChaCha20, whatever the order."""
    assert choose_mode(offered) == mode


def test_a_discontinued_mode_is_the_last_resort() -> None:
    """What the service gave up is taken from a server that offers nothing else, the best of it first."""
    assert MODES == (
        "aead_aes256_gcm_rtpsize",
        "aead_xchacha20_poly1305_rtpsize",
        "xsalsa20_poly1305_lite_rtpsize",
        "aead_aes256_gcm",
        "xsalsa20_poly1305_lite",
        "xsalsa20_poly1305_suffix",
        "xsalsa20_poly1305",
    )
    for number, mode in enumerate(MODES):
        assert choose_mode(MODES[: number - 1 : -1] if number else MODES) == mode


@pytest.mark.parametrize("offered", [[], ["aead_aes256_gcm_rtpsize_v2", "plain"]])
def test_no_known_mode_fails_for_good(offered: list[str]) -> None:
    """With no known mode on offer there is nothing to try again."""
    with pytest.raises(VoiceError) as caught:
        choose_mode(offered)
    assert caught.value.code is ErrorCode.VOICE_MODE_UNSUPPORTED
    assert not caught.value.retryable


@pytest.mark.parametrize(
    "call",
    [
        lambda: nonce_bytes("plain"),
        lambda: suffix_bytes("plain"),
        lambda: seal_packet("plain", KEY, HEADER, FRAME, 1),
        lambda: open_packet("plain", KEY, HEADER + bytes(40)),
        lambda: seal_rtcp("plain", KEY, HEADER, 1),
        lambda: open_rtcp("plain", KEY, HEADER + bytes(40)),
    ],
)
def test_an_unknown_mode_is_refused_everywhere(call: Callable[[], object]) -> None:
    """Nothing is sealed or opened in a mode of a later day, and there is nothing to try again."""
    with pytest.raises(VoiceError) as caught:
        call()
    assert caught.value.code is ErrorCode.VOICE_MODE_UNSUPPORTED
    assert not caught.value.retryable


def test_nonce_lengths() -> None:
    """The whole nonce has 12 bytes for AES-GCM and 24 for all others; on the wire it has 4, 24 or none."""
    assert [nonce_bytes(mode) for mode in MODES] == [12, 24, 24, 12, 24, 24, 24]
    assert [suffix_bytes(mode) for mode in MODES] == [4, 4, 4, 4, 4, 24, 0]


@every_mode
@pytest.mark.parametrize("size", [0, 16, KEY_BYTES - 1, KEY_BYTES + 1])
def test_a_key_of_another_length_is_refused(mode: str, size: int) -> None:
    """A shorter AES key would silently be a weaker cipher; libsodium would read past its end."""
    with pytest.raises(ValueError, match="32"):
        seal_packet(mode, bytes(size), HEADER, FRAME, 1)
    with pytest.raises(ValueError, match="32"):
        open_packet(mode, bytes(size), HEADER + bytes(60))
    with pytest.raises(ValueError, match="32"):
        seal_rtcp(mode, bytes(size), HEADER, 1)


@every_mode
def test_the_last_counter_seals_and_the_next_does_not(mode: str) -> None:
    """The counter never wraps: after the last one the key must be renewed. Without a suffix it means nothing."""
    bits = 8 * SUFFIX_BYTES[mode]
    packet = seal_packet(mode, KEY, HEADER, FRAME, 2**bits - 1)
    assert packet.endswith(b"\xff" * SUFFIX_BYTES[mode])
    assert open_packet(mode, KEY, packet) == FRAME
    if mode == XSALSA:
        assert seal_packet(mode, KEY, HEADER, FRAME, 5) == packet
        return
    with pytest.raises(NonceExhausted) as caught:
        seal_packet(mode, KEY, HEADER, FRAME, 2**bits)
    assert caught.value.code is ErrorCode.NONCE_EXHAUSTED


@every_mode
def test_another_key_does_not_open(mode: str) -> None:
    """A packet of the old key is dropped after a key change."""
    packet = seal_packet(mode, KEY, HEADER, FRAME, 1)
    with pytest.raises(MalformedPacket):
        open_packet(mode, KEY[::-1], packet)


@every_mode
@pytest.mark.parametrize(
    ("first", "plain", "payload"),
    [
        (0xA0, b"audio\x00\x00\x03", b"audio"),
        (0xA0, b"\x00\x00\x03", b""),
        (0xA0, b"audio\x01", b"audio"),
        (0x80, b"audio\x01", b"audio\x01"),
        (0x80, b"", b""),
    ],
)
def test_padding_is_cut_after_decryption(mode: str, first: int, plain: bytes, payload: bytes) -> None:
    """The last decrypted byte counts the padding; a packet that was padding only opens to nothing."""
    header = bytes([first]) + HEADER[1:]
    assert open_packet(mode, KEY, seal_packet(mode, KEY, header, plain, 1)) == payload


@every_mode
@pytest.mark.parametrize(
    ("header", "plain"),
    [
        (b"\xa0" + HEADER[1:], b"audio\x00"),
        (b"\xa0" + HEADER[1:], b"audio\x07"),
        (b"\xa0" + HEADER[1:], b""),
        (b"\x90" + HEADER[1:] + b"\xbe\xde\x00\x02", b"1234567"),
        (b"\xb0" + HEADER[1:] + b"\xbe\xde\x00\x01", b"\x00\x00\x00\x04"),
    ],
)
def test_inner_lengths_that_do_not_fit_are_malformed(mode: str, header: bytes, plain: bytes) -> None:
    """An authentic packet whose padding or extension is longer than its payload is dropped."""
    with pytest.raises(MalformedPacket):
        open_packet(mode, KEY, seal_packet(mode, KEY, header, plain, 1))


@every_mode
def test_every_truncation_is_malformed(mode: str) -> None:
    """A packet cut anywhere is dropped."""
    packet = seal_packet(mode, KEY, b"\x90" + HEADER[1:] + b"\xbe\xde\x00\x01", b"\x10\xff\x00\x00audio", 1)
    for size in range(len(packet)):
        with pytest.raises(MalformedPacket):
            open_packet(mode, KEY, packet[:size])


@given(st.sampled_from(AEAD_MODES), st.integers(0, 8 * 60 - 1))
def test_every_flipped_bit_is_noticed(mode: str, bit: int) -> None:
    """Header, ciphertext, tag and counter are all authenticated."""
    packet = bytearray(seal_packet(mode, KEY, HEADER, bytes(28), 5))
    packet[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MalformedPacket) as caught:
        open_packet(mode, KEY, bytes(packet))
    assert KEY.hex() not in repr(caught.value)


@given(st.sampled_from([XSALSA_LITE_RTPSIZE, XSALSA_LITE, XSALSA_SUFFIX]), st.integers(8 * 12, 8 * 60 - 1))
def test_every_flipped_bit_behind_the_header_is_noticed(mode: str, bit: int) -> None:
    """XSalsa20 authenticates tag, ciphertext and nonce, and leaves the header to itself."""
    packet = bytearray(seal_packet(mode, KEY, HEADER, bytes(28), 5))
    packet[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MalformedPacket):
        open_packet(mode, KEY, bytes(packet))


@given(st.sampled_from(MODES), st.binary(max_size=100))
def test_any_bytes_raise_only_malformed_packet(mode: str, packet: bytes) -> None:
    """Whatever comes is refused in the one declared way."""
    with pytest.raises(MalformedPacket):
        open_packet(mode, KEY, packet)
    with pytest.raises(MalformedPacket):
        open_rtcp(mode, KEY, packet)


@given(st.sampled_from(MODES), st.binary(max_size=400), st.integers(0, 2**32 - 1))
def test_what_is_sealed_opens(mode: str, frame: bytes, counter: int) -> None:
    """Sealing and opening are inverse."""
    packet = seal_packet(mode, KEY, HEADER, frame, counter)
    assert len(packet) == len(HEADER) + len(frame) + TAG_BYTES + SUFFIX_BYTES[mode]
    assert open_packet(mode, KEY, packet) == frame


@given(st.sampled_from(MODES), st.binary(max_size=90), st.integers(0, 255))
def test_any_plaintext_raises_only_malformed_packet(mode: str, plain: bytes, first: int) -> None:
    """An authentic packet may still be nonsense inside, and is then refused in the one declared way."""
    header = bytes([0x80 | first & 0x3F]) + HEADER[1:]
    try:
        packet = open_rtp(mode, KEY, seal_packet(mode, KEY, header, plain, 1))
    except MalformedPacket:
        return
    assert len(packet.extension) + len(packet.payload) <= len(plain)


@every_mode
def test_header_and_elements_are_told_of_an_opened_packet(mode: str) -> None:
    """Whatever the mode encrypts of them, CSRC list, extension and payload are found."""
    header = b"\x91" + HEADER[1:] + bytes.fromhex("11223344bede0001")
    packet = open_rtp(mode, KEY, seal_packet(mode, KEY, header, bytes.fromhex("10b29002") + FRAME, 1))
    assert (packet.header.csrcs, packet.header.ssrc) == ((0x11223344,), 42)
    assert (packet.extension.hex(), packet.payload) == ("10b29002", FRAME)


@every_mode
def test_rtcp_keeps_its_first_eight_bytes_clear(mode: str) -> None:
    """Type and sender are clear, and what is sealed opens to the whole packet."""
    report = bytes.fromhex("80c8000600001c6ce800000012345678000177000000006400003e80")
    packet = seal_rtcp(mode, KEY, report, 2)
    assert packet[:8] == report[:8]
    assert len(packet) == len(report) + TAG_BYTES + SUFFIX_BYTES[mode]
    assert report[8:] not in packet
    assert open_rtcp(mode, KEY, packet) == report
    for size in range(len(packet)):
        with pytest.raises(MalformedPacket):
            open_rtcp(mode, KEY, packet[:size])
    with pytest.raises(MalformedPacket):
        seal_rtcp(mode, KEY, report[:7], 2)
