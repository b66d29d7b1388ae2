"""A store that loses what it held, in part or as a whole, while everything plays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.e2e.stack import Stack, until
from tests.media.make_programme import PROGRAMME

pytestmark = pytest.mark.asyncio(loop_scope="module")

GUILDS = 6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with Stack(tmp_path_factory.mktemp("pool")) as running:
        copy = running.media / PROGRAMME.name
        copy.write_bytes(await asyncio.to_thread(Path(PROGRAMME).read_bytes))
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def playing(stack: Stack) -> AsyncIterator[list[str]]:
    """Guilds that hear two broadcasts."""
    guilds = []
    for _ in range(2):
        guilds += await stack.join(GUILDS // 2, await stack.start(stack.media / PROGRAMME.name, loop=True))
    await stack.hear_more(guilds, 50)
    yield guilds
    await stack.clear()


async def assert_nothing_was_heard_of_it(stack: Stack, guilds: list[str]) -> None:
    """One session each, and no packet lost."""
    await stack.hear_more(guilds, 100)
    for guild in guilds:
        (session,) = await stack.sessions(guild)
        assert (session.state, session.resumed) == ("live", 0)
        assert not await stack.faults(session)
        assert await stack.longest_silence_s(guild) < 1


async def test_an_emptied_store_is_not_heard(
    stack: Stack, playing: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The records are rebuilt from what the workers hold, and that is told; jobs go on to work."""
    runs = await stack.store.command("SMEMBERS", stack.keys.broadcasts)
    began_s = asyncio.get_running_loop().time()
    await stack.store.command("FLUSHALL")

    async def rebuilt() -> bool:
        cards = await stack.store.pipeline([("SCARD", stack.keys.guilds), ("SCARD", stack.keys.broadcasts)])
        return cards == [len(playing), 2]

    await until(rebuilt, "all records")
    took_s = asyncio.get_running_loop().time() - began_s
    assert await stack.events("store.emptied")
    await stack.wait_state(playing, "playing")
    await assert_nothing_was_heard_of_it(stack, playing)
    assert sorted(await stack.store.command("SMEMBERS", stack.keys.broadcasts)) == sorted(runs)
    (late,) = await stack.join(1, sorted(runs)[0])
    await stack.hear_more([late], 25)
    with capsys.disabled():
        print(f"\n  records of {len(playing)} guilds back after {took_s:.1f} s", end=" ")


async def test_lost_wants_and_records_are_not_heard(stack: Stack, playing: list[str]) -> None:
    """Of all workers, of the broadcasts, and of a guild."""
    workers = await stack.leased_workers()
    names = [stack.keys.want(worker) for worker in workers]
    names += [stack.keys.broadcast(name) for name in await stack.store.command("SMEMBERS", stack.keys.broadcasts)]
    names.append(stack.keys.guild("main", playing[0]))
    await stack.store.command("DEL", *names)

    async def restored() -> bool:
        return int(await stack.store.command("EXISTS", *names)) == len(names)

    await until(restored, "all that was deleted")
    await assert_nothing_was_heard_of_it(stack, playing)
