"""Chained Ogg is cut where a new link begins, whatever stands between the pages, and however it comes."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import pytest

from shared.errors import SourceError
from worker.encode.ogg import is_chained, links

BEGINS, ENDS = 0x02, 0x04


def page(serial: int, flags: int = 0, body: bytes = b"body") -> bytes:
    """A page as RFC 3533 has it; nobody looks at its check sum."""
    lacing = bytes([255] * (len(body) // 255) + [len(body) % 255])
    return b"OggS\0" + struct.pack("<BqIIIB", flags, 0, serial, 0, 0, len(lacing)) + lacing + body


def link(serial: int, pages: int = 3, streams: int = 1) -> bytes:
    begin = b"".join(page(serial + k, BEGINS) for k in range(streams))
    rest = b"".join(
        page(serial + k % streams, ENDS if k == pages - 1 else 0, bytes([k % 256]) * 300) for k in range(pages)
    )
    return begin + rest


class Trickle(io.RawIOBase):
    """Gives out a few bytes at a time."""

    def __init__(self, data: bytes, most: int) -> None:
        self._data, self._most = data, most

    def read(self, most: int = -1) -> bytes:
        found, self._data = self._data[: min(most, self._most)], self._data[min(most, self._most) :]
        return found


def read(data: bytes, most: int = 1 << 20) -> list[bytes]:
    def all_of() -> Iterator[bytes]:
        for one in links(Trickle(data, most)):
            found = b""
            while part := one.read(most):
                found += part
            assert one.read(most) == b"", "an end stays one"
            yield found

    return list(all_of())


CHAINS = {
    "one": [link(1)],
    "two": [link(1), link(2)],
    "the same serial again": [link(7), link(7), link(7)],
    "of several streams": [link(1, 6, 3), link(10, 4, 2)],
    "headers alone": [link(1), page(2, BEGINS) + page(2), link(3)],
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("most", [1, 13, 1 << 20])
@pytest.mark.parametrize("junk", [b"", b"OggOggS", b"\x89PNG" + bytes(5_000), b"OggS\x07" * 30])
def test_each_link_is_a_file_of_its_own(chain: list[bytes], most: int, junk: bytes) -> None:
    """And what stands between them, or before and behind all, is in none of them."""
    assert read(junk + junk.join(chain) + junk, most) == chain


def test_a_page_that_is_cut_short_is_left_out() -> None:
    """A recording that was broken off ends with its last whole page."""
    assert read(link(1) + page(1)[:-1]) == [link(1)]
    assert read(link(1)[:-1]) == [link(1, 3)[: -len(page(1, ENDS, bytes(300)))]]
    assert read(b"no Ogg at all" * 100) == []


def test_what_is_not_read_of_a_link_is_left_out() -> None:
    """The next one begins with its own beginning."""
    begun = [one.read(20) for one in links(io.BytesIO(link(1, 50) + link(2)))]
    assert begun == [link(1)[:20], link(2)[:20]]


CHAINED: dict[str, tuple[bytes, bool, bool]] = {
    "one": (link(1), False, False),
    "a long one": (link(1, 2_000), False, False),
    "of two streams": (link(1, 4, 2), False, False),
    "two": (link(1) + link(2), True, True),
    "two long ones": (link(1, 2_000) + link(2, 2_000), True, True),
    "junk at the end": (link(1) + link(2) + bytes(100), True, True),
    "the first one again": (link(1) + link(2) + link(1), True, False),
    "nothing": (b"nothing", False, False),
}


@pytest.mark.parametrize(("data", "everywhere", "by_its_end"), CHAINED.values(), ids=CHAINED)
def test_a_chain_is_told_by_all_of_it_or_by_its_end(data: bytes, *, everywhere: bool, by_its_end: bool) -> None:
    """The file stands at its beginning after that."""
    for expected, look_everywhere in ((everywhere, True), (by_its_end, False)):
        file = io.BytesIO(data)
        assert is_chained(file, look_everywhere=look_everywhere) is expected
        assert file.tell() == 0


def test_a_server_that_cannot_give_the_end_may_have_a_chain() -> None:
    """Read from its beginning, either is heard."""

    class NoEnd(io.BytesIO):
        def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
            if offset > 0:
                raise SourceError("no ranges")
            return super().seek(offset, whence)

    assert is_chained(NoEnd(link(1, 2_000)), look_everywhere=False)
