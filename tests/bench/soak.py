"""A pool for half an hour: resident memory, descriptors and lateness over time.

    python -m tests.bench.soak --guilds 1000 --minutes 30

Every few seconds RSS and open descriptors of each process of the product are read from /proc, and the lateness of that
stretch from the sender's histogram, beside a bare timerfd loop (see `pace.py`). RSS counts what processes share in each
of them. Its slope is the line of least squares through what comes after the first ten minutes, or after the first third
of a shorter run, given for 1,000 guilds. Guilds are voice channels with end-to-end encryption.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from tests.bench.lateness import BareLoop, SenderFigures, fresh_stats, quantiles_ms
from tests.bench.pool import BenchPool
from tests.bench.results import save, table

SLOPE_LIMIT_MIB = 1.0
"""An hour, for 1,000 guilds."""
_WARM_UP_S = 600.0
_MODULES = {
    "fan-out worker": "worker.fanout",
    "sender": "worker.fanout.sender",
    "encode worker": "worker.encode",
    "encode child": "worker.encode.child",
}
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


class Reading(NamedTuple):
    """One look at all processes, and the stretch before it."""

    at_s: float
    """Since the begin."""
    rss_mib: dict[str, float]
    descriptors: dict[str, int]
    sender_p999_ms: float
    bare_p999_ms: float
    slots: int
    """In which the sender sent."""


class Soaked(NamedTuple):
    """A whole run."""

    guilds: int
    readings: list[Reading]
    ticks_skipped: int
    lost: int
    packets: int
    dropped_by_the_listeners_kernel: int

    def steady(self) -> list[Reading]:
        """Without the time in which caches fill."""
        warm_up_s = min(_WARM_UP_S, self.readings[-1].at_s / 3)
        return [reading for reading in self.readings if reading.at_s >= warm_up_s]

    def slopes_mib(self) -> dict[str, float]:
        """MiB an hour for 1,000 guilds: of each process, and of all together; zeros from fewer than two readings."""
        steady = self.steady()
        hours = [reading.at_s / 3_600 for reading in steady]
        lines = {name: [reading.rss_mib[name] for reading in steady] for name in steady[0].rss_mib}
        lines["all"] = [sum(reading.rss_mib.values()) for reading in steady]
        return {name: _slope(hours, values) * 1_000 / self.guilds for name, values in lines.items()}


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else 0.0


async def measure(guilds: int, seconds: float, every_s: float) -> Soaked:
    """Play for so long, and look every so many seconds. Raises: ChildProcessError: a process of the pool ended."""
    async with BenchPool(guilds, sample=1) as pool:
        await pool.play(guilds)
        pids = _pids(pool)
        with tempfile.TemporaryDirectory() as folder:
            sender = SenderFigures(pids["fan-out worker"])
            bare = await BareLoop.start(pool.processes, Path(folder), pids["fan-out worker"])
            skipped = sum(stats.ticks_skipped for stats in await fresh_stats(pool))
            await pool.discord.reset()
            readings = await _watch(pids, sender, bare, seconds, every_s)
        if pids != _pids(pool):
            raise ChildProcessError(f"a process ended and was started anew: {pool.log_end()}")
        report = await pool.discord.report()
        return Soaked(
            guilds,
            readings,
            sum(stats.ticks_skipped for stats in await fresh_stats(pool)) - skipped,
            report.lost,
            report.packets,
            report.kernel_drops,
        )


def _pids(pool: BenchPool) -> dict[str, int]:
    """One process of each kind."""
    own = {name: pool.processes.processes[name].pid for name in ("coordinator", "supervisor")}
    return own | {name: pool.below_supervisors(module)[0] for name, module in _MODULES.items()}


async def _watch(
    pids: dict[str, int], sender: SenderFigures, bare: BareLoop, seconds: float, every_s: float
) -> list[Reading]:
    readings = []
    begin_s = time.monotonic()
    before = sender.lateness(), bare.lateness()
    for number in range(1, max(1, round(seconds / every_s)) + 1):
        await asyncio.sleep(max(0.0, begin_s + number * every_s - time.monotonic()))
        after = sender.lateness(), bare.lateness()
        late, bare_late = (new - old for new, old in zip(after, before, strict=True))
        before = after
        try:
            rss_mib = {name: _rss_mib(pid) for name, pid in pids.items()}
            descriptors = {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()}  # noqa: PTH208
        except FileNotFoundError as error:
            raise ChildProcessError(f"a process ended: {error.filename}") from error
        readings.append(
            Reading(
                at_s=time.monotonic() - begin_s,
                rss_mib=rss_mib,
                descriptors=descriptors,
                sender_p999_ms=quantiles_ms(late)["p99.9"],
                bare_p999_ms=quantiles_ms(bare_late)["p99.9"],
                slots=int(late.sum()),
            )
        )
    return readings


def _rss_mib(pid: int) -> float:
    """Source: proc(5), /proc/pid/statm."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_MIB


# what is shown


def figures_of(soaked: Soaked) -> dict[str, object]:
    """All figures."""
    steady = soaked.steady()
    return {
        "guilds": soaked.guilds,
        "seconds": soaked.readings[-1].at_s,
        "steady_after_s": steady[0].at_s,
        "slope_mib_per_hour_and_1000_guilds": soaked.slopes_mib(),
        "slope_limit": SLOPE_LIMIT_MIB,
        "descriptors_least_and_most": {name: _descriptors(steady, name) for name in steady[0].descriptors},
        "sender_p999_ms_median": float(np.median([reading.sender_p999_ms for reading in steady])),
        "bare_p999_ms_median": float(np.median([reading.bare_p999_ms for reading in steady])),
        "packets": soaked.packets,
        "ticks_skipped": soaked.ticks_skipped,
        "lost": soaked.lost,
        "dropped_by_the_listeners_kernel": soaked.dropped_by_the_listeners_kernel,
        "readings": [reading._asdict() for reading in soaked.readings],
    }


def _descriptors(readings: Sequence[Reading], name: str) -> tuple[int, int]:
    counts = [reading.descriptors[name] for reading in readings]
    return min(counts), max(counts)


def show(soaked: Soaked) -> None:
    """Print the tables."""
    steady, slopes = soaked.steady(), soaked.slopes_mib()
    rows: list[list[object]] = [
        [
            name,
            f"{steady[0].rss_mib[name]:.1f}",
            f"{steady[-1].rss_mib[name]:.1f}",
            slopes[name],
            " to ".join(map(str, _descriptors(steady, name))),
        ]
        for name in steady[0].rss_mib
    ]
    totals = [f"{sum(reading.rss_mib.values()):.1f}" for reading in (steady[0], steady[-1])]
    rows.append(["all", *totals, slopes["all"], f"allowed {SLOPE_LIMIT_MIB:.0f} MiB"])
    table(
        f"soak: {soaked.guilds} guilds with DAVE, {soaked.readings[-1].at_s / 60:.1f} minutes, "
        f"from minute {steady[0].at_s / 60:.1f} on",
        ["", "RSS MiB, first", "last", "slope MiB/h per 1,000 guilds", "descriptors"],
        rows,
    )
    late = [(reading.sender_p999_ms, reading.bare_p999_ms) for reading in steady]
    sender, bare = np.array(late).T
    table(
        f"soak: lateness p99.9 in ms over {len(late)} stretches",
        ["", "median", "least", "most", "packets", "skipped", "lost", "not read"],
        [
            [
                *("sender", float(np.median(sender)), float(sender.min()), float(sender.max()), soaked.packets),
                *(soaked.ticks_skipped, soaked.lost, soaked.dropped_by_the_listeners_kernel),
            ],
            ["bare loop", float(np.median(bare)), float(bare.min()), float(bare.max()), "", "", "", ""],
        ],
    )


def draw(soaked: Soaked, figure: Figure) -> None:
    """Memory, descriptors and lateness over time."""
    minutes = [reading.at_s / 60 for reading in soaked.readings]
    memory, files, lateness = figure.subplots(1, 3)
    for name in soaked.readings[0].rss_mib:
        memory.plot(minutes, [reading.rss_mib[name] for reading in soaked.readings], label=name)
        files.plot(minutes, [reading.descriptors[name] for reading in soaked.readings], label=name)
    lateness.plot(minutes, [reading.sender_p999_ms for reading in soaked.readings], label="sender")
    lateness.plot(minutes, [reading.bare_p999_ms for reading in soaked.readings], ":", label="bare loop")
    memory.set(title=f"RSS, {soaked.guilds} guilds", ylabel="MiB")
    files.set(title="open descriptors")
    files.set_yscale("log")
    lateness.set(title="lateness p99.9", ylabel="ms")
    lateness.set_yscale("log")
    for axes in (memory, files, lateness):
        axes.set_xlabel("minutes")
        axes.legend(fontsize=7)
    memory.set_ylim(bottom=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guilds", type=int, default=1_000)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks")
    options = parser.parse_args()
    soaked = asyncio.run(measure(options.guilds, options.minutes * 60, options.every))
    show(soaked)
    save("soak", figures_of(soaked), lambda figure: draw(soaked, figure))


if __name__ == "__main__":
    main()
