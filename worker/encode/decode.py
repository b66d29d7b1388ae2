"""Any audio FFmpeg reads, as blocks of 960 stereo samples at 48 kHz. Used in the encoding child only.

    open ─packets─▶ decoder ─frames─▶ resampler ─48 kHz stereo─▶ blocks

A loop opens its source again for every pass, while resampler and blocks run on: the seam is like any other place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from av.audio.frame import AudioFrame

from shared.errors import ErrorCode, SourceError
from shared.schema.job import SourceKind
from worker.encode.answer import Readable
from worker.encode.files import Files
from worker.encode.inputs import Input, open_input
from worker.encode.media import PREROLL_SAMPLES, Media, counted, from_place, length_of, open_media
from worker.encode.pcm import Block, Blocks, Resampler
from worker.encode.records import Looks
from worker.encode.resolve import is_web
from worker.encode.short import ShortPass
from worker.encode.web import IO_TIMEOUT_S, Web

_BRISK = 2.0
_BRISK_AFTER_S = 2.0
"""What is read up to a place no faster than twice its pace is not read up to it."""
_NO_SOUND = frozenset({ErrorCode.SOURCE_NOT_AUDIO, ErrorCode.SOURCE_EMPTY})
_MOST_WITHOUT_SOUND = 10
"""Parts in a row."""


class Hooks:
    """What decoding finds out beside the sound, and what it asks for; whoever wants to know overrides it."""

    def opened(self, looks: Looks) -> None:
        """The source is open, for the first time."""

    def titled(self, title: str) -> None:
        """This is on air from here on."""

    def placed(self, number: int) -> None:
        """Live input was read up to here."""

    def ended(self, *, complete: bool) -> None:
        """The end was reached, and whether it is one for certain."""

    def rate_ppm(self) -> int:
        """By how much faster live input is to be played."""
        return 0


def decode(
    url: str,
    *,
    folder: Path | None = None,
    kind: SourceKind = "auto",
    loop: bool = False,
    start_samples: int = 0,
    place: int | None = None,
    headers: Mapping[str, str] | None = None,
    io_timeout_s: float = IO_TIMEOUT_S,
    hooks: Hooks | None = None,
) -> Iterator[Block]:
    """Decode one source.

    Mono is put on both sides at its own level; more than two channels are mixed down so that they cannot clip.
    A single corrupt packet is left out, as players do, and so is what stands between frames and is none.

    Args:
        url: absolute path, or http(s) URL.
        folder: where files lie that a playlist may name; None: its own.
        kind: what a web source is taken for; `auto`: for what it looks like.
        loop: begin again at the end without padding; else the last block is filled up with zeros. Where live input
            ends, what would not fill it is left out.
        start_samples: where to begin, at 48 kHz; exact to the sample, to half a sample when the source has another
            rate. Beyond the end: the rest of the division when looping, else there is nothing to hear. Live input
            begins where it is and only counts from `start_samples`; so does what cannot be read up to there faster than
            it is heard.
        place: of live input, told by `placed` before: what was heard up to there is not heard again.
        headers: to be sent with each request; see `Web`.
        io_timeout_s: for connecting, and for every single read.
        hooks: told what is found out.
    Yields: blocks, without end when looping.
    Raises: SourceError: with the code that says why there is no sound.
    """
    hooks = hooks or Hooks()
    web = Web(timeout_s=io_timeout_s, on_title=hooks.titled, headers=headers or {})
    source = _Source(url, web, Files(folder or Path(url).parent), kind, place, hooks)
    start = start_samples
    resampler, blocks = Resampler(), Blocks()
    first_pass = True
    while True:
        begun, short = False, ShortPass()
        for position, frame in _one_pass(source, start if first_pass else 0):
            if loop and not source.is_live:
                short.add(frame)
            blocks.add(resampler.adapt(frame, steered=source.is_live))
            if not begun:
                begun = True
                blocks.mark(resampler.next_input_at, position)
                blocks.skip(max(0, start - position) if first_pass else 0)  # it may lie in a hole, or a jump
            blocks.add(resampler.push(frame, hooks.rate_ppm() if source.is_live else 0))
            yield from blocks.whole()
        if not loop or source.is_live:
            break
        if first_pass and (not begun or blocks.is_skipping):
            # The end came before the start, so the length is known to the sample.
            length = blocks.position_at(resampler.next_input_at) if begun else _length_samples(source)
            start %= max(length, 1)
            resampler, blocks = Resampler(), Blocks()
        elif (not first_pass or not start) and (again := short.repeated()) is not None:
            yield from _replayed(again, resampler, blocks)
        else:
            first_pass = False
    blocks.add(resampler.flush())
    yield from blocks.whole()
    if not source.is_live:
        yield from blocks.rest()


def _replayed(again: Iterator[tuple[AudioFrame, list[int]]], resampler: Resampler, blocks: Blocks) -> Iterator[Block]:
    """Passes from memory, without end; each begins at position 0."""
    for frame, begins in again:
        blocks.add(resampler.adapt(frame, steered=False))
        for at in begins:
            blocks.mark(resampler.input_at(at), 0)
        blocks.add(resampler.push(frame))
        yield from blocks.whole()


def _one_pass(source: _Source, start_samples: int) -> Iterator[tuple[int, AudioFrame]]:
    """Decoded frames, each with its position at 48 kHz; they begin at most about `PREROLL_SAMPLES` before the start.

    Nothing is yielded when the source ends before that. Live input, and what comes no faster than it is heard, is taken
    as it comes, as if it stood at the start: to read up to there would be as much silence.
    """
    wanted = max(0, start_samples - PREROLL_SAMPLES)
    with source.open() as found:
        if found.has_seams:
            frames = source.frames(found)
            frames = chain([next(frames)], frames)
            if source.is_live:
                yield from counted(frames, start_samples)
            else:
                yield from from_place(counted(frames), wanted, source.slowness(), start_samples)
            return
        with source.media(found) as media:
            if source.is_live:
                yield from counted(media.frames(), start_samples)
                return
            sought = media.seek(wanted) if wanted and media.seeks_exactly else None
            if sought is not None:
                yield from sought
                return
            if not wanted or not media.seeks_exactly:
                yield from media.frames_after(wanted, source.slowness(), start_samples)
                return
    with source.open() as found, source.media(found) as media:
        yield from media.frames_after(wanted, source.slowness(), start_samples)


def _length_samples(source: _Source) -> int:
    """Length at 48 kHz, found by decoding all of it."""
    with source.open() as found:
        return round(sum(length_of(frame) for frame in source.frames(found)))


class _Source:
    """What a URL leads to, to be opened as often as there are passes.

    Attributes:
        is_live: it is taken for live input.
    """

    def __init__(self, url: str, web: Web, files: Files, kind: SourceKind, place: int | None, hooks: Hooks) -> None:
        self._url = url
        self._kind = kind
        self._place = place
        self._web = web
        self._files = files
        self._hooks = hooks
        self._told = False
        self.is_live = False

    @contextmanager
    def open(self) -> Iterator[Input]:
        """Open it.

        Raises: SourceError.
        """
        with open_input(
            self._url, self._kind, self._web, self._files, after=self._place, on_place=self._hooks.placed
        ) as found:
            yield found
            self._hooks.ended(complete=found.is_complete())

    def slowness(self) -> Callable[[float], bool]:
        """Tells, of so many seconds left out from now on, whether that goes on too slowly. Only the web can make it."""
        begun_s = time.monotonic()

        def is_slow(left_out_s: float) -> bool:
            took_s = time.monotonic() - begun_s
            return is_web(self._url) and took_s > _BRISK_AFTER_S and left_out_s < _BRISK * took_s

        return is_slow

    def frames(self, found: Input) -> Iterator[AudioFrame]:
        """All frames of all parts. A part without sound is left out, unless there is nothing else.

        Raises: SourceError.
        """
        failure: SourceError | None = None
        heard, without = False, 0
        for part in found.parts:
            try:
                with self._opened(found, part) as media:
                    for frame in media.frames():
                        yield frame
                        heard, without = True, 0
            except SourceError as error:
                if error.code not in _NO_SOUND:
                    raise
                failure, without = error, without + 1
                if without > _MOST_WITHOUT_SOUND:
                    raise
        if not heard:
            raise failure or SourceError(f"{found.shown} holds no sound", code=ErrorCode.SOURCE_EMPTY)

    @contextmanager
    def media(self, found: Input) -> Iterator[Media]:
        """The only part."""
        with self._opened(found, next(found.parts)) as media:
            yield media

    @contextmanager
    def _opened(self, found: Input, part: Readable) -> Iterator[Media]:
        with open_media(part, found.shown, trickles=found.trickles) as media:
            # what looks live because its server tells no length may tell one itself
            self.is_live = found.live and (found.certain or self._kind == "live" or not media.tells_length)
            if not self._told:
                self._told = True
                self._hooks.opened(Looks(self.is_live, found.certain, found.chunk_ms, found.burst_ms))
            if media.title:
                self._hooks.titled(media.title)
            yield media
