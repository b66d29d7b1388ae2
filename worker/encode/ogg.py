"""Chained Ogg, cut into its links: what a station sends that hands on file after file.

FFmpeg plays on over a border only where the next link is of the same kind; each link as a file of its own may be of
any. What stands between two pages is no sound and is left out. Source: RFC 3533, sections 4 and 6.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from shared.errors import SourceError
from worker.encode.answer import Readable, Seekable

CAPTURE = b"OggS"
"""Begins each page."""
_HEADER_BYTES = 27
_FLAGS_AT = 5
_SERIAL_AT = slice(14, 18)
_SEGMENTS_AT = 26
_BEGINS_STREAM = 0x02
_READ_BYTES = 32 * 1024
_TAIL_BYTES = 128 * 1024
"""The last page begins no further from the end: none is longer than half of it."""


class _Page(NamedTuple):
    """Attributes: begins: it is the first one of a logical stream."""

    data: bytes
    begins: bool
    serial: bytes


def links(file: Readable) -> Iterator[Link]:
    """The links of a physical stream, one behind the other.

    What is not read of a link when the next one is asked for is left out.
    Raises: SourceError: as reading does.
    """
    pages = _Pages(file)
    while pages.next() is not None:
        link = Link(pages)
        yield link
        link.skip()


def is_chained(file: Seekable, *, look_everywhere: bool) -> bool:
    """Whether a file has more than one link; it is read from its beginning after that.

    Args: look_everywhere: read all of it, where that costs little; else its end is looked at, and a server that cannot
        give it may have a chain.
    """
    if look_everywhere:
        found = sum(1 for _ in islice(links(file), 2)) > 1
    else:
        try:
            found = _ends_otherwise(file)
        except SourceError:
            found = True
    file.seek(0)
    return found


def _ends_otherwise(file: Seekable) -> bool:
    pages, first = _Pages(file), set[bytes]()
    while (page := pages.next()) is not None and page.begins:
        first.add(page.serial)
        pages.take()
    end = file.seek(0, io.SEEK_END)
    file.seek(max(0, end - _TAIL_BYTES))
    pages, last = _Pages(file), b""
    while (page := pages.next()) is not None:
        last = page.serial
        pages.take()
    return bool(first) and bool(last) and last not in first


class Link:
    """A file for FFmpeg: all pages up to the next one that begins a link. It cannot be sought in."""

    def __init__(self, pages: _Pages) -> None:
        self._pages = pages
        self._left = memoryview(b"")
        self._begun = False
        """A page was read that does not begin a stream."""

    def read(self, most: int, /) -> bytes:
        if not self._left:
            self._left = memoryview(self._next_page())
        found, self._left = self._left[:most], self._left[most:]
        return bytes(found)

    def skip(self) -> None:
        """Go to its end."""
        while self._next_page():
            pass

    def _next_page(self) -> bytes:
        page = self._pages.next()
        if page is None or (page.begins and self._begun):
            return b""
        self._begun = self._begun or not page.begins
        self._pages.take()
        return page.data


class _Pages:
    """Whole pages, found in whatever comes."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._held = bytearray()
        self._next: _Page | None = None

    def next(self) -> _Page | None:
        """The page that is next; None: there is none any more."""
        while self._next is None:
            if (length := self._length()) is None:
                return None
            data = bytes(self._held[:length])
            self._next = _Page(data, bool(data[_FLAGS_AT] & _BEGINS_STREAM), data[_SERIAL_AT])
            del self._held[:length]
        return self._next

    def take(self) -> None:
        """Go on to the one behind it."""
        self._next = None

    def _length(self) -> int | None:
        """Length of the page that what is held begins with; None at the end."""
        while True:
            at = self._held.find(CAPTURE)
            if at < 0:  # it may stand half in what comes next
                del self._held[: max(0, len(self._held) - len(CAPTURE) + 1)]
                if not self._more():
                    return None
                continue
            del self._held[:at]
            if not self._hold(_HEADER_BYTES):
                return None
            if self._held[len(CAPTURE)]:  # another version, which is none
                del self._held[: len(CAPTURE)]
                continue
            head_bytes = _HEADER_BYTES + self._held[_SEGMENTS_AT]
            if not self._hold(head_bytes):
                return None
            length = head_bytes + sum(self._held[_HEADER_BYTES:head_bytes])
            return length if self._hold(length) else None

    def _hold(self, count: int) -> bool:
        while len(self._held) < count:
            if not self._more():
                return False
        return True

    def _more(self) -> bool:
        found = self._file.read(_READ_BYTES)
        self._held += found
        return bool(found)
