"""Processes that hang: alive for everybody who looks at pids and sockets, and as bad as dead."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.e2e.stack import Stack, until
from tests.media.make_programme import PROGRAMME

pytestmark = pytest.mark.asyncio(loop_scope="module")

GUILDS = 8


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with Stack(tmp_path_factory.mktemp("pool")) as stack:
        yield stack


@pytest_asyncio.fixture(loop_scope="module")
async def stack(running: Stack) -> AsyncIterator[Stack]:
    """A pool that plays to some guilds, on two workers."""
    await running.whole()
    copy = running.media / PROGRAMME.name
    copy.write_bytes(await asyncio.to_thread(Path(PROGRAMME).read_bytes))
    yield running
    await running.clear()


async def tell(stack: Stack, what: str, guilds: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    silences = sorted([await stack.longest_silence_s(guild) for guild in guilds])
    with capsys.disabled():
        print(f"\n  {what}: silence {silences[len(silences) // 2]:.2f} s median, {silences[-1]:.2f} s at most", end=" ")


async def test_a_sender_that_hangs_is_replaced(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """The sessions stay, nobody is asked, and no guild goes elsewhere."""
    radio = await stack.start(stack.media / PROGRAMME.name, loop=True)
    guilds = await stack.join(GUILDS, radio)
    await stack.hear_more(guilds, 50)
    before = await stack.by_worker(guilds)
    stopped = stack.children("worker.fanout.sender")[0]
    os.kill(stopped.pid, signal.SIGSTOP)

    async def gone() -> bool:
        return not stopped.alive

    await until(gone, "the end of the sender that stands still")
    await stack.hear_more(guilds, 50)
    assert await stack.by_worker(guilds) == before
    for guild in guilds:
        (session,) = await stack.sessions(guild)
        assert session.state == "live"
    await tell(stack, "sender", guilds, capsys)


async def test_guilds_of_a_worker_that_hangs_are_heard_elsewhere(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is killed by its supervisor, sooner than its lease runs out."""
    radio = await stack.start(stack.media / PROGRAMME.name, loop=True)
    guilds = await stack.join(GUILDS, radio)
    await stack.hear_more(guilds, 50)
    held = await stack.by_worker(guilds)
    worker = next(iter(held))
    struck = held[worker]
    os.kill(stack.worker(worker).pid, signal.SIGSTOP)

    async def elsewhere() -> bool:
        return worker not in await stack.by_worker(struck)

    await until(elsewhere, "other workers for the guilds")
    await stack.wait_state(struck, "playing")
    await stack.hear_more(guilds, 25)
    await tell(stack, "worker", struck, capsys)


async def test_an_encoding_child_that_hangs_is_not_heard(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """A file is encoded far ahead: another child goes on where it stopped, and nobody misses a frame."""
    radio = await stack.start(stack.media / PROGRAMME.name, loop=True)
    guilds = await stack.join(2, radio)
    await stack.hear_more(guilds, 50)
    await stack.wait_lead(await stack.run_of(radio), 10)
    stopped = stack.children("worker.encode.child")[0]
    os.kill(stopped.pid, signal.SIGSTOP)

    async def replaced() -> bool:
        return not stopped.alive and bool(stack.children("worker.encode.child"))

    await until(replaced, "another child")
    await stack.hear_more(guilds, 100)
    for guild in guilds:
        (session,) = await stack.sessions(guild)
        assert not await stack.faults(session)
        assert await stack.longest_silence_s(guild) < 1
    await tell(stack, "child", guilds, capsys)
