"""Frames of one run and rendition by index, with cuts and flagged gaps applied. Pure.

Source: design section 3, "Cuts" and "Gaps".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from shared.schema.frame_entry import Flags, FrameEntry

HORIZON_FRAMES = 3 * 60_000 // 20
"""Frames further ahead than three of the longest leads are not kept: memory has a bound whatever is published."""


class Silence(Enum):
    """Why there is no frame at an index."""

    BEFORE_START = auto()
    PAUSED = auto()
    """By order."""
    GAP = auto()
    """The encoder has nothing, and said so in time."""
    ENDED = auto()
    MISSING = auto()
    """Not there and nobody said why: an underrun."""


@dataclass(slots=True)
class _Gap:
    start: int
    end: int | None
    flags: Flags

    def covers(self, index: int) -> bool:
        return self.start <= index and (self.end is None or index < self.end)


class FrameRing:
    """What a run plays, as far as it is known and not yet played."""

    def __init__(self) -> None:
        self.epoch_us: int | None = None
        self.term = 0
        self._frames: dict[int, bytes] = {}
        self._gaps: list[_Gap] = []
        self._floor: int | None = None
        self.changed_from: int | None = None
        """Lowest index that was cut since somebody set this to None: what was known of it is no more true."""
        self.refused = 0
        """Frames not kept because they lie beyond the horizon, or entries of a lower term."""

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def next_index(self) -> int | None:
        """Index after the last frame known, None before the first."""
        return max(self._frames) + 1 if self._frames else None

    def apply(self, entry: FrameEntry) -> None:
        """Take one entry of the stream, in the stream's order."""
        if entry.term < self.term:
            self.refused += len(entry.packets)
            return
        first = entry.first_index
        if entry.term > self.term and self.term:
            self._cut(first)
        self.term = entry.term
        self.epoch_us = entry.epoch_us
        if self._floor is None:
            self._floor = first
        for gap in self._gaps:
            if gap.end is None:
                gap.end = first
        for index, packet in enumerate(entry.packets, first):
            if index - self._floor < HORIZON_FRAMES:
                self._frames[index] = packet
            else:
                self.refused += 1
        if entry.flags:
            self._gaps.append(_Gap(entry.next_index, None, entry.flags))

    def _cut(self, first: int) -> None:
        """Void everything of lower terms at and above `first`."""
        self.changed_from = first if self.changed_from is None else min(first, self.changed_from)
        for index in [index for index in self._frames if index >= first]:
            del self._frames[index]
        self._gaps = [gap for gap in self._gaps if gap.start < first]
        for gap in self._gaps:
            if gap.end is None or gap.end > first:
                gap.end = first

    def at(self, index: int) -> bytes | Silence:
        """The frame of an index, or why there is none."""
        packet = self._frames.get(index)
        if packet is not None:
            return packet
        for gap in self._gaps:
            if gap.covers(index):
                if Flags.ENDED in gap.flags:
                    return Silence.ENDED
                return Silence.GAP if Flags.GAP in gap.flags else Silence.PAUSED
        if self._floor is None or index < self._floor:
            return Silence.BEFORE_START
        return Silence.MISSING

    def known_until(self, first: int, last: int) -> int:
        """Of the indexes from `first` to `last`, the last before one without a frame; `first` in any case.

        Also a gap that was flagged may end at any time.
        """
        index = first
        while index < last and index + 1 in self._frames:
            index += 1
        return index

    def forget_before(self, index: int) -> None:
        """Drop what was played; called as time goes on."""
        for old in [known for known in self._frames if known < index]:
            del self._frames[old]
        self._gaps = [gap for gap in self._gaps if gap.end is None or gap.end > index]
        if self._floor is not None and index > self._floor:
            self._floor = index
