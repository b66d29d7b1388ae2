"""Opus packets: duration and framing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import MalformedPacket
from shared.protocol.opus import (
    FRAME_MS,
    FRAME_SAMPLES,
    MAX_FRAME_BYTES,
    SAMPLE_RATE_HZ,
    SILENCE_FRAME,
    check_frame,
    packet_samples,
)

CELT_20 = 31 << 3 | 4  # full band, stereo
CELT_10 = 30 << 3 | 4
CELT_5 = 29 << 3 | 4
CELT_2_5 = 28 << 3 | 4
TWO_EQUAL, TWO_DIFFERENT, COUNTED = 1, 2, 3
VBR, PADDED = 0x80, 0x40


def test_the_silence_frame_is_one_valid_frame() -> None:
    """The silence frame is itself 20 ms."""
    assert packet_samples(SILENCE_FRAME) == FRAME_SAMPLES == SAMPLE_RATE_HZ * FRAME_MS // 1000
    check_frame(SILENCE_FRAME)


@pytest.mark.parametrize(
    ("config", "samples"),
    [
        (0, 480),
        (1, 960),
        (2, 1920),
        (3, 2880),
        (7, 2880),
        (8, 480),
        (11, 2880),
        (12, 480),
        (13, 960),
        (14, 480),
        (15, 960),
        (16, 120),
        (17, 240),
        (18, 480),
        (19, 960),
        (28, 120),
        (31, 960),
    ],
)
def test_duration_follows_the_config(config: int, samples: int) -> None:
    """The upper five bits of the TOC byte say how long a frame is (RFC 6716 table 2)."""
    assert packet_samples(bytes([config << 3])) == samples


@pytest.mark.parametrize(
    ("packet", "samples"),
    [
        (bytes([CELT_10 | TWO_EQUAL]), 960),
        (bytes([CELT_10 | TWO_DIFFERENT]), 960),
        (bytes([CELT_5 | COUNTED, 3]), 720),
        (bytes([CELT_2_5 | COUNTED, 48]), 5760),
        (bytes([CELT_20 | COUNTED, VBR | PADDED | 6]), 5760),
    ],
)
def test_duration_follows_the_frame_count(packet: bytes, samples: int) -> None:
    """Codes 1 and 2 hold two frames, code 3 says how many."""
    assert packet_samples(packet) == samples


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        bytes([CELT_20 | COUNTED]),
        bytes([CELT_20 | COUNTED, 0]),
        bytes([CELT_20 | COUNTED, 7]),
        bytes([CELT_2_5 | COUNTED, 49]),
    ],
)
def test_a_packet_without_duration_is_malformed(packet: bytes) -> None:
    """No TOC byte, no frame count, no frame, or more than 120 ms is malformed."""
    with pytest.raises(MalformedPacket):
        packet_samples(packet)


@pytest.mark.parametrize(
    "packet",
    [
        bytes([CELT_20]),  # a frame of no bytes is discontinuous transmission
        bytes([CELT_20]) + bytes(MAX_FRAME_BYTES - 1),
        bytes([CELT_10 | TWO_EQUAL]) + bytes(10),
        bytes([CELT_10 | TWO_DIFFERENT, 4]) + bytes(9),
        bytes([CELT_10 | TWO_DIFFERENT, 252, 1]) + bytes(256),
        bytes([CELT_20 | COUNTED, 1]) + bytes(20),
        bytes([CELT_5 | COUNTED, 4]) + bytes(20),
        bytes([CELT_2_5 | COUNTED, 8]) + bytes(8),
        bytes([CELT_5 | COUNTED, 4 | PADDED, 3]) + bytes(20 + 3),
        bytes([CELT_20 | COUNTED, 1 | PADDED, 255, 1]) + bytes(20 + 255),
        bytes([CELT_20 | COUNTED, 1 | PADDED, 255, 1]) + bytes(254 + 1),
        bytes([CELT_20 | COUNTED, 1 | PADDED, 0]),
        bytes([CELT_5 | COUNTED, 4 | VBR, 1, 2, 3]) + bytes(6 + 5),
        bytes([CELT_10 | COUNTED, 2 | VBR | PADDED, 2, 5]) + bytes(5 + 0 + 2),
    ],
)
def test_every_framing_of_20_ms_is_accepted(packet: bytes) -> None:
    """All four codes may hold 20 ms."""
    check_frame(packet)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        bytes([CELT_20]) + bytes(MAX_FRAME_BYTES),
        bytes([CELT_10]) + bytes(20),
        bytes([CELT_20 | TWO_EQUAL]) + bytes(20),
        bytes([CELT_10 | TWO_EQUAL]) + bytes(11),
        bytes([CELT_10 | TWO_DIFFERENT]),
        bytes([CELT_10 | TWO_DIFFERENT, 252]),
        bytes([CELT_10 | TWO_DIFFERENT, 5]) + bytes(4),
        bytes([CELT_10 | TWO_DIFFERENT, 252, 1]) + bytes(255),
        bytes([CELT_5 | COUNTED, 4]) + bytes(21),
        bytes([CELT_5 | COUNTED, 4 | PADDED]),
        bytes([CELT_5 | COUNTED, 4 | PADDED, 255]) + bytes(0),
        bytes([CELT_5 | COUNTED, 4 | PADDED, 5]) + bytes(4),
        bytes([CELT_20 | COUNTED, 1 | PADDED, 255, 1]) + bytes(254),
        bytes([CELT_5 | COUNTED, 4 | PADDED, 3]) + bytes(21 + 3),
        bytes([CELT_5 | COUNTED, 4 | VBR, 1, 2]),
        bytes([CELT_5 | COUNTED, 4 | VBR, 1, 2, 3]) + bytes(5),
        bytes([CELT_10 | COUNTED, 2 | VBR | PADDED, 2, 5]) + bytes(6),
    ],
)
def test_what_does_not_add_up_is_malformed(packet: bytes) -> None:
    """A wrong size, another duration, or lengths that do not add up are refused."""
    with pytest.raises(MalformedPacket):
        check_frame(packet)


@given(st.binary(max_size=60))
def test_any_bytes_raise_only_malformed_packet(packet: bytes) -> None:
    """Whatever comes, the answer is a verdict, and whatever is accepted lasts 20 ms."""
    try:
        check_frame(packet)
    except MalformedPacket:
        return
    assert packet_samples(packet) == FRAME_SAMPLES
