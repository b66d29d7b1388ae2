"""Two hosts with little room: guilds go where there is some, wait where there is none, and are refused by the full."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from shared.errors import ErrorCode
from tests.e2e.stack import Stack, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SMALL, LARGE = 1, 2


def _host(capacity: int) -> dict[str, str]:
    return {"GUILDCAST_FANOUT_WORKERS": "1", "GUILDCAST_WORKER_CAPACITY": str(capacity)}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """One worker for a single guild, one for two."""
    folder = tmp_path_factory.mktemp("admission")
    async with Stack(folder, supervisors={"small": _host(SMALL), "large": _host(LARGE)}) as stack:
        yield stack


async def test_guilds_beyond_all_room_wait_and_play_when_there_is_some(stack: Stack, music: Path) -> None:
    """The emptiest worker is filled first; whoever fits nowhere says so, and needs no new job to be played to."""
    radio = await stack.start(music, loop=True)
    guilds = await stack.join(SMALL + LARGE, radio)
    held = await stack.by_worker(guilds)
    assert sorted(len(some) for some in held.values()) == [SMALL, LARGE]

    ((waiting, channel),) = stack.new_guilds(1)
    await stack.join_these([(waiting, channel)], radio, kind="voice", members=1)
    await stack.wait_event("guild.failed", guild=waiting, code=ErrorCode.NO_WORKER)
    worker, status = await stack.guild(waiting)
    assert status is not None
    assert (worker, status.state, status.code) == ("", "wanted", ErrorCode.NO_WORKER)

    await stack.do("guild.leave", guild=guilds[0])
    await stack.wait_state([waiting], "playing")
    await stack.hear_more([waiting, *guilds[1:]], 25)


async def test_a_full_worker_refuses_a_guild_and_another_plays_to_it(stack: Stack, music: Path) -> None:
    """It refuses before a handshake: the voice server sees one session, of the worker that had room."""
    radio = await stack.start(music, loop=True)
    guilds = await stack.join(SMALL + LARGE, radio)
    held = await stack.by_worker(guilds)
    small = next(worker for worker, some in held.items() if len(some) == SMALL)
    large = next(worker for worker in held if worker != small)
    await stack.do("guild.leave", guild=held[large].pop())

    process = stack.worker(small)
    os.kill(process.pid, signal.SIGSTOP)  # so that it cannot tell the truth
    try:
        await stack.store.command("HSET", stack.keys.worker(small), "headroom", 50)
        ((refused, channel),) = stack.new_guilds(1)
        await stack.join_these([(refused, channel)], radio, kind="voice", members=1)

        async def placed() -> bool:
            return (await stack.guild(refused))[0] == small

        await until(placed, "the guild with the worker that is said to have room")
    finally:
        os.kill(process.pid, signal.SIGCONT)
    (playing,) = await stack.wait_state([refused], "playing")
    assert playing.worker == large
    (told,) = await stack.events("guild.failed", guild=refused)
    assert (told.worker, told.code) == (small, ErrorCode.WORKER_FULL)
    assert len(await stack.sessions(refused)) == 1
    assert (await stack.by_worker(held[small])).keys() == {small}
