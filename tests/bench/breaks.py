"""What breaks leave behind: WebSockets of one worker's guilds break and are resumed, ten thousand times in all.

    python -m tests.bench.breaks --guilds 150

Each guild breaks three times in a row, then it stands for half a minute: a session that breaks more often before that
is given up. Guilds take turns. The worker's memory is read along the way, and once more after its last look at what
ended. Guilds are voice channels with end-to-end encryption. It takes 20 minutes, longer on a machine that is busy.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from tests.bench.lateness import fresh_stats
from tests.bench.pool import BenchPool
from tests.bench.processes import Memory
from tests.bench.results import save, table
from tests.emulator.client import EmulatorClient, EmulatorError
from worker.fanout.garbage import LOOKED_AT_EVERY_NS

_IN_A_ROW, _APART_S = 3, 2.0
_STANDS_S = 33.0
"""By then a session that was resumed has its tries back."""
_LOOKED_AT_AFTER_S = LOOKED_AT_EVERY_NS / 1e9 + 5
_CONNECTED_WITHIN_S = 60.0
_POLL_S = 0.5
_READINGS = 20


class Reading(NamedTuple):
    """The worker's memory after so many breaks."""

    at_s: float
    breaks: int
    resident_kib: int
    private_kib: int


class Broken(NamedTuple):
    """A whole run."""

    guilds: int
    readings: list[Reading]
    """The last one when all had been looked at."""
    resumed: int
    ticks_skipped: int
    lost: int
    packets: int

    @property
    def kib_per_break(self) -> float:
        """What a break left behind in the second half."""
        half = self.readings[len(self.readings) // 2 :]
        if len(half) < 2:
            return 0.0
        return float(np.polyfit([one.breaks for one in half], [one.private_kib for one in half], 1)[0])


async def measure(
    guilds: int,
    breaks: int,
    *,
    stands_s: float = _STANDS_S,
    looked_at_after_s: float = _LOOKED_AT_AFTER_S,
    on_reading: Callable[[Reading], None] = lambda _: None,
) -> Broken:
    """Break so often. Raises: TimeoutError: some did not come back."""
    async with BenchPool(guilds, sample=1) as pool:
        voices = await pool.play(guilds)
        ((pid, _),) = pool.fanout()
        skipped = sum(stats.ticks_skipped for stats in await fresh_stats(pool))
        begin_s = time.monotonic()
        readings: list[Reading] = []

        def read(broken: int) -> None:
            memory = Memory.of(pid)
            readings.append(Reading(time.monotonic() - begin_s, broken, memory.resident, memory.private))
            on_reading(readings[-1])

        read(0)
        broken, late_s = 0, 0.0
        for at_s, guild in _plan(guilds, stands_s):
            late_s += max(0.0, time.monotonic() - begin_s - at_s - late_s)  # never made up for: guilds have to stand
            await asyncio.sleep(begin_s + at_s + late_s - time.monotonic())
            # a guild that lost its session, as on a machine that stood still, gets another one
            with suppress(EmulatorError, TimeoutError):
                await pool.discord.fault(voices[guild].guild, "drop")
                broken += 1
                if broken % max(1, breaks // _READINGS) == 0:
                    read(broken)
            if broken == breaks:
                break
        await _until_connected(pool.discord, guilds)
        await asyncio.sleep(looked_at_after_s)
        read(breaks)
        report = await pool.discord.report()
        return Broken(
            guilds,
            readings,
            await _resumed(pool.discord),
            sum(stats.ticks_skipped for stats in await fresh_stats(pool)) - skipped,
            report.lost,
            report.packets,
        )


def _plan(guilds: int, stands_s: float) -> Iterator[tuple[float, int]]:
    """When which guild breaks, for ever."""
    round_s = (_IN_A_ROW - 1) * _APART_S + stands_s
    turns = sorted(
        ((guild / guilds * round_s + number * _APART_S) % round_s, guild)
        for guild in range(guilds)
        for number in range(_IN_A_ROW)
    )
    for number in itertools.count():
        yield from ((number * round_s + at_s, guild) for at_s, guild in turns)


async def _resumed(discord: EmulatorClient) -> int:
    rows = (await discord.report(guilds=True)).guild_rows or ()
    return sum(session.resumed for row in rows for session in row.sessions)


async def _until_connected(discord: EmulatorClient, guilds: int) -> None:
    async with asyncio.timeout(_CONNECTED_WITHIN_S):
        while (await discord.report()).connected < guilds:  # noqa: ASYNC110 - a report wakes nobody
            await asyncio.sleep(_POLL_S)


def _tell(reading: Reading) -> None:
    sys.stdout.write(
        f"{reading.at_s / 60:5.1f} min {reading.breaks:6} breaks: {reading.resident_kib / 1024:6.1f} MiB resident, "
        f"{reading.private_kib / 1024:6.1f} private\n"
    )
    sys.stdout.flush()


def _draw(broken: Broken, figure: Figure) -> None:
    axes = figure.subplots()
    breaks = [one.breaks for one in broken.readings]
    axes.plot(breaks, [one.resident_kib / 1024 for one in broken.readings], "o-", label="resident")
    axes.plot(breaks, [one.private_kib / 1024 for one in broken.readings], "o-", label="private")
    axes.set(title=f"one worker, {broken.guilds} guilds", xlabel="breaks", ylabel="MiB", ylim=(0, None))
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guilds", type=int, default=150)
    parser.add_argument("--breaks", type=int, default=10_000)
    options = parser.parse_args()
    broken = asyncio.run(measure(options.guilds, options.breaks, on_reading=_tell))
    table(
        f"breaks: {broken.guilds} guilds with DAVE on one worker",
        ["", "resumed", "KiB left by each in the second half", "packets", "skipped ticks", "lost"],
        [["", broken.resumed, broken.kib_per_break, broken.packets, broken.ticks_skipped, broken.lost]],
    )
    figures = {**broken._asdict(), "kib_per_break": broken.kib_per_break}
    figures["readings"] = [one._asdict() for one in broken.readings]
    save("breaks", figures, lambda figure: _draw(broken, figure))


if __name__ == "__main__":
    main()
