"""Pace, skew and soak are run once, short, so that none rots; their times mean nothing here."""

from __future__ import annotations

import numpy as np

from tests.bench import pace, skew
from tests.bench.lateness import BIN_MS, quantiles_ms
from worker.fanout.rows import BATCH_LATENESS_BINS


def test_a_quantile_is_the_upper_edge_of_its_bin() -> None:
    """Of a thousand slots the 999th decides; the largest is that of the last bin that holds any."""
    histogram = np.zeros(BATCH_LATENESS_BINS, np.int64)
    assert set(quantiles_ms(histogram).values()) == {0.0}
    histogram[[3, 10, 40]] = 990, 9, 1
    assert list(quantiles_ms(histogram).values()) == [bin_ * BIN_MS for bin_ in (4, 4, 11, 41)]


async def test_pace_bench_measures_sender_and_bare_loop_in_both_weathers() -> None:
    """Both noted their slots, guilds were heard, and the storm consisted of all that belongs to it."""
    found = await pace.measure(guilds=4, rounds=1, seconds=1.0, spare=8, crowd=4)
    (quiet,), (storm,) = found["quiet"], found["storm"]
    for window in (quiet, storm):
        assert window.sender.sum() > 0
        assert window.bare.sum() > 0
        assert window.gaps.sum() > 0
        assert window.report.packets > 0
        assert window.report.gap_ms.count > 0
    assert quiet.guilds == 4
    assert quiet.storm is None
    assert storm.storm is not None
    assert storm.storm._replace(seconds=0) == (0, 20, 20, 4, 1, 1)
    assert pace.figures_of(found).keys() == {"quiet", "storm"}


async def test_skew_bench_compares_guilds_of_two_workers() -> None:
    """Frames were compared between the workers, with and without the slots of the guilds."""
    (window,) = await skew.measure("two hosts, wrong clocks", guilds=4, windows=1, seconds=1.0)
    assert len(window.skew_ms) == len(window.without_slot_ms) > 0
    assert skew.figures_of({"two hosts": [window]}).keys() == {"two hosts"}


def test_only_pairs_on_different_workers_are_compared() -> None:
    """Two guilds of one worker are no pair; who did not hear a frame is in none."""
    arrivals_ms = np.array([[0.0, 1.0, 10.0, 30.0], [0.0, np.nan, 5.0, np.nan]])
    found = skew.across_ms(arrivals_ms, np.array([True, True, False, False]))
    assert sorted(found) == [5.0, 9.0, 10.0, 29.0, 30.0]
