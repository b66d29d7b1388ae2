"""What holds the loop takes turns, and the pace decides how many."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import pytest

from worker.voice.turns import Turns

MS = 1_000_000


class Bench:
    """Many who want a turn, and the order in which they had it."""

    def __init__(self, budget_ns: int | None, every_passes: int = 1) -> None:
        self.turns = Turns(budget_ns, every_passes=every_passes)
        self.had: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []

    def want(self, name: str, take: Callable[[], Awaitable[None]], spends_ns: int = 0) -> asyncio.Task[None]:
        async def one() -> None:
            await take()
            self.had.append(name)
            if spends_ns:
                self.turns.spent(spends_ns)

        task = asyncio.create_task(one())
        self._tasks.append(task)
        return task

    async def settle(self) -> list[str]:
        """Let everybody go on who can; returns who had a turn since the last time."""
        for _ in range(50):
            await asyncio.sleep(0)
        had, self.had = self.had, []
        return had

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def bench() -> object:
    made = Bench(10 * MS)
    yield made
    await made.aclose()


async def test_a_budget_is_given_out_and_no_more(bench: Bench) -> None:
    """Ten milliseconds are four handshakes; the others wait until the pace has come round."""
    for number in range(9):
        bench.want(str(number), bench.turns.handshake)
    assert await bench.settle() == ["0", "1", "2", "3"]
    assert await bench.settle() == []
    bench.turns.passed()
    assert await bench.settle() == ["4", "5", "6"]
    assert bench.turns.waiting == 2


async def test_long_work_is_paid_back(bench: Bench) -> None:
    """An operation of 38 ms costs the next ticks their turns."""
    bench.want("long", bench.turns.group, spends_ns=38 * MS)
    bench.want("next", bench.turns.group, spends_ns=1 * MS)
    assert await bench.settle() == ["long"]
    for _ in range(2):
        bench.turns.passed()
        assert await bench.settle() == []
    bench.turns.passed()
    assert await bench.settle() == ["next"]


async def test_calls_that_stand_come_before_new_ones(bench: Bench) -> None:
    """A group's message overtakes every handshake that waits."""
    for number in range(100):
        bench.want(f"handshake {number}", bench.turns.handshake)
    await bench.settle()
    bench.want("group", bench.turns.group, spends_ns=MS)
    await bench.settle()
    bench.turns.passed()
    assert (await bench.settle())[0] == "group"


async def test_a_budget_does_not_pile_up(bench: Bench) -> None:
    """A quiet minute is no reason for a burst."""
    for _ in range(3_000):
        bench.turns.passed()
    for number in range(20):
        bench.want(str(number), bench.turns.handshake)
    assert len(await bench.settle()) == 4


async def test_work_that_waits_is_done_together_at_every_fourth_pass() -> None:
    """A pace whose passes are late gives out less in a second, and what came in between follows each other."""
    bench = Bench(10 * MS, every_passes=4)
    async with aclosing(bench):
        for number in range(8):
            bench.want(str(number), bench.turns.handshake)
        had = [await bench.settle()]
        for _ in range(8):
            bench.turns.passed()
            had.append(await bench.settle())
    assert had == [["0", "1", "2", "3"], [], [], [], ["4", "5", "6"], [], [], [], ["7"]]


async def test_who_gives_up_his_turn_holds_up_nobody(bench: Bench) -> None:
    """Cancelled while he waits, or just when his turn had come."""
    for number in range(4):
        bench.want(f"first {number}", bench.turns.handshake)
    await bench.settle()
    waiting = [bench.want(f"gone {number}", bench.turns.handshake) for number in range(3)]
    last = bench.want("last", bench.turns.handshake)
    await bench.settle()
    waiting[1].cancel()
    bench.turns.passed()  # the first has his turn and has not woken yet
    waiting[0].cancel()
    waiting[2].cancel()
    assert "last" in await bench.settle()
    assert last.done()


async def test_calls_that_stand_do_not_hold_up_new_ones_for_ever(bench: Bench) -> None:
    """However busy the groups are, every fifth turn is a handshake's."""
    for number in range(60):
        bench.want(f"group {number}", bench.turns.group, spends_ns=10 * MS)
    bench.want("handshake", bench.turns.handshake)
    had: list[str] = []
    for _ in range(8):
        bench.turns.passed()
        had += await bench.settle()
    assert "handshake" in had


async def test_a_process_that_stood_still_owes_little(bench: Bench) -> None:
    """A minute's pause inside an operation is not paid back by a minute without turns."""
    bench.want("stopped", bench.turns.group, spends_ns=60_000 * MS)
    bench.want("next", bench.turns.group)
    await bench.settle()
    for _ in range(51):
        bench.turns.passed()
    assert await bench.settle() == ["next"]


async def test_without_limit_nobody_waits() -> None:
    free = Bench(None)
    for number in range(200):
        free.want(str(number), free.turns.handshake)
    assert len(await free.settle()) == 200
    await free.aclose()


async def test_long_work_is_announced_when_its_turn_has_come() -> None:
    """The pace builds ahead what will be due meanwhile; short work fits into what is ahead anyway."""
    announced: list[int] = []
    turns = Turns(1_000_000, announced.append)
    await turns.group(5_000_000)
    await turns.group(300_000_000)
    assert announced == [300_000_000]
    turns.spent(2_000_000)
    waiting = asyncio.create_task(turns.group(100_000_000))
    await asyncio.sleep(0)
    assert announced == [300_000_000]
    for _ in range(3):
        turns.passed()
    await waiting
    assert announced == [300_000_000, 100_000_000]
