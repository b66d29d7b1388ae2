"""When live input may go on air: at its own pace, late by its lead, without what is too old for that."""

from __future__ import annotations

import itertools

import pytest

from worker.encode.live import (
    LEAST_FRAMES,
    LONGEST_BURST_FRAMES,
    PACE_FRAMES,
    Beginning,
    LiveBeginning,
    LiveLateness,
    LivePace,
    entry_frames,
)

MS = 1_000_000
TICK_NS = 20 * MS
LEAST_NS = 200 * MS
ENCODED_NS = MS // 2
"""Between two frames of a burst."""
PAUSE_NS = 200 * MS


def begin(
    lead_ms: int, burst_frames: int, chunk_frames: int = 1, pause_each: int | None = None
) -> tuple[Beginning, int, int]:
    """What is found of a source that begins with a burst; how many frames came until then, and when the last one."""
    pace = LivePace()
    watched = LiveBeginning(lead_ms, LEAST_NS, pace)
    now_ns = 0
    for number in itertools.count(1):
        if pause_each and number <= burst_frames and number % pause_each == 0:
            now_ns += PAUSE_NS
        elif number <= burst_frames or (number - burst_frames) % chunk_frames:
            now_ns += ENCODED_NS
        else:
            now_ns += chunk_frames * TICK_NS
        pace.arrived(now_ns)
        found = watched.arrived(now_ns)
        if found is not None:
            return found, number, now_ns
    raise AssertionError


@pytest.mark.parametrize("burst_frames", [0, 60, 200])
def test_the_newest_frame_is_late_by_the_lead(burst_frames: int) -> None:
    """Whatever was sent at once; a second of it is kept, and the rest is left out."""
    found, came, now_ns = begin(1_000, burst_frames)
    frames, first_at_ns, live = found
    assert came > burst_frames
    assert frames == min(came, 41)
    assert live
    assert first_at_ns + (frames - 1) * TICK_NS == found.newest_at_ns == now_ns + 1_000 * MS


@pytest.mark.parametrize("pause_each", [30, 45, 100])
def test_a_burst_that_pauses_is_still_a_burst(pause_each: int) -> None:
    """The network takes a round trip between the pieces of it, and a busy machine has other work."""
    _, came, _ = begin(1_000, 300, pause_each=pause_each)
    assert came > 300


def test_under_the_shortest_lead_only_the_newest_frame_is_kept() -> None:
    """It lies as far ahead as everybody needs to know of it."""
    (frames, first_at_ns, _), _, now_ns = begin(200, 100)
    assert (frames, first_at_ns - now_ns) == (1, LEAST_NS)


def test_a_longer_lead_than_the_burst_plays_all_of_it() -> None:
    """Nothing is left out for which there is time."""
    (frames, first_at_ns, _), came, now_ns = begin(30_000, 100)
    assert frames == came
    assert first_at_ns > now_ns + LEAST_NS


@pytest.mark.parametrize("chunk_frames", [2, 12, 50])
def test_a_source_that_sends_in_chunks_has_its_own_pace(chunk_frames: int) -> None:
    """A pause behind a chunk is no burst any more."""
    _, came, _ = begin(1_000, 100, chunk_frames)
    assert came <= 100 + max(PACE_FRAMES, chunk_frames)


def test_a_source_that_pauses_after_its_burst_begins_then() -> None:
    """With what there is, if that is enough to begin with at all."""
    watched = LiveBeginning(1_000, LEAST_NS, LivePace())
    for number in range(LEAST_FRAMES):
        assert watched.look(number * ENCODED_NS) is None
        assert watched.arrived(number * ENCODED_NS) is None
    assert watched.look(499 * MS) is None
    assert watched.look(500 * MS) == Beginning(LEAST_FRAMES, (1_500 - 20 * (LEAST_FRAMES - 1)) * MS)


def test_what_never_comes_at_its_own_pace_loses_nothing() -> None:
    """A file of unknown length is read as fast as it can be, and played from its beginning."""
    found, came, now_ns = begin(1_000, 10 * LONGEST_BURST_FRAMES)
    assert found == Beginning(came, now_ns + LEAST_NS, live=False)
    assert came == LONGEST_BURST_FRAMES


def test_entries_are_short_under_a_short_lead() -> None:
    """Five frames would be there only when the first one is nearly due."""
    assert [entry_frames(lead_ms) for lead_ms in (200, 499, 500, 1_000)] == [2, 2, 5, 5]


STEADY_WAITING = 3


def found(rate: float, *, surplus_ns: int = 0, for_ns: int = 120_000 * MS, jitter_ns: int = 0) -> list[str]:
    """What is found of input that comes at so many times its pace, with a surplus from the second frame on."""
    lateness = LiveLateness()
    told: list[str] = []
    cut_ns = 0
    for number in range(for_ns // TICK_NS):
        now_ns = number * TICK_NS  # it is taken at the pace of its play
        late_ns = round((rate - 1) * now_ns) + (surplus_ns if number else 0) - cut_ns
        jitter_now_ns = jitter_ns if number % 50 < 40 else 0
        verdict = lateness.taken(now_ns, late_ns + jitter_now_ns, STEADY_WAITING + late_ns // TICK_NS)
        if verdict != "in time":
            told.append(verdict)
        if verdict == "behind":
            cut_ns += late_ns
        if verdict == "no live input":
            break
    return told


@pytest.mark.parametrize("rate", [0.999, 1.0, 1.000_1])
def test_input_at_its_own_pace_is_in_time(rate: float) -> None:
    """A clock that is fast by 0.01 % takes hours to be late."""
    assert found(rate) == []


def test_a_fast_clock_is_noticed_in_the_end() -> None:
    """After an hour at most for one that no sound card has."""
    assert found(1.000_5, for_ns=3_600_000 * MS) == ["behind"] * 2


def test_the_rest_of_a_burst_is_behind_and_no_file() -> None:
    """It comes at once, and then keeps its pace."""
    assert found(1.0, surplus_ns=5_000 * MS, for_ns=600_000 * MS) == ["behind"]


@pytest.mark.parametrize("rate", [1.02, 1.05, 1.25, 1.45])
def test_a_file_that_is_sent_slowly_is_no_live_input(rate: float) -> None:
    """It comes faster than it is played all the time; after one cut nothing of it is left out."""
    assert found(rate) == ["behind", "no live input"]


def test_input_that_comes_in_chunks_is_not_behind() -> None:
    """It waits when a chunk has come, but not until the next one does."""
    assert found(1.0, jitter_ns=3_000 * MS) == []


def test_what_an_outage_held_back_is_live_however_much_it_is() -> None:
    """Time went by for it; what comes faster than that allows for is a file."""
    pace = LivePace()
    for number in range(3_000):
        pace.arrived(number * TICK_NS)
    back_ns = 3_000 * TICK_NS + 60_000 * MS
    for _ in range(60_000 * MS // TICK_NS):
        pace.arrived(back_ns)
    assert pace.is_live(back_ns)
    for _ in range(LONGEST_BURST_FRAMES * 2):
        pace.arrived(back_ns)
    assert not pace.is_live(back_ns)
