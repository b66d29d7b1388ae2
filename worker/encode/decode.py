"""Any audio FFmpeg reads, as blocks of 960 stereo samples at 48 kHz. Used in the encoding child only.

    open ─packets─▶ decoder ─frames─▶ resampler ─48 kHz stereo─▶ blocks

A loop opens its source again for every pass, while resampler and blocks run on: the seam is like any other place.
"""

from __future__ import annotations

import io
import math
import stat
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Literal

import av
import av.error
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet

from shared.errors import ErrorCode, SourceError
from shared.schema.job import SourceKind
from worker.encode.inputs import Input, Readable, Seekable, open_input
from worker.encode.pcm import SAMPLE_RATE, Block, Blocks, Resampler
from worker.encode.records import Looks
from worker.encode.web import IO_TIMEOUT_S, Web

_TRICKLING = {"probesize": "32768", "analyzeduration": "200000"}
"""Of what comes no faster than it is heard, FFmpeg would look at seconds before the first of it is decoded."""
MAX_BAD_PACKETS_IN_ROW = 50
"""About a second of audio: what comes after that is not a scratch but another kind of data."""
PREROLL_SAMPLES = SAMPLE_RATE
"""Decoded and dropped before a start: fills the memory of decoder (bit reservoir, overlap) and resampler."""

_FILE_PROTOCOLS = "file"
"""A local file may name no other protocol."""
# Demuxers whose time stamps after a seek are what the file says. The others (MP3 above all) estimate them from the
# mean bit rate, so there the way to a position is to read up to it.
_EXACT_SEEK = frozenset({"aiff", "caf", "flac", "mov", "ogg", "w64", "wav"})

_BRISK = 2.0
_BRISK_AFTER_S = 2.0
"""What is read up to a place no faster than twice its pace is not read up to it."""


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
    kind: SourceKind = "auto",
    loop: bool = False,
    start_samples: int = 0,
    place: int | None = None,
    io_timeout_s: float = IO_TIMEOUT_S,
    hooks: Hooks | None = None,
) -> Iterator[Block]:
    """Decode one source.

    Mono is put on both sides at its own level; more than two channels are mixed down so that they cannot clip.
    A single corrupt packet is left out, as players do.

    Args:
        url: absolute path, or http(s) URL.
        kind: what a web source is taken for; `auto`: for what it looks like.
        loop: begin again at the end without padding; else, and at the end of live input, the last block is filled up
            with zeros.
        start_samples: where to begin, at 48 kHz; exact to the sample, to half a sample when the source has another
            rate. Beyond the end: the rest of the division when looping, else there is nothing to hear. Live input
            begins where it is and only counts from `start_samples`; so does what cannot be read up to there faster than
            it is heard.
        place: of live input, told by `placed` before: what was heard up to there is not heard again.
        io_timeout_s: for connecting, and for every single read.
        hooks: told what is found out.
    Yields: blocks, without end when looping.
    Raises: SourceError: with the code that says why there is no sound.
    """
    hooks = hooks or Hooks()
    source = _Source(url, kind, place, io_timeout_s, hooks)
    start = start_samples
    resampler, blocks = Resampler(), Blocks()
    first_pass = True
    while True:
        begun = False
        for position, frame in _one_pass(source, start if first_pass else 0):
            blocks.add(resampler.adapt(frame, steered=source.is_live))
            if not begun:
                begun = True
                blocks.mark(resampler.next_input_at, position)
                blocks.skip(start - position if first_pass else 0)
            blocks.add(resampler.push(frame, hooks.rate_ppm() if source.is_live else 0))
            yield from blocks.whole()
        if not loop or source.is_live:
            break
        if first_pass and (not begun or blocks.is_skipping):
            # The end came before the start, so the length is known to the sample.
            length = blocks.position_at(resampler.next_input_at) if begun else _length_samples(source)
            start %= max(length, 1)
            resampler, blocks = Resampler(), Blocks()
        else:
            first_pass = False
    blocks.add(resampler.flush())
    yield from blocks.whole()
    yield from blocks.rest()


def _one_pass(source: _Source, start_samples: int) -> Iterator[tuple[int, AudioFrame]]:
    """Decoded frames, each with its position at 48 kHz; they begin at most about `PREROLL_SAMPLES` before the start.

    Nothing is yielded when the source ends before that.
    """
    wanted = max(0, start_samples - PREROLL_SAMPLES)
    with source.open() as medias:
        media = next(medias)
        if source.is_live:
            yield from _counted(_all_frames(chain([media], medias)), start_samples)
            return
        if source.has_seams:
            for position, frame in _counted(_all_frames(chain([media], medias)), 0):
                if position + frame.samples * SAMPLE_RATE // frame.sample_rate >= wanted:
                    yield position, frame
            return
        if not wanted or not media.seeks_exactly:
            yield from media.frames_after(wanted, start_samples)
            return
        sought = media.seek(wanted)
        if sought is not None:
            yield from sought
            return
    with source.open() as medias:
        yield from next(medias).frames_after(wanted, start_samples)


def _all_frames(medias: Iterator[_Media]) -> Iterator[AudioFrame]:
    for media in medias:
        yield from media.frames()


def _length_samples(source: _Source) -> int:
    """Length at 48 kHz, found by decoding all of it."""
    with source.open() as medias:
        frames = _all_frames(medias)
        return round(sum(Fraction(frame.samples * SAMPLE_RATE, frame.sample_rate) for frame in frames))


def _counted(frames: Iterable[AudioFrame], position_samples: int) -> Iterator[tuple[int, AudioFrame]]:
    """Each frame with its position at 48 kHz, by counting."""
    position = Fraction(position_samples)
    for frame in frames:
        yield round(position), frame
        position += Fraction(frame.samples * SAMPLE_RATE, frame.sample_rate)


class _Source:
    """What a URL leads to, to be opened as often as there are passes.

    Attributes:
        is_live: it is taken for live input.
        has_seams: it is more than one file.
    """

    def __init__(self, url: str, kind: SourceKind, place: int | None, io_timeout_s: float, hooks: Hooks) -> None:
        self._url = url
        self._kind = kind
        self._place = place
        self._io_timeout_s = io_timeout_s
        self._hooks = hooks
        self._told = False
        self.is_live = False
        self.has_seams = False

    @contextmanager
    def open(self) -> Iterator[Iterator[_Media]]:
        """Give what is to be decoded, one behind the other.

        Raises: SourceError.
        """
        if not self._url.lower().startswith(("http://", "https://")):
            _check_file(self._url)
            self._tell(Looks())
            with _media(f"file:{self._url}", self._url, None) as media:
                yield iter([media])
            self._hooks.ended(complete=True)
            return
        web = Web(timeout_s=self._io_timeout_s, on_title=self._hooks.titled)
        with open_input(self._url, self._kind, web, after=self._place, on_place=self._hooks.placed) as found:
            yield self._medias(found)
            self._hooks.ended(complete=found.is_complete())

    def _medias(self, found: Input) -> Iterator[_Media]:
        for part in found.parts:
            reader = _Reader(part)
            with _media(reader, found.shown, reader, trickles=found.trickles) as media:
                self._judge(found, media)
                if media.title:
                    self._hooks.titled(media.title)
                yield media

    def _judge(self, found: Input, media: _Media) -> None:
        """What looks live because its server tells no length may tell one itself."""
        self.has_seams = found.has_seams
        self.is_live = found.live and (found.certain or self._kind == "live" or not media.tells_length)
        self._tell(Looks(self.is_live, found.certain, found.chunk_ms, found.burst_ms))

    def _tell(self, looks: Looks) -> None:
        if not self._told:
            self._told = True
            self._hooks.opened(looks)


class _Reader:
    """Hands on what FFmpeg reads, and remembers why that failed: FFmpeg may take it for the end."""

    def __init__(self, part: Readable) -> None:
        self._part = part
        self.failure: SourceError | None = None

    def read(self, most: int) -> bytes:
        try:
            return self._part.read(most)
        except SourceError as error:
            self.failure = error
            raise

    def seekable(self) -> bool:
        return isinstance(self._part, Seekable) and self._part.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert isinstance(self._part, Seekable)
        return self._part.seek(offset, whence)

    def tell(self) -> int:
        assert isinstance(self._part, Seekable)
        return self._part.tell()


@contextmanager
def _media(file: str | _Reader, shown: str, reader: _Reader | None, *, trickles: bool = False) -> Iterator[_Media]:
    """Open one container and pick FFmpeg's best audio stream; pictures and the rest are ignored.

    Raises: SourceError.
    """
    options = {"protocol_whitelist": _FILE_PROTOCOLS} if reader is None else {}
    if trickles:
        options |= _TRICKLING
    try:
        container = av.open(file, options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        if reader is not None and reader.failure is not None:
            raise reader.failure from error
        raise _opening_failed(error, shown) from error
    assert isinstance(container, InputContainer)
    with container:
        stream = container.streams.best("audio")
        # Without a decoder PyAV leaves the context out, whatever its annotations say.
        if not isinstance(stream, AudioStream) or getattr(stream, "codec_context", None) is None:
            raise SourceError(f"{shown} holds no audio that can be decoded", code=ErrorCode.SOURCE_NOT_AUDIO)
        stream.codec_context.thread_count = 1
        yield _Media(shown, container, stream, reader)


class _Media:
    """One opened source and its one audio stream.

    Attributes:
        seeks_exactly: time stamps after a seek are true to the sample.
        title: what its tags say, empty: nothing.
        tells_length: it says how long it is.
    """

    def __init__(self, shown: str, container: InputContainer, stream: AudioStream, reader: _Reader | None) -> None:
        self._shown = shown
        self._reader = reader
        self._container = container
        self._stream = stream
        self._bad_packets = 0
        self._heard = False
        tick_s = stream.time_base
        self._fine_ticks = tick_s is not None and tick_s * stream.rate <= 1
        tags = {name.lower(): text for name, text in (container.metadata | stream.metadata).items()}
        self.title = " - ".join(tags[name] for name in ("artist", "title") if tags.get(name)) if "title" in tags else ""
        self.tells_length = container.duration is not None
        self.seeks_exactly = self._fine_ticks and not _EXACT_SEEK.isdisjoint(container.format.name.split(","))

    def frames(self) -> Iterator[AudioFrame]:
        """Every frame from here to the end.

        Raises: SourceError: reading breaks off, too many corrupt packets in a row, or nothing to hear at all.
        """
        return self._decoded(self._packets())

    def frames_after(self, wanted_samples: int, start_samples: int) -> Iterator[tuple[int, AudioFrame]]:
        """Read from the beginning and yield what ends after `wanted_samples`.

        Where time stamps are true to the sample, what comes before is not even decoded. What comes no faster than it
        is heard is taken as it comes, as if it were at `start_samples`: to read up to there would be as much silence.
        """
        packets = self._packets()
        frames = self._decoded(packets)
        first = next(frames)
        counted = _counted(chain([first], frames), 0)
        if not wanted_samples:
            yield from counted
            return
        begun_s = time.monotonic()
        if self._fine_ticks and first.pts is not None:
            begin_s = _time_s(first)
            match self._skip_packets(packets, begin_s, Fraction(wanted_samples, SAMPLE_RATE), begun_s):
                case "there":
                    yield from self._placed(self._decoded(packets), begin_s)
                case "too slow":
                    yield from _counted(self._decoded(packets), start_samples)
            return
        for position, frame in counted:
            if position + frame.samples * SAMPLE_RATE // frame.sample_rate >= wanted_samples:
                yield position, frame
            elif self._is_slow(position / SAMPLE_RATE, begun_s):
                yield from _counted((each for _, each in counted), start_samples)

    def seek(self, wanted_samples: int) -> Iterator[tuple[int, AudioFrame]] | None:
        """Frames from `wanted_samples` or before it; None when the seek failed and this source must be opened again."""
        frames = self._decoded(packets := self._packets())
        first = next(frames)
        frames.close()
        packets.close()
        if first.pts is None or self._stream.time_base is None:
            return None
        begin_s = _time_s(first)
        target = math.floor((begin_s + Fraction(wanted_samples, SAMPLE_RATE)) / self._stream.time_base)
        try:
            self._container.seek(target, stream=self._stream)
        except av.FFmpegError:
            return None  # not every source can be sought in: the caller reads up to the place instead
        placed = self._placed(self._decoded(self._packets()), begin_s)
        head = next(placed, None)
        if head is None or not 0 <= head[0] <= wanted_samples + PREROLL_SAMPLES:
            return None
        return chain([head], placed)

    def _placed(self, frames: Iterator[AudioFrame], begin_s: Fraction) -> Iterator[tuple[int, AudioFrame]]:
        """Positions counted on from the time stamp of the first frame; nothing when that one has none."""
        first = next(frames, None)
        if first is None or first.pts is None:
            return
        yield from _counted(chain([first], frames), round((_time_s(first) - begin_s) * SAMPLE_RATE))

    def _skip_packets(
        self, packets: Iterator[Packet[AudioStream]], begin_s: Fraction, for_s: Fraction, begun_s: float
    ) -> Literal["there", "too slow", "ended before"]:
        """Drop so much."""
        for packet in packets:
            if packet.pts is None or packet.time_base is None:
                continue
            skipped_s = packet.pts * packet.time_base - begin_s
            if skipped_s >= for_s or self._is_slow(float(skipped_s), begun_s):
                self._stream.codec_context.flush_buffers()
                return "there" if skipped_s >= for_s else "too slow"
        return "ended before"

    def _is_slow(self, skipped_s: float, begun_s: float) -> bool:
        """Whether skipping goes on too slowly, which only the web can make it."""
        took_s = time.monotonic() - begun_s
        return self._reader is not None and took_s > _BRISK_AFTER_S and skipped_s < _BRISK * took_s

    def _packets(self) -> Generator[Packet[AudioStream]]:
        try:
            yield from self._container.demux(self._stream)
        except av.FFmpegError as error:
            if self._reader is not None and self._reader.failure is not None:
                raise self._reader.failure from error
            raise SourceError(f"{self._shown} breaks off: {error.strerror}", code=ErrorCode.SOURCE_BROKEN) from error
        if self._reader is not None and self._reader.failure is not None:
            raise self._reader.failure

    def _decoded(self, packets: Iterable[Packet[AudioStream]]) -> Generator[AudioFrame]:
        bad_in_row = 0
        for packet in packets:
            try:
                frames = self._stream.codec_context.decode(packet)
            except av.FFmpegError as error:
                bad_in_row += 1
                self._bad_packets += 1
                if bad_in_row > MAX_BAD_PACKETS_IN_ROW:
                    raise self._undecodable() from error
                continue
            for frame in frames:
                if frame.samples:
                    bad_in_row = 0
                    self._heard = True
                    yield frame
        if not self._heard:
            if self._bad_packets:
                raise self._undecodable()
            raise SourceError(f"{self._shown} holds no sound", code=ErrorCode.SOURCE_EMPTY)

    def _undecodable(self) -> SourceError:
        return SourceError(
            f"{self._shown} cannot be decoded: {self._bad_packets} corrupt packets",
            code=ErrorCode.SOURCE_BROKEN if self._heard else ErrorCode.SOURCE_NOT_AUDIO,
        )


def _time_s(frame: AudioFrame) -> Fraction:
    if frame.pts is None or frame.time_base is None:
        raise ValueError("frame without a time stamp")
    return frame.pts * Fraction(frame.time_base)


def _check_file(path: str) -> None:
    """Tell what FFmpeg would not tell apart.

    Raises: SourceError: missing, empty, not a regular file, or not ours to read.
    """
    try:
        status = Path(path).stat()
    except PermissionError as error:
        raise SourceError(f"{path} may not be read", code=ErrorCode.SOURCE_FORBIDDEN, retryable=False) from error
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}", code=ErrorCode.SOURCE_NOT_FOUND) from error
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{path} is not a file", code=ErrorCode.SOURCE_NOT_AUDIO)
    if not status.st_size:
        raise SourceError(f"{path} is an empty file", code=ErrorCode.SOURCE_EMPTY)


def _opening_failed(error: av.FFmpegError, shown: str) -> SourceError:
    if isinstance(error, FileNotFoundError):
        return SourceError(f"{shown} does not exist", code=ErrorCode.SOURCE_NOT_FOUND)
    if isinstance(error, PermissionError):
        return SourceError(f"{shown} may not be read", code=ErrorCode.SOURCE_FORBIDDEN, retryable=False)
    return SourceError(f"{shown} cannot be opened as audio: {error.strerror}", code=ErrorCode.SOURCE_NOT_AUDIO)
