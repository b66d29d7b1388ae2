"""The loss of any one process, and of Redis for a while, is heard as a short gap or not at all."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from tests.e2e.stack import Stack, gone, until
from tests.emulator.analysis import unwrap_timestamps
from tests.emulator.payloads import SILENCE_ID
from tests.emulator.records import SessionPackets
from tests.media.audio import FRAME_SAMPLES, Pcm, align, decode_opus

pytestmark = pytest.mark.asyncio(loop_scope="module")

RECOVERED_WITHIN_S = 20.0
SECOND = 50
"""Frames."""
REDIS_AWAY_PACKETS = 4 * 50


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Two fan-out workers and two encode workers."""
    async with Stack(tmp_path_factory.mktemp("pool"), settings={"GUILDCAST_ENCODE_WORKERS": "2"}) as stack:
        yield stack


async def assert_lost_nothing(stack: Stack, guilds: Iterable[str]) -> None:
    """Each guild is on the session it began with, and every packet follows 20 ms after the one before,
    unless the machine stood still."""
    for guild, row in (await stack.heard(guilds)).items():
        (session,) = row.sessions
        assert not await stack.faults(session), guild
        assert session.state == "live"
        (recording,) = (await stack.packets(guild)).sessions
        steps = np.diff(unwrap_timestamps(np.asarray(recording.timestamp, np.uint32)))
        # what the workers themselves say they skipped counts as lost, and is forgiven above
        assert int((steps // FRAME_SAMPLES - 1).sum()) <= session.lost, guild
        assert SILENCE_ID not in recording.payload, guild


def sound_arrivals_ns(session: SessionPackets) -> list[int]:
    return [at for at, payload in zip(session.arrival_ns, session.payload, strict=True) if payload != SILENCE_ID]


async def test_guilds_of_a_killed_worker_are_heard_again_and_others_lose_nothing(
    stack: Stack, music: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of a fan-out worker: its guilds go on elsewhere after a gap, those of the other worker notice nothing."""
    broadcast = await stack.start(music, loop=True)
    guilds = await stack.join(8, broadcast)
    held = await stack.by_worker(guilds)
    victim, survivor = held
    await stack.hear_more(guilds, 25)
    killed = stack.worker(victim)
    family = [killed, *(one for one in stack.children("worker.fanout.sender") if one.parent == killed.pid)]
    os.kill(killed.pid, signal.SIGKILL)
    await gone(family)

    async def heard_again() -> bool:
        rows = await stack.heard(held[victim])
        return all(len(row.sessions) > 1 and row.sessions[-1].audio_packets >= 25 for row in rows.values())

    await until(heard_again, "sound in the guilds of the killed worker", RECOVERED_WITHIN_S)
    gaps_s = []
    for guild in held[victim]:
        before, *_, after = (await stack.packets(guild)).sessions
        gaps_s.append((sound_arrivals_ns(after)[0] - sound_arrivals_ns(before)[-1]) / 1e9)
        assert not await stack.faults((await stack.sessions(guild))[-1])
    with capsys.disabled():
        print(f"\nSIGKILL of a fan-out worker: heard again after {min(gaps_s):.2f} to {max(gaps_s):.2f} s", end="")
    await assert_lost_nothing(stack, held[survivor])
    assert [one.worker for one in await stack.events("worker.lost", worker=victim)] == [victim]


async def test_a_killed_encode_worker_is_replaced_before_listeners_run_dry(
    stack: Stack, music: Path, programme: Pcm
) -> None:
    """SIGKILL of the encode worker: another goes on at the next index and position, across a seam nobody misses."""
    broadcast = await stack.start(music, lead_ms=4_000)
    guilds = await stack.join(4, broadcast)
    run = await stack.run_of(broadcast)
    await stack.wait_lead(run, 3.5)
    victim = stack.worker((await stack.broadcast(broadcast)).worker)
    children = [one for one in stack.children("worker.encode.child") if one.parent == victim.pid]
    assert len(children) == 1
    before = await stack.published(run)
    os.kill(victim.pid, signal.SIGKILL)
    await gone([victim, *children])

    async def gone_on() -> int:
        entries = await stack.published(run)
        return next((entry.first_index for entry in entries if entry.term > before[0].term), 0)

    seam = await until(gone_on, "frames of a higher term", RECOVERED_WITHIN_S)
    entries = await stack.published(run)
    for one, following in pairwise(entries):
        assert following.first_index == one.next_index
        assert following.position_samples == one.position_samples + FRAME_SAMPLES * len(one.packets)
    frame = next(packet for entry in entries if entry.first_index == seam for packet in entry.packets)

    async def heard_past_the_seam() -> bool:
        heard = await stack.packets(guilds[0])
        return any(payload == frame for payload in heard.payloads.values())

    await until(heard_past_the_seam, "the first frame of the new encoder")
    await stack.hear_more(guilds, 60)
    await assert_lost_nothing(stack, guilds)
    for guild in guilds:
        recording = await stack.packets(guild)
        frames = [recording.payloads[payload] for payload in recording.sessions[0].payload]
        place = frames.index(frame)
        around = decode_opus(frames[place - SECOND : place + SECOND])
        offset, likeness = align(programme, around)
        assert likeness > 0.98
        # The seam itself, where a wrong position or a cold encoder would be heard as a click.
        seam_at = SECOND * FRAME_SAMPLES
        here = around[seam_at : seam_at + FRAME_SAMPLES].ravel()
        there = programme[offset + seam_at : offset + seam_at + FRAME_SAMPLES].ravel()
        assert here @ there / np.sqrt((here @ here) * (there @ there)) > 0.98


async def test_a_killed_sender_costs_no_voice_session(stack: Stack, music: Path) -> None:
    """SIGKILL of a sender: a new one sends on the same sessions."""
    broadcast = await stack.start(music, loop=True)
    guilds = await stack.join(6, broadcast)
    held = await stack.by_worker(guilds)
    victim, survivor = held
    before = {guild: row.sessions[-1].ssrc for guild, row in (await stack.heard(guilds)).items()}
    worker = stack.worker(victim)
    senders = [one for one in stack.children("worker.fanout.sender") if one.parent == worker.pid]
    assert len(senders) == 1
    os.kill(senders[0].pid, signal.SIGKILL)
    await gone(senders)
    await stack.hear_more(held[victim], 50)
    assert worker.alive
    for guild, row in (await stack.heard(held[victim])).items():
        (session,) = row.sessions
        assert (session.ssrc, session.state) == (before[guild], "live")
        assert not {name: n for name, n in (await stack.faults(session)).items() if name != "lost"}, guild
    await assert_lost_nothing(stack, held[survivor])


async def test_sound_goes_on_while_redis_is_away(stack: Stack, music: Path) -> None:
    """Redis away for 4 s, with 30 s published ahead: nobody hears it, and afterwards the pool works as before."""
    broadcast = await stack.start(music, loop=True)
    guilds = await stack.join(6, broadcast)
    await stack.wait_lead(await stack.run_of(broadcast), 25)
    async with stack.redis_stopped():
        await stack.hear_more(guilds, REDIS_AWAY_PACKETS)
    newcomers = await stack.join(2, broadcast)
    await stack.hear_more([*guilds, *newcomers], 50)
    await assert_lost_nothing(stack, [*guilds, *newcomers])
    await stack.whole()


async def test_a_new_coordinator_does_what_was_asked_meanwhile_once(stack: Stack, music: Path) -> None:
    """SIGKILL of the coordinator drops no voice session; its successor does each waiting job, once."""
    broadcast = await stack.start(music, loop=True)
    guilds = await stack.join(4, broadcast)
    await stack.kill("coordinator")
    ((guild, channel),) = stack.new_guilds(1)
    join: dict[str, Any] = {"v": 1, "id": stack.new_id(), "type": "guild.join", "guild": guild, "channel": channel}
    join |= {"broadcast": broadcast, "voice": await stack.voice(guild, channel)}
    leave: dict[str, Any] = {"v": 1, "id": stack.new_id(), "type": "guild.leave", "guild": guilds.pop()}
    for body in (join, leave, join):
        await stack.send(body)
    await stack.start_coordinator()
    for body in (join, leave):
        assert (await stack.outcome(body["id"])).state == "done"
    await stack.wait_state([guild], "playing")
    await stack.hear_more([*guilds, guild], 50)
    await assert_lost_nothing(stack, [*guilds, guild])
    for body in (join, leave):
        assert len(await stack.events("job.done", job=body["id"])) == 1
    assert not int(await stack.store.command("XLEN", stack.keys.jobs))
