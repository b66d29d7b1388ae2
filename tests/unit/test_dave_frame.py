"""Frames of the end-to-end encryption, told by their form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import MalformedPacket
from shared.protocol.dave_frame import ClearRange, DaveFrame, is_protocol_frame, overhead_bytes, parse_frame, uleb_bytes

TAG = bytes(range(8))


def uleb(value: int) -> bytes:
    """ULEB128, written here on its own."""
    out = bytearray()
    while True:
        out.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)


def pack(ciphertext: bytes, nonce: int, ranges: list[tuple[int, int]], size: int | None = None) -> bytes:
    """A frame as a sender lays it out."""
    supplement = TAG + uleb(nonce) + b"".join(uleb(offset) + uleb(length) for offset, length in ranges)
    return ciphertext + supplement + bytes([len(supplement) + 3 if size is None else size]) + b"\xfa\xfa"


@pytest.mark.parametrize(
    ("nonce", "overhead"),
    [
        (0, 12),
        (127, 12),
        (128, 13),
        (16_383, 13),
        (16_384, 14),
        (2**21 - 1, 14),
        (2**21, 15),
        (2**28 - 1, 15),
        (2**28, 16),
        (2**32 - 1, 16),
    ],
)
def test_the_overhead_grows_with_the_nonce(nonce: int, overhead: int) -> None:
    """Twelve bytes and one more for every seven bits."""
    assert overhead_bytes(nonce) == overhead == len(pack(b"", nonce, []))
    assert uleb_bytes(nonce) == len(uleb(nonce))


def test_clear_ranges_are_what_is_authenticated() -> None:
    """Parts that stay clear are told with their places, and joined for the cipher."""
    frame = parse_frame(pack(b"abcdefgh", 5, [(0, 1), (3, 0), (3, 2)]))
    assert frame == DaveFrame(b"abcdefgh", TAG, 5, (ClearRange(0, 1), ClearRange(3, 0), ClearRange(3, 2)))
    assert frame.authenticated == b"ade"


@pytest.mark.parametrize(("nonce", "generation"), [(2**24 - 1, 0), (2**24, 1), (2**32 - 1, 255)])
def test_the_generation_is_the_upper_byte_of_the_nonce(nonce: int, generation: int) -> None:
    """After 2^24 frames the next key is due; the nonce is little endian behind eight zero bytes."""
    frame = parse_frame(pack(b"x", nonce, []))
    assert (frame.generation, frame.gcm_nonce) == (generation, bytes(8) + nonce.to_bytes(4, "little"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xfa",
        b"\xfa\xfa",
        b"\x03\xfa\xfa",
        b"\xf8\xff\xfe",
        pack(b"abc", 5, [])[:-1],
        pack(b"abc", 5, [], size=10),
        pack(b"abc", 5, [], size=11),
        pack(b"abc", 5, [], size=16),
        pack(b"abc", 2**32, []),
        pack(b"abc", 5, [(0, 4)]),
        pack(b"abc", 5, [(3, 1)]),
        pack(b"abc", 5, [(1, 2), (0, 1)]),
        pack(b"abc", 5, [(0, 2), (1, 1)]),
        b"abc" + TAG + b"\x85\x80\x80\x80\x80\x00" + b"\x11\xfa\xfa",
        b"abc" + TAG + b"\x05\x01" + b"\x0d\xfa\xfa",
        b"abc" + TAG + b"\x05\x01\x80" + b"\x0e\xfa\xfa",
    ],
    ids=range(17),
)
def test_what_is_no_encrypted_frame_is_told(data: bytes) -> None:
    """Ending, size byte, nonce and ranges must all fit, else the frame is plain."""
    assert not is_protocol_frame(data)
    with pytest.raises(MalformedPacket):
        parse_frame(data)


def test_a_truncated_frame_is_none() -> None:
    """Cut at its end it is plain; cut at its beginning, it ends where the supplement would."""
    whole = pack(b"abc", 300, [(0, 1)])
    for size in range(len(whole)):
        assert not is_protocol_frame(whole[:size])
    for start in range(4, len(whole)):
        assert not is_protocol_frame(whole[start:])


@given(st.binary(max_size=40) | st.binary(max_size=40).map(lambda data: data + b"\xfa\xfa"))
def test_any_bytes_raise_only_malformed_packet(data: bytes) -> None:
    """Whatever comes is taken apart into all of its parts, or refused in the one declared way."""
    try:
        frame = parse_frame(data)
    except MalformedPacket:
        assert not is_protocol_frame(data)
        return
    assert is_protocol_frame(data)
    assert data.startswith(frame.ciphertext + frame.tag)
    assert len(frame.authenticated) <= len(frame.ciphertext)


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1), st.lists(st.integers(0, 20), max_size=6))
def test_what_is_laid_out_is_taken_apart(ciphertext: bytes, nonce: int, steps: list[int]) -> None:
    """Laying out and taking apart are inverse."""
    ranges: list[tuple[int, int]] = []
    at = 0
    for gap, length in zip(steps[::2], steps[1::2], strict=False):
        if at + gap + length <= len(ciphertext):
            ranges.append((at + gap, length))
            at += gap + length
    assert parse_frame(pack(ciphertext, nonce, ranges)) == (ciphertext, TAG, nonce, tuple(ranges))
