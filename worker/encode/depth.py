"""How late live input is heard, and what is done to keep it so. Pure.

The depth of the buffer is the time from the arrival of the newest frame to when it is played. Its target is the lead,
or more where arrival comes in chunks: the longest pause seen lately and a margin. The depth is held by playing a
little faster or slower, by steps nobody hears; what is far too deep (the rest of a burst, what was held back by an
outage) is left out in one go. The deepest moment of some seconds counts, as a single frame may always be late.

Source: design section 3, "Lead".
"""

from __future__ import annotations

from collections import deque

from shared.clock import NS_PER_MS, NS_PER_S, NS_PER_US
from shared.schema.frame_entry import TICK_US

_TICK_NS = TICK_US * NS_PER_US
LONGEST_DEPTH_NS = 30 * NS_PER_S
_PAUSES_KEPT_NS = 120 * NS_PER_S
_OUTAGE_NS = 12 * NS_PER_S
"""A pause that is longer, and longer than one and a half of those that were told, is not how the input comes."""
_MOST_MARGIN_NS = 500 * NS_PER_MS
_SHRINKS_PPM = 1_000
"""A target that was deeper comes back by a millisecond a second."""
_LOOK_NS = 5 * NS_PER_S
_FIRST_LOOK_NS = 2 * NS_PER_S
TOO_DEEP_NS = 800 * NS_PER_MS
_EXACT_NS = 20 * NS_PER_MS
"""What is no further off is left alone."""
_PPM_PER_MS = 10
MOST_PPM = 3_000
"""A twentieth of a semitone."""


class Depth:
    """Of one live input.

    Args:
        lead_ms: the least target.
    Attributes:
        target_ns: how late it shall be heard.
        rate_ppm: by how much faster it is to be played now.
    """

    def __init__(self, lead_ms: int) -> None:
        self._lead_ns = lead_ms * NS_PER_MS
        self.target_ns = self._lead_ns
        self.rate_ppm = 0
        self._pauses: deque[tuple[int, int]] = deque()
        """When a pause ended and how long it was: each longer than all that came after it."""
        self._arrived_ns: int | None = None
        self._outage_ns = _OUTAGE_NS
        self._too_deep_ns = TOO_DEEP_NS
        self._looked_ns = 0
        self._look_for_ns = _FIRST_LOOK_NS
        self._deepest_ns: int | None = None

    def opened(self, now_ns: int, chunk_ns: int) -> None:
        """The input was opened anew; it is said to come in chunks of this length, 0 where nothing is said."""
        self._arrived_ns = None
        self._outage_ns = max(_OUTAGE_NS, 3 * chunk_ns // 2)
        # How old the newest chunk was when it was found is not known: a skip at the next one would be heard, it is not.
        self._too_deep_ns = TOO_DEEP_NS + chunk_ns * 2 // 3
        if chunk_ns:
            self._paused(now_ns, chunk_ns)

    def noted(self, now_ns: int) -> None:
        """A frame arrived: note the pause before it."""
        if self._arrived_ns is not None and now_ns - self._arrived_ns <= self._outage_ns:
            self._paused(now_ns, now_ns - self._arrived_ns)
        self._arrived_ns = now_ns

    def not_live(self) -> None:
        """What comes now is asked for when there is room for it: that makes pauses that mean nothing."""
        self._arrived_ns = None

    def placed(self, now_ns: int) -> None:
        """What comes next is played at its target."""
        self.rate_ppm = 0
        self._look(now_ns, _FIRST_LOOK_NS)

    def measured(self, now_ns: int, depth_ns: int, *, may_leave_out: bool) -> int:
        """A frame arrived that will be played after so long; returns how many of the next ones are left out."""
        self._deepest_ns = depth_ns if self._deepest_ns is None else max(depth_ns, self._deepest_ns)
        if now_ns - self._looked_ns < self._look_for_ns:
            return 0
        error_ns = self._deepest_ns - self.target_ns
        longest_ns = self._pauses[0][1] if self._pauses else 0
        self._shrink(now_ns - self._looked_ns)
        self._look(now_ns, max(_LOOK_NS, 2 * longest_ns))
        if error_ns > self._too_deep_ns and may_leave_out:
            self.rate_ppm = 0
            return error_ns // _TICK_NS
        beyond_ms = max(0, abs(error_ns) - _EXACT_NS) / NS_PER_MS
        ppm = min(MOST_PPM, round(beyond_ms * _PPM_PER_MS))
        self.rate_ppm = ppm if error_ns > 0 else -ppm
        return 0

    def _look(self, now_ns: int, for_ns: int) -> None:
        self._looked_ns, self._look_for_ns, self._deepest_ns = now_ns, for_ns, None

    def _paused(self, now_ns: int, pause_ns: int) -> None:
        while self._pauses and self._pauses[-1][1] <= pause_ns:
            self._pauses.pop()
        self._pauses.append((now_ns, pause_ns))
        while now_ns - self._pauses[0][0] > _PAUSES_KEPT_NS:
            self._pauses.popleft()
        self.target_ns = max(self.target_ns, self._wanted_ns)

    @property
    def _wanted_ns(self) -> int:
        longest_ns = self._pauses[0][1] if self._pauses else 0
        margin_ns = min(longest_ns // 4, _MOST_MARGIN_NS)
        return max(self._lead_ns, min(longest_ns + margin_ns, LONGEST_DEPTH_NS))

    def _shrink(self, within_ns: int) -> None:
        self.target_ns = max(self._wanted_ns, self.target_ns - within_ns * _SHRINKS_PPM // 1_000_000)
