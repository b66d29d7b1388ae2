"""What may happen to a pool all at once, at given rates: everything that a fan-out worker does besides playing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from shared.cli.pool import ROOT
from tests.bench.pool import BenchPool
from tests.emulator.records import Voice

INSIDE = {"PYTHONPATH": f"{Path(__file__).with_name('inside')}:{ROOT}"}
"""Settings of a pool whose workers can be told to collect garbage."""
JOINS_PER_S = 20
STAY_S = 5.0
"""After so long a guild that joined leaves again."""
SPARE_GUILDS = 160
"""Those that join in a storm: as many as are there at once, and time to say goodbye."""
CHANGES_PER_S = 20
CROWD = 100
"""Users of the one large group."""
_CROWD_EVERY = 20
"""Each so manieth change is one of the large group."""
_SMALL_GROUPS = 40
_TALK_S = 0.5
_TALKERS_EVERY_S = 0.1
_COLLECT_EVERY_S = 1.0


class Talker(NamedTuple):
    """A member of a guild who can speak."""

    guild: str
    user: str


class Done(NamedTuple):
    """What a storm consisted of."""

    seconds: float
    """From its begin to the last act of it; longer than wanted where the machine did not keep up."""
    joins: int
    """Jobs that were sent."""
    changes: int
    """Members who came to a channel or went: the local Discord had told all who are there."""
    talkers: int
    restarts: int
    collections: int


class Storm:
    """Joins and leaves, members who come and go, talkers, a source that starts anew, and garbage collections.

    Args:
        talkers: one in each of the guilds that stay; the group of the first is the large one.
        spare: voice credentials of guilds that come and go.
        workers: processes that are made to collect garbage; their pool was started with `INSIDE`.
        crowd: users of the large group.
    """

    def __init__(
        self, pool: BenchPool, talkers: Sequence[Talker], spare: Sequence[Voice], workers: Sequence[int], crowd: int
    ) -> None:
        self._pool = pool
        self._talkers = talkers
        self._spare = spare
        self._workers = workers
        self._crowd = crowd
        self._ghosts = {talkers[0].guild: crowd}
        self._staying: list[Voice] = []
        self._next_spare = 0

    async def gather_crowd(self) -> None:
        """Let the large group come together; before anything is measured."""
        await self._pool.discord.ghosts(self._talkers[0].guild, self._crowd)

    async def rage(self, seconds: float) -> Done:
        """All of it for so long."""
        begin_s = time.monotonic()
        turns = max(1, round(seconds / _TALKERS_EVERY_S))

        async def talk(number: int) -> None:
            first, last = (len(self._talkers) * turn // turns for turn in (number, number + 1))
            await asyncio.gather(*(self._talk(talker) for talker in self._talkers[first:last]))

        async with asyncio.TaskGroup() as group:
            joins, changes, collections = (
                group.create_task(_every(interval_s, seconds, act))
                for interval_s, act in (
                    (1 / JOINS_PER_S, self._join),
                    (1 / CHANGES_PER_S, self._change),
                    (_COLLECT_EVERY_S, self._collect),
                )
            )
            group.create_task(_every(seconds / turns, seconds, talk))
            restarts = group.create_task(self._restart_source(seconds / 2))
        return Done(
            time.monotonic() - begin_s,
            joins.result(),
            changes.result(),
            len(self._talkers),
            restarts.result(),
            collections.result(),
        )

    async def end(self) -> None:
        """Have those leave who still stay."""
        await self._leave(self._staying)
        self._staying = []

    async def _join(self, _: int) -> None:
        if len(self._staying) >= min(STAY_S * JOINS_PER_S, len(self._spare) / 2):
            await self._leave([self._staying.pop(0)])
        voice = self._spare[self._next_spare % len(self._spare)]
        self._next_spare += 1
        self._staying.append(voice)
        await self._pool.join([voice])

    async def _leave(self, voices: Sequence[Voice]) -> None:
        await self._pool.jobs([{"type": "guild.leave", "guild": voice.guild} for voice in voices])

    async def _change(self, number: int) -> None:
        """Somebody comes to a channel, or goes."""
        if number % _CROWD_EVERY == 0:
            guild, low = self._talkers[0].guild, self._crowd - 1
        else:
            small = self._talkers[1 : 1 + _SMALL_GROUPS] or self._talkers
            guild, low = small[number % len(small)].guild, 1
        self._ghosts[guild] = low + 1 if self._ghosts.get(guild) == low else low
        await self._pool.discord.ghosts(guild, self._ghosts[guild])

    async def _talk(self, talker: Talker) -> None:
        await self._pool.discord.members.speak(talker.guild, talker.user, seconds=_TALK_S)

    async def _collect(self, _: int) -> None:
        for worker in self._workers:
            os.kill(worker, signal.SIGUSR1)

    async def _restart_source(self, after_s: float) -> int:
        await asyncio.sleep(after_s)
        await self._pool.jobs([{"type": "broadcast.stop", "broadcast": "bench"}])
        await self._pool.broadcast()
        return 1


async def _every(interval_s: float, seconds: float, act: Callable[[int], Awaitable[None]]) -> int:
    """Act on a fixed schedule; what comes late is made up for. Returns how often."""
    begin_s = time.monotonic()
    times = max(1, round(seconds / interval_s))
    for number in range(times):
        await asyncio.sleep(max(0.0, begin_s + number * interval_s - time.monotonic()))
        await act(number)
    return times
