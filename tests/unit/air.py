"""Live input in simulated time: how its sound arrives, and what a listener hears of it.

Sound that comes into being at a moment arrives by a plan, late, in chunks, at once; nature and timeline of a run make
indices of it. What a listener hears is, tick by tick, the moment at which what is heard came into being.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from shared.clock import NS_PER_MS, NS_PER_S
from shared.schema.frame_entry import Flags
from shared.schema.records import SourceRecord
from worker.encode.nature import Nature
from worker.encode.source import EncodedFrame
from worker.encode.timeline import FRAME_SAMPLES, TICK_NS, Timeline

START_NS = 1_000 * NS_PER_S
DECODING_NS = NS_PER_MS // 2
"""Frames that are there at once come so far apart."""
LEAD_S = 1.0


@dataclass(slots=True)
class Arrival:
    """Something that happens to the input: sound that was made at `made_s` comes, or it is opened, or breaks."""

    at_s: float
    made_s: float | None = None
    event: str = ""
    chunk_s: float = 0.0
    burst_s: float = 0.0


@dataclass
class Heard:
    """What a listener heard.

    Attributes:
        made_s: by tick since the first sound, when what is heard came into being; None: silence.
        first_at_s: when the first sound was heard.
        gaps, states: marks that were published, and delays over time.
    """

    first_at_s: float = 0.0
    made_s: list[float | None] = field(default_factory=list)
    marks: list[tuple[float, Flags]] = field(default_factory=list)
    delays_ms: list[tuple[float, int]] = field(default_factory=list)
    counted_silent_ms: int = 0

    def silence_s(self) -> float:
        """In all, between first and last sound."""
        return self.made_s.count(None) * 0.02

    def late_s(self, at_s: float) -> float | None:
        """How old is what is heard then."""
        tick = round((at_s - self.first_at_s) / 0.02)
        made_s = self.made_s[tick] if 0 <= tick < len(self.made_s) else None
        return None if made_s is None else at_s - made_s

    def repeats(self) -> int:
        """Ticks in which something is heard that was heard before, or older than that."""
        newest, count = float("-inf"), 0
        for made_s in self.made_s:
            if made_s is not None:
                count += made_s <= newest + 1e-9
                newest = max(newest, made_s)
        return count

    def jumps_s(self, least_s: float = 0.1) -> list[float]:
        """What was left out where sound follows sound."""
        found = []
        for before, after in zip(self.made_s, self.made_s[1:], strict=False):
            if before is not None and after is not None and after - before > least_s:
                found.append(after - before)
        return found


def play(
    arrivals: Iterable[Arrival],
    until_s: float,
    *,
    lead_ms: int | None = None,
    kind: str = "auto",
    looks_live: bool = True,
    certain: bool = False,
    on_air: Callable[[Timeline], None] | None = None,
) -> Heard:
    """Let sound arrive, and hear what is made of it."""
    source = SourceRecord(url="http://station/", kind=kind, lead_ms=lead_ms)
    nature, timeline, heard = Nature(kind, is_local=False), Timeline(source), Heard()
    if on_air is not None:
        on_air(timeline)
    queue = deque(arrivals)
    stretched = 0.0
    ticks: dict[int, float] = {}
    made: dict[int, float] = {}
    now_ns, asked_ns = START_NS, START_NS
    number = 0

    until_ns = _common(until_s)
    while now_ns < until_ns:
        while (ripe := timeline.take(now_ns)) is not None:
            for index, frame in enumerate(ripe.frames, ripe.first_index):
                ticks[(timeline.time_ns(index) - START_NS) // TICK_NS] = made[frame.position_samples]
            if ripe.flags:
                heard.marks.append(((now_ns - START_NS) / NS_PER_S, ripe.flags))
        heard.delays_ms.append(((now_ns - START_NS) / NS_PER_S, timeline.delay_ms))
        due_ns = timeline.due_ns(now_ns)
        if not timeline.wants_more(now_ns):
            assert due_ns is not None
            if timeline.holds_much:
                nature.certain = True
            now_ns = max(now_ns + 1, due_ns)
            asked_ns = now_ns
            continue
        arrival = queue[0] if queue else None
        came_ns = max(now_ns, _common(arrival.at_s)) if arrival is not None else None
        if came_ns is None or (due_ns is not None and due_ns <= came_ns):
            if due_ns is None:
                break
            now_ns = max(now_ns + 1, due_ns)
            continue
        queue.popleft()
        assert arrival is not None
        now_ns = came_ns
        if arrival.event == "opened":
            nature.opened(live=looks_live, certain=certain)
            timeline.opened(now_ns, round(arrival.chunk_s * NS_PER_S), round(arrival.burst_s * NS_PER_S))
        elif arrival.event == "broke":
            timeline.broke()
        elif arrival.event == "ended":
            nature.ended()
            timeline.ended()
        else:
            assert arrival.made_s is not None
            nature.arrived(now_ns - asked_ns)
            stretched += 1 - timeline.rate_ppm * 1e-6  # as the child plays it faster or slower
            for again in range(int(stretched)):
                frame = EncodedFrame(b"", 0, number * FRAME_SAMPLES)
                made[frame.position_samples] = arrival.made_s + again * 0.01
                number += 1
                timeline.arrived(frame, now_ns, live=nature.live, certain=nature.certain, paced=nature.paced)
            stretched %= 1
        asked_ns = now_ns
    heard.counted_silent_ms = timeline.silent_ms(now_ns)
    if ticks:
        first, last = min(ticks), max(ticks)
        heard.first_at_s = first * 0.02
        heard.made_s = [ticks.get(tick) for tick in range(first, min(last, round(until_s / 0.02)) + 1)]
    return heard


def _common(at_s: float) -> int:
    return START_NS + round(at_s * NS_PER_S)


def station(
    from_s: float,
    to_s: float,
    *,
    burst_s: float = 0.0,
    chunk_s: float = 0.02,
    says_chunk_s: float = 0.0,
    says_burst: bool = False,
    clock_ppm: float = 0.0,
    burst_speed: float | None = None,
) -> list[Arrival]:
    """A connection that is open from one moment to another: a burst of what was made before, then what is made.

    Args:
        chunk_s: so much comes at once, when its last frame was made.
        says_chunk_s: how long its pauses may be, by its own word.
        says_burst: it tells how long its burst is.
        clock_ppm: by how much the station's clock is fast.
        burst_speed: how many seconds of the burst come in a second; None: as fast as they are decoded.
    """
    found = [Arrival(from_s, event="opened", chunk_s=says_chunk_s, burst_s=burst_s if says_burst else 0.0)]
    pace = 0.02 / (1 + clock_ppm * 1e-6)
    at_s = from_s
    frames = round(burst_s / 0.02)
    for number in range(frames):
        at_s += DECODING_NS / NS_PER_S if burst_speed is None else 0.02 / burst_speed
        found.append(Arrival(at_s, from_s - (frames - number) * 0.02))
    made_s, number = from_s, 0
    each = max(1, round(chunk_s / 0.02))
    while made_s < to_s:
        batch = []
        for _ in range(each):
            batch.append(made_s)
            number += 1
            made_s = from_s + number * pace
        for place, one in enumerate(batch):
            found.append(Arrival(max(at_s, made_s) + place * DECODING_NS / NS_PER_S, one))
    return in_order(one for one in found if one.at_s <= to_s)


def in_order(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """Nothing overtakes on its way: what was kept back keeps back what follows."""
    found: list[Arrival] = []
    for one in arrivals:
        at_s = max(one.at_s, found[-1].at_s + DECODING_NS / NS_PER_S) if found else one.at_s
        found.append(one if one.at_s == at_s else replace(one, at_s=at_s))
    return found


def held_up(arrivals: Iterable[Arrival], from_s: float, for_s: float) -> list[Arrival]:
    """The same, but nothing comes for a while, and then all that was kept back at once."""
    end_s = from_s + for_s
    return in_order(replace(one, at_s=end_s) if from_s <= one.at_s < end_s else one for one in arrivals)
