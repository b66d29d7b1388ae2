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
    comes_at_its_own_pace,
    entry_frames,
    is_behind,
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
    watched = LiveBeginning(lead_ms, LEAST_NS)
    now_ns = 0
    for number in itertools.count(1):
        if pause_each and number <= burst_frames and number % pause_each == 0:
            now_ns += PAUSE_NS
        elif number <= burst_frames or (number - burst_frames) % chunk_frames:
            now_ns += ENCODED_NS
        else:
            now_ns += chunk_frames * TICK_NS
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
    watched = LiveBeginning(1_000, LEAST_NS)
    for number in range(LEAST_FRAMES):
        assert watched.look(number * ENCODED_NS) is None
        assert watched.arrived(number * ENCODED_NS) is None
    assert watched.look(499 * MS) is None
    assert watched.look(500 * MS) == Beginning(LEAST_FRAMES, (1_500 - 20 * (LEAST_FRAMES - 1)) * MS)


def test_what_never_comes_at_its_own_pace_loses_nothing() -> None:
    """A file of unknown length is read as fast as it can be, and played from its beginning."""
    found, came, now_ns = begin(1_000, 10 * LONGEST_BURST_FRAMES)
    assert (found, came) == (Beginning(came, now_ns + LEAST_NS, live=False), LONGEST_BURST_FRAMES)


def test_entries_are_short_under_a_short_lead() -> None:
    """Five frames would be there only when the first one is nearly due."""
    assert [entry_frames(lead_ms) for lead_ms in (200, 499, 500, 1_000)] == [2, 2, 5, 5]


def test_input_is_behind_when_it_waits_beyond_its_lead() -> None:
    """By more than what networks and busy machines do to it."""
    assert not is_behind(newest_at_ns=1_500 * MS, lead_ms=1_000, now_ns=0)
    assert is_behind(newest_at_ns=1_900 * MS, lead_ms=1_000, now_ns=0)
    assert not is_behind(newest_at_ns=1_900 * MS, lead_ms=2_000, now_ns=0)


@pytest.mark.parametrize(("rate", "live"), [(0.9, True), (1.001, True), (1.1, False), (2.0, False)])
def test_a_file_that_is_sent_slowly_is_not_live(rate: float, live: bool) -> None:
    """It comes faster than it is played, for longer than a burst lasts; a station's fast clock is never that fast."""
    day_ns = 86_400 * 1_000 * MS
    assert comes_at_its_own_pace(round(rate * day_ns / TICK_NS), day_ns) is live
    assert comes_at_its_own_pace(LONGEST_BURST_FRAMES, 0)
