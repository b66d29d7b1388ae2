"""A worker's place in the pool: lease, record, want, reports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from shared.cli.redis_server import RedisServer
from shared.clock import NS_PER_MS, LocalClock
from shared.schema import event as events
from shared.schema.event import Event
from shared.schema.records import GuildSpec, GuildStatus, GuildWant, WorkerRecord, WorkerStats
from shared.schema.wake import wake_word
from shared.schema.want_version import FIELD
from shared.store.client import Store, reach
from shared.store.keys import Keys
from worker.membership import LEASE_MS, Membership, Report

BOUND_S = 10.0
GUILD_ID = "123456789012345678"
RECORD = WorkerRecord(id="h-fanout-0-ab", name="h-fanout-0", role="fanout", host="h", capacity=9, headroom=9)
STATUS = GuildStatus(state="playing", at=5, worker=RECORD.id, slot=3)


class HandClock(LocalClock):
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.ns = 1_000_000_000_000

    def now_ns(self) -> int:
        return self.ns


@pytest.fixture
async def own_store(own_redis_server: RedisServer) -> AsyncIterator[Store]:
    """A client of this test's own server, closed whatever comes."""
    store = Store(own_redis_server.url)
    yield store
    await store.close()


@pytest.fixture
async def away() -> AsyncIterator[Store]:
    """A client of a server that is not there."""
    store = Store("unix:///nowhere/redis.sock")
    yield store
    await store.close()


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def member(store: Store, keys: Keys, clock: HandClock) -> Membership:
    return Membership(store, keys, RECORD, clock)


async def told(store: Store, keys: Keys) -> list[Event]:
    return [events.decode(fields[events.FIELD]) for _, fields in await store.command("XRANGE", keys.events, "-", "+")]


async def test_a_worker_that_joins_is_seen(store: Store, keys: Keys, member: Membership) -> None:
    """Lease, record, its name among the workers, an event, and a call to the leader."""
    async with aclosing(store.hear([keys.wake_leader], BOUND_S)) as leader:
        assert await anext(leader) is None
        assert not member.lease_valid
        await member.join()
        assert member.lease_valid
        assert await anext(leader) == RECORD.id
    assert await store.command("SMEMBERS", keys.workers) == {RECORD.id}
    assert 0 < await store.command("PTTL", keys.lease(RECORD.id)) <= LEASE_MS
    assert await store.command("GET", keys.lease(RECORD.id)) == RECORD.name
    fields = await store.command("HGETALL", keys.worker(RECORD.id))
    assert (fields["name"], fields["role"], fields["capacity"], fields["headroom"]) == (
        "h-fanout-0",
        "fanout",
        "9",
        "9",
    )
    assert await store.command("PTTL", keys.worker(RECORD.id)) > LEASE_MS
    assert [(event.type, event.worker) for event in await told(store, keys)] == [("worker.up", RECORD.id)]


async def test_a_lease_ends_without_renewal(member: Membership, clock: HandClock) -> None:
    """By its own clock a worker knows when its guilds may have been given to another."""
    await member.join()
    clock.ns += LEASE_MS * NS_PER_MS - 1
    assert member.lease_valid
    clock.ns += 1
    assert not member.lease_valid


async def test_a_renewal_makes_the_lease_longer_from_when_it_was_asked_for(
    member: Membership, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time that Redis took to answer is not added to the lease: there it runs already."""
    await member.join()
    store = member._store
    transaction = store.transaction

    async def slow(commands: object) -> object:
        done = await transaction(commands)  # type: ignore[arg-type]
        clock.ns += 1_000 * NS_PER_MS
        return done

    monkeypatch.setattr(store, "transaction", slow)
    await member.renew(4, WorkerStats(guilds=5))
    clock.ns += (LEASE_MS - 1_000) * NS_PER_MS - 1
    assert member.lease_valid
    clock.ns += 1
    assert not member.lease_valid


async def test_a_renewal_tells_headroom_and_figures(store: Store, keys: Keys, member: Membership) -> None:
    """The coordinator places by what workers tell with their leases."""
    await member.renew(4, WorkerStats(guilds=5, underruns=2))
    fields = await store.command("HGETALL", keys.worker(RECORD.id))
    assert fields["headroom"] == "4"
    assert msgspec.json.decode(fields["stats"], type=WorkerStats) == WorkerStats(guilds=5, underruns=2)


async def test_a_beat_renews_without_being_waited_for(member: Membership, clock: HandClock) -> None:
    """The pace of the work renews the lease and is not held up by it; who waits for the lease is let go on."""
    waiting = asyncio.create_task(member.wait_clearance())
    await asyncio.sleep(0)
    assert not waiting.done()
    member.beat(3, WorkerStats())
    member.beat(3, WorkerStats())  # one is under way: no second one beside it
    async with asyncio.timeout(BOUND_S):
        await waiting
    assert member.lease_valid
    clock.ns += LEASE_MS * NS_PER_MS
    assert not member.lease_valid
    await member.leave()


async def test_a_beat_without_redis_leaves_the_lease_to_run_out(away: Store, keys: Keys, clock: HandClock) -> None:
    """An absence of Redis does not end the worker, and does not make its lease longer."""
    member = Membership(away, keys, RECORD, clock)
    member.beat(1, WorkerStats())
    async with asyncio.timeout(BOUND_S):
        assert member._beating is not None
        await member._beating
    assert not member.lease_valid


def want(generation: int, broadcast: str = "news") -> str:
    spec = GuildSpec(bot="main", guild=GUILD_ID, channel=GUILD_ID, broadcast=broadcast)
    return msgspec.json.encode(GuildWant(generation=generation, spec=spec)).decode()


async def test_a_worker_looks_at_once_and_on_every_call(
    store: Store, keys: Keys, member: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in `want` is told at the start, then when the worker is called, and when all are."""
    monkeypatch.setattr("worker.membership.LOOK_EVERY_S", 10 * BOUND_S)
    await store.command("HSET", keys.want(RECORD.id), "guild:main:1", want(1))
    async with aclosing(member.wants(GuildWant)) as looks, asyncio.timeout(BOUND_S):
        assert {name: one.generation for name, one in (await anext(looks)).items()} == {"guild:main:1": 1}
        for generation, channel in ((2, keys.wake(RECORD.id)), (3, keys.wake_all)):
            await store.command("HSET", keys.want(RECORD.id), "guild:main:1", want(generation))
            await store.command("PUBLISH", channel, "look")
            assert (await anext(looks))["guild:main:1"].generation == generation


async def test_a_worker_that_is_told_what_changed_reads_only_that(
    store: Store, keys: Keys, member: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that is the same stays the same object; one that is gone is gone; what was not named comes later."""
    monkeypatch.setattr("worker.membership.LOOK_EVERY_S", 10 * BOUND_S)
    entries = keys.want(RECORD.id)
    await store.command("HSET", entries, "guild:main:1", want(1), "guild:main:2", want(1), "guild:main:3", want(1))
    async with aclosing(member.wants(GuildWant)) as looks, asyncio.timeout(BOUND_S):
        before = await anext(looks)
        await store.command("HSET", entries, "guild:main:1", want(2), "guild:main:4", want(2))
        await store.command("HDEL", entries, "guild:main:2")
        await store.command("PUBLISH", keys.wake(RECORD.id), wake_word(["guild:main:1", "guild:main:2"]))
        after = await anext(looks)
        assert {name: one.generation for name, one in after.items()} == {"guild:main:1": 2, "guild:main:3": 1}
        assert after["guild:main:3"] is before["guild:main:3"]
        await store.command("PUBLISH", keys.wake(RECORD.id), "look")
        assert set(await anext(looks)) == {"guild:main:1", "guild:main:3", "guild:main:4"}


async def test_a_worker_that_is_called_all_the_time_looks_at_all_of_it_too(
    store: Store, keys: Keys, member: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that was missed among many costs the time until the next whole look."""
    monkeypatch.setattr("worker.membership.LOOK_EVERY_S", 0.2)
    async with aclosing(member.wants(GuildWant)) as looks, asyncio.timeout(BOUND_S):
        assert await anext(looks) == {}
        await store.command("HSET", keys.want(RECORD.id), "guild:main:1", want(1))
        while True:
            await store.command("PUBLISH", keys.wake(RECORD.id), wake_word(["guild:main:2"]))
            if await anext(looks):
                break


async def test_a_lapse_is_made_up_for_by_a_whole_look_only(
    store: Store, keys: Keys, member: Membership, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever lost its lease while it looked may not go by the few entries that it is told of next."""
    monkeypatch.setattr("worker.membership.LOOK_EVERY_S", 10 * BOUND_S)
    await member.join()
    await store.command("HSET", keys.want(RECORD.id), "guild:main:1", want(1), FIELD, "s:1:1")
    async with aclosing(member.wants(GuildWant)) as looks, asyncio.timeout(BOUND_S):
        await anext(looks)
        clock.ns += (LEASE_MS + 1) * NS_PER_MS
        await member.renew(4, WorkerStats())
        await store.command("HDEL", keys.want(RECORD.id), "guild:main:1")
        await store.command("HSET", keys.want(RECORD.id), FIELD, "s:2:0")
        await store.command("PUBLISH", keys.wake(RECORD.id), wake_word(["guild:main:2"]))
        assert await anext(looks) == {}
        assert not member.may_identify  # it is read, but not yet acted upon
        await store.command("PUBLISH", keys.wake(RECORD.id), wake_word(["guild:main:2"]))
        await anext(looks)
        assert member.may_identify


async def test_a_worker_looks_without_a_call_too(
    store: Store, keys: Keys, member: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that was missed costs time and nothing else."""
    monkeypatch.setattr("worker.membership.LOOK_EVERY_S", 0.05)
    async with aclosing(member.wants(GuildWant)) as looks, asyncio.timeout(BOUND_S):
        assert await anext(looks) == {}
        await store.command("HSET", keys.want(RECORD.id), "guild:main:1", want(1))
        while not await anext(looks):
            pass


async def test_a_worker_looks_again_after_an_outage(
    own_redis_server: RedisServer, own_store: Store, keys: Keys, clock: HandClock
) -> None:
    """When Redis is back, `want` is read anew."""
    member = Membership(own_store, keys, RECORD, clock)
    async with aclosing(member.wants(GuildWant)) as looks, asyncio.timeout(BOUND_S):
        assert await anext(looks) == {}
        own_redis_server.stop()
        own_redis_server.start()
        await reach(own_store)
        await own_store.command("HSET", keys.want(RECORD.id), "guild:main:1", want(1))
        while not await anext(looks):
            pass


async def test_an_entry_that_cannot_be_read_costs_no_other(store: Store, keys: Keys, member: Membership) -> None:
    """One guild of a later version does not take the worker from all."""
    await store.command("HSET", keys.want(RECORD.id), "guild:main:1", want(1), "guild:main:2", '{"generation":"x"}')
    async with aclosing(member.wants(GuildWant)) as looks, asyncio.timeout(BOUND_S):
        assert "guild:main:1" in await anext(looks)


async def test_a_report_stands_in_the_record_and_is_told(store: Store, keys: Keys, member: Membership) -> None:
    """Under the generation in force a status is written, and its event with it."""
    key = keys.guild("main", GUILD_ID)
    await store.command("HSET", key, "generation", 7)
    assert await member.report([Report(key, 7, 1, STATUS, Event(type="guild.playing", at=5, guild=GUILD_ID))]) == [True]
    assert msgspec.json.decode(await store.command("HGET", key, "status"), type=GuildStatus) == STATUS
    assert [event.type for event in await told(store, keys)] == ["guild.playing"]
    assert await member.report([Report(key, 7, 2, STATUS, None)]) == [True]
    assert len(await told(store, keys)) == 1


async def test_an_event_alone_leaves_the_status_as_it_is(store: Store, keys: Keys, member: Membership) -> None:
    """What happened to a guild need not change how it is doing."""
    key = keys.guild("main", GUILD_ID)
    await store.command("HSET", key, "generation", 7, "status", "as it was")
    assert await member.report([Report(key, 7, 1, None, Event(type="guild.listeners", at=5, listeners=0))]) == [True]
    assert await store.command("HGET", key, "status") == "as it was"
    assert [event.listeners for event in await told(store, keys)] == [0]


async def test_a_report_made_twice_counts_once(store: Store, keys: Keys, member: Membership) -> None:
    """A worker that did not hear the answer tells again; the same number under another generation is another report."""
    key = keys.guild("main", GUILD_ID)
    event = Event(type="guild.playing", at=5)
    await store.command("HSET", key, "generation", 7)
    assert await member.report([Report(key, 7, 1, STATUS, event)]) == [True]
    await store.command("HSET", key, "status", "written since")
    assert await member.report([Report(key, 7, 1, STATUS, event)]) == [True]
    assert await store.command("HGET", key, "status") == "written since"
    assert len(await told(store, keys)) == 1
    await store.command("HSET", key, "generation", 8)
    assert await member.report([Report(key, 8, 1, STATUS, event)]) == [True]
    assert len(await told(store, keys)) == 2


@pytest.mark.parametrize("standing", ["8", "70", "0", None])
async def test_a_report_under_another_generation_changes_nothing(
    store: Store, keys: Keys, member: Membership, standing: str | None
) -> None:
    """A worker whose guild was given to another, or that left, has no say in it."""
    key = keys.guild("main", GUILD_ID)
    if standing is not None:
        await store.command("HSET", key, "generation", standing, "status", "as it was")
    assert await member.report([Report(key, 7, 1, STATUS, Event(type="guild.playing", at=5))]) == [
        None if standing is None else False
    ]
    assert await store.command("HGET", key, "status") == ("as it was" if standing else None)
    assert await store.command("EXISTS", key) == (standing is not None)
    assert await told(store, keys) == []


async def test_a_worker_that_leaves_says_so(store: Store, keys: Keys, member: Membership) -> None:
    """No lease any more, the record says gone, and the leader is called: nobody waits for the lease to run out."""
    await member.join()
    async with aclosing(store.hear([keys.wake_leader], BOUND_S)) as leader:
        assert await anext(leader) is None
        await member.leave()
        assert await anext(leader) == RECORD.id
    assert not member.lease_valid
    assert await store.command("EXISTS", keys.lease(RECORD.id)) == 0
    assert await store.command("HMGET", keys.worker(RECORD.id), "gone", "headroom") == ["true", "0"]


async def test_a_beat_under_way_does_not_bring_back_who_leaves(
    store: Store, keys: Keys, member: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving waits for the last renewal, so that the lease does not come after the goodbye."""
    await member.join()
    transaction = store.transaction
    slow = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, slow.set)

    async def held_up(commands: Any) -> Any:
        monkeypatch.undo()
        await slow.wait()
        return await transaction(commands)

    monkeypatch.setattr(store, "transaction", held_up)
    member.beat(5, WorkerStats())
    await asyncio.sleep(0)  # the renewal is on its way
    await member.leave()
    assert member._beating is not None
    await member._beating
    assert await store.command("EXISTS", keys.lease(RECORD.id)) == 0
    assert await store.command("HGET", keys.worker(RECORD.id), "gone") == "true"
    assert not member.lease_valid


async def test_after_a_lapse_want_is_read_before_anybody_identifies(
    store: Store, keys: Keys, member: Membership, clock: HandClock
) -> None:
    """A lease that ran out may have cost the worker its guilds: being renewed is not enough to identify."""
    await member.join()
    clock.ns += (LEASE_MS + 1) * NS_PER_MS
    await member.renew(4, WorkerStats())
    assert member.lease_valid
    assert not member.may_identify
    waiting = asyncio.create_task(member.wait_clearance())
    await store.command("HSET", keys.want(RECORD.id), FIELD, "s:1:0")
    wants = member.wants(GuildWant)
    async with asyncio.timeout(BOUND_S):
        await anext(wants)
        assert not waiting.done()
        await store.command("PUBLISH", keys.wake(RECORD.id), wake_word(["guild:main:1"]))
        await anext(wants)
        await waiting
    await wants.aclose()
