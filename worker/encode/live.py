"""When live input may go on air, and with which of its frames. Pure.

What comes from a live source begins with a burst: servers send some seconds at once, and while the source was opened
sound came in as well. Played from its beginning, that would be late by its length for ever. So the run begins when
frames have come at their own pace for half a second, and what is older than the lead allows is left out. The same
holds whenever the source is opened anew, when it comes back after listeners ran dry, and when it has been later than
its lead for long: a burst paused and seemed to be over, a station's clock is fast, or nothing could be published.

A file whose server does not tell its length looks like live input, but comes faster: at once, or steadily. From when
that shows nothing is left out.

Source: design section 3, "Lead".
"""

from __future__ import annotations

from collections import deque
from typing import Literal, NamedTuple

from shared.clock import NS_PER_MS, NS_PER_US
from shared.schema.frame_entry import FRAMES_PER_ENTRY, TICK_US

_TICK_NS = TICK_US * NS_PER_US
PACE_NS = 500 * NS_PER_MS
PACE_FRAMES = 37
"""So many frames in less time are a burst, or a piece of one: networks and busy machines let bursts pause."""
LOOK_S = 0.05
"""A source that pauses is looked at so often."""
LEAST_FRAMES = 25
"""Of less than 500 ms, a source that pauses is waited for."""
LONGEST_BURST_FRAMES = 500
"""What still comes faster after 10 s more of sound than of time is not live, whatever is known of its end."""
_LIVE_RATE = 1.01
"""What goes on coming faster than that is a file which its server sends slowly; clocks are far better."""
_BURST_RATE = 1.6
"""What comes faster still is a burst, or the rest of one."""
_CALM_NS, _BEHIND_NS = 100 * NS_PER_MS, 800 * NS_PER_MS
_BEHIND_FOR_NS = 10_000 * NS_PER_MS
"""Sources that come in chunks are later than their lead when a chunk has come, and not before the next one."""
_STEADY_WITHIN_NS = 120_000 * NS_PER_MS
_SHORT_LEAD_MS = 500
_SHORT_LEAD_ENTRY_FRAMES = 2


class Beginning(NamedTuple):
    """How many of the newest frames are played, when the first of them, and whether the source is live at all."""

    frames: int
    first_at_ns: int
    live: bool = True

    @property
    def newest_at_ns(self) -> int:
        """When the newest frame is played."""
        return self.first_at_ns + (self.frames - 1) * _TICK_NS


class LivePace:
    """How much came of a source since it was opened."""

    def __init__(self) -> None:
        self.frames = 0
        self._opened_ns = 0

    def arrived(self, now_ns: int) -> None:
        """Take note of a frame."""
        if not self.frames:
            self._opened_ns = now_ns
        self.frames += 1

    def is_live(self, now_ns: int) -> bool:
        """Whether that is live input and its burst. What it was late by for a while may come at once afterwards."""
        return self.frames <= LONGEST_BURST_FRAMES + _LIVE_RATE * (now_ns - self._opened_ns) / _TICK_NS


class LiveBeginning:
    """Watches the first frames that a live source sends after it was opened, or after it was away.

    Args:
        lead_ms: by how much the newest frame is late.
        least_ns: how far ahead of now the first frame must lie.
        pace: of the source, told of each frame before this is.
    """

    def __init__(self, lead_ms: int, least_ns: int, pace: LivePace) -> None:
        self._lead_ns = max(lead_ms * NS_PER_MS, least_ns)
        self._least_ns = least_ns
        self._pace = pace
        self._just_opened = pace.frames <= 1
        self._frames = 0
        self._watched_from_ns = 0
        self._arrivals_ns: deque[int] = deque(maxlen=PACE_FRAMES)

    def arrived(self, now_ns: int) -> Beginning | None:
        """Take note of a frame; None: it is too early to begin."""
        if not self._frames:
            self._watched_from_ns = now_ns
        self._frames += 1
        self._arrivals_ns.append(now_ns)
        # of a source that was open before, what was held back meanwhile may come at once, however much it is
        endless = self._frames >= LONGEST_BURST_FRAMES if self._just_opened else not self._pace.is_live(now_ns)
        if endless:
            return Beginning(self._frames, now_ns + self._least_ns, live=False)
        return self.look(now_ns)

    def look(self, now_ns: int) -> Beginning | None:
        """Whether the burst is over by now: then the next frames take their time."""
        came_slowly = self._frames < PACE_FRAMES or now_ns - self._arrivals_ns[0] >= PACE_NS
        watched_long = self._frames >= LEAST_FRAMES and now_ns - self._watched_from_ns >= PACE_NS
        return self._begin(now_ns) if came_slowly and watched_long else None

    def _begin(self, now_ns: int) -> Beginning:
        frames = min(self._frames, 1 + (self._lead_ns - self._least_ns) // _TICK_NS)
        return Beginning(frames, now_ns + self._lead_ns - (frames - 1) * _TICK_NS)


class LiveLateness:
    """Watches live input that is on the air: whether it has come to be later than its lead, and by what.

    It becomes late at once when the rest of a burst comes, and steadily when it is a file that its server sends slowly,
    or when such a rest comes through a slow network. A file does so again and again.
    """

    def __init__(self) -> None:
        self._calm_ns: int | None = None
        """When it was last as late as it shall be."""
        self._came = 0
        """Frames since then."""
        self._behind_ns: int | None = None
        self._steady = False
        self._steady_before_ns: int | None = None
        """When it was last found to be behind because it came steadily."""

    def taken(self, now_ns: int, late_ns: int, waiting: int) -> Literal["in time", "behind", "no live input"]:
        """Take note of a frame.

        Args:
            late_ns: by how much more than its lead the newest frame is late that is there.
            waiting: frames that are there.
        """
        self._came += 1
        if late_ns < _CALM_NS or self._calm_ns is None:
            self._calm_ns, self._came = now_ns, 0
        if late_ns < _BEHIND_NS:
            self._behind_ns = None
            return "in time"
        if self._behind_ns is None:
            self._behind_ns = now_ns
            came_ns, within_ns = (self._came + waiting) * _TICK_NS, now_ns - self._calm_ns
            self._steady = _LIVE_RATE * within_ns < came_ns < _BURST_RATE * within_ns
        if now_ns - self._behind_ns < _BEHIND_FOR_NS:
            return "in time"
        before_ns, self._steady_before_ns = self._steady_before_ns, now_ns if self._steady else None
        self._calm_ns = self._behind_ns = None
        if self._steady and before_ns is not None and now_ns - before_ns < _STEADY_WITHIN_NS:
            return "no live input"
        return "behind"


def entry_frames(lead_ms: int) -> int:
    """How many frames of live input go into one entry: under a short lead they cannot wait for five to be there."""
    return FRAMES_PER_ENTRY if lead_ms >= _SHORT_LEAD_MS else _SHORT_LEAD_ENTRY_FRAMES
