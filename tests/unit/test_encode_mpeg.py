"""Frames in a row: all of them come through, and nothing of what stands between them."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import pytest

from tests.media.audio import PROGRAMME
from worker.encode.mpeg import Frames, begins_with_frames

FORMS = {
    "MPEG-1 layer III, 128 kbit/s": (b"\xff\xfb\x90\x00", 417),
    "the same, padded": (b"\xff\xfb\x92\x00", 418),
    "MPEG-1 layer III, 48 kHz, 320 kbit/s": (b"\xff\xfb\xe4\x00", 960),
    "MPEG-2 layer III, 22.05 kHz, 64 kbit/s": (b"\xff\xf3\x80\x00", 208),
    "MPEG-2.5 layer III, 8 kHz, 8 kbit/s": (b"\xff\xe3\x18\x00", 72),
    "MPEG-1 layer II, 192 kbit/s": (b"\xff\xfd\xa0\x00", 626),
    "MPEG-1 layer I, 384 kbit/s": (b"\xff\xff\xc0\x00", 416),
    "ADTS, 44.1 kHz": (b"\xff\xf1\x50\x80\x2e\x7f\xfc", 371),
    "ADTS with a check sum": (b"\xff\xf0\x4c\x80\x2e\x7f\xfc", 371),
}
ID3V2 = b"ID3\x04\0\0\0\0\x02\x10" + bytes(0x110)
"""Its size has seven bits in a byte."""


def row(form: str, count: int = 5) -> bytes:
    header, length = FORMS[form]
    return b"".join(header + bytes([k]) * (length - len(header)) for k in range(1, count + 1))


class Pieces:
    """A file that comes in pieces of any size."""

    def __init__(self, data: bytes, seed: int) -> None:
        self._data = data
        self._random = random.Random(seed)

    def read(self, most: int, /) -> bytes:
        count = self._random.choice([1, 7, 300, most])
        found, self._data = self._data[:count], self._data[count:]
        return found


def read(data: bytes, seed: int = 0) -> bytes:
    frames, found = Frames(Pieces(data, seed)), b""
    while part := frames.read(1_000):
        found += part
    assert frames.read(1_000) == b"", "an end stays one"
    return found


@pytest.mark.parametrize("form", FORMS)
def test_frames_come_through_untouched(form: str) -> None:
    """Of every kind that there is, with a tag before them or without, however they come."""
    for tag in (b"", ID3V2):
        for seed in range(5):
            assert read(tag + row(form), seed) == tag + row(form)


JUNK: dict[str, bytes] = {
    "a tag": ID3V2,
    "zeros": bytes(1_000),
    "ones": b"\xff" * 1_000,
    "a lone header": b"\xff\xfb\x90\x00" + bytes(10),
    "a frame that was cut short": row("MPEG-1 layer III, 128 kbit/s", 1)[:-10],
    "noise": random.Random(1).randbytes(100_000),
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
@pytest.mark.parametrize("form", FORMS)
def test_what_stands_between_frames_is_left_out(form: str, junk: bytes) -> None:
    """Not a byte of the frames before and behind it is lost."""
    assert read(row(form) + junk + row(form) + junk, 3) == row(form) * 2


def test_frames_of_another_kind_follow_at_once() -> None:
    """Rate and codec may change from one song to the next."""
    chain = b"".join(row(form) for form in FORMS)
    assert read(chain) == chain


@pytest.mark.parametrize("form", FORMS)
def test_a_frame_that_is_cut_short_at_the_end_is_left_out(form: str) -> None:
    """All before it are whole."""
    _, length = FORMS[form]
    assert read(row(form, 6)[:-1]) == row(form, 6)[: 5 * length]


OTHERS: dict[str, Callable[[], bytes]] = {
    "Ogg": PROGRAMME.read_bytes,
    "noise": lambda: random.Random(3).randbytes(300_000),
    "nothing": lambda: b"",
    "a few bytes": lambda: b"ID3",
    "text": lambda: b"no sound here\n" * 10_000,
    "a tag, and something else": lambda: ID3V2 + b"fLaC" + bytes(100_000),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_is_something_else_is_handed_on_as_it_is(make: Callable[[], bytes]) -> None:
    """It is for others to say what it is."""
    assert read(make()) == make()


def test_a_frame_is_handed_on_as_soon_as_the_next_one_has_begun() -> None:
    """A station's sound does not wait for more than it must."""
    form = "MPEG-1 layer III, 128 kbit/s"
    _, length = FORMS[form]
    frames = Frames(io.BytesIO(row(form, 4)[: 3 * length + 6]))
    assert len(frames.read(10_000)) == 3 * length


def test_a_file_can_be_looked_into_and_begun_again() -> None:
    """FFmpeg looks for a tag at the end before it reads from the beginning."""
    data = ID3V2 + row("MPEG-1 layer III, 128 kbit/s", 100)
    frames = Frames(io.BytesIO(data), looks_back=True)
    assert frames.seekable()
    assert frames.seek(-1, io.SEEK_END) == len(data) - 1
    first = frames.read(500)
    frames.seek(len(data) - 128)
    assert frames.read(200) == data[-128:], "it may be a tag"
    frames.seek(0)
    assert frames.read(500) == first
    frames.seek(len(ID3V2))
    assert frames.read(4) == b"\xff\xfb\x90\x00"


def test_nobody_looks_at_the_end_of_what_would_be_fetched_for_it() -> None:
    """A server that promises ranges may send all of it."""
    data = row("MPEG-1 layer III, 128 kbit/s", 100)
    frames = Frames(io.BytesIO(data))
    first = frames.read(500)
    assert frames.seek(-1, io.SEEK_END) == len(data) - 1
    assert frames.seek(len(data) - 128) < 0
    frames.seek(0)
    assert frames.read(500) == first


def test_frames_are_told_by_their_beginning_or_by_what_the_server_says() -> None:
    """A station may be joined in the middle of a picture."""
    assert all(begins_with_frames(row(form), "") for form in FORMS)
    assert begins_with_frames(ID3V2, "")
    assert begins_with_frames(b"\x89PNG", "audio/mpeg")
    for other in (b"OggS", b"fLaC", b"RIFF", bytes(4) + b"ftyp", b"G" * 200):
        assert not begins_with_frames(other, "audio/mpeg")
        assert not begins_with_frames(other, "")
