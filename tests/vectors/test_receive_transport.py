"""The opener that is bound to a key, against vectors that two other implementations agreed on."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ErrorCode, MalformedPacket, VoiceError
from shared.protocol.rtp import pack_header, parse_header
from shared.protocol.transport_crypto import AES_GCM, KEY_BYTES, MODES, XCHACHA, open_packet, seal_packet
from worker.voice.receive.transport import Open, new_opener

VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("transport-vectors.json").read_text())
KEY = bytes.fromhex(VECTORS["key_hex"])
LIVE_MODES = [AES_GCM, XCHACHA]
HEADER = pack_header(7, 960, 42)


def opened(opener: Open, packet: bytes) -> bytes | None:
    return opener(packet, parse_header(packet))


@pytest.mark.parametrize(
    "vector",
    [pytest.param(v, id=f"{v['mode']}-{v['case']}") for v in VECTORS["transport_rtp"]],
)
def test_a_vector_opens_to_its_payload(vector: dict[str, Any]) -> None:
    """Extension elements and padding are gone, with CSRCs and without; a second packet opens as well as the first."""
    opener = new_opener(vector["mode"], KEY)
    for _ in range(2):
        payload = opened(opener, bytes.fromhex(vector["packet_hex"]))
        assert payload is not None
        assert payload.hex() == vector["payload_after_decrypt_hex"]


@pytest.mark.parametrize("vector", VECTORS["must_fail"], ids=lambda v: v["why"])
def test_a_forged_packet_does_not_open(vector: dict[str, Any]) -> None:
    """What must fail is told as not authentic, or as too short to be."""
    with suppress(MalformedPacket):
        assert opened(new_opener(vector["mode"], KEY), bytes.fromhex(vector["packet_hex"])) is None


@pytest.mark.parametrize("mode", LIVE_MODES)
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
    """An authentic packet whose padding or extension is longer than its payload is malformed."""
    with pytest.raises(MalformedPacket):
        opened(new_opener(mode, KEY), seal_packet(mode, KEY, header, plain, 1))


@given(
    st.sampled_from(LIVE_MODES),
    st.integers(0, 15),
    st.one_of(st.none(), st.integers(0, 3)),
    st.one_of(st.none(), st.integers(1, 255)),
    st.binary(max_size=60),
    st.integers(0, 2**32 - 1),
    st.integers(0, 60),
)
def test_it_opens_what_the_reference_opens(
    mode: str, csrcs: int, words: int | None, padding: int | None, payload: bytes, counter: int, cut: int
) -> None:
    """Any header with any extension and padding, whole or cut: the same as the slow path, or malformed with it."""
    flags = 0x80 | csrcs | (0x10 if words is not None else 0) | (0x20 if padding is not None else 0)
    header = bytes([flags]) + HEADER[1:] + bytes(4 * csrcs)
    plain = payload
    if words is not None:
        header += b"\xbe\xde" + words.to_bytes(2, "big")
        plain = bytes(4 * words) + plain
    if padding is not None:
        plain += bytes(padding - 1) + bytes([padding])
    packet = seal_packet(mode, KEY, header, plain, counter)
    opener = new_opener(mode, KEY)
    assert opened(opener, packet) == open_packet(mode, KEY, packet) == payload
    cut_packet = packet[: len(packet) - cut - 1]
    with pytest.raises(MalformedPacket):
        open_packet(mode, KEY, cut_packet)
    with suppress(MalformedPacket):
        assert opened(opener, cut_packet) is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [0, 16, KEY_BYTES - 1, KEY_BYTES + 1])
def test_a_key_of_another_length_is_refused(mode: str, size: int) -> None:
    """A shorter AES key would silently be a weaker cipher; libsodium would read past its end."""
    with pytest.raises(ValueError, match="32"):
        new_opener(mode, bytes(size))


def test_an_unknown_mode_is_refused() -> None:
    """There are seven modes."""
    with pytest.raises(VoiceError) as caught:
        new_opener("aead_aes512_gcm_rtpsize", KEY)
    assert caught.value.code is ErrorCode.VOICE_MODE_UNSUPPORTED
