"""Subscribing: back to the frame due now, on with what comes, over malformed entries and outages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from shared.cli.redis_server import RedisServer
from shared.clock import CommonClock, LocalClock
from shared.schema.frame_entry import FIELD, Flags, FrameEntry
from shared.store.client import Store, reach
from shared.store.keys import Keys
from worker.encode.publish import Publisher
from worker.fanout.ring import FrameRing, Silence
from worker.fanout.subscribe import BLOCK_S, GATHERED_S, Subscriber

BOUND_S = 10.0
EPOCH_US = 20_000 * 85_000_000_000


class StoppedClock(LocalClock):
    """A clock that stands still."""

    def now_ns(self) -> int:
        return 0


def at_index(index: int) -> CommonClock:
    """A common clock at which the frame of an index is due."""
    clock = CommonClock(StoppedClock())
    clock.observe(0, 0, EPOCH_US + index * 20_000)
    return clock


def packet(index: int, term: int = 5) -> bytes:
    return b"%d/%d" % (term, index)


def entry(first: int, number: int = 5, term: int = 5, flags: Flags = Flags.NONE) -> FrameEntry:
    packets = [packet(index, term) for index in range(first, first + number)]
    return FrameEntry(term, first, EPOCH_US, 0, 0, packets, flags)


class Rig:
    """A stream, its publisher, and a subscriber whose clock stands at `due`."""

    def __init__(self, server: RedisServer, key: str, due: int) -> None:
        self.key = key
        self.store = Store(server.url, raw=True)
        self.reading = Store(server.url, raw=True, block_s=BLOCK_S)
        self.publisher = Publisher(self.store, key, 60_000)
        self.ring = FrameRing()
        self.subscriber = Subscriber(self.reading, key, self.ring, at_index(due))

    async def fill(self, entries: int, *, without: int = -1) -> None:
        """Publish entries of five frames; one of them may be garbage."""
        for number in range(entries):
            if number == without:
                await self.store.command("XADD", self.key, f"5-{number * 5}", FIELD, b"garbage")
            else:
                await self.publisher.publish(entry(number * 5))

    @asynccontextmanager
    async def reads(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.subscriber.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(BOUND_S):
            while not condition():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.002)

    async def has(self, index: int) -> None:
        """Wait until the ring has the frame of an index."""
        await self.until(lambda: isinstance(self.ring.at(index), bytes))

    async def close(self) -> None:
        await self.store.close()
        await self.reading.close()


@pytest.fixture
async def rig(redis_server: RedisServer, keys: Keys) -> AsyncIterator[Rig]:
    made = Rig(redis_server, keys.frames(17), 1_000)
    yield made
    await made.close()


@pytest.fixture
async def own_rig(own_redis_server: RedisServer, keys: Keys) -> AsyncIterator[Rig]:
    """On a server that may be stopped; the run has just begun."""
    made = Rig(own_redis_server, keys.frames(17), 0)
    yield made
    await made.close()


async def test_entries_that_come_in_a_row_are_read_together(own_rig: Rig) -> None:
    """A lead is filled up by many at a time: however fast they come, Redis is asked no more often than that."""

    async def reads() -> int:
        stats = await own_rig.store.command("INFO", "commandstats")
        return int(stats.get("cmdstat_xread", {}).get("calls", 0))

    await own_rig.fill(1)
    async with own_rig.reads():
        await own_rig.has(4)
        began_s, before = time.monotonic(), await reads()
        await own_rig.fill(200)
        await own_rig.has(999)
        asked = await reads() - before
        assert asked <= (time.monotonic() - began_s) / GATHERED_S + 2


async def test_a_late_joiner_reads_back_to_the_frame_due_now(rig: Rig) -> None:
    """All from the frame due now on is there, and the stream was not read from its beginning."""
    await rig.fill(400)
    async with rig.reads():
        await rig.has(1_999)
    assert [rig.ring.at(index) for index in range(1_000, 2_000)] == [packet(index) for index in range(1_000, 2_000)]
    assert len(rig.ring) < 1_600
    assert rig.ring.epoch_us == EPOCH_US


async def test_a_short_stream_is_read_whole(rig: Rig) -> None:
    """Where less was published than is due, what there is is read."""
    await rig.fill(3)
    async with rig.reads():
        await rig.has(14)
    assert len(rig.ring) == 15


async def test_a_stream_that_does_not_exist_yet_is_waited_for(rig: Rig) -> None:
    """A guild may be tuned before the broadcast starts: its first frame is heard."""
    async with rig.reads():
        await asyncio.sleep(0)
        await rig.fill(2)
        await rig.has(9)
    assert rig.ring.at(0) == packet(0)


async def test_a_reader_goes_on_with_what_comes(rig: Rig) -> None:
    """After catching up each new entry is applied, none twice and none left out."""
    await rig.fill(250)
    async with rig.reads():
        await rig.has(1_249)
        for number in range(250, 300):
            await rig.publisher.publish(entry(number * 5))
        await rig.has(1_499)
    assert all(rig.ring.at(index) == packet(index) for index in range(1_000, 1_500))


async def test_a_cut_is_applied(rig: Rig) -> None:
    """What a takeover replaces is replaced in the ring, and what it does not is not."""
    await rig.fill(250)
    async with rig.reads():
        await rig.has(1_249)
        await rig.publisher.publish(entry(1_100, term=6))
        await rig.until(lambda: rig.ring.term == 6)
    assert rig.ring.at(1_099) == packet(1_099)
    assert rig.ring.at(1_100) == packet(1_100, 6)
    assert rig.ring.at(1_105) is Silence.MISSING


async def test_a_cut_that_was_published_before_is_applied_to_a_late_joiner(rig: Rig) -> None:
    """A late joiner hears what the others hear: entries are applied in the stream's order."""
    await rig.fill(250)
    for number in range(30):
        await rig.publisher.publish(entry(1_100 + number * 5, term=6))
    async with rig.reads():
        await rig.has(1_249)
    assert rig.ring.at(1_000) == packet(1_000)
    assert rig.ring.at(1_099) == packet(1_099)
    assert all(rig.ring.at(index) == packet(index, 6) for index in range(1_100, 1_250))
    assert rig.ring.at(1_250) is Silence.MISSING


async def test_a_flag_is_applied(rig: Rig) -> None:
    """The end of a run is known as such."""
    await rig.fill(250)
    async with rig.reads():
        await rig.publisher.publish(entry(1_250, flags=Flags.ENDED))
        await rig.has(1_254)
    assert rig.ring.at(1_255) is Silence.ENDED


@pytest.mark.parametrize("place", [249, 249 - 63, 249 - 64, 220])
async def test_a_malformed_entry_is_skipped_when_catching_up(rig: Rig, place: int) -> None:
    """Wherever it stands, it costs its own frames and nothing else: the frame due now is found all the same."""
    rig.subscriber = Subscriber(rig.reading, rig.key, rig.ring, at_index(400))
    await rig.fill(250, without=place)
    async with rig.reads():
        await rig.until(lambda: len(rig.ring))
        await rig.publisher.publish(entry(1_250))
        await rig.has(1_254)
    lost = range(place * 5, place * 5 + 5)
    for index in range(400, 1_255):
        assert rig.ring.at(index) == (Silence.MISSING if index in lost else packet(index))
    assert rig.subscriber.malformed


async def test_a_malformed_entry_is_skipped_when_reading_on(rig: Rig) -> None:
    """What comes after it is heard."""
    await rig.fill(1)
    async with rig.reads():
        await rig.has(4)
        await rig.store.command("XADD", rig.key, "5-5", FIELD, b"\x01garbage")
        await rig.store.command("XADD", rig.key, "5-6", "other", b"field")
        await rig.publisher.publish(entry(10))
        await rig.has(14)
    assert rig.ring.at(5) is Silence.MISSING
    assert rig.subscriber.malformed == 2


async def test_a_restart_of_redis_is_survived(own_redis_server: RedisServer, own_rig: Rig) -> None:
    """While Redis is away the ring keeps what it has; when it is back, empty, the reader goes on."""
    rig = own_rig
    await rig.fill(4)
    async with rig.reads():
        await rig.has(19)
        own_redis_server.stop()
        assert rig.ring.at(19) == packet(19)
        own_redis_server.start()
        await reach(rig.store)
        await rig.publisher.publish(entry(20))
        await rig.has(24)
    assert all(rig.ring.at(index) == packet(index) for index in range(25))
