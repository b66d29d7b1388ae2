"""Handshakes take turns."""

from __future__ import annotations

import asyncio
import itertools

from worker.voice.commons import Turns


async def test_a_handshake_that_never_ends_delays_no_other() -> None:
    """A turn is a moment, not a place: whoever took one and waits for a dead server holds nobody up."""
    turns = Turns(0.0)
    never = asyncio.Event()
    took = 0

    async def shake_hands() -> None:
        nonlocal took
        await turns.take()
        took += 1
        await never.wait()

    stuck = [asyncio.create_task(shake_hands()) for _ in range(200)]
    async with asyncio.timeout(10):
        while took < 200:  # noqa: ASYNC110 - the loop is let run
            await asyncio.sleep(0)
    for task in stuck:
        task.cancel()
    await asyncio.gather(*stuck, return_exceptions=True)


async def test_turns_come_one_after_the_other() -> None:
    """Each turn lies at least the set time after the one before."""
    turns = Turns(0.01)
    loop = asyncio.get_running_loop()
    moments: list[float] = []

    async def take() -> None:
        await turns.take()
        moments.append(loop.time())

    await asyncio.gather(*(take() for _ in range(5)))
    assert all(after - before > 0.005 for before, after in itertools.pairwise(moments))
