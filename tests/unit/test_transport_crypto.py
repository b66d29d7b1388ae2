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
    KEY_BYTES,
    MAX_COUNTER,
    NONCE_SUFFIX_BYTES,
    TAG_BYTES,
    XCHACHA,
    Buffer,
    choose_mode,
    new_sealer,
    nonce_bytes,
    open_packet,
    seal_packet,
)

KEY = bytes(range(KEY_BYTES))
HEADER = pack_header(7, 960, 42)
FRAME = bytes(range(200)) + b"\xfe" * 40

both_modes = pytest.mark.parametrize("mode", [AES_GCM, XCHACHA])


@pytest.mark.parametrize(
    ("offered", "mode"),
    [
        ([AES_GCM, XCHACHA], AES_GCM),
        ([XCHACHA, AES_GCM], AES_GCM),
        (["xsalsa20_poly1305", XCHACHA], XCHACHA),
        ([AES_GCM], AES_GCM),
    ],
)
def test_aes_is_preferred(offered: list[str], mode: str) -> None:
    """AES-GCM is taken where offered, else XChaCha20, whatever the order."""
    assert choose_mode(offered) == mode


@pytest.mark.parametrize("offered", [[], ["xsalsa20_poly1305_lite", "aead_aes256_gcm"]])
def test_no_live_mode_fails_for_good(offered: list[str]) -> None:
    """With neither mode on offer there is nothing to try again."""
    with pytest.raises(VoiceError) as caught:
        choose_mode(offered)
    assert caught.value.code is ErrorCode.VOICE_MODE_UNSUPPORTED
    assert not caught.value.retryable


@pytest.mark.parametrize(
    "call",
    [
        lambda: nonce_bytes("aead_aes256_gcm"),
        lambda: new_sealer("aead_aes256_gcm", KEY),
        lambda: seal_packet("aead_aes256_gcm", KEY, HEADER, FRAME, 1),
        lambda: open_packet("aead_aes256_gcm", KEY, HEADER + bytes(40)),
    ],
)
def test_a_dead_mode_is_refused_everywhere(call: Callable[[], object]) -> None:
    """Modes that the service gave up are unknown here."""
    with pytest.raises(VoiceError) as caught:
        call()
    assert caught.value.code is ErrorCode.VOICE_MODE_UNSUPPORTED


def test_nonce_lengths() -> None:
    """The whole nonce has 12 bytes for AES-GCM and 24 for XChaCha20."""
    assert (nonce_bytes(AES_GCM), nonce_bytes(XCHACHA)) == (12, 24)


@both_modes
@pytest.mark.parametrize("size", [0, 16, KEY_BYTES - 1, KEY_BYTES + 1])
def test_a_key_of_another_length_is_refused(mode: str, size: int) -> None:
    """A shorter AES key would silently be a weaker cipher; libsodium would read past its end."""
    with pytest.raises(ValueError, match="32"):
        new_sealer(mode, bytes(size))
    with pytest.raises(ValueError, match="32"):
        open_packet(mode, bytes(size), HEADER + bytes(40))


@both_modes
@pytest.mark.parametrize("frame_type", [bytes, bytearray, memoryview])
def test_any_buffer_may_hold_frame_and_nonce(mode: str, frame_type: Callable[[bytes], Buffer]) -> None:
    """bytes, bytearray and memoryview give the same packet, and the bytes around out stay as they are."""
    seal = new_sealer(mode, KEY)
    size = len(FRAME) + TAG_BYTES
    row = bytearray(b"\xaa" * (size + 20))
    nonce = frame_type((1).to_bytes(NONCE_SUFFIX_BYTES, "big").ljust(nonce_bytes(mode), b"\x00"))
    seal(nonce, frame_type(FRAME), memoryview(HEADER), memoryview(row)[10 : 10 + size])
    assert row[10:-10] == seal_packet(mode, KEY, HEADER, FRAME, 1)[len(HEADER) : -NONCE_SUFFIX_BYTES]
    assert row[:10] == row[-10:] == b"\xaa" * 10


@both_modes
@pytest.mark.parametrize("difference", [-TAG_BYTES, -1, 1, TAG_BYTES])
def test_out_of_another_length_is_refused(mode: str, difference: int) -> None:
    """The sealer neither writes past out nor leaves a part of it."""
    seal = new_sealer(mode, KEY)
    out = bytearray(len(FRAME) + TAG_BYTES + difference)
    with pytest.raises(ValueError):  # noqa: PT011  # each library has words of its own
        seal(bytes(nonce_bytes(mode)), FRAME, HEADER, memoryview(out))
    assert not any(out)


@pytest.mark.parametrize("size", [0, 12, 23, 25])
def test_a_short_nonce_is_never_read_past(size: int) -> None:
    """libsodium would read 24 bytes whatever it is given."""
    out = bytearray(len(FRAME) + TAG_BYTES)
    with pytest.raises(ValueError, match="nonce"):
        new_sealer(XCHACHA, KEY)(bytes(size), FRAME, HEADER, out)


@both_modes
def test_a_read_only_out_is_refused(mode: str) -> None:
    """Writing into bytes would change an object that others hold."""
    out = bytes(len(FRAME) + TAG_BYTES)
    with pytest.raises((BufferError, TypeError, ValueError)):
        new_sealer(mode, KEY)(bytes(nonce_bytes(mode)), FRAME, HEADER, out)
    assert not any(out)


@both_modes
def test_the_last_counter_seals_and_the_next_does_not(mode: str) -> None:
    """The counter never wraps: after 2^32 - 1 the key must be renewed."""
    packet = seal_packet(mode, KEY, HEADER, FRAME, MAX_COUNTER)
    assert packet[-NONCE_SUFFIX_BYTES:] == b"\xff" * 4
    assert open_packet(mode, KEY, packet) == FRAME
    with pytest.raises(NonceExhausted) as caught:
        seal_packet(mode, KEY, HEADER, FRAME, MAX_COUNTER + 1)
    assert caught.value.code is ErrorCode.NONCE_EXHAUSTED


@both_modes
def test_another_key_does_not_open(mode: str) -> None:
    """A packet of the old key is dropped after a key change."""
    packet = seal_packet(mode, KEY, HEADER, FRAME, 1)
    with pytest.raises(MalformedPacket):
        open_packet(mode, KEY[::-1], packet)


@both_modes
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


@both_modes
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


@both_modes
def test_every_truncation_is_malformed(mode: str) -> None:
    """A packet cut anywhere is dropped."""
    packet = seal_packet(mode, KEY, b"\x90" + HEADER[1:] + b"\xbe\xde\x00\x01", b"\x10\xff\x00\x00audio", 1)
    for size in range(len(packet)):
        with pytest.raises(MalformedPacket):
            open_packet(mode, KEY, packet[:size])


@given(st.sampled_from([AES_GCM, XCHACHA]), st.integers(0, 8 * 60 - 1))
def test_every_flipped_bit_is_noticed(mode: str, bit: int) -> None:
    """Header, ciphertext, tag and counter are all authenticated."""
    packet = bytearray(seal_packet(mode, KEY, HEADER, bytes(28), 5))
    packet[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MalformedPacket) as caught:
        open_packet(mode, KEY, bytes(packet))
    assert KEY.hex() not in repr(caught.value)


@given(st.sampled_from([AES_GCM, XCHACHA]), st.binary(max_size=100))
def test_any_bytes_raise_only_malformed_packet(mode: str, packet: bytes) -> None:
    """Whatever comes is refused in the one declared way."""
    with pytest.raises(MalformedPacket):
        open_packet(mode, KEY, packet)


@given(st.sampled_from([AES_GCM, XCHACHA]), st.binary(max_size=400), st.integers(0, MAX_COUNTER))
def test_what_is_sealed_opens(mode: str, frame: bytes, counter: int) -> None:
    """Sealing and opening are inverse."""
    packet = seal_packet(mode, KEY, HEADER, frame, counter)
    assert len(packet) == len(HEADER) + len(frame) + TAG_BYTES + NONCE_SUFFIX_BYTES
    assert open_packet(mode, KEY, packet) == frame
