"""A store that loses what it held, in part or as a whole, while everything plays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from shared.schema.frame_entry import FIELD, Flags, FrameEntry, pack
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


HIGHEST = 2**64 - 1


def _garbage(_: FrameEntry) -> tuple[str, bytes]:
    return "*", b"garbage"


def _highest(_: FrameEntry) -> tuple[str, bytes]:
    return f"{HIGHEST}-{HIGHEST}", b""


def _higher_term(last: FrameEntry) -> tuple[str, bytes]:
    hostile = last._replace(term=last.term + 10**12, first_index=last.next_index, packets=(), flags=Flags.ENDED)
    return hostile.id, pack(hostile)


@pytest.mark.parametrize("entry", [_garbage, _highest, _higher_term], ids=["garbage", "highest id", "higher term"])
async def test_nothing_on_the_frame_stream_ends_a_broadcast(
    stack: Stack,
    playing: list[str],
    capsys: pytest.CaptureFixture[str],
    entry: Callable[[FrameEntry], tuple[str, bytes]],
) -> None:
    """Whatever somebody else writes there, the broadcast goes on, on a stream of its own if it must."""
    broadcasts = sorted(await stack.store.command("SMEMBERS", stack.keys.broadcasts))
    before = {name: await stack.run_of(name) for name in broadcasts}
    struck = broadcasts[0]
    last = (await stack.published(before[struck]))[-1]
    entry_id, body = entry(last)
    await stack.frames.command("XADD", stack.keys.frames(before[struck]), entry_id, FIELD, body)

    async def renewed() -> bool:
        return await stack.run_of(struck) != before[struck]

    await until(renewed, "a fresh run", 40)
    await stack.wait_state(playing, "playing")
    await stack.hear_more(playing, 100)
    assert (await stack.broadcast(struck)).state == "playing"
    assert [await stack.run_of(name) for name in broadcasts[1:]] == [before[name] for name in broadcasts[1:]]
    silences = [await stack.longest_silence_s(guild) for guild in playing]
    with capsys.disabled():
        print(f"\n  longest silence {max(silences):.2f} s", end=" ")
