"""Commands and bytes a second on Redis in steady play, and how they grow with workers, sources and guilds.

    python -m tests.bench.redis_load --guilds 1000

A pool for each number of workers and sources, in which guilds become more and more, tuned to all sources alike; to
save time, only the smallest and the largest pool get all of them. Read
from Redis itself, less what the reading costs; nobody else asks anything meanwhile. A plane through all readings says
what one more worker, source, reader (a rendition that a worker's guilds hear) and guild adds. What grows in bytes with
guilds is the list of them that each worker looks at every 2 s.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from shared.store.client import Store
from tests.bench.pool import BenchPool
from tests.bench.results import save, table
from tests.media.make_programme import PROGRAMME

WORKERS, SOURCES, GUILDS = (1, 2), (1, 4), (10, 100, 1_000)
_LEAD_MS = 10_000
_SETTLED_AFTER_S = 6.0
_COMMANDS_SHOWN = 12
_SPARE = 16
_LEADERS_READERS = 1
"""Of events; jobs are asked for."""
_POLL_S = 0.1
_UP_WITHIN_S = 30.0


class Reading(NamedTuple):
    """What Redis counted since its start."""

    commands: float
    bytes_in: float
    bytes_out: float
    calls: dict[str, float]

    @classmethod
    async def take(cls, store: Store) -> Reading:
        stats, commands = await store.command("INFO", "stats"), await store.command("INFO", "commandstats")
        return cls(
            stats["total_commands_processed"],
            stats["total_net_input_bytes"],
            stats["total_net_output_bytes"],
            {name.removeprefix("cmdstat_"): found["calls"] for name, found in commands.items()},
        )

    def since(self, before: Reading, own: Reading | None = None, seconds: float = 1.0) -> Reading:
        """What came after `before`, less what the reading itself cost, per second."""
        own = own or Reading(0, 0, 0, {})
        return Reading(
            (self.commands - before.commands - own.commands) / seconds,
            (self.bytes_in - before.bytes_in - own.bytes_in) / seconds,
            (self.bytes_out - before.bytes_out - own.bytes_out) / seconds,
            {
                name: (calls - before.calls.get(name, 0) - own.calls.get(name, 0)) / seconds
                for name, calls in self.calls.items()
            },
        )


class Load(NamedTuple):
    """Steady play of one size; per second."""

    workers: int
    sources: int
    readers: int
    guilds: int
    commands: float
    bytes_in: float
    bytes_out: float
    calls: dict[str, float]


async def _window(store: Store, window_s: float) -> Reading:
    first = await Reading.take(store)
    before = await Reading.take(store)
    own, began_s = before.since(first), time.monotonic()
    await asyncio.sleep(window_s)
    after = await Reading.take(store)
    return after.since(before, own, time.monotonic() - began_s)


async def _readers(store: Store) -> int:
    """Who reads frames: clients in XREAD, without those of the leader."""
    clients: str = await store.command("CLIENT", "LIST")
    return sum(" cmd=xread " in client for client in clients.splitlines()) - _LEADERS_READERS


async def measure(
    workers: int, sources: int, guilds: Sequence[int], *, windows: int, window_s: float, settle_s: float
) -> list[Load]:
    """The load of each number of guilds, in one pool; medians of several windows."""
    found = []
    names = [f"bench-{number}" for number in range(sources)]
    dice = random.Random(1)  # so that each worker's guilds hear all sources, whoever places them how
    async with BenchPool(max(guilds) // workers + _SPARE, fanout_workers=workers, sample=0) as pool:
        for name in names:
            await pool.broadcast(name, {"url": PROGRAMME.name, "loop": True, "lead_ms": _LEAD_MS})
        async with asyncio.timeout(_UP_WITHIN_S):
            while len(await pool.stats()) < workers:  # noqa: ASYNC110 - a figure on Redis wakes nobody
                await asyncio.sleep(_POLL_S)
        there = 0
        for number in sorted(guilds):
            joining: dict[str, list[int]] = {name: [] for name in names}
            for guild in range(there, number):
                joining[dice.choice(names)].append(guild)
            voices = await pool.voices(number - there, first=there)
            for name, chosen in joining.items():
                await pool.join([voices[guild - there] for guild in chosen], name)
            await pool.until_heard(number)
            there = number
            await asyncio.sleep(settle_s)
            readings = [await _window(pool.store, window_s) for _ in range(windows)]
            found.append(
                Load(
                    *(workers, sources, await _readers(pool.store), number),
                    statistics.median(reading.commands for reading in readings),
                    statistics.median(reading.bytes_in for reading in readings),
                    statistics.median(reading.bytes_out for reading in readings),
                    {
                        name: statistics.median(reading.calls.get(name, 0.0) for reading in readings)
                        for name in readings[-1].calls
                    },
                )
            )
    return found


def growth(loads: Sequence[Load]) -> dict[str, dict[str, float]]:
    """What one more of each adds per second, by least squares: commands, bytes in, bytes out."""
    counts = np.array([[1, load.workers, load.sources, load.readers, load.guilds] for load in loads], float)
    told = np.array([[load.commands, load.bytes_in, load.bytes_out] for load in loads])
    plane, *_ = np.linalg.lstsq(counts, told, rcond=None)
    names = ("pool", "worker", "source", "reader", "guild")
    return {
        name: dict(zip(("commands", "bytes_in", "bytes_out"), map(float, row), strict=True))
        for name, row in zip(names, plane, strict=True)
    }


def _show(loads: Sequence[Load], grown: dict[str, dict[str, float]]) -> None:
    table(
        "Redis in steady play, per second",
        ("workers", "sources", "readers", "guilds", "commands", "KiB in", "KiB out"),
        [(*load[:5], load.bytes_in / 1_024, load.bytes_out / 1_024) for load in loads],
    )
    table(
        "one more of each adds, per second",
        ("", "commands", "bytes in", "bytes out"),
        [(name, f"{added['commands']:.3f}", added["bytes_in"], added["bytes_out"]) for name, added in grown.items()],
    )
    least, most = loads[0], loads[-1]
    names = sorted(most.calls, key=lambda name: -most.calls[name])[:_COMMANDS_SHOWN]
    table(
        "commands a second by name",
        ("", *(f"{one.workers} workers, {one.sources} sources, {one.guilds} guilds" for one in (least, most))),
        [(name, least.calls.get(name, 0.0), most.calls[name]) for name in names],
    )


def _draw(loads: Sequence[Load], figure: Figure) -> None:
    figure.suptitle("Redis in steady play")
    commands, traffic = figure.subplots(1, 2)
    for (workers, sources), group in itertools.groupby(loads, lambda load: (load.workers, load.sources)):
        line = list(group)
        guilds = [load.guilds for load in line]
        label = f"{workers} workers, {sources} sources"
        commands.plot(guilds, [load.commands for load in line], marker="o", label=label)
        traffic.plot(guilds, [(load.bytes_in + load.bytes_out) / 1_024 for load in line], marker="o", label=label)
    for axes, name in ((commands, "commands a second"), (traffic, "KiB a second, in and out")):
        axes.set_xscale("log")
        axes.set_xlabel("guilds")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    commands.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guilds", type=int, default=GUILDS[-1], help="most guilds")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument(
        "--seconds",
        type=float,
        default=11.0,
        help="of a window: leads are filled up every 1.1 s, eleven entries at once",
    )
    options = parser.parse_args()
    guilds = [number for number in GUILDS if number < options.guilds] + [options.guilds]
    loads: list[Load] = []
    for workers, sources in itertools.product(WORKERS, SOURCES):
        whole = (workers, sources) in ((min(WORKERS), min(SOURCES)), (max(WORKERS), max(SOURCES)))
        loads += asyncio.run(
            measure(
                *(workers, sources, guilds if whole else guilds[:2]),
                windows=options.windows,
                window_s=options.seconds,
                settle_s=_SETTLED_AFTER_S,
            )
        )
    grown = growth(loads)
    _show(loads, grown)
    figures = {"loads": [load._asdict() for load in loads], "one_more_adds_per_s": grown}
    save("redis_load", figures, lambda figure: _draw(loads, figure))


if __name__ == "__main__":
    main()
