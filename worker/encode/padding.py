"""The samples that an AAC encoder puts before and behind the sound, as MP4 tells of them; used in the encoding child.

FFmpeg cuts off what an edit list, or iTunes' own note, says of the beginning. Where neither stands there, the first
frame is none all the same: it is whole only together with a frame before it. The end is where the last packet's
duration says, or the length of the stream. Sources: ISO/IEC 14496-12, 8.6.6 and 10.1; 14496-24; Apple's `iTunSMPB`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator
from fractions import Fraction
from itertools import chain

from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet

from worker.encode.pcm import beginning

_NOTE = "iTunSMPB"
_NOTED_LENGTH_AT = 3
"""Of its hexadecimal numbers."""
_MOST_SAMPLES = 4_096
"""An encoder fills up its last frames: what is further beyond the end shows that it is none."""
_ROUNDED_S = Fraction(1, 1_000)
"""Lengths of edit lists may be in milliseconds."""


def padding_of(container: InputContainer, stream: AudioStream) -> Padding | None:
    """What is to be cut off; None: nothing is known of it, or others see to it."""
    is_mp4 = "mov" in container.format.name.split(",")
    if not is_mp4 or stream.codec_context.name != "aac" or not stream.frames or not stream.duration:
        return None
    if stream.time_base != Fraction(1, stream.rate):
        return None
    length = stream.duration
    numbers = container.metadata.get(_NOTE, "").split()
    if len(numbers) > _NOTED_LENGTH_AT:
        with contextlib.suppress(ValueError):
            length = int(numbers[_NOTED_LENGTH_AT], 16) or length
    return Padding(stream.start_time or 0, length, round(_ROUNDED_S * stream.rate))


class Padding:
    """Of one stream, whose time stamps count samples.

    Args:
        start: where its sound begins.
        length: how much there is of it.
        rounded: by so much that may be wrong.
    """

    def __init__(self, start: int, length: int, rounded: int) -> None:
        self._start = start
        self._end: int | None = start + length
        """None: it was none."""
        self._rounded = rounded
        self._first_pts: int | None = None

    def read(self, packet: Packet[AudioStream]) -> None:
        """The packets, as they come."""
        if self._first_pts is None:
            self._first_pts = packet.pts

    def cut_off(self, frames: Iterable[AudioFrame], *, from_beginning: bool) -> Generator[AudioFrame]:
        """The frames without it.

        Args: from_beginning: the first one is the first of all.
        """
        if from_beginning:
            frames = self._begun(frames)
        beyond: list[AudioFrame] = []
        last: AudioFrame | None = None
        for frame in frames:
            if last is not None:
                yield last
            last = None
            if self._end is None or frame.pts is None or frame.pts + frame.samples <= self._end + self._rounded:
                last = frame
                continue
            beyond.append(frame)
            if frame.pts > self._end + _MOST_SAMPLES:
                self._end = None
                yield from beyond
                beyond.clear()
        for frame in beyond:
            if self._end is not None and frame.pts is not None and frame.pts < self._end:
                yield beginning(frame, self._end - frame.pts)
        if last is not None:
            yield last if not 0 < last.duration < last.samples else beginning(last, last.duration)

    def _begun(self, frames: Iterable[AudioFrame]) -> Iterator[AudioFrame]:
        """Without the first one, where the container does not say itself what is none."""
        rest = iter(frames)
        if (first := next(rest, None)) is not None and not self._says_beginning:
            first = next(rest, None)
        return chain([first], rest) if first is not None else rest

    @property
    def _says_beginning(self) -> bool:
        return self._first_pts is None or self._first_pts < self._start
