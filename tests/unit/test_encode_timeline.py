"""Where live input is heard in time, as a simulation: what arrives in whatever way is heard once, in order, and late by
what is told."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from shared.schema.frame_entry import Flags
from shared.schema.records import SourceRecord
from tests.unit.air import START_NS, Arrival, Heard, held_up, in_order, play, station
from worker.encode.source import EncodedFrame
from worker.encode.timeline import CUT_AHEAD_NS, FRAME_SAMPLES, START_FRAMES, TICK_NS, Slice, Timeline

BROKE = "broke"


def lost(at_s: float) -> Arrival:
    return Arrival(at_s, event=BROKE)


def assert_in_order(heard: Heard, *, jumps: int = 0) -> None:
    """Nothing is heard twice, nothing before what was older, and what is left out is left out in one go."""
    assert heard.repeats() == 0
    assert len(heard.jumps_s()) <= jumps, heard.jumps_s()
    assert heard.counted_silent_ms == pytest.approx(heard.silence_s() * 1_000, abs=100)


CHUNKS = [0.02, 0.1, 0.5]
BURSTS = [0.0, 0.3, 2.0, 4.0, 8.0]


@pytest.mark.parametrize(("chunk_s", "burst_s"), list(itertools.product(CHUNKS, BURSTS)))
@pytest.mark.parametrize("lead_ms", [1_000, 5_000])
def test_live_input_is_late_by_its_lead_from_the_first_sound_on(chunk_s: float, burst_s: float, lead_ms: int) -> None:
    """However long a burst it begins with; where one fills the lead, it is heard after half a second."""
    heard = play(station(0, 60, burst_s=burst_s, chunk_s=chunk_s), 60, lead_ms=lead_ms)
    assert_in_order(heard)
    assert heard.silence_s() == 0
    for at_s in (heard.first_at_s + 0.1, 30, 58):
        assert heard.late_s(at_s) == pytest.approx(lead_ms / 1_000, abs=0.05 + chunk_s)
    if burst_s * 1_000 > lead_ms:
        assert heard.first_at_s < 0.6 + chunk_s


@pytest.mark.parametrize("burst_speed", [1.7, 3.0, 10.0])
def test_a_burst_through_a_slow_network_is_waited_for(burst_speed: float) -> None:
    """Playing from its beginning would be late by its length for ever."""
    heard = play(station(0, 60, burst_s=4.0, burst_speed=burst_speed), 60)
    assert_in_order(heard, jumps=1 if burst_speed < 2 else 0)  # a slow one is hardly told from live input at first
    assert heard.late_s(50) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("kind", ["auto", "live"])
@pytest.mark.parametrize("burst_s", [15.0, 30.0, 64.0])
def test_a_burst_of_half_a_minute_is_left_out_in_one_cut(burst_s: float, kind: str) -> None:
    """Where it is not known to be live it may be a file, and is played at once; when it turns out, it is late by its
    lead, without silence, and nothing is heard twice."""
    heard = play(station(0, 200, burst_s=burst_s), 200, kind=kind)
    assert_in_order(heard, jumps=1)
    assert heard.silence_s() == 0
    assert heard.first_at_s < 2.0
    assert heard.late_s(burst_s + 60) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("chunk_s", [1.0, 2.0, 4.0, 6.0, 10.0])
@pytest.mark.parametrize("lead_ms", [200, 1_000, 3_000])
def test_input_in_chunks_that_says_so_is_never_silent(chunk_s: float, lead_ms: int) -> None:
    """The first pause is not heard, nor is any other."""
    arrivals = station(0, 180, burst_s=3 * chunk_s, chunk_s=chunk_s, says_chunk_s=chunk_s)
    heard = play(arrivals, 180, lead_ms=lead_ms, kind="live")
    assert_in_order(heard)
    assert heard.silence_s() == 0
    assert not heard.marks
    assert heard.delays_ms[-1][1] <= max(lead_ms, 1_000 * (chunk_s + 0.6))


@pytest.mark.parametrize("round_trip_s", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("segment_s", [2.0, 6.0])
def test_segments_that_are_fetched_one_by_one_are_waited_for(segment_s: float, round_trip_s: float) -> None:
    """Where it is told how much there is at once, pauses between them end no burst.

    What was on its way for longer than is let be is left out once.
    """
    arrivals = station(0, 120, burst_s=2 * segment_s, chunk_s=segment_s, says_chunk_s=1.5 * segment_s, says_burst=True)
    burst = [one for one in arrivals if one.made_s is not None and one.made_s < 0]
    second = {id(one) for one in burst[len(burst) // 2 :]}
    late = in_order(replace(one, at_s=one.at_s + round_trip_s) if id(one) in second else one for one in arrivals)
    heard = play(late, 120, kind="live")
    assert_in_order(heard, jumps=1 if round_trip_s > 0.8 else 0)
    assert heard.silence_s() == 0


@pytest.mark.parametrize("chunk_s", [1.5, 2.0, 4.0, 6.0, 10.0])
def test_input_in_chunks_that_does_not_say_so_is_silent_once(chunk_s: float) -> None:
    """The first pause is heard, less the lead; from then on the buffer is deep enough."""
    heard = play(station(0, 180, chunk_s=chunk_s), 180, kind="live")
    assert_in_order(heard)
    assert heard.silence_s() <= chunk_s + 0.7
    assert len(heard.marks) <= 1


@pytest.mark.parametrize(("clock_ppm", "hours"), [(-500.0, 12), (-100.0, 1), (200.0, 1), (500.0, 12)])
def test_a_clock_that_is_wrong_is_followed(clock_ppm: float, hours: int) -> None:
    """For hours: no gap, no cut, and late by the lead. Not followed, each would be off by more within one."""
    for_s = hours * 3_600.0
    heard = play(station(0, for_s, clock_ppm=clock_ppm), for_s)
    assert_in_order(heard)
    assert heard.silence_s() == 0
    for at_s in range(60, int(for_s), 600):
        assert heard.late_s(at_s) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("pause_s", [0.3, 0.9, 1.5, 5.0, 7.5])
@pytest.mark.parametrize("lead_ms", [1_000, 3_000, 8_000])
def test_a_pause_costs_no_more_than_it_is_longer_than_the_lead(pause_s: float, lead_ms: int) -> None:
    """What was held back is heard whole, once; the next pause of that kind is not heard any more."""
    arrivals = held_up(held_up(station(0, 120), 20, pause_s), 60, pause_s)
    heard = play(arrivals, 120, lead_ms=lead_ms)
    assert_in_order(heard)
    assert heard.silence_s() <= max(0.0, pause_s - lead_ms / 1_000) + 0.7
    assert all(at_s < 40 for at_s, _ in heard.marks)
    assert heard.delays_ms[-1][1] <= max(lead_ms, 1_000 * (pause_s + 0.6))


def test_a_delay_that_has_grown_shrinks_again_slowly() -> None:
    """Nobody hears how."""
    heard = play(held_up(station(0, 3_600), 20, 5.0), 3_600)
    delays = {round(at_s): delay_ms for at_s, delay_ms in heard.delays_ms}
    assert delays[60] > 5_000
    assert delays[3_590] < delays[600] < delays[60]
    assert_in_order(heard)
    assert len(heard.marks) == 1


@pytest.mark.parametrize("burst_s", [0.0, 2.0, 4.0, 30.0])
@pytest.mark.parametrize("away_s", [0.1, 0.5, 3.0, 60.0])
def test_input_that_was_away_is_late_by_its_lead_again(away_s: float, burst_s: float) -> None:
    """Silence for as long as it was away, less the lead; of the burst nothing is heard twice."""
    back_s = 30 + away_s
    arrivals = in_order([*station(0, 30), lost(30.01), *station(back_s, 200, burst_s=burst_s)])
    heard = play(arrivals, 200, kind="live")
    assert_in_order(heard, jumps=1)
    assert heard.silence_s() <= max(0.0, away_s - 1.0) + 1.5
    assert heard.late_s(back_s + 60) == pytest.approx(1.0, abs=0.6 if burst_s == 0 else 0.1)


@pytest.mark.parametrize("plays_s", [0.5, 1.0, 2.0, 6.0])
def test_a_station_that_hangs_up_all_the_time_is_heard_most_of_it(plays_s: float) -> None:
    """With a burst at each opening, which fills what was missed."""
    arrivals: list[Arrival] = []
    at_s = 0.0
    while at_s < 60:
        arrivals += [*station(at_s, at_s + plays_s, burst_s=2.0), lost(at_s + plays_s + 0.01)]
        at_s += max(1.0, plays_s) + 0.1
    heard = play(in_order(arrivals), 60, kind="live")
    assert heard.repeats() == 0
    assert heard.silence_s() < 0.15 * 60


def test_listeners_are_told_before_they_run_dry() -> None:
    """The mark of a gap lies ahead of the first frame that is missing."""
    heard = play(in_order([*station(0, 20), lost(20.01)]), 40, kind="live")
    ((at_s, flags),) = heard.marks
    assert flags is Flags.GAP
    assert at_s < heard.first_at_s + len(heard.made_s) * 0.02 - 0.05


# a file


def file_frames(count: int) -> list[EncodedFrame]:
    return [EncodedFrame(b"", 0, number * FRAME_SAMPLES) for number in range(count)]


def taken(timeline: Timeline, now_ns: int) -> list[Slice]:
    found = []
    while (one := timeline.take(now_ns)) is not None:
        found.append(one)
    return found


def filled(timeline: Timeline, frames: list[EncodedFrame], now_ns: int) -> list[Slice]:
    """What is taken when a file's frames are there whenever they are wanted."""
    found = taken(timeline, now_ns)
    while frames and timeline.wants_more(now_ns):
        timeline.arrived(frames.pop(0), now_ns, live=False, certain=True, paced=False)
        found += taken(timeline, now_ns)
    return found


def test_a_file_goes_on_air_when_half_a_second_is_there() -> None:
    """Its first frame is heard 200 ms later."""
    timeline, frames = Timeline(SourceRecord(url="a")), file_frames(START_FRAMES)
    for frame in frames[:-1]:
        timeline.arrived(frame, START_NS, live=False, certain=True, paced=False)
        assert timeline.take(START_NS) is None
    timeline.arrived(frames[-1], START_NS, live=False, certain=True, paced=False)
    assert [one.first_index for one in taken(timeline, START_NS)] == [0, 5, 10, 15, 20]
    assert timeline.time_ns(0) == START_NS + CUT_AHEAD_NS


@pytest.mark.parametrize("lead_ms", [200, 1_000, 5_000, 30_000])
def test_the_lead_of_a_file_is_filled_up_by_a_tenth(lead_ms: int) -> None:
    """At most a second of it; never is more published than the lead."""
    timeline, frames = Timeline(SourceRecord(url="a", lead_ms=lead_ms)), file_frames(5_000)
    now_ns, woken = START_NS, []
    for _ in range(20):
        before = timeline.next_index
        filled(timeline, frames, now_ns)
        woken.append(timeline.next_index - before)
        assert timeline.time_ns(timeline.next_index) - now_ns <= lead_ms * 1_000_000 + 6 * TICK_NS
        due_ns = timeline.due_ns(now_ns)
        assert due_ns is not None
        now_ns = max(due_ns, now_ns + 1)
    assert max(woken[1:]) <= min(lead_ms // 10, 1_000) / 20 + 5


def test_the_end_of_a_file_is_marked_behind_its_last_frame() -> None:
    """However few frames are left over; then it is over."""
    timeline, frames = Timeline(SourceRecord(url="a")), file_frames(28)
    filled(timeline, frames, START_NS)
    timeline.ended()
    (last,) = taken(timeline, START_NS)
    assert (last.first_index, len(last.frames), last.flags) == (25, 3, Flags.ENDED)
    assert timeline.over
    assert timeline.take(START_NS) is None


def test_a_file_shorter_than_its_start_is_played() -> None:
    """Seven frames and the end."""
    timeline, frames = Timeline(SourceRecord(url="a")), file_frames(7)
    assert not filled(timeline, frames, START_NS)
    timeline.ended()
    assert [len(one.frames) for one in taken(timeline, START_NS)] == [5, 2]


def test_nothing_at_all_leaves_nothing_behind() -> None:
    """Not even a mark: nobody ever heard of it."""
    timeline = Timeline(SourceRecord(url="a"))
    timeline.ended()
    assert timeline.take(START_NS) is None
    assert timeline.over


def test_a_file_that_stood_still_goes_on_where_it_stood() -> None:
    """A gap, and nothing of it is left out."""
    timeline, frames = Timeline(SourceRecord(url="a", lead_ms=1_000)), file_frames(200)
    found = filled(timeline, frames, START_NS)
    now_ns = timeline.time_ns(timeline.next_index)
    found += taken(timeline, now_ns)
    assert found[-1].flags is Flags.GAP
    later_ns = now_ns + 3_000_000_000
    more = filled(timeline, frames, later_ns)
    positions = [frame.position_samples // FRAME_SAMPLES for one in (*found, *more) for frame in one.frames]
    assert positions == list(range(len(positions)))
    assert timeline.time_ns(more[0].first_index) == pytest.approx(later_ns + CUT_AHEAD_NS, abs=TICK_NS)
    assert timeline.silent_ms(later_ns) == (more[0].first_index - found[-1].next_index) * 20


def test_what_redis_kept_waiting_is_moved_for_a_file_and_left_for_live_input() -> None:
    """A file goes on with it; of live input it would be too old, and what comes next is placed anew."""
    for live in (False, True):
        timeline = Timeline(SourceRecord(url="http://a", kind="live" if live else "file", lead_ms=1_000))
        ripe: Slice | None = None
        now_ns = START_NS
        for frame in file_frames(40):
            now_ns += TICK_NS
            timeline.arrived(frame, now_ns, live=live, certain=True, paced=False)
            ripe = ripe or timeline.take(now_ns)
        assert ripe is not None
        later_ns = now_ns + 5_000_000_000
        assert timeline.is_late(ripe, later_ns)
        moved = timeline.moved(ripe, later_ns)
        if live:
            assert moved is None
            assert timeline.take(later_ns) is None
        else:
            assert moved is not None
            assert timeline.time_ns(moved.first_index) >= later_ns + CUT_AHEAD_NS
            assert moved.frames == ripe.frames
        assert timeline.silent_ms(later_ns) > 4_000


def test_whoever_takes_over_goes_on_behind_the_last_entry() -> None:
    """With what lies ahead nobody hears it; where listeners ran dry, that is counted."""
    epoch_us = START_NS // 1_000 // 20_000 * 20_000
    for next_index, dry in ((100, False), (2, True)):
        timeline, frames = Timeline(SourceRecord(url="a")), file_frames(50)
        timeline.resume(epoch_us, next_index, 96_000, START_NS)
        found = filled(timeline, frames, START_NS)
        assert (found[0].first_index > next_index) is dry
        assert (timeline.silent_ms(START_NS) > 0) is dry


def test_a_file_that_breaks_before_it_is_on_air_loses_nothing() -> None:
    """What is held of it is heard when it goes on."""
    timeline, frames = Timeline(SourceRecord(url="http://a", kind="file")), file_frames(60)
    timeline.opened(START_NS)
    found = filled(timeline, frames[:20], START_NS)
    timeline.broke()
    timeline.opened(START_NS)
    found += filled(timeline, frames[20:], START_NS)
    timeline.ended()
    found += taken(timeline, START_NS)
    positions = [frame.position_samples // FRAME_SAMPLES for one in found for frame in one.frames]
    assert positions == list(range(60))
