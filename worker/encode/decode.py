"""Any audio FFmpeg reads, as blocks of 960 stereo samples at 48 kHz. Used in the encoding child only.

    open ─packets─▶ decoder ─frames─▶ resampler ─48 kHz stereo─▶ blocks

A loop opens its source again for every pass, while resampler and blocks run on: the seam is like any other place.
"""

from __future__ import annotations

import math
import ssl
import stat
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

import av
import av.error
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from numpy.typing import NDArray

from shared.errors import ErrorCode, SourceError
from shared.schema.job import SourceKind

SAMPLE_RATE = 48_000
FRAME_SAMPLES = 960
CHANNELS = 2
IO_TIMEOUT_S = 8.0
"""For opening, and for every single read of a connection."""
_HLS_TIMEOUT_S = 30.0
"""For the next sound, whatever is read for it: three of the longest usual segments. A single connection that sends
nothing is told by its own time-out before."""
MAX_BAD_PACKETS_IN_ROW = 50
"""About a second of audio: what comes after that is not a scratch but another kind of data."""
PREROLL_SAMPLES = SAMPLE_RATE
"""Decoded and dropped before a start: fills the memory of decoder (bit reservoir, overlap) and resampler."""

# The resampler makes time stamps true by playing faster or slower: ready from the first sample on (`res`), because to
# begin later would be heard; from a tenth of a millisecond on; within a second; by half a per cent at most, which is
# more than is asked for; and never by leaving out or filling in.
_STEERED = {
    "flags": "res",
    "min_comp": "0.0001",
    "min_hard_comp": "1000000",
    "comp_duration": "1",
    "max_soft_comp": "0.005",
}
_TIME_PARTS = 64
"""Of a sample, as which time stamps are given."""
# A file may name no other protocol, and HTTP may not lead to a file. `data` carries keys inside HLS playlists.
_FILE_PROTOCOLS = "file"
_HTTP_PROTOCOLS = "http,https,tcp,tls,crypto,data"
# Demuxers whose time stamps after a seek are what the file says. The others (MP3 above all) estimate them from the
# mean bit rate, so there the way to a position is to read up to it.
_EXACT_SEEK = frozenset({"aiff", "caf", "flac", "mov", "ogg", "w64", "wav"})

_HTTP_STATUS = {
    av.error.HTTPBadRequestError: "400",
    av.error.HTTPUnauthorizedError: "401",
    av.error.HTTPForbiddenError: "403",
    av.error.HTTPNotFoundError: "404",
    av.error.HTTPTooManyRequestsError: "429",
    av.error.HTTPOtherClientError: "4xx",
    av.error.HTTPServerError: "5xx",
}
_UNREACHABLE = (
    av.error.ConnectionRefusedError,
    av.error.ConnectionResetError,
    av.error.ConnectionAbortedError,
    av.error.BrokenPipeError,
    av.error.EOFError,
    av.error.OSError,  # EIO stands for a name that does not resolve, too
)

Pcm = NDArray[np.float32]
_NOTHING: Pcm = np.zeros((0, CHANNELS), np.float32)


@dataclass(frozen=True, slots=True)
class Block:
    """20 ms of sound.

    Attributes:
        position_samples: of the first sample, in the source's own time at 48 kHz; begins again with every pass.
        pcm: shape (960, 2), full scale at 1.0.
        live: it is taken for live input.
    """

    position_samples: int
    pcm: Pcm
    live: bool = False


def decode(
    url: str,
    *,
    kind: SourceKind = "auto",
    loop: bool = False,
    start_samples: int = 0,
    io_timeout_s: float = IO_TIMEOUT_S,
    rate_ppm: Callable[[], int] = lambda: 0,
) -> Iterator[Block]:
    """Decode one source.

    Mono is put on both sides at its own level; more than two channels are mixed down so that they cannot clip.
    A single corrupt packet is left out, as players do.

    Args:
        url: absolute path, or http(s) URL.
        kind: what a web source is taken for; `auto`: for live input where it does not tell its length.
        loop: begin again at the end without padding; else, and at the end of live input, the last block is filled up
            with zeros.
        start_samples: where to begin, at 48 kHz; exact to the sample, to half a sample when the source has another
            rate. Beyond the end: the rest of the division when looping, else there is nothing to hear. Live input
            begins where it is and only counts from `start_samples`.
        io_timeout_s: for opening, and for every single read.
        rate_ppm: asked for each frame of live input, by how much faster it is to be played.
    Yields: blocks, without end when looping.
    Raises: SourceError: SOURCE_NOT_FOUND, _FORBIDDEN, _HTTP_STATUS, _UNREACHABLE, _NOT_AUDIO, _EMPTY, _STALLED or
        _BROKEN, or _ENDED: what is said to be live is an HLS playlist that has ended.
    """
    start = start_samples
    resampler, blocks = _Resampler(), _Blocks()
    first_pass = True
    while True:
        begun = False
        for position, frame in _one_pass(url, kind, start if first_pass else 0, io_timeout_s, blocks):
            blocks.add(resampler.adapt(frame, steered=blocks.live))
            if not begun:
                begun = True
                blocks.mark(resampler.next_input_at, position)
                blocks.skip(start - position if first_pass else 0)
            blocks.add(resampler.push(frame, rate_ppm() if blocks.live else 0))
            yield from blocks.whole()
        if not loop or blocks.live:
            break
        if first_pass and (not begun or blocks.is_skipping):
            # The end came before the start, so the length is known to the sample.
            length = blocks.position_at(resampler.next_input_at) if begun else _length_samples(url, kind, io_timeout_s)
            start %= max(length, 1)
            resampler, blocks = _Resampler(), _Blocks()
        else:
            first_pass = False
    blocks.add(resampler.flush())
    yield from blocks.whole()
    yield from blocks.rest()


def _one_pass(
    url: str, kind: SourceKind, start_samples: int, io_timeout_s: float, blocks: _Blocks
) -> Iterator[tuple[int, AudioFrame]]:
    """Decoded frames, each with its position at 48 kHz; they begin at most about `PREROLL_SAMPLES` before the start.

    Nothing is yielded when the source ends before that. `blocks` are told whether the source is live.
    """
    wanted = max(0, start_samples - PREROLL_SAMPLES)
    with _open(url, kind, io_timeout_s) as media:
        blocks.live = media.is_live
        if start_samples and media.is_live:
            yield from _counted(media.frames(), start_samples)
            return
        if not wanted or not media.seeks_exactly:
            yield from media.frames_after(wanted)
            return
        sought = media.seek(wanted)
        if sought is not None:
            yield from sought
            return
    with _open(url, kind, io_timeout_s) as media:
        yield from media.frames_after(wanted)


def _length_samples(url: str, kind: SourceKind, io_timeout_s: float) -> int:
    """Length at 48 kHz, found by decoding all of it."""
    with _open(url, kind, io_timeout_s) as media:
        return round(sum(Fraction(frame.samples * SAMPLE_RATE, frame.sample_rate) for frame in media.frames()))


def _counted(frames: Iterable[AudioFrame], position_samples: int) -> Iterator[tuple[int, AudioFrame]]:
    """Each frame with its position at 48 kHz, by counting."""
    position = Fraction(position_samples)
    for frame in frames:
        yield round(position), frame
        position += Fraction(frame.samples * SAMPLE_RATE, frame.sample_rate)


@contextmanager
def _open(url: str, kind: SourceKind, io_timeout_s: float) -> Iterator[_Media]:
    """Open `url` and pick FFmpeg's best audio stream; pictures and the rest are ignored."""
    is_web = url.lower().startswith(("http://", "https://"))
    if not is_web:
        _check_file(url)
    begun_s = time.monotonic()
    try:
        container = av.open(
            url if is_web else f"file:{url}",
            options=_web_options(io_timeout_s) if is_web else {"protocol_whitelist": _FILE_PROTOCOLS},
            timeout=(io_timeout_s, _HLS_TIMEOUT_S if is_web else io_timeout_s),
            metadata_errors="replace",
        )
    except av.FFmpegError as error:
        late = time.monotonic() - begun_s >= io_timeout_s
        raise _opening_failed(error, url, is_web=is_web, late=late) from error
    with container:
        stream = container.streams.best("audio")
        # Without a decoder PyAV leaves the context out, whatever its annotations say.
        if not isinstance(stream, AudioStream) or getattr(stream, "codec_context", None) is None:
            raise SourceError(f"{_shown(url)} holds no audio that can be decoded", code=ErrorCode.SOURCE_NOT_AUDIO)
        stream.codec_context.thread_count = 1
        is_live = is_web and (kind == "live" or (kind == "auto" and container.duration is None))
        if is_live and container.format.name == "hls" and container.duration is not None:
            # read again from its beginning, what was heard before would be heard a second time
            raise SourceError(f"the playlist of {_shown(url)} has ended", code=ErrorCode.SOURCE_ENDED)
        yield _Media(_shown(url), container, stream, is_live=is_live)


class _Media:
    """One opened source and its one audio stream.

    Attributes:
        is_live: it is taken for live input.
        seeks_exactly: time stamps after a seek are true to the sample.
    """

    def __init__(self, shown: str, container: InputContainer, stream: AudioStream, *, is_live: bool) -> None:
        self._shown = shown
        self._container = container
        self._stream = stream
        self._bad_packets = 0
        self._heard = False
        tick_s = stream.time_base
        self._fine_ticks = tick_s is not None and tick_s * stream.rate <= 1
        self.is_live = is_live
        self.seeks_exactly = self._fine_ticks and not _EXACT_SEEK.isdisjoint(container.format.name.split(","))

    def frames(self) -> Iterator[AudioFrame]:
        """Every frame from here to the end.

        Raises: SourceError: reading breaks off, too many corrupt packets in a row, or nothing to hear at all.
        """
        return self._decoded(self._packets())

    def frames_after(self, wanted_samples: int) -> Iterator[tuple[int, AudioFrame]]:
        """Read from the beginning and yield what ends after `wanted_samples`.

        Where time stamps are true to the sample, what comes before is not even decoded.
        """
        packets = self._packets()
        frames = self._decoded(packets)
        first = next(frames)
        counted = _counted(chain([first], frames), 0)
        if not wanted_samples:
            yield from counted
            return
        if self._fine_ticks and first.pts is not None:
            begin_s = _time_s(first)
            if self._skip_packets(packets, begin_s + Fraction(wanted_samples, SAMPLE_RATE)):
                yield from self._placed(self._decoded(packets), begin_s)
            return
        for position, frame in counted:
            if position + frame.samples * SAMPLE_RATE // frame.sample_rate >= wanted_samples:
                yield position, frame

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

    def _skip_packets(self, packets: Iterator[Packet[AudioStream]], until_s: Fraction) -> bool:
        """Drop packets up to `until_s`; False when the source ended before."""
        for packet in packets:
            if packet.pts is not None and packet.time_base is not None and packet.pts * packet.time_base >= until_s:
                self._stream.codec_context.flush_buffers()
                return True
        return False

    def _packets(self) -> Generator[Packet[AudioStream]]:
        try:
            yield from self._container.demux(self._stream)
        except av.FFmpegError as error:
            if isinstance(error, av.error.ExitError | av.error.TimeoutError):
                raise SourceError(f"{self._shown} sends nothing any more", code=ErrorCode.SOURCE_STALLED) from error
            raise SourceError(f"{self._shown} breaks off: {error.strerror}", code=ErrorCode.SOURCE_BROKEN) from error

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


class _Resampler:
    """Frames of any rate, layout and format to stereo at 48 kHz, across frames that change all three."""

    def __init__(self) -> None:
        self._kind: tuple[str, str, int] | None = None
        self._resampler: AudioResampler | None = None
        self._out_samples = 0
        self._base_samples = 0
        self._in_samples = 0
        self._steered = False
        self._fewer_samples = 0.0
        """By how many input samples the time is behind, because they are to be played faster."""

    @property
    def next_input_at(self) -> int:
        """Index, among all samples that come out, of the first one that belongs to the next frame put in."""
        if self._kind is None:
            return 0
        return self._base_samples + math.ceil(Fraction(self._in_samples * SAMPLE_RATE, self._kind[2]))

    def adapt(self, frame: AudioFrame, *, steered: bool) -> Pcm:
        """Get ready for `frame`; returns what is still inside when it is of another kind than the one before.

        Args: steered: it may have to be played faster or slower.
        """
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind == self._kind:
            return _NOTHING
        rest = self.flush()
        self._kind = kind
        self._steered, self._fewer_samples = steered, 0.0
        channels = frame.layout.nb_channels
        options = dict(_STEERED) if steered else {}
        if channels > CHANNELS:
            # FFmpeg scales a mix-down so that it cannot clip for integer formats only, unless told.
            options["rematrix_maxval"] = "1.0"
        self._resampler = AudioResampler(
            format="flt",
            layout="mono" if channels == 1 else "stereo",
            rate=SAMPLE_RATE,
            options=options,
        )
        return rest

    def push(self, frame: AudioFrame, rate_ppm: int = 0) -> Pcm:
        """Put in one frame of the kind last adapted to; returns what came out, shape (n, 2)."""
        # The count of samples is the time here. Where it lags behind them, they are squeezed until it does no more.
        frame.pts = None
        if self._steered:
            frame.time_base = Fraction(1, frame.sample_rate * _TIME_PARTS)
            frame.pts = round((self._in_samples - self._fewer_samples) * _TIME_PARTS)
            self._fewer_samples += frame.samples * rate_ppm / 1_000_000
        self._in_samples += frame.samples
        return self._pull(frame)

    def flush(self) -> Pcm:
        """Everything still inside, shape (n, 2)."""
        rest = self._pull(None)
        self._base_samples = self._out_samples
        self._in_samples = 0
        self._kind = None
        self._resampler = None
        return rest

    def _pull(self, frame: AudioFrame | None) -> Pcm:
        if self._resampler is None:
            return _NOTHING
        # Where nothing has to be changed PyAV hands back what it was given, the None of a flush as well.
        given: list[AudioFrame | None] = [*self._resampler.resample(frame)]
        parts = [_stereo(part) for part in given if part is not None]
        self._out_samples += sum(len(part) for part in parts)
        return np.concatenate(parts) if parts else _NOTHING


class _Blocks:
    """Cuts a run of samples into blocks and knows the position of each."""

    def __init__(self) -> None:
        self.live = False
        self._held = _NOTHING
        self._first = 0
        self._to_skip = 0
        self._marks: deque[tuple[int, int]] = deque([(0, 0)])

    @property
    def is_skipping(self) -> bool:
        return self._to_skip > 0

    def mark(self, index: int, position_samples: int) -> None:
        """The sample of `index`, counted over all that was added, stands at `position_samples` of its pass."""
        self._marks.append((index, position_samples))

    def skip(self, count_samples: int) -> None:
        """Drop the next samples."""
        self._to_skip = count_samples

    def add(self, pcm: Pcm) -> None:
        dropped = min(self._to_skip, len(pcm))
        self._to_skip -= dropped
        self._first += dropped
        self._held = np.concatenate([self._held, pcm[dropped:]])

    def position_at(self, index: int) -> int:
        """Position of the sample of `index`; indices asked for never go back."""
        while len(self._marks) > 1 and self._marks[1][0] <= index:
            self._marks.popleft()
        begin, position = self._marks[0]
        return position + index - begin

    def whole(self) -> Iterator[Block]:
        """The blocks that are full."""
        cut = len(self._held) // FRAME_SAMPLES * FRAME_SAMPLES
        ready, self._held = self._held[:cut], self._held[cut:]
        for begin in range(0, cut, FRAME_SAMPLES):
            yield Block(self.position_at(self._first), ready[begin : begin + FRAME_SAMPLES], self.live)
            self._first += FRAME_SAMPLES

    def rest(self) -> Iterator[Block]:
        """The last block, filled up with zeros; none when nothing is left."""
        if len(self._held):
            pcm = np.zeros((FRAME_SAMPLES, CHANNELS), np.float32)
            pcm[: len(self._held)] = self._held
            yield Block(self.position_at(self._first), pcm, self.live)


def _stereo(frame: AudioFrame) -> Pcm:
    samples = frame.to_ndarray().astype(np.float32, copy=False).reshape(frame.samples, -1)
    return np.repeat(samples, CHANNELS, axis=1) if samples.shape[1] == 1 else samples


def _time_s(frame: AudioFrame) -> Fraction:
    if frame.pts is None or frame.time_base is None:
        raise ValueError("frame without a time stamp")
    return frame.pts * Fraction(frame.time_base)


def _web_options(io_timeout_s: float) -> dict[str, str]:
    options = {
        "protocol_whitelist": _HTTP_PROTOCOLS,
        "rw_timeout": str(int(io_timeout_s * 1_000_000)),
        "reconnect": "0",  # another layer tries again, and only that one
        "user_agent": "guildcast",
        "tls_verify": "1",
    }
    trusted = ssl.get_default_verify_paths().cafile
    if trusted is not None:
        options["ca_file"] = trusted
    return options


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


def _opening_failed(error: av.FFmpegError, url: str, *, is_web: bool, late: bool) -> SourceError:
    shown = _shown(url)
    if late or isinstance(error, av.error.ExitError | av.error.TimeoutError):
        return SourceError(f"{shown} does not answer in time", code=ErrorCode.SOURCE_STALLED)
    for kind, status in _HTTP_STATUS.items():
        if isinstance(error, kind):
            return SourceError(f"{shown} answers with HTTP status {status}", code=ErrorCode.SOURCE_HTTP_STATUS)
    if isinstance(error, FileNotFoundError):
        return SourceError(f"{shown} does not exist", code=ErrorCode.SOURCE_NOT_FOUND)
    if isinstance(error, PermissionError):
        return SourceError(f"{shown} may not be read", code=ErrorCode.SOURCE_FORBIDDEN, retryable=False)
    if is_web and isinstance(error, _UNREACHABLE):
        return SourceError(f"{shown} cannot be reached: {error.strerror}", code=ErrorCode.SOURCE_UNREACHABLE)
    return SourceError(f"{shown} cannot be opened as audio: {error.strerror}", code=ErrorCode.SOURCE_NOT_AUDIO)


def _shown(url: str) -> str:
    """A source as it may stand in a message: without user, password and query."""
    parts = urlsplit(url)
    if not parts.netloc:
        return url
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
