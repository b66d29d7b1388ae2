"""Publishing: one encoder at a time, no frame twice, and a stream that neither grows nor stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from shared.cli.redis_server import RedisServer
from shared.errors import Fenced, StoreUnavailable
from shared.schema.frame_entry import FIELD, Flags, FrameEntry, unpack
from shared.store.client import Store
from shared.store.keys import Keys
from worker.encode.publish import Publisher

LEAD_MS = 1_000


def entry(term: int, first: int, *packets: bytes, flags: Flags = Flags.NONE) -> FrameEntry:
    return FrameEntry(term, first, 20_000 * 85_000_000_000, 0, first * 960, packets or (b"\xfc",) * 5, flags)


@pytest.fixture
async def own_store(own_redis_server: RedisServer) -> AsyncIterator[Store]:
    """A client of this test's own server, closed whatever comes."""
    store = Store(own_redis_server.url, raw=True)
    yield store
    await store.close()


@pytest.fixture
async def away() -> AsyncIterator[Store]:
    """A client of a server that is not there."""
    store = Store("unix:///nowhere/redis.sock", raw=True)
    yield store
    await store.close()


@pytest.fixture
def key(keys: Keys) -> str:
    return keys.frames(17)


@pytest.fixture
def publisher(raw_store: Store, key: str) -> Publisher:
    return Publisher(raw_store, key, LEAD_MS)


async def stored(raw_store: Store, key: str) -> list[FrameEntry]:
    return [
        unpack(entry_id.decode(), fields[FIELD.encode()])
        for entry_id, fields in await raw_store.command("XRANGE", key, "-", "+")
    ]


async def test_what_is_published_stands_in_the_stream(raw_store: Store, key: str, publisher: Publisher) -> None:
    """Entries keep their order, their ids and every byte."""
    entries = [entry(5, 0, b"\xff\x00", b"a"), entry(5, 2, b"b"), entry(5, 3, flags=Flags.ENDED)]
    assert await publisher.last() is None
    for one in entries:
        await publisher.publish(one)
        last = await publisher.last()
        assert last is not None
        assert last.id == one.id
    found = await stored(raw_store, key)
    assert [one._replace(packets=tuple(one.packets)) for one in found] == entries


async def test_a_stale_encoder_cannot_publish(raw_store: Store, key: str, publisher: Publisher) -> None:
    """A lower term is refused at whatever index, the publisher learns that it was replaced, and nothing changes."""
    await publisher.publish(entry(6, 10))
    before = await stored(raw_store, key)
    for first in (0, 10, 11, 1_000_000):
        with pytest.raises(Fenced) as caught:
            await publisher.publish(entry(5, first))
        assert not caught.value.retryable
    assert await stored(raw_store, key) == before


async def test_a_higher_term_may_cut_back(raw_store: Store, key: str, publisher: Publisher) -> None:
    """Whoever takes over publishes from where it likes; the one before is fenced by it."""
    await publisher.publish(entry(5, 100))
    await publisher.publish(entry(6, 50))
    with pytest.raises(Fenced):
        await publisher.publish(entry(5, 105))
    assert [one.id for one in await stored(raw_store, key)] == ["5-100", "6-50"]


async def test_a_repeated_entry_is_not_doubled(raw_store: Store, key: str, publisher: Publisher) -> None:
    """An entry whose answer was lost is sent again: it is there once, and the publisher goes on."""
    await publisher.publish(entry(5, 0))
    await publisher.publish(entry(5, 0))
    await publisher.publish(entry(5, 5))
    assert [one.id for one in await stored(raw_store, key)] == ["5-0", "5-5"]


async def test_of_two_publishers_of_one_term_at_one_index_one_entry_stands(
    raw_store: Store, key: str, publisher: Publisher
) -> None:
    """However many write the same entry at once, it is there once."""
    await asyncio.gather(*(publisher.publish(entry(5, 0)) for _ in range(10)))
    assert len(await stored(raw_store, key)) == 1


async def test_a_stream_is_trimmed(raw_store: Store, key: str, publisher: Publisher) -> None:
    """Three leads are kept, and what Redis cannot cut off cheaply; what is new is never cut."""
    for number in range(500):
        await publisher.publish(entry(5, number * 5))
    kept = await stored(raw_store, key)
    assert 3 * LEAD_MS // 100 <= len(kept) <= 3 * LEAD_MS // 100 + 100
    assert kept[-1].id == "5-2495"


async def test_a_stream_that_nobody_writes_to_goes(raw_store: Store, key: str, publisher: Publisher) -> None:
    """Each entry puts the end off, past all that is still to be played."""
    await publisher.publish(entry(5, 0))
    assert LEAD_MS + 55_000 < await raw_store.command("PTTL", key) <= LEAD_MS + 60_000
    await raw_store.command("PERSIST", key)
    await publisher.publish(entry(5, 5))
    assert await raw_store.command("PTTL", key) > 0


async def test_a_stream_whose_run_has_ended_goes_in_a_minute(raw_store: Store, key: str, publisher: Publisher) -> None:
    """Memory is given back when nobody can want it any more."""
    await publisher.publish(entry(5, 0))
    await publisher.expire()
    assert 0 < await raw_store.command("PTTL", key) <= 60_000


async def test_without_redis_it_is_not_known_whether_an_entry_is_there(away: Store, key: str) -> None:
    """The publisher is told to repeat, and not that it was replaced."""
    with pytest.raises(StoreUnavailable):
        await Publisher(away, key, LEAD_MS).publish(entry(5, 0))


async def test_a_full_redis_does_not_fence(own_store: Store, key: str) -> None:
    """Out of memory is an absence: the same entry is published when there is room again."""
    publisher = Publisher(own_store, key, LEAD_MS)
    await publisher.publish(entry(5, 0))
    await own_store.command("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(StoreUnavailable):
        await publisher.publish(entry(5, 5))
    await own_store.command("CONFIG", "SET", "maxmemory", "0")
    await publisher.publish(entry(5, 5))
    assert [one.id for one in await stored(own_store, key)] == ["5-0", "5-5"]
