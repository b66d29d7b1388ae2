"""Pace, skew and soak are run once, short, so that none rots; their times mean nothing here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.bench import pace, skew, soak
from tests.bench.lateness import BIN_MS, quantiles_ms
from worker.fanout.rows import LATENESS_BINS

DAVE = "AES-GCM and DAVE"


def test_a_quantile_is_the_upper_edge_of_its_bin() -> None:
    """Of a thousand slots the 999th decides; the largest is that of the last bin that holds any."""
    histogram = np.zeros(LATENESS_BINS, np.int64)
    assert set(quantiles_ms(histogram).values()) == {0.0}
    histogram[[3, 10, 40]] = 990, 9, 1
    assert list(quantiles_ms(histogram).values()) == [bin_ * BIN_MS for bin_ in (4, 4, 11, 41)]


def test_pace_is_measured_at_a_share_of_what_was_found(tmp_path: Path) -> None:
    """The largest number that was carried without a skip counts; where nothing was found, 700 guilds are usual."""
    file = tmp_path / "fanout.json"
    assert pace.usual_size(file) == (700, None)
    cells = [
        {"way": way, "guilds": guilds, "ticks_skipped": skipped}
        for way, guilds, skipped in (("AES-GCM", 4_000, 0), (DAVE, 250, 0), (DAVE, 1_000, 0), (DAVE, 2_000, 3))
    ]
    file.write_text(json.dumps({"cells": cells}))
    assert pace.usual_size(file) == (700, 1_000)
    assert pace.usual_size(file).share == pytest.approx(0.7)
    file.write_text(json.dumps({"cells": cells[:1]}))
    assert pace.usual_size(file) == (700, None)


async def test_pace_bench_measures_sender_and_bare_loop_in_both_weathers() -> None:
    """Both noted their slots, guilds were heard, and the storm consisted of all that belongs to it."""
    found = await pace.measure(guilds=4, rounds=1, seconds=0.5, spare=8, crowd=4)
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
    assert storm.storm._replace(seconds=0) == (0, 10, 10, 4, 1, 1)
    assert quiet.joins_heard == 0
    assert storm.joins_heard <= 10
    assert pace.figures_of(found).keys() == {"quiet", "storm"}


async def test_a_sender_in_a_thread_can_be_measured_as_well() -> None:
    """The worker sends, and has no process that does it."""
    found = await pace.measure(guilds=4, rounds=1, seconds=0.5, spare=8, crowd=4, sending="thread")
    for windows in found.values():
        assert windows[0].sender.sum() > 0
        assert windows[0].report.packets > 0


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


async def test_soak_bench_watches_every_process() -> None:
    """Each look saw memory and descriptors of all six, and the slots in between."""
    soaked = await soak.measure(guilds=4, seconds=1.0, every_s=0.25)
    assert len(soaked.readings) == 4
    for reading in soaked.readings:
        assert len(reading.rss_mib) == len(reading.descriptors) == 6
        assert min(reading.rss_mib.values()) > 0
        assert min(reading.descriptors.values()) > 0
    assert sum(reading.slots for reading in soaked.readings) > 0
    assert soaked.packets > 0
    assert soak.figures_of(soaked)["guilds"] == 4


def test_a_slope_is_given_for_a_thousand_guilds_once_warm() -> None:
    """Two MiB an hour at 500 guilds are four at 1,000; what came before the first third does not count."""
    times_s = range(0, 3_601, 60)
    readings = [
        soak.Reading(at_s, {"worker": 500.0 if at_s < 600 else 100 + at_s / 1_800}, {"worker": 3}, 0.1, 0.1, 1)
        for at_s in times_s
    ]
    slopes = soak.Soaked(500, readings, 0, 0, 0, 0).slopes_mib()
    assert slopes == pytest.approx({"worker": 4.0, "all": 4.0})
