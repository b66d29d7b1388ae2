"""One container and its sound: FFmpeg's frames, without what is no sound, and with the time that they stand for.

    bytes ─▶ packets ─▶ decoder ─▶ (corrupt ones left out) ─▶ (padding cut off) ─▶ (holes filled) ─▶ frames

Used in the encoding child only.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain

import av
import av.error
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet

from shared.errors import ErrorCode, SourceError
from worker.encode.answer import Readable, Seekable
from worker.encode.gaps import Gaps
from worker.encode.padding import padding_of
from worker.encode.pcm import SAMPLE_RATE, silence

_TRICKLING = {"probesize": "32768", "analyzeduration": "200000"}
"""Of what comes no faster than it is heard, FFmpeg would look at seconds before the first of it is decoded."""
MOST_BAD_PACKETS = 50
"""In a row. About a second: what comes after that is not a scratch but a ruin."""
MOST_FOREIGN_PACKETS = 5_000
"""In a row, before any sound. They are short: a picture of a megabyte is some hundred."""
_MOST_GAP_S = 600.0
_MOST_LIVE_GAP_S = 30.0
_FILL_SAMPLES = 48_000
"""Silence comes in pieces of so many."""
PREROLL_SAMPLES = SAMPLE_RATE
"""Decoded and dropped before a start: fills the memory of decoder (bit reservoir, overlap) and resampler."""

# Demuxers whose time stamps after a seek are what the file says. The others (MP3 above all) estimate them from the
# mean bit rate, so there the way to a position is to read up to it.
_EXACT_SEEK = frozenset({"aiff", "caf", "flac", "mov", "ogg", "w64", "wav"})
_TRUE_TIME = frozenset({"flv", "matroska", "mov", "mpegts", "ogg"})
"""Their time stamps were written by whoever recorded; those of the others are counted by FFmpeg as it reads."""
_FINDS_FRAMES = frozenset({"aac", "ac3", "dts", "eac3", "mp3", "truehd"})
"""Frames in a row and nothing else: FFmpeg looks for their beginnings, and takes for one what is in a picture."""


class Reader:
    """Hands on what FFmpeg reads. For FFmpeg a failure is the end; here it is remembered which one it was."""

    def __init__(self, part: Readable, name: str) -> None:
        self._part = part
        self.name = name
        """FFmpeg knows some files by it."""
        self.failure: SourceError | None = None

    def read(self, most: int) -> bytes:
        if self.failure is not None:
            return b""
        try:
            return self._part.read(most)
        except SourceError as error:
            self.failure = error
            return b""

    def seekable(self) -> bool:
        return isinstance(self._part, Seekable) and self._part.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert isinstance(self._part, Seekable)
        return self._part.seek(offset, whence)

    def tell(self) -> int:
        assert isinstance(self._part, Seekable)
        return self._part.tell()


@contextmanager
def open_media(part: Readable, shown: str, *, trickles: bool = False) -> Iterator[Media]:
    """Open one container and pick FFmpeg's best audio stream; pictures and the rest are ignored.

    FFmpeg itself opens nothing: a container may not name files or addresses.

    Args: trickles: it may come no faster than it is heard.
    Raises: SourceError.
    """
    reader = Reader(part, shown if shown.startswith("/") else "")
    options = {"protocol_whitelist": "none"} | (_TRICKLING if trickles else {})
    try:
        container = av.open(reader, options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        if reader.failure is not None:
            raise reader.failure from error
        message = f"{shown} cannot be opened as audio: {error.strerror}"
        raise SourceError(message, code=ErrorCode.SOURCE_NOT_AUDIO) from error
    assert isinstance(container, InputContainer)
    with container:
        # None is best where the sound has not begun yet: a picture stands before it.
        stream = container.streams.best("audio") or next(iter(container.streams.audio), None)
        # Without a decoder PyAV leaves the context out, whatever its annotations say.
        if not isinstance(stream, AudioStream) or getattr(stream, "codec_context", None) is None:
            if reader.failure is not None:
                raise reader.failure
            raise SourceError(f"{shown} holds no audio that can be decoded", code=ErrorCode.SOURCE_NOT_AUDIO)
        stream.codec_context.thread_count = 1
        yield Media(shown, container, stream, reader)


class Media:
    """One opened container and its one audio stream.

    Attributes:
        seeks_exactly: time stamps after a seek are true to the sample.
        title: what its tags say, empty: nothing.
        tells_length: it says how long it is.
    """

    def __init__(self, shown: str, container: InputContainer, stream: AudioStream, reader: Reader) -> None:
        self._shown = shown
        self._reader = reader
        self._container = container
        self._stream = stream
        self._bad_packets = 0
        self._heard = False
        names = frozenset(container.format.name.split(","))
        tick_s = stream.time_base
        self._fine_ticks = tick_s is not None and tick_s * stream.rate <= 1
        self._finds_frames = not _FINDS_FRAMES.isdisjoint(names)
        self._has_true_time = not _TRUE_TIME.isdisjoint(names)
        self._padding = padding_of(container, stream)
        tags = {name.lower(): text for name, text in (container.metadata | stream.metadata).items()}
        self.title = " - ".join(tags[name] for name in ("artist", "title") if tags.get(name)) if "title" in tags else ""
        self.tells_length = container.duration is not None
        self.seeks_exactly = self._fine_ticks and not _EXACT_SEEK.isdisjoint(names)

    def frames(self) -> Iterator[AudioFrame]:
        """Every frame from here to the end.

        Raises: SourceError: reading breaks off, too many corrupt packets in a row, or nothing to hear at all.
        """
        return self._sound(self._packets(), from_beginning=True)

    def frames_after(
        self, wanted_samples: int, enough: Callable[[float], bool], otherwise_samples: int
    ) -> Iterator[tuple[int, AudioFrame]]:
        """Read from the beginning and yield, with their positions at 48 kHz, the frames that end after a place.

        Where FFmpeg counts the time stamps itself, what comes before is not even decoded; those that were written may
        jump.

        Args:
            wanted_samples: the place, at 48 kHz.
            enough: told how many seconds were left out, whether no more shall be; what comes then is yielded as if it
                stood at `otherwise_samples`.
        """
        packets = self._packets()
        frames = self._sound(packets, from_beginning=True)
        first = next(frames)
        if not wanted_samples or not self._fine_ticks or self._has_true_time or first.pts is None:
            yield from from_place(counted(chain([first], frames)), wanted_samples, enough, otherwise_samples)
            return
        begin_s, wanted_s = _time_s(first), Fraction(wanted_samples, SAMPLE_RATE)
        for packet in packets:
            if packet.pts is None or packet.time_base is None:
                continue
            skipped_s = packet.pts * packet.time_base - begin_s
            if (gave_up := enough(float(skipped_s))) or skipped_s >= wanted_s:
                self._stream.codec_context.flush_buffers()
                rest = self._sound(packets)
                yield from counted(rest, otherwise_samples) if gave_up else self._placed(rest, begin_s)
                return

    def seek(self, wanted_samples: int) -> Iterator[tuple[int, AudioFrame]] | None:
        """Frames from a place at 48 kHz or before it, with their positions.

        None when the seek failed: then this source must be opened again.
        """
        packets = self._packets()
        frames = self._sound(packets, from_beginning=True)
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
        placed = self._placed(self._sound(self._packets()), begin_s)
        head = next(placed, None)
        if head is None or not 0 <= head[0] <= wanted_samples + PREROLL_SAMPLES:
            return None
        return chain([head], placed)

    def _placed(self, frames: Iterator[AudioFrame], begin_s: Fraction) -> Iterator[tuple[int, AudioFrame]]:
        """Positions counted on from the time stamp of the first frame; nothing when that one has none."""
        first = next(frames, None)
        if first is None or first.pts is None:
            return
        yield from counted(chain([first], frames), round((_time_s(first) - begin_s) * SAMPLE_RATE))

    def _packets(self) -> Generator[Packet[AudioStream]]:
        try:
            for packet in self._container.demux(self._stream):
                if self._padding is not None:
                    self._padding.read(packet)
                yield packet
        except av.FFmpegError as error:
            if self._reader.failure is not None:
                raise self._reader.failure from error
            raise SourceError(f"{self._shown} breaks off: {error.strerror}", code=ErrorCode.SOURCE_BROKEN) from error
        if self._reader.failure is not None:
            raise self._reader.failure

    def _sound(self, packets: Iterable[Packet[AudioStream]], *, from_beginning: bool = False) -> Generator[AudioFrame]:
        """All that is to be heard of these packets."""
        frames = self._decoded(packets)
        if self._padding is not None:
            frames = self._padding.cut_off(frames, from_beginning=from_beginning)
        return self._filled(frames) if self._has_true_time else frames

    def _decoded(self, packets: Iterable[Packet[AudioStream]]) -> Generator[AudioFrame]:
        """Frames of the packets that can be decoded.

        What follows a corrupt packet is believed when the next one can be decoded, too: in a picture there is enough
        that looks like a frame once.
        """
        bad_in_row = 0
        doubtful: list[AudioFrame] | None = None
        for packet in packets:
            try:
                frames = [frame for frame in self._stream.codec_context.decode(packet) if frame.samples]
            except av.FFmpegError as error:
                bad_in_row += 1
                self._bad_packets += 1
                if bad_in_row > self._most_bad_packets:
                    raise self._undecodable() from error
                doubtful = [] if self._finds_frames else None
                continue
            if not frames:
                continue
            bad_in_row = 0
            if doubtful == []:
                doubtful = frames
                continue
            self._heard = True
            yield from chain(doubtful or (), frames)
            doubtful = None
        if not self._heard:
            if self._bad_packets:
                raise self._undecodable()
            raise SourceError(f"{self._shown} holds no sound", code=ErrorCode.SOURCE_EMPTY)

    @property
    def _most_bad_packets(self) -> float:
        if not self._finds_frames:
            return MOST_BAD_PACKETS
        return math.inf if self._heard else MOST_FOREIGN_PACKETS

    def _undecodable(self) -> SourceError:
        return SourceError(
            f"{self._shown} cannot be decoded: {self._bad_packets} corrupt packets",
            code=ErrorCode.SOURCE_BROKEN if self._heard else ErrorCode.SOURCE_NOT_AUDIO,
        )

    def _filled(self, frames: Iterable[AudioFrame]) -> Generator[AudioFrame]:
        """Silence where time stamps say that there is a hole."""
        gaps = Gaps(_MOST_GAP_S if self._reader.seekable() else _MOST_LIVE_GAP_S)
        for frame in frames:
            begins_s = None if frame.pts is None or frame.time_base is None else frame.pts * float(frame.time_base)
            missing = round(gaps.before(begins_s, frame.samples / frame.sample_rate) * frame.sample_rate)
            while missing > 0:
                piece = min(missing, _FILL_SAMPLES)
                yield silence(frame, piece)
                missing -= piece
            yield frame


def counted(frames: Iterable[AudioFrame], position_samples: int = 0) -> Iterator[tuple[int, AudioFrame]]:
    """Each frame with its position at 48 kHz, by counting."""
    position = float(position_samples)  # exact for 48 kHz, and to a thousandth of a sample for years of any other rate
    for frame in frames:
        yield round(position), frame
        position += frame.samples * SAMPLE_RATE / frame.sample_rate


def from_place(
    placed: Iterator[tuple[int, AudioFrame]],
    wanted_samples: int,
    enough: Callable[[float], bool],
    otherwise_samples: int,
) -> Iterator[tuple[int, AudioFrame]]:
    """Frames that end after a place; see `Media.frames_after`."""
    for position, frame in placed:
        if not wanted_samples or position + length_of(frame) >= wanted_samples:
            yield position, frame
        elif enough(position / SAMPLE_RATE):
            yield from counted((each for _, each in placed), otherwise_samples)


def length_of(frame: AudioFrame) -> Fraction:
    """In samples at 48 kHz."""
    return Fraction(frame.samples * SAMPLE_RATE, frame.sample_rate)


def _time_s(frame: AudioFrame) -> Fraction:
    if frame.pts is None or frame.time_base is None:
        raise ValueError("frame without a time stamp")
    return frame.pts * Fraction(frame.time_base)
