"""Every process ends within three seconds of SIGTERM, for listeners cleanly; none outlives its parent."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.e2e.stack import Process, Stack, descendants, ended_cleanly, gone, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

END_WITHIN_S = 3.0


async def terminate(process: Process) -> None:
    """SIGTERM a process and wait for its end, and for that of all it had started."""
    family = [process, *descendants(process.pid)]
    os.kill(process.pid, signal.SIGTERM)
    await gone(family, END_WITHIN_S)


async def assert_ended_cleanly(stack: Stack, guilds: Iterable[str]) -> None:
    """The first session of each guild has a clean end and missed nothing."""

    async def all_ended() -> bool:
        return all(row.sessions[0].state == "ended" for row in (await stack.heard(guilds)).values())

    await until(all_ended, "the end of the voice sessions")
    for guild, row in (await stack.heard(guilds)).items():
        session = row.sessions[0]
        assert ended_cleanly(session), (guild, session)
        assert not await stack.faults(session), guild


async def assert_undisturbed(stack: Stack, guilds: Iterable[str]) -> None:
    """These guilds hear on, on the session they began with."""
    await stack.hear_more(guilds, 50)
    for guild, row in (await stack.heard(guilds)).items():
        (session,) = row.sessions
        assert not await stack.faults(session), guild
        assert (session.state, session.trailing_silence) == ("live", 0), guild


async def test_a_terminated_fanout_worker_says_goodbye_and_its_guilds_go_on_elsewhere(
    stack: Stack, music: Path
) -> None:
    """SIGTERM of a fan-out worker: its guilds end cleanly and are heard again, others notice nothing."""
    broadcast = await stack.start(music, loop=True)
    guilds = await stack.join(8, broadcast)
    victim, survivor = (held := await stack.by_worker(guilds))
    await stack.hear_more(guilds, 25)
    await terminate(stack.worker(victim))
    await assert_ended_cleanly(stack, held[victim])

    async def heard_again() -> bool:
        rows = await stack.heard(held[victim])
        return all(len(row.sessions) > 1 and row.sessions[-1].audio_packets for row in rows.values())

    await until(heard_again, "sound in the guilds of the ended worker")
    await assert_undisturbed(stack, held[survivor])


async def test_a_terminated_encode_worker_is_not_heard(stack: Stack, music: Path) -> None:
    """SIGTERM of the encode worker ends it and its child; listeners live from the lead until the source goes on."""
    broadcast = await stack.start(music, loop=True)
    guilds = await stack.join(4, broadcast)
    run = await stack.run_of(broadcast)
    await stack.wait_lead(run, 25)
    worker = (await stack.broadcast(broadcast)).worker
    last = (await stack.published(run))[-1]
    await terminate(stack.worker(worker))

    async def goes_on() -> bool:
        return (await stack.published(run))[-1].term > last.term

    await until(goes_on, "frames of another encoder")
    assert (await stack.broadcast(broadcast)).worker != worker
    await assert_undisturbed(stack, guilds)


async def test_a_terminated_coordinator_is_not_heard(stack: Stack, music: Path) -> None:
    """SIGTERM of the coordinator ends it with status 0 and gives its lease back; no voice session notices."""
    broadcast = await stack.start(music, loop=True)
    guilds = await stack.join(4, broadcast)
    assert await stack.stop_within("coordinator", END_WITHIN_S) == 0
    assert not int(await stack.store.command("EXISTS", stack.keys.leader))
    await assert_undisturbed(stack, guilds)


async def test_a_terminated_supervisor_ends_all_guilds_cleanly_and_leaves_no_process(stack: Stack, music: Path) -> None:
    """SIGTERM of the supervisor ends every child with clean goodbyes, and the supervisor with status 0."""
    broadcast = await stack.start(music, loop=True)
    guilds = await stack.join(8, broadcast)
    await stack.hear_more(guilds, 25)
    children = descendants(stack.pool.processes["supervisor"].pid)
    assert {one.module for one in children} == {
        "worker.fanout",
        "worker.fanout.sender",
        "worker.encode",
        "worker.encode.child",
    }
    assert await stack.stop_within("supervisor", END_WITHIN_S) == 0
    await gone(children, 0.5)
    await assert_ended_cleanly(stack, guilds)
    assert not await stack.leased_workers()


async def test_a_killed_supervisor_leaves_no_orphan(stack: Stack, music: Path) -> None:
    """SIGKILL of the supervisor: its children say goodbye and end with it."""
    broadcast = await stack.start(music, loop=True)
    guilds = await stack.join(4, broadcast)
    await stack.hear_more(guilds, 25)
    children = descendants(stack.pool.processes["supervisor"].pid)
    assert len(children) == 6
    await stack.kill("supervisor")
    await gone(children)
    await assert_ended_cleanly(stack, guilds)
