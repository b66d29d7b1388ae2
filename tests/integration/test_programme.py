"""What listeners of one broadcast hear, as their worker tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from shared.clock import CommonClock, LocalClock
from shared.schema.frame_entry import Flags, FrameEntry
from shared.store.client import Store
from shared.store.keys import Keys
from worker.encode.publish import Publisher
from worker.fanout.grid import epoch_tick
from worker.fanout.programme import Programme
from worker.fanout.ring import FrameRing

EPOCH_US = 1_700_000_000_000_000
FRAME = b"\xfc" + bytes(9)
RUN = 77
BOUND_S = 10.0


@pytest.fixture
async def programme(raw_store: Store, keys: Keys) -> AsyncIterator[Programme]:
    clock = CommonClock(LocalClock())
    clock.observe(clock.local.now_ns(), clock.local.now_ns(), EPOCH_US)
    programme = Programme("b", raw_store, keys, clock)
    yield programme
    programme.follow(0)
    await programme.close()


async def publish(store: Store, keys: Keys, first: int, frames: int, flags: Flags = Flags.NONE, term: int = 5) -> None:
    entry = FrameEntry(term, first, EPOCH_US, 0, 0, [FRAME] * frames, flags)
    await Publisher(store, keys.frames(RUN), 1_000).publish(entry)


def no_entry(_ring: FrameRing, _entry: FrameEntry) -> None:
    raise ValueError("a defect")


def state(programme: Programme) -> str:
    return programme.state


def play(programme: Programme, tick: int) -> bytes | None:
    """What is heard at a tick, which is over then."""
    frame = programme.frame_at(tick)
    programme.passed(tick)
    return frame


async def until_heard(programme: Programme, index: int) -> None:
    async with asyncio.timeout(BOUND_S):
        while programme.frame_at(epoch_tick(EPOCH_US) + index) is None:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
    play(programme, epoch_tick(EPOCH_US) + index)


async def test_a_second_without_frames_that_nobody_flagged_is_told(
    programme: Programme, raw_store: Store, keys: Keys
) -> None:
    """A short underrun is counted; dead air is a state, until the sound is back."""
    await publish(raw_store, keys, 0, 5)
    programme.follow(RUN)
    await until_heard(programme, 0)
    assert state(programme) == "playing"
    start = epoch_tick(EPOCH_US) + 5
    before = programme.underruns
    for tick in range(start, start + 49):
        assert play(programme, tick) is None
        assert state(programme) == "playing"
    assert play(programme, start + 49) is None
    assert state(programme) == "starved"
    assert programme.underruns - before == 50
    await publish(raw_store, keys, 60, 5)
    await until_heard(programme, 60)
    assert state(programme) == "playing"


async def test_a_second_of_a_gap_that_the_encoder_flagged_is_told_as_well(
    programme: Programme, raw_store: Store, keys: Keys
) -> None:
    """That a source is away is dead air, too, though nothing is missing here."""
    await publish(raw_store, keys, 0, 5, Flags.GAP)
    programme.follow(RUN)
    await until_heard(programme, 0)
    start = epoch_tick(EPOCH_US) + 5
    for tick in range(start, start + 49):
        assert play(programme, tick) is None
        assert state(programme) == "playing"
    assert play(programme, start + 49) is None
    assert state(programme) == "starved"
    assert programme.underruns == 0


async def test_a_flagged_end_is_no_underrun(programme: Programme, raw_store: Store, keys: Keys) -> None:
    """What ended or paused as it was meant to is idle, and nothing is missing."""
    await publish(raw_store, keys, 0, 5, Flags.ENDED)
    programme.follow(RUN)
    await until_heard(programme, 0)
    assert state(programme) == "playing"
    assert play(programme, epoch_tick(EPOCH_US) + 5) is None
    assert state(programme) == "idle"
    assert programme.underruns == 0


async def test_a_reader_that_ended_is_told_and_begins_anew(
    programme: Programme, raw_store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect of ours is not the source's fault; the next look at the run has it read again."""
    await publish(raw_store, keys, 0, 5)
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(FrameRing, "apply", no_entry)
        programme.follow(RUN)
        async with asyncio.timeout(BOUND_S):
            while not any(line["event"] == "task.crashed" for line in logs):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
    assert str(programme.why_starved) == "internal_error: its frames cannot be read: a defect"
    programme.follow(RUN)
    await until_heard(programme, 0)
    assert state(programme) == "playing"
    assert str(programme.why_starved) == "source_stalled: nothing comes from the source"


async def test_another_run_is_followed_at_once(programme: Programme, raw_store: Store, keys: Keys) -> None:
    """When a broadcast is stopped and started again, nothing of the old run is played any more."""
    await publish(raw_store, keys, 0, 5)
    programme.follow(RUN)
    await until_heard(programme, 0)
    programme.follow(RUN + 1)
    assert play(programme, epoch_tick(EPOCH_US) + 1) is None
    assert state(programme) == "idle"


async def test_a_packet_that_fits_no_row_is_never_built(programme: Programme, raw_store: Store, keys: Keys) -> None:
    """An entry with something larger than an Opus packet is left out, and the next one is played."""
    entry = FrameEntry(5, 0, EPOCH_US, 0, 0, [bytes(2_000)])
    await Publisher(raw_store, keys.frames(RUN), 1_000).publish(entry)
    await publish(raw_store, keys, 5, 5)
    programme.follow(RUN)
    await until_heard(programme, 5)
    assert play(programme, epoch_tick(EPOCH_US)) is None
