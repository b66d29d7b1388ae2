"""A looped source that is short: played from memory, so that it is not opened again many times a second. Used in the
encoding child only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from av.audio.frame import AudioFrame

from worker.encode.pcm import joined, kind_of, size_of

_MOST_BYTES = 4 * 1024 * 1024
_MOST_S = 10.0
"""Of any sound: at 48 kHz it takes as much, however little it was before."""
_LEAST_S = 1.0
"""Frames that are much shorter than that would cost more than their sound."""


class ShortPass:
    """What one pass from beginning to end consists of, as long as it is short."""

    def __init__(self) -> None:
        self._frames: list[AudioFrame] | None = []
        """None: it is not short."""
        self._bytes, self._seconds = 0, 0.0

    def add(self, frame: AudioFrame) -> None:
        """The next frame of the pass."""
        if self._frames is None:
            return
        self._frames.append(frame)
        self._bytes += size_of(frame)
        self._seconds += frame.samples / frame.sample_rate
        if self._bytes > _MOST_BYTES or self._seconds > _MOST_S:
            self._frames = None

    def repeated(self) -> Iterator[tuple[AudioFrame, list[int]]] | None:
        """The same pass again and again, without end; None: it was not short.

        Yields: a frame, and at which of its samples a pass begins.
        """
        return self._without_end(self._frames) if self._frames else None

    def _without_end(self, frames: list[AudioFrame]) -> Iterator[tuple[AudioFrame, list[int]]]:
        if len({kind_of(frame) for frame in frames}) > 1:
            while True:
                for number, frame in enumerate(frames):
                    yield frame, [] if number else [0]
        length = sum(frame.samples for frame in frames)
        passes = max(1, round(_LEAST_S * frames[0].sample_rate / length))
        whole = joined(frames * passes)
        begins = [int(at) for at in np.arange(passes) * length]
        while True:
            yield whole, begins
