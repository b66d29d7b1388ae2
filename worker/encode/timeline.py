"""Where a source's frames stand in time: index by index, ahead of the listeners. Pure.

    arrived(frame) ─▶ held ─▶ take() ─▶ slices of some frames with the index of the first, to be published

A file is taken as fast as its lead allows. Live input comes when it comes: it is placed so that its newest frame is
heard at the target of its depth (`worker.encode.depth`), and published at once. Listeners who are about to run dry are
told beforehand by a gap. Before live input is placed, be it for the first time, when it was opened anew or when
listeners ran dry, a burst at its beginning is waited for, and only as much of it is kept as the depth wants.

Source: design section 3, "Lead", "Cuts" and "Gaps".
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from shared.clock import NS_PER_MS, NS_PER_S, NS_PER_US
from shared.schema.frame_entry import FRAMES_PER_ENTRY, TICK_US, Flags
from shared.schema.records import SourceRecord
from worker.encode.depth import Depth
from worker.encode.source import EncodedFrame

TICK_NS = TICK_US * NS_PER_US
FRAME_SAMPLES = 960
START_FRAMES = 25
"""A file goes on air when 500 ms of it are there."""
CUT_AHEAD_NS = 200 * NS_PER_MS
"""A cut, a start or a return lies this far ahead, so that every worker knows of it in time."""
MARK_AHEAD_NS = 100 * NS_PER_MS
REFILL_SHARE, MOST_REFILL_NS = 10, NS_PER_S
"""The lead of a file is filled up when a tenth of it is used, at most a second: to wake for each entry, with its code
out of the caches by then, cost as much as encoding did."""
CALM_NS = 150 * NS_PER_MS
_CALM_FRAMES = 12
"""No more than that in so long a time is no burst: 1.6 times the pace of live input."""
_LONGEST_BURST_NS = NS_PER_S
"""Of what is certainly live, whatever still comes at once then."""
_EXPECTED_WITHIN_NS = 5 * NS_PER_S
_MUCH_FRAMES = 60 * 50
_SHORT_LEAD_MS = 500
_SHORT_LEAD_ENTRY_FRAMES = 2
"""Under a short lead frames cannot wait for five to be there."""


class Slice(NamedTuple):
    """To be published: some frames in a row, or none, and what follows them."""

    first_index: int
    frames: tuple[EncodedFrame, ...]
    flags: Flags
    item: int
    position_samples: int

    @property
    def next_index(self) -> int:
        return self.first_index + len(self.frames)


class _Burst:
    """Looks at what comes before it is placed, until it comes at the pace of live input.

    Args: expected: so many frames come as fast as they can be fetched, however long that pauses in between.
    """

    def __init__(self, expected: int = 0) -> None:
        self._missing = expected
        self._looked_from_ns = 0
        """When what is expected was there."""
        self._first_ns: int | None = None
        self._last: deque[int] = deque(maxlen=_CALM_FRAMES + 1)

    def arrived(self, now_ns: int) -> None:
        if self._first_ns is None:
            self._first_ns = now_ns
        if self._missing >= 0:
            self._looked_from_ns = now_ns
        self._missing -= 1
        self._last.append(now_ns)

    @property
    def newest_ns(self) -> int:
        """When the last frame came."""
        return self._last[-1]

    def over_ns(self, *, certain: bool) -> int | None:
        """When it is over if nothing more comes; None: nothing has come yet."""
        if self._first_ns is None:
            return None
        if self._missing > 0:
            return self._first_ns + _EXPECTED_WITHIN_NS
        calm_ns = self._first_ns + CALM_NS
        if len(self._last) > _CALM_FRAMES:
            calm_ns = max(calm_ns, self._last[0] + CALM_NS)
        return min(calm_ns, self._looked_from_ns + _LONGEST_BURST_NS) if certain else calm_ns


class Timeline:
    """One run.

    Attributes:
        epoch_us: time of frame 0; 0 until it is known.
        next_index: of the first frame that was not taken yet.
        position_samples: of that frame in the source.
        silent_frames: that listeners did not hear, though they should have; without those that are missing now.
        silent_from: the first of those that are missing now.
        broken: nothing comes until the source is open again.
        over: the end of the run was taken, too.
    """

    def __init__(self, source: SourceRecord) -> None:
        self.epoch_us = 0
        self.next_index = 0
        self.position_samples = 0
        self.silent_frames = 0
        self.silent_from: int | None = None
        self._source = source
        self._depth = Depth(source.lead_ms_of(live=True))
        self._held: deque[EncodedFrame] = deque()
        self._burst: _Burst | None = _Burst()
        """While what comes is not placed yet."""
        self._on_air = False
        """Frames lie ahead of the listeners, or come in time."""
        self._live = False
        self._certain = False
        self._ended = False
        self._filling = True
        self._marked_index = -1
        self._left_out = 0
        """So many of the next frames are not heard."""
        self.broken = False
        self.over = False

    def resume(self, epoch_us: int, next_index: int, position_samples: int, now_ns: int) -> None:
        """Go on where somebody else has published up to."""
        self.epoch_us, self.next_index, self.position_samples = epoch_us, next_index, position_samples
        self._on_air = not self._is_past(next_index, now_ns)
        if not self._on_air:
            self.silent_from = next_index

    # what is told

    @property
    def delay_ms(self) -> int:
        """How late live input is heard; 0 of a file."""
        return round(self._depth.target_ns / NS_PER_MS) if self._live else 0

    @property
    def rate_ppm(self) -> int:
        """By how much faster the source is to be played."""
        return self._depth.rate_ppm if self._live else 0

    def silent_ms(self, now_ns: int) -> int:
        """For how long listeners heard nothing."""
        missing = max(0, self.index_at(now_ns) - self.silent_from) if self.silent_from is not None else 0
        return (self.silent_frames + missing) * TICK_US // 1_000

    def index_at(self, common_ns: int) -> int:
        """First frame that does not begin before a moment."""
        return -(-(common_ns - self.epoch_us * NS_PER_US) // TICK_NS)

    def time_ns(self, index: int) -> int:
        """When a frame is played, without the slots of guilds."""
        return self.epoch_us * NS_PER_US + index * TICK_NS

    # what comes

    def opened(self, now_ns: int, chunk_ns: int = 0, burst_ns: int = 0) -> None:
        """The source is open, for the first time or again.

        Args:
            chunk_ns: it is said to come in chunks of this length.
            burst_ns: so much of it is said to be there at once.
        """
        self.broken = False
        if self._live:
            if self._burst is not None:
                self._held.clear()  # what follows them was not heard in one piece with them
            self._left_out = 0
        if self._live or (self._burst is not None and burst_ns):
            self._burst = _Burst(burst_ns * 9 // 10 // TICK_NS)  # segments are a little shorter than is said
        self._depth.opened(now_ns, chunk_ns)

    def arrived(self, frame: EncodedFrame, now_ns: int, *, live: bool, certain: bool, paced: bool) -> None:
        """Take a frame.

        Args:
            live: the source is taken for live input.
            certain: whatever comes.
            paced: it has lately come at the pace of live input.
        """
        self._live, self._certain = live, certain
        if live:
            self._depth.noted(now_ns)
        else:
            self._depth.not_live()
        if self._left_out:
            self._left_out -= 1
            return
        self._held.append(frame)
        if self._burst is not None:
            self._burst.arrived(now_ns)
        elif live:
            depth_ns = self.time_ns(self.next_index + len(self._held) - 1) - now_ns
            self._left_out = self._depth.measured(now_ns, depth_ns, may_leave_out=certain or paced)

    def ended(self) -> None:
        """Nothing more will come."""
        self._ended, self._live = True, False

    def broke(self) -> None:
        """Nothing comes until it is opened again: what is placed of live input waits for nothing more."""
        self.broken = True

    # what goes

    def wants_more(self, now_ns: int) -> bool:
        """Whether a file's next frames may come; what is or may be live input comes whenever it does."""
        if self._live or self._burst is not None or len(self._held) < FRAMES_PER_ENTRY or self._may_fill(now_ns):
            return True
        return not self._certain and not self.holds_much

    @property
    def holds_much(self) -> bool:
        """More than any burst is there: it is a file."""
        return len(self._held) >= _MUCH_FRAMES

    def take(self, now_ns: int) -> Slice | None:
        """What is to be published now; None: nothing more for now."""
        if self.over:
            return None
        if self._burst is not None and not self._place(now_ns):
            return self._gap(()) if self._on_air and self._is_past(self.next_index, now_ns) else None
        if len(self._held) >= self._entry_frames or (self._held and (self._ended or (self.broken and self._live))):
            if self._live or self._may_fill(now_ns):
                return self._slice(self._entry_frames)
            return None
        if self._ended:
            self.over = True
            return self._mark((), Flags.ENDED) if self.epoch_us else None
        if self._on_air and self._is_past(self.next_index, now_ns):
            rest = tuple(self._held)
            self._held.clear()
            return self._gap(rest)
        return None

    def due_ns(self, now_ns: int) -> int | None:
        """When there may be something to take even if nothing comes; None: never."""
        due = []
        if self._on_air:
            due.append(self.time_ns(self.next_index) - MARK_AHEAD_NS)
        if self._burst is not None and self._live:
            over_ns = self._burst.over_ns(certain=self._certain)
            due += [] if over_ns is None else [over_ns]
        ripe = len(self._held) >= FRAMES_PER_ENTRY or (self._ended and self._held)
        if ripe and not self._live and not self._may_fill(now_ns):
            return self.time_ns(self.next_index) - self._lead_ns + self._refill_ns
        return min(due, default=None)

    def moved(self, late: Slice, now_ns: int) -> Slice | None:
        """Redis was away while this waited, and it is too late now; None: leave it.

        A file goes on with it at now + 200 ms; of live input it would be too old.
        """
        if self._live:
            self._held.clear()
            self.next_index, self._on_air, self._burst = late.first_index, False, _Burst()
            self.silent_from = late.first_index if self.silent_from is None else self.silent_from
            return None
        moved = max(late.first_index, self.index_at(now_ns + CUT_AHEAD_NS))
        if late.frames:
            self.silent_frames += moved - late.first_index
        self.next_index = moved + len(late.frames)
        return late._replace(first_index=moved)

    def cut_off(self, now_ns: int) -> Slice:
        """The end by order: of what was published, nothing is heard from now + 200 ms on."""
        self._live, self.over = False, True
        index = max(0, self.index_at(now_ns + CUT_AHEAD_NS))
        return Slice(index, (), Flags.ENDED, 0, self.position_samples)

    def is_late(self, late: Slice, now_ns: int) -> bool:
        """Whether listeners have run dry of it."""
        return self._is_past(late.first_index, now_ns)

    # how

    @property
    def _entry_frames(self) -> int:
        short = self._live and self._source.lead_ms_of(live=True) < _SHORT_LEAD_MS
        return _SHORT_LEAD_ENTRY_FRAMES if short else FRAMES_PER_ENTRY

    @property
    def _lead_ns(self) -> int:
        return self._source.lead_ms_of(live=False) * NS_PER_MS

    @property
    def _refill_ns(self) -> int:
        return min(self._lead_ns // REFILL_SHARE, MOST_REFILL_NS)

    def _is_past(self, index: int, now_ns: int) -> bool:
        return self.time_ns(index) - MARK_AHEAD_NS <= now_ns

    def _may_fill(self, now_ns: int) -> bool:
        ahead_ns = self.time_ns(self.next_index) - now_ns
        if ahead_ns >= self._lead_ns:
            self._filling = False
        elif ahead_ns <= self._lead_ns - self._refill_ns:
            self._filling = True
        return self._filling

    def _place(self, now_ns: int) -> bool:
        """Give what is held its place in time, if it is time for that."""
        if self._live:
            return self._place_live(now_ns)
        if len(self._held) < (FRAMES_PER_ENTRY if self.epoch_us else START_FRAMES) and not self._ended:
            return False
        if self._held and not self._on_air:
            self._go_on_air(now_ns + CUT_AHEAD_NS)
        self._burst = None
        return True

    def _place_live(self, now_ns: int) -> bool:
        assert self._burst is not None
        over_ns = self._burst.over_ns(certain=self._certain)
        if over_ns is None or now_ns < over_ns:
            return False
        newest_at_ns = self._burst.newest_ns + max(self._depth.target_ns, CUT_AHEAD_NS)
        soonest_ns = now_ns + CUT_AHEAD_NS
        if self._on_air:
            # nobody heard that it was away: what they have is continued by what is newer
            keep = self.index_at(newest_at_ns) - self.next_index + 1
        else:
            keep = 1 + (newest_at_ns - soonest_ns) // TICK_NS
        while len(self._held) > max(1, keep):
            self._held.popleft()
        if not self._on_air:
            self._go_on_air(max(soonest_ns, newest_at_ns - (len(self._held) - 1) * TICK_NS))
        self._burst = None
        self._depth.placed(now_ns)
        return True

    def _go_on_air(self, common_ns: int) -> None:
        """What comes next is played then, or just after it; up to there listeners heard nothing."""
        if not self.epoch_us:
            self.epoch_us = -(-common_ns // TICK_NS) * TICK_US
        else:
            index = max(self.next_index + 1, self.index_at(common_ns))
            if self.silent_from is not None:
                self.silent_frames += index - self.silent_from
            self.next_index = index
        self.silent_from = None
        self._on_air = True

    def _slice(self, count: int) -> Slice:
        frames = tuple(self._held.popleft() for _ in range(min(count, len(self._held))))
        self.over = self._ended and not self._held
        return self._mark(frames, Flags.ENDED if self.over else Flags.NONE)

    def _gap(self, rest: tuple[EncodedFrame, ...]) -> Slice:
        """Listeners run dry behind these frames."""
        gap = self._mark(rest, Flags.GAP)
        self._on_air, self._burst = False, _Burst()
        self.silent_from = gap.next_index
        return gap

    def _mark(self, frames: tuple[EncodedFrame, ...], flags: Flags) -> Slice:
        if not frames and self.next_index == self._marked_index:
            self.next_index += 1  # a mark stands there already, and an id is used once
        if frames:
            taken = Slice(self.next_index, frames, flags, frames[0].item, frames[0].position_samples)
            self.position_samples = frames[-1].position_samples + FRAME_SAMPLES
        else:
            taken = Slice(self.next_index, (), flags, 0, self.position_samples)
            self._marked_index = self.next_index
        self.next_index = taken.next_index
        return taken
