"""An HLS stream as files in a row that FFmpeg reads: segment after segment, a new file at each seam.

    playlist ─(again each half target duration)─▶ segments ─▶ bytes of one after the other ─▶ Part.read

The container inside is FFmpeg's; what a playlist says of names, times and encryption is seen to here. A segment that
cannot be had is left out, as players do. Source: RFC 8216.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from shared.errors import ErrorCode, SourceError
from shared.urls import shown
from worker.encode.answer import Answer, Getter
from worker.encode.playlist import MOST_BYTES, MasterPlaylist, MediaPlaylist, Segment, parse_hls

_CHUNK_TARGETS = 1.5
"""A pause lasts for a segment, and half of one until that is noticed."""
_BEGIN_MORE_S = 1.0
"""A live stream is begun so much further from its end than such a pause."""
WAIT_TARGETS = 3
"""So many target durations without anything new are too many."""
_LEAST_WAIT_S = 8.0
_MOST_SEGMENT_BYTES = 64 * 1024 * 1024
_MOST_INIT_BYTES = 4 * 1024 * 1024
_MOST_LEFT_OUT = 5
"""Segments in a row that cannot be had."""
_KEY_BYTES = 16


class HlsStream:
    """What a media playlist leads to, as bytes.

    Args:
        getter: is asked for everything.
        url: of the playlist.
        media: what it says now.
        after: begin behind the segment of this sequence where the stream still has it; None: it was never heard.
        on_place: told of the sequence of each segment that was read.
    """

    def __init__(
        self, getter: Getter, url: str, media: MediaPlaylist, *, after: int | None, on_place: Callable[[int], None]
    ) -> None:
        self._getter = getter
        self._playlist = _Playlist(getter, url, media, after)
        self._on_place = on_place
        self._current: Answer | _Bytes | None = None
        self._segment: Segment | None = None
        self._begun = False
        """Something of the segment was read."""
        self._init = ""
        self._keys: dict[str, bytes] = {}
        self._is_seam = False
        """Before the segment that is open, or before one that was left out just before it."""
        self._left_out = 0
        self._failure: SourceError | None = None
        """Of the segment left out last."""
        self._heard = False
        self.chunk_ms = self._playlist.chunk_ms
        self.burst_ms = self._playlist.burst_ms

    def parts(self) -> Iterator[Part]:
        """What can be read in one piece each; of a live stream without end.

        Raises: SourceError.
        """
        while self._segment is not None or self._open_next():
            yield Part(self)
        if not self._heard:
            raise self._failure or SourceError("the HLS stream holds no sound", code=ErrorCode.SOURCE_EMPTY)

    def read(self, most: int, *, fresh: bool) -> bytes:
        """The next bytes of this part; nothing at its end.

        Args: fresh: nothing of it was read yet.
        Raises: SourceError.
        """
        while True:
            if self._current is None and (not self._open_next() or (self._is_seam and not fresh)):
                return b""
            assert self._current is not None
            assert self._segment is not None
            try:
                found = self._current.read(most)
            except SourceError as error:
                if self._begun:
                    self._on_place(self._segment.sequence)
                self._leave_out(error, self._segment)
                continue
            if found:
                self._heard = self._begun = True
                return found
            self._on_place(self._segment.sequence)
            self.close()
            self._left_out, self._is_seam = 0, False

    def close(self) -> None:
        if self._current is not None:
            self._current.close()
        self._current = self._segment = None

    def _leave_out(self, failure: SourceError, segment: Segment) -> None:
        """What is left of this segment is not heard.

        Raises: SourceError: as the segments before it.
        """
        self._failure = failure
        self._left_out += 1
        if self._left_out > _MOST_LEFT_OUT:
            raise failure
        if segment.init:
            self._is_seam, self._init = True, ""  # a container with a piece missing is begun anew
        self.close()

    def _open_next(self) -> bool:
        """Open the next segment; False when there is none, and never will be."""
        while self._current is None:
            segment = self._playlist.next()
            if segment is None:
                return False
            self._is_seam = self._is_seam or segment.seam
            try:
                self._current = self._fetched(segment)
                self._segment, self._init, self._begun = segment, segment.init, False
            except SourceError as error:
                if error.code is ErrorCode.SOURCE_ENCRYPTED:
                    raise
                self._leave_out(error, segment)
        return True

    def _fetched(self, segment: Segment) -> Answer | _Bytes:
        head = b""
        if segment.init and (segment.init != self._init or self._is_seam):
            head = _whole(self._getter, segment.init, _MOST_INIT_BYTES)
        answer = self._getter.get(segment.url, first_byte=segment.first_byte)
        if not (head or segment.key or segment.length):
            return answer
        try:
            body = answer.read_all(_MOST_SEGMENT_BYTES) if not segment.length else _exactly(answer, segment.length)
        finally:
            answer.close()
        if segment.key:
            body = self._decrypted(segment, body)
        return _Bytes(head + body)

    def _decrypted(self, segment: Segment, body: bytes) -> bytes:
        key = self._keys.get(segment.key)
        if key is None:
            try:
                key = _whole(self._getter, segment.key, 1_024)
            except SourceError as error:
                message = f"the HLS stream is encrypted, and its key cannot be had: {error.message}"
                raise SourceError(message, code=ErrorCode.SOURCE_ENCRYPTED) from error
            self._keys = {segment.key: key}
        if len(body) % _KEY_BYTES:
            raise SourceError("an HLS segment breaks off", code=ErrorCode.SOURCE_BROKEN)
        if len(key) != _KEY_BYTES:
            raise SourceError("the HLS stream is encrypted, and its key is none", code=ErrorCode.SOURCE_ENCRYPTED)
        iv = segment.iv if segment.iv is not None else segment.sequence.to_bytes(_KEY_BYTES, "big")
        opener = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
        clear = opener.update(body) + opener.finalize()
        return clear[: -clear[-1]] if clear and 1 <= clear[-1] <= _KEY_BYTES else clear


class _Playlist:
    """The segments of a media playlist in their order; a live one is read again and again."""

    def __init__(self, getter: Getter, url: str, media: MediaPlaylist, after: int | None) -> None:
        self._getter = getter
        self._url = url
        self._media = media
        self._loaded_s = time.monotonic()
        self._new_s = self._loaded_s
        self._waiting: deque[Segment] = deque()
        self._newest = -1
        self._anew = 0
        """How often in a row a playlist was far behind."""
        self._begin(media, after)

    @property
    def chunk_ms(self) -> int:
        """How long a pause may be."""
        return 0 if self._media.ended else round(self._media.target_s * _CHUNK_TARGETS * 1_000)

    @property
    def burst_ms(self) -> int:
        """How much there is to be had at once."""
        return 0 if self._media.ended else round(sum(one.duration_s for one in self._waiting) * 1_000)

    def _begin(self, media: MediaPlaylist, after: int | None) -> None:
        segments = list(unheard(media, after))
        if not media.ended:
            segments = self._from_the_edge(segments)
        self._waiting.extend(segments)
        newest = media.segments[-1].sequence if media.segments else -1
        self._newest = newest if after is None or _counts_anew(media, after) else max(newest, after)

    def _from_the_edge(self, segments: list[Segment]) -> list[Segment]:
        """The last segments, as many as the first pause wants."""
        wanted_s = self._media.target_s * _CHUNK_TARGETS + _BEGIN_MORE_S
        count, found_s = 0, 0.0
        while count < len(segments) and found_s < wanted_s:
            count += 1
            found_s += segments[-count].duration_s
        return segments[len(segments) - count :]

    def next(self) -> Segment | None:
        """The next segment, waited for where there is none yet; None at the end.

        Raises: SourceError: for long nothing new.
        """
        while not self._waiting:
            if self._media.ended:
                return None
            self._load_again()
        return self._waiting.popleft()

    def _load_again(self) -> None:
        """Wait for half a target duration, and look what is new.

        Raises: SourceError: for long nothing.
        """
        target_s = self._media.target_s
        time.sleep(max(0.0, self._loaded_s + target_s / 2 - time.monotonic()))
        self._loaded_s = time.monotonic()
        failure: SourceError | None = None
        try:
            told = parse_hls(_whole(self._getter, self._url, MOST_BYTES).decode("utf-8", "replace"), self._url)
            if isinstance(told, MasterPlaylist):
                raise SourceError(f"{shown(self._url)} is another playlist now", code=ErrorCode.SOURCE_BROKEN)
            self._media = told
            self._take_new(told)
        except SourceError as error:
            failure = error
        if self._waiting:
            self._new_s = self._loaded_s
        elif self._loaded_s - self._new_s > max(_LEAST_WAIT_S, WAIT_TARGETS * target_s):
            raise failure or SourceError(
                f"{shown(self._url)} has had nothing new for {self._loaded_s - self._new_s:.0f} s",
                code=ErrorCode.SOURCE_STALLED,
            )

    def _take_new(self, media: MediaPlaylist) -> None:
        self._anew = self._anew + 1 if _counts_anew(media, self._newest) else 0
        if self._anew == 1:
            return  # a server behind another may be far behind it for once
        fresh = unheard(media, self._newest)
        if fresh and fresh[0].sequence != self._newest + 1:
            fresh = self._from_the_edge(list(fresh))  # it counts anew, or much was missed
        self._waiting.extend(fresh)
        if fresh:
            self._newest = fresh[-1].sequence


def _whole(getter: Getter, url: str, most: int) -> bytes:
    answer = getter.get(url)
    try:
        return answer.read_all(most)
    finally:
        answer.close()


def _counts_anew(media: MediaPlaylist, after: int) -> bool:
    """As an encoder that was restarted does; what is one playlist behind is a slow server."""
    return bool(media.segments) and media.segments[-1].sequence < after - len(media.segments)


def unheard(media: MediaPlaylist, after: int | None) -> Sequence[Segment]:
    """What a playlist has behind a segment; all of it where that was of another count, or never heard."""
    if after is None or not media.segments:
        return media.segments
    if _counts_anew(media, after):
        return media.segments
    return [one for one in media.segments if one.sequence > after]


class Part:
    """A file for FFmpeg: what comes up to the next seam. It cannot be sought in."""

    def __init__(self, stream: HlsStream) -> None:
        self._stream = stream
        self._fresh = True
        self._over = False

    def read(self, most: int, /) -> bytes:
        if self._over:
            return b""
        found = self._stream.read(most, fresh=self._fresh)
        self._fresh, self._over = False, not found
        return found


class _Bytes:
    """A segment that was read already."""

    def __init__(self, body: bytes) -> None:
        self._left = memoryview(body)

    def read(self, most: int) -> bytes:
        found, self._left = self._left[:most], self._left[most:]
        return bytes(found)

    def close(self) -> None:
        self._left = memoryview(b"")


def _exactly(answer: Answer, length: int) -> bytes:
    if length > _MOST_SEGMENT_BYTES:
        raise SourceError("an HLS segment is too large", code=ErrorCode.SOURCE_TOO_LARGE)
    found = bytearray()
    while len(found) < length and (part := answer.read(min(length - len(found), 65_536))):
        found += part
    return bytes(found)
