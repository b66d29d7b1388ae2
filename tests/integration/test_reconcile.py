"""What stands on Redis is compared with what is wanted, and mended: by the leader, and by workers that hold on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec
import pytest

from coordinator import reconcile
from coordinator.planner import Planner
from coordinator.registry import Change
from shared.schema.records import GuildWant, WorkerStats
from shared.schema.want_version import FIELD, read_version
from shared.store.client import Store
from shared.store.keys import Keys
from tests.integration.test_planner import Pool
from worker.membership import Membership

GUILDS = 7
BOUND_S = 10.0


@pytest.fixture
async def pool(store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """A leader that looks with each step."""
    monkeypatch.setattr(reconcile, "LOOK_EVERY_S", -1.0)
    return Pool(store, keys)


async def with_guilds(pool: Pool) -> tuple[Planner, Membership]:
    """Guilds that one worker holds."""
    planner = await pool.lead()
    member = await pool.worker("w")
    await pool.guilds(GUILDS)
    await planner.step()
    assert len(await pool.wants("w")) == GUILDS
    return planner, member


@pytest.mark.parametrize(
    "spoil",
    [
        [("DEL", "{want}")],
        [("HDEL", "{want}", "guild:main:100000000000000003")],
        [("HDEL", "{want}", FIELD)],
        [("HSET", "{want}", "guild:main:999999999999999999", "{}")],
        [("HSET", "{want}", FIELD, "garbage")],
        [("HSET", "{want}", FIELD, "s:another-1:7")],
        [("DEL", "{want}"), ("SET", "{want}", "of another type")],
        [("DEL", "{want}"), ("HSET", "{want}", "guild:main:100000000000000001", "{}")],
    ],
    ids=[
        "deleted",
        "an entry gone",
        "version gone",
        "an entry more",
        "garbage",
        "another version",
        "a string",
        "one left",
    ],
)
async def test_a_want_that_was_spoilt_is_written_again(pool: Pool, spoil: list[tuple[str, ...]]) -> None:
    """Whatever befell it; the generations are those of before, so the worker goes on."""
    planner, _ = await with_guilds(pool)
    before = await pool.wants("w")
    for command in spoil:
        await pool.store.command(*(word.replace("{want}", pool.keys.want("w")) for word in command))
    await planner.step()
    assert await pool.wants("w") == before


async def test_what_is_as_it_was_written_is_left_alone(pool: Pool) -> None:
    """By the leader that wrote it, and by the next one: no worker is woken for nothing."""
    planner, _ = await with_guilds(pool)
    before = await pool.store.command("HGET", pool.keys.want("w"), FIELD)
    await planner.step()
    planner = await pool.lead()
    await planner.step()
    assert await pool.store.command("HGET", pool.keys.want("w"), FIELD) == before


async def test_an_empty_want_is_an_order(pool: Pool) -> None:
    """It stands there, with a version, from the worker's first moments on, and after its last guild."""
    planner = await pool.lead()
    await pool.worker("w")
    await planner.step()
    stated = read_version(await pool.store.command("HGET", pool.keys.want("w"), FIELD))
    assert stated is not None
    assert stated.entries == 0
    await pool.guilds(1)
    await planner.step()
    change = Change(pool.registry)
    change.drop_guild(next(iter(pool.registry.guilds.values())))
    await change.commit(pool.leadership)
    assert await pool.store.command("HLEN", pool.keys.want("w")) == 1


async def test_a_record_that_was_lost_is_written_again(pool: Pool) -> None:
    """Of a guild and of a broadcast, with the status that was known, in their sets."""
    planner, _ = await with_guilds(pool)
    await pool.worker("e", "encode")
    await pool.broadcast()
    await planner.step()
    guild = next(iter(pool.registry.guilds.values()))
    names = [pool.keys.guild(*guild.key), pool.keys.broadcast("news")]
    before = await pool.store.pipeline([("HGETALL", name) for name in names])
    await pool.store.command("DEL", *names, pool.keys.guilds, pool.keys.broadcasts)
    await planner.step()
    assert await pool.store.pipeline([("HGETALL", name) for name in names]) == before
    assert await pool.store.command("SISMEMBER", pool.keys.guilds, ":".join(guild.key))


# what workers do


@asynccontextmanager
async def reading(member: Membership) -> AsyncIterator[asyncio.Queue[Mapping[str, GuildWant]]]:
    """A worker that looks at its want; what it sees."""
    seen: asyncio.Queue[Mapping[str, GuildWant]] = asyncio.Queue()

    async def look() -> None:
        async for wants in member.wants(GuildWant):
            seen.put_nowait(wants)

    task = asyncio.create_task(look())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def emptied(pool: Pool) -> None:
    """The store lost all that is ours."""
    names = await pool.store.command("KEYS", pool.keys.prefix.replace("{", "?").replace("}", "?") + "*")
    await pool.store.command("DEL", *names)


async def next_of(pool: Pool, seen: asyncio.Queue[Mapping[str, GuildWant]]) -> Mapping[str, GuildWant]:
    """What a worker sees when it looks next."""
    while not seen.empty():
        seen.get_nowait()
    await pool.store.command("PUBLISH", pool.keys.wake("w"), "look")
    async with asyncio.timeout(BOUND_S):
        return await seen.get()


async def test_a_worker_goes_on_with_what_nobody_took_from_it(pool: Pool) -> None:
    """A want that is not there any more is no order to stop; when it is back, it is as if nothing had been."""
    planner, member = await with_guilds(pool)
    async with reading(member) as seen:
        before = await next_of(pool, seen)
        assert len(before) == GUILDS
        await pool.store.command("DEL", pool.keys.want("w"))
        assert await next_of(pool, seen) is before
        assert member.want_is_lost
        await planner.step()
        assert await next_of(pool, seen) is before
    assert (member.want_is_lost, member.restores) == (False, 1)


async def test_a_want_that_is_not_whole_is_no_order(pool: Pool) -> None:
    """One entry of seven, with the version that counts seven: the others were lost, not taken away."""
    _, member = await with_guilds(pool)
    async with reading(member) as seen:
        before = await next_of(pool, seen)
        await pool.store.command("HDEL", pool.keys.want("w"), *list(before)[1:])
        assert await next_of(pool, seen) is before


async def test_a_want_of_the_version_before_is_read_as_it_is(pool: Pool) -> None:
    """Its leader writes no version."""
    _, member = await with_guilds(pool)
    async with reading(member) as seen:
        before = await next_of(pool, seen)
        await pool.store.command("HDEL", pool.keys.want("w"), FIELD, next(iter(before)))
        assert len(await next_of(pool, seen)) == GUILDS - 1
        assert not member.want_is_lost


async def test_an_emptied_store_is_rebuilt_from_what_workers_hold(pool: Pool) -> None:
    """Specs, generations, terms and runs; the next leader says loudly what happened."""
    planner, member = await with_guilds(pool)
    sources = await pool.worker("e", "encode")
    await pool.broadcast()
    await planner.step()
    guilds, broadcasts = dict(pool.registry.guilds), dict(pool.registry.broadcasts)
    async with reading(member) as seen, reading(sources) as sources_seen:
        before = await next_of(pool, seen)
        async with asyncio.timeout(BOUND_S):
            await sources_seen.get()
        await emptied(pool)
        for one in (member, sources):
            await one.join()
        assert await next_of(pool, seen) is before
        await pool.store.command("PUBLISH", pool.keys.wake("e"), "look")
        async with asyncio.timeout(BOUND_S):
            while not await pool.store.command("EXISTS", pool.keys.held("e")):  # noqa: ASYNC110 - set by the worker
                await asyncio.sleep(0.01)
        planner = await pool.lead()
        assert pool.registry.guilds == {}
        await planner.step()
        assert await next_of(pool, seen) is before
    assert member.restores == 1
    plain = {key: msgspec.structs.asdict(guild.spec) for key, guild in guilds.items()}
    assert {key: msgspec.structs.asdict(guild.spec) for key, guild in pool.registry.guilds.items()} == plain
    for key, guild in pool.registry.guilds.items():
        assert (guild.worker, guild.generation) == (guilds[key].worker, guilds[key].generation)
    (mended,) = pool.registry.broadcasts.values()
    (lost,) = broadcasts.values()
    assert (mended.spec, mended.generation, mended.term, mended.worker) == (
        *(lost.spec, lost.generation, lost.term, lost.worker),
    )
    told = [event for event in await pool.events() if event.type == "store.emptied"]
    assert {event.worker for event in told} == {"w", "e"}
    assert await pool.leadership.draw() > max(guild.generation for guild in guilds.values())


async def test_a_worker_that_holds_something_is_asked_before_it_is_told_to_do_nothing(pool: Pool) -> None:
    """A leader that finds an empty store is faster than a worker that looks every two seconds."""
    planner, member = await with_guilds(pool)
    async with reading(member) as seen:
        before = await next_of(pool, seen)
        await emptied(pool)
        await member.renew(0, WorkerStats(guilds=GUILDS, held=GUILDS))
        planner = await pool.lead()
        while not pool.registry.guilds:
            await planner.step()
        assert await next_of(pool, seen) is before
    assert len(await pool.wants("w")) == GUILDS


async def test_what_was_taken_from_a_worker_is_not_given_back(pool: Pool) -> None:
    """A worker that held on to a guild that left meanwhile: its word is about this very store, and worth nothing."""
    planner, member = await with_guilds(pool)
    async with reading(member) as seen:
        await next_of(pool, seen)
        await pool.store.command("DEL", pool.keys.want("w"))
        await next_of(pool, seen)
        change = Change(pool.registry)
        for guild in list(pool.registry.guilds.values())[1:]:
            change.drop_guild(guild)
        await change.commit(pool.leadership)
        await planner.step()
        assert len(await next_of(pool, seen)) == 1
    assert len(pool.registry.guilds) == 1
