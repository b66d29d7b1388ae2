"""Whether a source is live input or a file, as it turns out. Pure.

A job may say it. Else what opens it says what it looks like (`certain`, where the signs leave no doubt), and how it
comes decides: live input has to be waited for as long as it is heard, a file is there when it is asked for. That is
judged by blocks of 5 s of sound, because live input begins with a burst and comes in chunks, too.
"""

from __future__ import annotations

from collections import deque

from shared.clock import NS_PER_US
from shared.schema.frame_entry import TICK_US
from shared.schema.job import SourceKind

BLOCK_FRAMES = 250
_TICK_NS = TICK_US * NS_PER_US
_PACED_SHARE = 0.95
"""A block that was waited for so much of its length came at the pace of what is live; clocks are far better."""
_FILE_BLOCKS = 3
"""In a row, each faster than that: no server's burst is so long and so slow."""
_LIVE_BLOCKS = 2
_ENDED_FILE_SHARE = 0.25
_LAST_FRAMES = 100


class Nature:
    """What one source is taken for.

    Args:
        kind: what the job says.
        is_local: a file of this machine is none, unless it is a list that names a station.
    Attributes:
        live: what it is taken for; a source that was never open may be live.
        known: it was said, or the source has been open.
        certain: nothing that comes changes it.
        paced: the last block came at the pace of live input.
    """

    def __init__(self, kind: str, *, is_local: bool) -> None:
        self.live = kind != "file" and not is_local
        self.known = self.certain = kind == "file" or (kind == "live" and not is_local)
        self.paced = False
        self._proved = False
        """It was waited for so long that an end is none."""
        self._in_a_row = 0
        self._paced_blocks = 0
        self._frames = self._frames_before = 0
        self._waited_ns = self._waited_before_ns = 0
        """Of the block that is not full yet, and of the one before."""
        self._last_ns: deque[int] = deque(maxlen=_LAST_FRAMES)

    @property
    def kind(self) -> SourceKind:
        """As what it is opened."""
        if not self.known:
            return "auto"
        return "live" if self.live else "file"

    def opened(self, *, live: bool, certain: bool) -> None:
        """It is open, and looks like this."""
        if not self.known:
            self.known, self.live, self.certain = True, live, certain
        self.paced = False
        self._in_a_row = 0
        self._frames = self._frames_before = self._waited_ns = self._waited_before_ns = 0
        self._last_ns.clear()

    def arrived(self, waited_ns: int) -> None:
        """A frame came, after so long a wait; a time in which nobody asked for it is none."""
        self._frames += 1
        self._waited_ns += waited_ns
        self._last_ns.append(waited_ns)
        if self._frames < BLOCK_FRAMES:
            return
        self.paced = self._waited_ns >= _PACED_SHARE * BLOCK_FRAMES * _TICK_NS
        self._frames_before, self._waited_before_ns = self._frames, self._waited_ns
        self._frames = self._waited_ns = 0
        self._paced_blocks = self._paced_blocks + 1 if self.paced else 0
        self._proved = self._proved or self._paced_blocks >= _LIVE_BLOCKS
        self._in_a_row = self._in_a_row + 1 if self.paced != self.live else 0
        if not self.certain and self._in_a_row >= (_FILE_BLOCKS if self.live else _LIVE_BLOCKS):
            self.live = not self.live
            self._in_a_row = 0

    def ended(self, *, complete: bool = False) -> None:
        """It came to an end.

        One that is `complete` is that of a file for certain. Else how it came last says what it was: something short
        may have been taken for live input, a long burst for a file. What was live before stays so.
        """
        if self.certain:
            return
        if complete:
            self.live = False
            return
        frames, waited_ns = self._frames + self._frames_before, self._waited_ns + self._waited_before_ns
        if not self._proved and waited_ns < _ENDED_FILE_SHARE * frames * _TICK_NS:
            self.live = False
        if self._last_ns and sum(self._last_ns) >= _PACED_SHARE * len(self._last_ns) * _TICK_NS:
            self.live = True
