"""Opens what a URL leads to: a station, a file, an HLS stream, or a list that names one of them.

    URL ─▶ answer ─▶ what is it? ─▶ list: its first entry that opens ─▶ ...
                                 ├▶ HLS: parts, one between two seams
                                 ├▶ a chain of Ogg streams: each a part
                                 ├▶ MPEG audio: its frames, without what stands between them
                                 └▶ sound: one part, the answer itself

Used in the encoding child only.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shared.errors import ErrorCode, SourceError
from shared.schema.job import SourceKind
from shared.urls import shown
from worker.encode.answer import Answer, Getter, Readable
from worker.encode.files import Files
from worker.encode.hls import HlsStream, unheard
from worker.encode.mpeg import Frames, begins_with_frames
from worker.encode.ogg import CAPTURE, is_chained, links
from worker.encode.playlist import MOST_BYTES, MasterPlaylist, MediaPlaylist, parse_hls, parse_list, sniff
from worker.encode.resolve import is_web
from worker.encode.web import Web

_DEEPEST = 4
"""Lists may name lists."""
_MOST_TRIED = 10
"""Of the entries of a list."""
_HASTY_S = 3.0
"""Where there is another entry, for so long one is waited for that does not answer, or answers and sends nothing."""
_HEAD_BYTES = 1_024
_FORWARD_BYTES = 256 * 1024
"""A place that is so near is read up to instead of asked for."""


@dataclass(frozen=True, slots=True)
class Input:
    """Something open.

    Attributes:
        parts: to be decoded one after the other.
        live: it looks like live input; `certain`: without doubt.
        chunk_ms: how long a pause in it may be; 0: not known.
        burst_ms: how much of it is to be had at once; 0: not known.
        has_seams: it may be more than one part.
        trickles: it may come no faster than it is heard.
        is_complete: asked at its end: whether that was one.
    """

    parts: Iterator[Readable]
    shown: str
    live: bool
    certain: bool
    chunk_ms: int
    burst_ms: int
    has_seams: bool
    trickles: bool
    is_complete: Callable[[], bool]


@contextmanager
def open_input(
    url: str,
    kind: SourceKind,
    web: Web,
    files: Files,
    *,
    after: int | None = None,
    on_place: Callable[[int], None] = lambda _: None,
) -> Iterator[Input]:
    """Open a source.

    Args:
        url: http(s) URL, or absolute path of a file.
        kind: what it is taken for; `auto`: see what it looks like.
        files: for a source that is a file, and what that names.
        after: of HLS, the segment that was heard last.
        on_place: told of HLS segments that were read whole.
    Raises: SourceError: with the code that says why it cannot be played.
    """
    opened = _Opener(kind, web, files, after, on_place).open(url)
    try:
        yield opened.input
    finally:
        opened.close()


@dataclass(frozen=True, slots=True)
class _Opened:
    input: Input
    close: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Opener:
    """Follows one URL to something that can be decoded."""

    kind: SourceKind
    web: Web
    files: Files
    after: int | None
    on_place: Callable[[int], None]

    def open(self, url: str, depth: int = 0, named_by: str = "") -> _Opened:
        """Open a URL, or what the playlist behind it names; what is named from the web is on the web.

        Raises: SourceError.
        """
        if is_web(named_by) and not is_web(url):
            raise SourceError(f"{shown(named_by)} leads away from the web", code=ErrorCode.SOURCE_UNREACHABLE)
        if depth > _DEEPEST:
            raise SourceError(f"{shown(url)}: lists that name lists, and no end of it", code=ErrorCode.SOURCE_NOT_AUDIO)
        getter: Getter = self.web if is_web(url) else self.files
        answer = getter.get(url)
        try:
            head = _head_of(answer)
            answer.wait_longer()
            playlist = sniff(head, answer.content_type, answer.url)
            if playlist is None:
                _refuse_what_is_no_sound(answer, head)
                return self._sound(_Body(getter, answer, head), answer, head)
            text = (head + answer.read_all(MOST_BYTES)).decode("utf-8", "replace")
        except BaseException:
            answer.close()
            raise
        answer.close()
        if playlist == "list":
            return self._first_of(parse_list(text, answer.url), answer.url, depth)
        told = parse_hls(text, answer.url)
        if isinstance(told, MasterPlaylist):
            return self.open(told.url, depth + 1, answer.url)
        return self._hls(getter, answer.url, told)

    def _first_of(self, urls: list[str], named_by: str, depth: int) -> _Opened:
        """The first entry of a list that opens: the others are the same station elsewhere."""
        failure = SourceError(f"{shown(named_by)} is a list that names nothing", code=ErrorCode.SOURCE_NOT_AUDIO)
        patience_s = self.web.answers_within_s
        if len(urls) > 1:
            self.web.answers_within_s = min(patience_s, _HASTY_S)
        try:
            for url in urls[:_MOST_TRIED]:
                try:
                    return self.open(url, depth + 1, named_by)
                except SourceError as error:
                    failure = error
            raise failure
        finally:
            self.web.answers_within_s = patience_s

    def _hls(self, getter: Getter, url: str, told: MediaPlaylist) -> _Opened:
        if not told.segments and told.ended:
            raise SourceError(f"{shown(url)}: an HLS playlist without segments", code=ErrorCode.SOURCE_EMPTY)
        if told.ended and self.kind == "live" and (self.after is None or not unheard(told, self.after)):
            # read from its beginning, what was heard before might be heard a second time
            raise SourceError(f"the playlist of {shown(url)} has ended", code=ErrorCode.SOURCE_ENDED)
        stream = HlsStream(getter, url, told, after=self.after, on_place=self.on_place)
        found = Input(
            parts=stream.parts(),
            shown=shown(url),
            live=not told.ended or self.kind == "live",
            certain=True,
            chunk_ms=stream.chunk_ms,
            burst_ms=stream.burst_ms,
            has_seams=True,
            trickles=False,
            is_complete=lambda: told.ended,
        )
        return _Opened(found, stream.close)

    def _sound(self, body: _Body, answer: Answer, head: bytes) -> _Opened:
        """How it looks: a station says so, and what has no length is no file on a disk."""
        is_local = not is_web(answer.url)
        looks_live = answer.is_station or answer.length is None
        certain = answer.is_station or (answer.length is not None and answer.serves_ranges)
        live = looks_live if self.kind == "auto" or is_local else self.kind == "live"
        is_chain = head.startswith(CAPTURE) and (not body.seekable() or is_chained(body, look_everywhere=is_local))
        part: Readable = Frames(body, looks_back=is_local) if begins_with_frames(head, answer.content_type) else body
        found = Input(
            parts=links(body) if is_chain else iter([part]),
            shown=answer.shown,
            live=live,
            certain=certain,
            chunk_ms=0,
            burst_ms=0,
            has_seams=is_chain,
            trickles=looks_live or live,
            is_complete=lambda: body.complete,
        )
        return _Opened(found, body.close)


def _head_of(answer: Answer) -> bytes:
    head = b""
    while len(head) < _HEAD_BYTES and (part := answer.read(_HEAD_BYTES - len(head))):
        head += part
    if not head:
        raise SourceError(f"{answer.shown} answers with nothing", code=ErrorCode.SOURCE_EMPTY)
    return head


_NO_SOUND = (
    (b"\x89PNG", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"GIF8", "a picture (GIF)"),
    (b"%PDF", "a document (PDF)"),
    (b"PK\x03\x04", "an archive (ZIP)"),
)


def _refuse_what_is_no_sound(answer: Answer, head: bytes) -> None:
    """Name what is clearly something else.

    Raises: SourceError.
    """
    text = head.lstrip()[:200].lower()
    found = next((name for magic, name in _NO_SOUND if head.startswith(magic)), "")
    if text.startswith((b"<!doctype html", b"<html", b"<head")) or b"<html" in text:
        found = "a web page (HTML)"
    elif text.startswith((b'{"', b'[{"', b"{\n")) or (answer.content_type == "application/json" and text[:1] in b"{["):
        found = "data (JSON)"
    if found:
        raise SourceError(f"{answer.shown} is {found}, no sound", code=ErrorCode.SOURCE_NOT_AUDIO)


class _Body:
    """An answer as a file for FFmpeg; one that has a length and serves ranges can be sought in."""

    def __init__(self, getter: Getter, answer: Answer, head: bytes) -> None:
        self._getter = getter
        self._answer = answer
        self._head = head
        self._length = answer.length
        self._is_web = is_web(answer.url)
        self._seekable = answer.serves_ranges and answer.length is not None and not answer.is_station
        self._at = 0
        """Where the next read begins."""
        self._answer_at = 0
        """Where the answer, with its head, is."""
        self._over = False

    @property
    def complete(self) -> bool:
        return self._answer.complete

    def read(self, most: int, /) -> bytes:
        if self._over and not self._seekable:
            return b""
        if self._seekable and self._at >= (self._length or 0) and self._is_web:
            return b""  # of a file that is here, more may have come
        if self._at != self._answer_at:
            self._go_there()
        if self._head:
            found, self._head = self._head[:most], self._head[most:]
        else:
            found = self._answer.read(most)
        self._at += len(found)
        self._answer_at = self._at
        self._over = not found
        return found

    def seekable(self) -> bool:
        return self._seekable

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert self._length is not None
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def close(self) -> None:
        self._answer.close()

    def _go_there(self) -> None:
        ahead = self._at - self._answer_at
        if 0 < ahead <= _FORWARD_BYTES:
            while ahead > 0:
                part, self._head = (self._head[:ahead], self._head[ahead:]) if self._head else (b"", b"")
                part = part or self._answer.read(min(ahead, _FORWARD_BYTES))
                if not part:
                    break
                ahead -= len(part)
            self._answer_at = self._at
            return
        self._head = b""
        self._answer.close()
        self._answer = self._getter.get(self._answer.url, first_byte=self._at)
        self._answer_at = self._at
