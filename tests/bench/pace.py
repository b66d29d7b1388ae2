"""Whether a worker keeps the pace: lateness and gaps, quiet and under storm, beside a bare timerfd loop.

    python -m tests.bench.pace

It plays at 70 % of the capacity that `fanout.py` found here, the largest number of guilds with end-to-end encryption
that a worker carried without a tick skipped, or with 700 guilds where it was not run.

Lateness is that of the first packet of each batch: from the moment its slot is due to the moment before `sendmmsg`, as
the sender itself notes it in the memory it shares with its worker, one count a slot. The bare loop is a process of the
same priority that wakes at the same 1,000 slots a second, half a slot beside the sender's, does nothing, and notes its
lateness in the same bins. Both are read at the begin and the end of each window, so that both saw the same machine.
What comes 60 ms late the sender skips: all 20 slots of such a tick are counted in the last bin. The bare loop skips
nothing. With fewer than 1,150 guilds not all slots are in use.
Gaps are between arrivals (the kernel's time-stamps) of successive packets of one guild, at the listeners' end; a packet
that is missing makes a long one, also where this machine's listeners had no room for it ("not read").

Quiet is steady play. In the storm 20 guilds a second join and as many leave after 5 s, 20 times a second somebody comes
to a channel or goes, each twentieth of them in a group of 100, one member of each guild speaks once, the source is
stopped and started, and the worker collects garbage once a second. The collection runs in the worker on a signal;
the handler is put there by `inside/sitecustomize.py`, the product has none. All guilds are voice channels with
end-to-end encryption and one member who can speak. Windows are taken in turns; figures are medians of the windows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from matplotlib.figure import Figure

from shared.schema.records import WorkerStats
from tests.bench.lateness import (
    BIN_MS,
    QUANTILES,
    BareLoop,
    Histogram,
    SenderFigures,
    fresh_stats,
    medians,
    quantiles_ms,
)
from tests.bench.pool import BenchPool
from tests.bench.results import RESULTS, Median, save, table
from tests.bench.storm import CROWD, INSIDE, SPARE_GUILDS, Done, Storm, Talker
from tests.emulator.analysis import gaps_ms
from tests.emulator.records import Report, Voice
from worker.fanout.rows import LATENESS_BINS

Weather = Literal["quiet", "storm"]
LIMITS_MS: dict[Weather, dict[str, float]] = {"quiet": {"p99": 0.5, "p99.9": 1.0}, "storm": {"p99.9": 2.0}}
"""How much later than the bare loop the sender may be."""
GAP_LIMIT_MS = 35.0
_GAP_BIN_MS = 0.25
_GAP_BINS = 240
_DRAWN_EDGES_MS = BIN_MS * np.array([0.9, *np.unique(np.geomspace(1.5, LATENESS_BINS, 45).round()) + 0.1])
_POLL_S = 0.25
_CALM_WITHIN_S = 60.0
_SAMPLE = 32
LONGEST_WINDOW_S = 28.0
"""The local Discord keeps 30 s of each guild that is not sampled."""
_SHARE = 0.7
_USUAL_GUILDS = 700


class Size(NamedTuple):
    """How many guilds are played to."""

    guilds: int
    capacity: int | None = None
    """The most guilds with DAVE that `fanout.py` saw one worker carry here without a tick skipped."""

    @property
    def share(self) -> float | None:
        """Of the capacity."""
        return self.guilds / self.capacity if self.capacity else None

    def __str__(self) -> str:
        share = "capacity not measured" if self.share is None else f"{self.share:.0%} of the capacity"
        return f"{self.guilds} guilds with DAVE ({share})"

    def told(self) -> dict[str, object]:
        return {"guilds": self.guilds, "capacity": self.capacity, "share_of_capacity": self.share}


def usual_size(results: Path = RESULTS / "fanout.json") -> Size:
    """70 % of what was seen to be carried here, or 700 guilds where nothing was measured."""
    cells = json.loads(results.read_text())["cells"] if results.exists() else []
    carried = [int(cell["guilds"]) for cell in cells if cell["way"] == "AES-GCM and DAVE" and not cell["ticks_skipped"]]
    return Size(int(_SHARE * max(carried)), max(carried)) if carried else Size(_USUAL_GUILDS)


def check_seconds(parser: argparse.ArgumentParser, seconds: float) -> None:
    """Refuse windows of which not all could be looked at. Raises: SystemExit."""
    if not 0 < seconds <= LONGEST_WINDOW_S:
        parser.error(f"a window takes {LONGEST_WINDOW_S:.0f} s at most: older packets are forgotten")


class Window(NamedTuple):
    """One stretch of play."""

    sender: Histogram
    bare: Histogram
    gaps: Histogram
    """Of the sampled guilds."""
    report: Report
    ticks_skipped: int
    underruns: int
    dave_epochs: int
    guilds: int
    """At the end."""
    storm: Done | None
    joins_heard: int
    """Guilds that joined meanwhile and of which a packet came."""
    seconds: float

    def above_bare_ms(self) -> dict[str, float]:
        """How much later the sender is than the bare loop, quantile by quantile."""
        sender, bare = quantiles_ms(self.sender), quantiles_ms(self.bare)
        return {name: sender[name] - bare[name] for name in QUANTILES}


async def measure(
    guilds: int,
    rounds: int,
    seconds: float,
    *,
    spare: int = SPARE_GUILDS,
    crowd: int = CROWD,
    sending: str = "process",
) -> dict[Weather, list[Window]]:
    """So many windows of each weather, in turns, on one worker.

    Args:
        seconds: of each window.
        spare: guilds that come and go in the storm.
        crowd: users of the large group.
        sending: what the sender is; a `thread` of its worker is not the product (see `without_sender.py`).
    Raises: ChildProcessError: the worker died. TimeoutError: not all guilds could be heard. LookupError: the sender is
        not what was asked for.
    """
    found: dict[Weather, list[Window]] = {"quiet": [], "storm": []}
    settings = INSIDE | {"BENCH_SENDING": sending}
    async with BenchPool(guilds + spare, sample=min(_SAMPLE, guilds), settings=settings) as pool:
        await pool.broadcast()
        voices = await pool.voices(guilds, ghosts=0, members=1)
        spare_voices = await pool.voices(spare, first=guilds)
        await pool.join(voices)
        await pool.until_heard(guilds)
        talkers = await talkers_of(pool, voices)
        workers = pool.below_supervisors("worker.fanout")
        if len(pool.below_supervisors("worker.fanout.sender")) != (sending == "process"):
            raise LookupError(f"the sender is no {sending}")
        storm = Storm(pool, talkers, spare_voices, workers, crowd)
        await storm.gather_crowd()
        with tempfile.TemporaryDirectory() as folder:
            sender = SenderFigures(workers[0])
            bare = await BareLoop.start(pool.processes, Path(folder), workers[0])
            for _ in range(rounds):
                found["quiet"].append(await _window(pool, voices, sender, bare, seconds))
                found["storm"].append(await _window(pool, voices, sender, bare, seconds, storm))
                await storm.end()
        if pool.below_supervisors("worker.fanout") != workers:
            raise ChildProcessError(f"the worker did not live through it: {pool.log_end()}")
    return found


async def talkers_of(pool: BenchPool, voices: Sequence[Voice]) -> list[Talker]:
    """The member of each guild."""
    report = await pool.discord.report(guilds=True)
    channels = {row.guild: row.channels[0] for row in report.guild_rows or ()}
    return [Talker(voice.guild, channels[voice.guild].members[0].user) for voice in voices]


async def _window(
    pool: BenchPool,
    voices: Sequence[Voice],
    sender: SenderFigures,
    bare: BareLoop,
    seconds: float,
    storm: Storm | None = None,
) -> Window:
    await _until_calm(pool, len(voices))
    stats_before = await fresh_stats(pool)
    await pool.discord.reset()
    before, began_ns, done = (sender.lateness(), bare.lateness()), time.monotonic_ns(), None
    if storm is None:
        await asyncio.sleep(seconds)
    else:
        done = await storm.rage(seconds)
    after, ended_ns, ended_of_day_ns = (sender.lateness(), bare.lateness()), time.monotonic_ns(), time.time_ns()
    stats = await fresh_stats(pool)
    report = await pool.discord.report(guilds=storm is not None)
    staying = {voice.guild for voice in voices}
    joins_heard = sum(
        session.first_arrival_ns is not None and session.first_arrival_ns <= ended_of_day_ns
        for row in report.guild_rows or ()
        if row.guild not in staying
        for session in row.sessions
    )
    return Window(
        sender=after[0] - before[0],
        bare=after[1] - before[1],
        gaps=await _sampled_gaps(pool, voices),
        report=report,
        ticks_skipped=_rise("ticks_skipped", stats_before, stats),
        underruns=_rise("underruns", stats_before, stats),
        dave_epochs=_rise("dave_epochs", stats_before, stats),
        guilds=sum(one.guilds for one in stats),
        storm=done,
        joins_heard=joins_heard,
        seconds=(ended_ns - began_ns) / 1e9,
    )


async def _until_calm(pool: BenchPool, guilds: int) -> None:
    """Wait until exactly the guilds that stay are there, and all of them are heard."""
    await pool.discord.reset()
    async with asyncio.timeout(_CALM_WITHIN_S):
        while sum(one.guilds for one in await pool.stats()) != guilds:  # noqa: ASYNC110 - it wakes nobody
            await asyncio.sleep(_POLL_S)
    await pool.until_heard(guilds)


def _rise(name: str, before: Sequence[WorkerStats], after: Sequence[WorkerStats]) -> int:
    sums = [sum(int(getattr(one, name)) for one in stats) for stats in (before, after)]
    return sums[1] - sums[0]


async def _sampled_gaps(pool: BenchPool, voices: Sequence[Voice]) -> Histogram:
    gaps = [np.zeros(0)]
    for voice in voices[:_SAMPLE]:
        heard = (await pool.discord.packets(voice.guild)).sessions
        gaps += [gaps_ms(*map(np.asarray, (one.timestamp, one.arrival_ns, one.after_pause))) for one in heard]
    bins = np.minimum(np.concatenate(gaps) / _GAP_BIN_MS, _GAP_BINS - 1).astype(np.int64)
    histogram: Histogram = np.bincount(bins, minlength=_GAP_BINS).astype(np.int64)
    return histogram


# what is shown


def figures_of(found: dict[Weather, list[Window]]) -> dict[str, object]:
    """All figures, by weather."""
    return {weather: _figures_of(weather, windows) for weather, windows in found.items()}


def _figures_of(weather: Weather, windows: Sequence[Window]) -> dict[str, object]:
    reports = [window.report for window in windows]
    return {
        "sender_ms": medians([quantiles_ms(window.sender) for window in windows]),
        "bare_ms": medians([quantiles_ms(window.bare) for window in windows]),
        "above_bare_ms": medians([window.above_bare_ms() for window in windows]),
        "above_bare_limits_ms": LIMITS_MS[weather],
        "gap_ms": medians([_gap_quantiles(report) for report in reports]),
        "gap_limit_ms": GAP_LIMIT_MS,
        "longest_gap_ms": max(report.gap_ms.max or 0.0 for report in reports),
        "slots": sum(int(window.sender.sum()) for window in windows),
        "packets": sum(report.packets for report in reports),
        "ticks_skipped": sum(window.ticks_skipped for window in windows),
        "lost": sum(report.lost for report in reports),
        "dropped_by_the_listeners_kernel": sum(report.kernel_drops for report in reports),
        "underruns": sum(window.underruns for window in windows),
        "dave_epochs": sum(window.dave_epochs for window in windows),
        "seconds": [window.seconds for window in windows],
        "joins_per_s": _rates(windows, "joins"),
        "changes_per_s": _rates(windows, "changes"),
        "storm": [
            {**window.storm._asdict(), "joins_heard": window.joins_heard}
            for window in windows
            if window.storm is not None
        ],
        "sender_histogram": _summed([window.sender for window in windows]),
        "bare_histogram": _summed([window.bare for window in windows]),
        "gap_histogram": _summed([window.gaps for window in windows]),
    }


def _rates(windows: Sequence[Window], what: Literal["joins", "changes"]) -> Median:
    """What a second brought: joins that were heard, or changes that were made."""
    return Median.of(
        [
            (window.joins_heard if what == "joins" else window.storm.changes if window.storm else 0) / window.seconds
            for window in windows
        ]
    )


def _gap_quantiles(report: Report) -> dict[str, float]:
    told = msgspec.to_builtins(report.gap_ms)
    return {name: told[field] or 0.0 for name, field in zip(QUANTILES, ("p50", "p99", "p999", "max"), strict=True)}


def _summed(histograms: Sequence[Histogram]) -> list[int]:
    """Of all windows, without the empty bins at the end."""
    counts: list[int] = np.trim_zeros(np.sum(histograms, axis=0), "b").tolist()
    return counts


def show(size: Size, found: dict[Weather, list[Window]]) -> None:
    """Print the tables."""
    rows: list[list[object]] = []
    counts: list[list[object]] = []
    for weather, windows in found.items():
        sender = medians([quantiles_ms(window.sender) for window in windows])
        bare = medians([quantiles_ms(window.bare) for window in windows])
        above = medians([window.above_bare_ms() for window in windows])
        rows.append([f"{weather}: sender", *sender.values()])
        rows.append(["bare loop", *bare.values()])
        rows.append(["above it", *above.values()])
        rows.append(["allowed", *(LIMITS_MS[weather].get(name, "") for name in QUANTILES)])
        reports = [window.report for window in windows]
        gaps = medians([_gap_quantiles(report) for report in reports])
        longest_ms = max(report.gap_ms.max or 0.0 for report in reports)
        counts.append(
            [
                weather,
                *(f"{gaps[name].median:.2f}" for name in ("p50", "p99", "p99.9")),
                f"{longest_ms:.2f}",
                sum(report.packets for report in reports),
                sum(window.ticks_skipped for window in windows),
                sum(report.lost for report in reports),
                sum(report.kernel_drops for report in reports),
                sum(window.dave_epochs for window in windows),
                *(_rates(windows, "joins").median, _rates(windows, "changes").median),
                Median.of([window.seconds for window in windows]).median,
            ]
        )
    table(f"pace: lateness of each slot's first packet in ms, {size}", ["", *QUANTILES], rows)
    table(
        f"pace: gaps between a guild's packets in ms, the longest of all may be {GAP_LIMIT_MS:.0f}",
        [
            *("", "p50", "p99", "p99.9", "longest", "packets", "skipped", "lost", "not read", "DAVE epochs"),
            *("joins/s", "changes/s", "window s"),
        ],
        counts,
    )


def draw(size: Size, found: dict[Weather, list[Window]], figure: Figure) -> None:
    """Both histograms."""
    left, right = figure.subplots(1, 2)
    colours: dict[Weather, str] = {"quiet": "tab:blue", "storm": "tab:red"}
    for weather, windows in found.items():
        for name, style, histograms in (
            ("sender", "-", [window.sender for window in windows]),
            ("bare loop", ":", [window.bare for window in windows]),
        ):
            counts = np.sum(histograms, axis=0)
            ends_ms = (np.arange(len(counts)) + 1) * BIN_MS
            bars, _ = np.histogram(ends_ms, _DRAWN_EDGES_MS, weights=counts)
            share = bars / max(1, int(counts.sum()))
            left.stairs(share, _DRAWN_EDGES_MS, label=f"{weather}, {name}", linestyle=style, color=colours[weather])
        gaps = np.sum([window.gaps for window in windows], axis=0)
        edges_ms = np.arange(len(gaps) + 1) * _GAP_BIN_MS
        right.stairs(gaps / max(1, int(gaps.sum())), edges_ms, label=weather, color=colours[weather])
    figure.suptitle(str(size), fontsize=10)
    left.set(title="lateness of a slot's first packet", xlabel="ms, at most", ylabel="share of slots")
    left.set_xscale("log")
    right.set(title="gaps between packets of a guild", xlabel="ms", ylabel="share of packets of sampled guilds")
    right.axvline(GAP_LIMIT_MS, color="gray", linewidth=0.8)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = usual_size()
    parser.add_argument("--guilds", type=int, default=usual.guilds)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each window; two windows make a round")
    options = parser.parse_args()
    check_seconds(parser, options.seconds)
    size = usual._replace(guilds=options.guilds)
    found = asyncio.run(measure(size.guilds, options.rounds, options.seconds))
    show(size, found)
    save("pace", {**size.told(), **figures_of(found)}, lambda figure: draw(size, found, figure))


if __name__ == "__main__":
    main()
