"""Skew between guilds on different workers, at the listeners' end.

    python -m tests.bench.skew --guilds 200

Two arrangements: two fan-out workers of one host, and two hosts with one each, whose clocks are seconds and hundreds of
ppm wrong. Guilds are voice channels with end-to-end encryption; a member in each sampled one decrypts, so that
it is known which packets are the same frame. Every frame is compared between every sampled guild of one worker and
every one of the other, by the kernel's time-stamps of arrival: as it is, and with the slots of both taken out.
Figures are medians of several windows.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from tests.bench.lateness import medians
from tests.bench.pool import BenchPool
from tests.bench.results import save, table
from tests.emulator.analysis import Floats, arrivals_ms
from tests.emulator.records import Voice
from tests.skew import SKEW_LIMIT_MS, SKEW_WITHOUT_SLOT_LIMIT_MS, WRONG_CLOCKS, heard_in, hosts

ARRANGEMENTS = ("two workers", "two hosts, wrong clocks")
LIMITS_MS = {"skew": SKEW_LIMIT_MS, "slot subtracted": SKEW_WITHOUT_SLOT_LIMIT_MS}
"""Of p99.9."""
_SAMPLE = 32
_BINS_MS = np.arange(0, 30.01, 0.1)


class Window(NamedTuple):
    """Differences of arrival of one frame at two guilds on different workers, over all such pairs."""

    skew_ms: Floats
    without_slot_ms: Floats


async def measure(arrangement: str, guilds: int, windows: int, seconds: float) -> list[Window]:
    """So many windows of play. Raises: LookupError: all sampled guilds are on one worker."""
    if arrangement == "two workers":
        pool = BenchPool(guilds, fanout_workers=2, sample=_SAMPLE)
    else:
        coordinator = {"GUILDCAST_CLOCK_ERROR": WRONG_CLOCKS["coordinator"]}
        pool = BenchPool(guilds, sample=_SAMPLE, supervisors=hosts(WRONG_CLOCKS), coordinator=coordinator)
    async with pool:
        await pool.until_workers(2)
        await pool.broadcast()
        voices = await pool.voices(guilds, ghosts=0, members=1)
        await pool.join(voices)
        await pool.until_heard(guilds)
        found = []
        for _ in range(windows):
            await pool.discord.reset()
            await asyncio.sleep(seconds)  # asking disturbs what is measured
            found.append(await _window(pool, voices[:_SAMPLE]))
        return found


async def _window(pool: BenchPool, voices: Sequence[Voice]) -> Window:
    statuses = await pool.held(voices)
    slots = [float(status.slot or 0) for status in statuses]
    heard = [heard_in(await pool.discord.packets(voice.guild)) for voice in voices]
    first = np.array([status.worker == statuses[0].worker for status in statuses])
    if first.all():
        raise LookupError("all sampled guilds are on one worker")
    return Window(across_ms(arrivals_ms(heard), first), across_ms(arrivals_ms(heard, slots), first))


def across_ms(arrivals: Floats, first: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Floats:
    """Differences between each column of `first` and each of the others, line by line; NaN where one has nothing."""
    differences = np.abs(arrivals[:, first, np.newaxis] - arrivals[:, np.newaxis, ~first]).ravel()
    found: Floats = differences[~np.isnan(differences)]
    return found


# what is shown


def quantiles_of(values_ms: Floats) -> dict[str, float]:
    """p50, p99, p99.9 and the largest; zeros where nothing was measured."""
    if not len(values_ms):
        return dict.fromkeys(("p50", "p99", "p99.9", "max"), 0.0)
    p50, p99, p999, most = (float(value) for value in np.percentile(values_ms, (50, 99, 99.9, 100)))
    return {"p50": p50, "p99": p99, "p99.9": p999, "max": most}


def figures_of(found: dict[str, list[Window]]) -> dict[str, object]:
    """All figures, by arrangement."""
    return {
        arrangement: {
            "skew_ms": medians([quantiles_of(window.skew_ms) for window in windows]),
            "without_slot_ms": medians([quantiles_of(window.without_slot_ms) for window in windows]),
            "compared": sum(len(window.skew_ms) for window in windows),
        }
        for arrangement, windows in found.items()
    }


def show(guilds: int, found: dict[str, list[Window]]) -> None:
    """Print the table."""
    rows: list[list[object]] = []
    for arrangement, windows in found.items():
        for name, values in (
            ("skew", [window.skew_ms for window in windows]),
            ("slot subtracted", [window.without_slot_ms for window in windows]),
        ):
            figures = medians([quantiles_of(one) for one in values])
            rows.append([f"{arrangement}: {name}", *figures.values(), LIMITS_MS[name]])
    columns = ["", "p50", "p99", "p99.9", "max", "p99.9 allowed"]
    table(f"skew between guilds on different workers in ms, {guilds} guilds with DAVE", columns, rows)


def draw(guilds: int, found: dict[str, list[Window]], figure: Figure) -> None:
    """How often which skew comes."""
    axes = figure.subplots()
    for (arrangement, windows), colour in zip(found.items(), ("tab:blue", "tab:red"), strict=False):
        for name, style, values in (
            ("as it is", ":", [window.skew_ms for window in windows]),
            ("slot subtracted", "-", [window.without_slot_ms for window in windows]),
        ):
            within = np.minimum(np.concatenate(values), (_BINS_MS[-2] + _BINS_MS[-1]) / 2)  # the last bin is open
            counts, _ = np.histogram(within, _BINS_MS)
            share = counts / max(1, counts.sum())
            axes.stairs(share, _BINS_MS, label=f"{arrangement}, {name}", linestyle=style, color=colour)
    axes.set(title=f"skew between guilds on different workers, {guilds} guilds", xlabel="ms", ylabel="share per 0.1 ms")
    axes.set_yscale("log")
    axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guilds", type=int, default=200)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each window")
    options = parser.parse_args()
    found = {
        arrangement: asyncio.run(measure(arrangement, options.guilds, options.windows, options.seconds))
        for arrangement in ARRANGEMENTS
    }
    show(options.guilds, found)
    save("skew", {"guilds": options.guilds, **figures_of(found)}, lambda figure: draw(options.guilds, found, figure))


if __name__ == "__main__":
    main()
