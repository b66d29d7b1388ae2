"""CPU per source: decoding, encoding and publishing a second of programme, by guilds and by sources.

    python -m tests.bench.encode --guilds 1000

CPU of the encode worker and its children over windows of steady play, when the lead has been published: a source then
gives out a second of programme each second. First one source, with more and more guilds tuned to it, of which it knows
nothing: what grows there is what everything else on the same machine does to caches and clock. Then, in a pool of its
own, more and more sources with a guild each. Medians of several windows, in percent of a core for each source. A window
is the whole programme once: some parts of it take twice the work of others. One source with one guild is measured
before and after the many, in a pool of its own: how fast a machine is drifts within the minutes that this takes.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.figure import Figure

from tests.bench.pool import BenchPool, descendants
from tests.bench.processes import exact_cpu_ns
from tests.bench.results import Median, save, table
from tests.media.make_programme import DURATION_S, PROGRAMME

LEAD_MS = 10_000
GUILDS, SOURCES = (1, 100, 1_000), (1, 4, 16)
_SOURCES_AT_MOST = 64
"""The capacity of a worker holds for sources, too."""
_LEAD_THERE_AFTER_S = 6.0
_ON_AIR_WITHIN_S = 60.0
_POLL_S = 0.1


class Step(NamedTuple):
    """So much is on air; each source has a guild, the first one all others."""

    sources: int
    guilds: int


def _encoders(pool: BenchPool) -> list[int]:
    """The encode worker and its children."""
    supervisor = pool.processes.processes["supervisor"].pid
    return descendants(supervisor, "worker.encode") + descendants(supervisor, "worker.encode.child")


async def _on_air(pool: BenchPool, there: Step, step: Step) -> None:
    """Begin sources, join guilds, and wait until all are heard."""
    voices = await pool.voices(step.guilds - there.guilds, first=there.guilds)
    for number in range(there.sources, step.sources):
        await pool.broadcast(f"bench-{number}", {"url": PROGRAMME.name, "loop": True, "lead_ms": LEAD_MS})
        await pool.join([voices.pop()], f"bench-{number}")
    if voices:
        await pool.join(voices, "bench-0")
    await pool.until_heard(step.guilds)
    deadline_s = time.monotonic() + _ON_AIR_WITHIN_S
    while len(_encoders(pool)) != 1 + step.sources:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{len(_encoders(pool)) - 1} of {step.sources} sources are encoded")
        await asyncio.sleep(_POLL_S)


async def _percent_per_source(pool: BenchPool, sources: int, windows: int, window_s: float) -> list[float]:
    found = []
    pids = _encoders(pool)
    for _ in range(windows):
        before_ns, began_ns = sum(map(exact_cpu_ns, pids)), time.monotonic_ns()
        await asyncio.sleep(window_s)
        spent_ns = sum(map(exact_cpu_ns, pids)) - before_ns
        found.append(100 * spent_ns / (time.monotonic_ns() - began_ns) / sources)
    return found


async def measure(
    steps: Sequence[Step], *, windows: int, window_s: float, settle_s: float = _LEAD_THERE_AFTER_S
) -> list[list[float]]:
    """Percent of a core for each source, of each step; from one to the next, both numbers only grow."""
    found = []
    async with BenchPool(max(*(step.guilds for step in steps), _SOURCES_AT_MOST), sample=0) as pool:
        there = Step(0, 0)
        for step in steps:
            await _on_air(pool, there, step)
            await asyncio.sleep(settle_s)
            found.append(await _percent_per_source(pool, step.sources, windows, window_s))
            there = step
    return found


def _show(title: str, first: str, found: dict[int, list[float]]) -> None:
    least = min(found)
    base = Median.of(found[least]).median
    table(
        title,
        (first, "% of a core per source", f"against {least}"),
        [
            (number, Median.of(readings), f"{100 * (Median.of(readings).median / base - 1):+.1f} %")
            for number, readings in found.items()
        ],
    )


def _draw(by_guilds: dict[int, list[float]], by_sources: dict[int, list[float]], figure: Figure) -> None:
    figure.suptitle("CPU per source")
    for axes, name, found in zip(
        figure.subplots(1, 2, sharey=True), ("guilds, one source", "sources"), (by_guilds, by_sources), strict=True
    ):
        medians = [Median.of(readings) for readings in found.values()]
        spread = [[one.median - one.least for one in medians], [one.most - one.median for one in medians]]
        axes.errorbar(list(found), [one.median for one in medians], yerr=spread, marker="o", capsize=4)
        axes.set_xscale("log")
        axes.set_xticks(list(found), [str(number) for number in found])
        axes.set_xlabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.set_ylabel("% of a core for each source")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guilds", type=int, default=GUILDS[-1], help="most guilds of one source")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=DURATION_S, help="of a window; all of the programme if not given"
    )
    options = parser.parse_args()
    guilds = [number for number in GUILDS if number < options.guilds] + [options.guilds]
    measured = partial(measure, windows=options.windows, window_s=options.seconds)
    by_guilds = dict(zip(guilds, asyncio.run(measured([Step(1, number) for number in guilds])), strict=True))
    (again,) = asyncio.run(measured([Step(1, guilds[0])]))
    by_guilds[guilds[0]] += again
    _show("one source, by guilds", "guilds", by_guilds)
    by_sources = dict(zip(SOURCES, asyncio.run(measured([Step(number, number) for number in SOURCES])), strict=True))
    _show("by sources", "sources", by_sources)
    figures = {
        name: {str(number): Median.of(readings)._asdict() for number, readings in found.items()}
        for name, found in (("percent_by_guilds", by_guilds), ("percent_per_source_by_sources", by_sources))
    }
    save("encode", figures, lambda figure: _draw(by_guilds, by_sources, figure))


if __name__ == "__main__":
    main()
