"""Decoded frames of any kind as one run of stereo samples at 48 kHz, cut into blocks of 20 ms. Used in the encoding
child only."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray

from shared.errors import ErrorCode, SourceError

SAMPLE_RATE = 48_000
FRAME_SAMPLES = 960
CHANNELS = 2

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

_LOUDEST = 1e6
"""Floating point knows no full scale."""

Pcm = NDArray[np.float32]
_NOTHING: Pcm = np.zeros((0, CHANNELS), np.float32)


class Kind(NamedTuple):
    """What frames have to have in common to be one run of samples."""

    format: str
    layout: str
    rate: int

    def __str__(self) -> str:
        return f"{self.layout} at {self.rate:,} Hz ({self.format})"


def kind_of(frame: AudioFrame) -> Kind:
    """The kind of a frame."""
    return Kind(frame.format.name, frame.layout.name, frame.sample_rate)


@dataclass(frozen=True, slots=True)
class Block:
    """20 ms of sound.

    Attributes:
        position_samples: of the first sample, in the source's own time at 48 kHz; begins again with every pass.
        pcm: shape (960, 2), full scale at 1.0.
    """

    position_samples: int
    pcm: Pcm


class Resampler:
    """Frames of any rate, layout and format to stereo at 48 kHz, across frames that change all three."""

    def __init__(self) -> None:
        self._kind: Kind | None = None
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
        return self.input_at(0)

    def input_at(self, samples: int) -> int:
        """The same of a sample within the next frame."""
        if self._kind is None:
            return 0
        return self._base_samples + math.ceil(Fraction((self._in_samples + samples) * SAMPLE_RATE, self._kind.rate))

    def adapt(self, frame: AudioFrame, *, steered: bool) -> Pcm:
        """Get ready for `frame`; returns what is still inside when it is of another kind than the one before.

        Args: steered: it may have to be played faster or slower.
        """
        kind = kind_of(frame)
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
        """Put in one frame of the kind last adapted to; returns what came out, shape (n, 2).

        Raises: SourceError: nobody knows how to make stereo of it.
        """
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
        try:
            given: list[AudioFrame | None] = [*self._resampler.resample(frame)]
        except av.FFmpegError as error:
            message = f"sound of {self._kind} cannot be made stereo at 48 kHz: {error.strerror}"
            raise SourceError(message, code=ErrorCode.SOURCE_NOT_AUDIO) from error
        parts = [_stereo(part) for part in given if part is not None]
        self._out_samples += sum(len(part) for part in parts)
        return np.concatenate(parts) if parts else _NOTHING


class Blocks:
    """Cuts a run of samples into blocks and knows the position of each."""

    def __init__(self) -> None:
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
            yield Block(self.position_at(self._first), ready[begin : begin + FRAME_SAMPLES])
            self._first += FRAME_SAMPLES

    def rest(self) -> Iterator[Block]:
        """The last block, filled up with zeros; none when nothing is left."""
        if len(self._held):
            pcm = np.zeros((FRAME_SAMPLES, CHANNELS), np.float32)
            pcm[: len(self._held)] = self._held
            yield Block(self.position_at(self._first), pcm)


def peak_db(pcm: Pcm) -> int:
    """The loudest sample, in dB of full scale; -128 for zeros."""
    peak = min(float(max(pcm.max(), -pcm.min())), _LOUDEST)
    return max(round(20 * math.log10(peak)), -127) if peak > 0 else -128


def silence(like: AudioFrame, samples: int) -> AudioFrame:
    """So much of it, of the same kind as a frame."""
    one = np.zeros_like(like.to_ndarray()[:, :1])
    if like.format.name.startswith("u8"):
        one += 128
    return _of(like, np.repeat(one, samples * _each(like), axis=1))


def beginning(frame: AudioFrame, samples: int) -> AudioFrame:
    """The first samples of a frame."""
    cut = _of(frame, frame.to_ndarray()[:, : samples * _each(frame)])
    cut.pts, cut.time_base = frame.pts, frame.time_base
    return cut


def joined(frames: Sequence[AudioFrame]) -> AudioFrame:
    """Frames of one kind as a single one."""
    return _of(frames[0], np.concatenate([frame.to_ndarray() for frame in frames], axis=1))


def size_of(frame: AudioFrame) -> int:
    """In bytes."""
    return frame.samples * frame.layout.nb_channels * frame.format.bytes


def _each(frame: AudioFrame) -> int:
    """Values of each sample in a row of its array."""
    return frame.layout.nb_channels if frame.format.is_packed else 1


def _of(like: AudioFrame, values: NDArray[Any]) -> AudioFrame:
    frame = AudioFrame.from_ndarray(np.ascontiguousarray(values), format=like.format.name, layout=like.layout.name)
    frame.sample_rate = like.sample_rate
    return frame


def _stereo(frame: AudioFrame) -> Pcm:
    samples = frame.to_ndarray().astype(np.float32, copy=False).reshape(frame.samples, -1)
    return np.repeat(samples, CHANNELS, axis=1) if samples.shape[1] == 1 else samples
