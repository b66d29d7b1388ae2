"""The registry: the mirror is what stands on Redis, and changes with it or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.election import Leadership
from coordinator.registry import Broadcast, Change, Guild, Registry, released
from shared.clock import LocalClock
from shared.errors import LeaseLost
from shared.schema.records import (
    BroadcastSpec,
    BroadcastStatus,
    GuildSpec,
    GuildStatus,
    OpusRecord,
    SourceRecord,
    VoiceRecord,
    WorkerRecord,
    WorkerStats,
)
from shared.schema.want_version import take_version
from shared.store.client import Store
from shared.store.keys import Keys
from worker.membership import Membership

GUILD_ID = "123456789012345678"
VOICE = VoiceRecord(user_id=GUILD_ID, session_id="s", token="t", endpoint="voice.example")
GUILD = Guild(
    GuildSpec(bot="main", guild=GUILD_ID, channel=GUILD_ID, broadcast="news", voice=VOICE, speaking=("priority",)),
    generation=7,
    worker="w",
    status=GuildStatus(state="wanted", at=5),
)
IDLE = Guild(GuildSpec(bot="other", guild=GUILD_ID, channel=GUILD_ID, broadcast="a", voice="sealed:x", job="j"))
NEWS = Broadcast(
    BroadcastSpec(broadcast="news", run=9, source=SourceRecord(url="file:ä"), opus=OpusRecord(bitrate=64_000)),
    generation=8,
    term=10,
    worker="e",
    stopping=True,
    status=BroadcastStatus(state="playing", at=6, encodes=2),
)
RECORD = WorkerRecord(
    id="w", name="007", role="fanout", host="1e5", region="true", capacity=9, headroom=4, stats=WorkerStats(guilds=5)
)


@pytest.fixture
async def leadership(store: Store, keys: Keys) -> Leadership:
    one = Leadership(store, keys, "a")
    await one.campaign()
    return one


@pytest.fixture
def registry(store: Store, keys: Keys) -> Registry:
    return Registry(store, keys)


async def put(registry: Registry, leadership: Leadership, *items: Guild | Broadcast) -> None:
    change = Change(registry)
    for item in items:
        if isinstance(item, Guild):
            change.put_guild(item)
        else:
            change.put_broadcast(item)
    await change.commit(leadership)


async def loaded(store: Store, keys: Keys) -> Registry:
    fresh = Registry(store, keys)
    await fresh.load()
    return fresh


async def test_what_is_loaded_is_what_was_put(
    store: Store, keys: Keys, registry: Registry, leadership: Leadership
) -> None:
    """The next leader knows what this one knew, every field of it."""
    await Membership(store, keys, RECORD, LocalClock()).join()
    await registry.look_at_workers()
    await put(registry, leadership, GUILD, IDLE, NEWS)
    fresh = await loaded(store, keys)
    assert fresh.guilds == registry.guilds == {GUILD.key: GUILD, IDLE.key: IDLE}
    assert fresh.broadcasts == registry.broadcasts == {"news": NEWS}
    assert fresh.workers == registry.workers
    assert fresh.workers["w"].record == RECORD
    assert fresh.workers["w"].leased


async def test_an_empty_store_is_an_empty_registry(store: Store, keys: Keys) -> None:
    """The first leader of all begins with nothing."""
    fresh = await loaded(store, keys)
    assert (fresh.guilds, fresh.broadcasts, fresh.workers) == ({}, {}, {})


async def test_a_record_that_cannot_be_read_is_left_alone(
    store: Store, keys: Keys, registry: Registry, leadership: Leadership
) -> None:
    """One broken record costs itself and no other, and is not overwritten."""
    await put(registry, leadership, GUILD, NEWS)
    await store.command("SADD", keys.guilds, "main:5", "main:6")
    await store.command("HSET", keys.guild("main", "5"), "spec", "nonsense")
    await store.command("SADD", keys.broadcasts, "odd")
    fresh = await loaded(store, keys)
    assert set(fresh.guilds) == {GUILD.key}
    assert set(fresh.broadcasts) == {"news"}
    assert await store.command("HGET", keys.guild("main", "5"), "spec") == "nonsense"


async def wanted(store: Store, keys: Keys, worker: str) -> set[str]:
    """Entries of a want that stands as it was written, empty or not."""
    want = await store.command("HGETALL", keys.want(worker))
    assert take_version(want) is not None
    return set(want)


async def test_the_want_of_a_worker_follows_the_record(
    store: Store, keys: Keys, registry: Registry, leadership: Leadership
) -> None:
    """What a worker shall do changes in the same stroke as the guild's record, and moves with it."""
    await put(registry, leadership, GUILD)
    assert await wanted(store, keys, "w") == {GUILD.want_field}
    await put(registry, leadership, replace(GUILD, worker="x", generation=8))
    assert await wanted(store, keys, "w") == set()
    assert await wanted(store, keys, "x") == {GUILD.want_field}
    await put(registry, leadership, released(registry.guilds[GUILD.key]))
    assert await wanted(store, keys, "x") == set()
    assert await store.command("HMGET", keys.guild(*GUILD.key), "generation", "worker") == ["0", ""]


async def test_a_workers_status_is_not_overwritten_by_a_change_of_the_spec(
    store: Store, keys: Keys, registry: Registry, leadership: Leadership
) -> None:
    """What a worker told stands until somebody tells something else."""
    await put(registry, leadership, GUILD)
    await store.command("HSET", keys.guild(*GUILD.key), "status", '{"state":"playing","at":9}')
    await put(registry, leadership, replace(GUILD, generation=8))
    assert (await loaded(store, keys)).guilds[GUILD.key].status == GuildStatus(state="playing", at=9)


async def test_what_is_dropped_is_gone(store: Store, keys: Keys, registry: Registry, leadership: Leadership) -> None:
    """Record, membership and want go together; nothing of it is left on Redis."""
    await put(registry, leadership, GUILD, NEWS)
    change = Change(registry)
    change.drop_guild(GUILD)
    change.drop_broadcast(NEWS)
    await change.commit(leadership)
    assert (registry.guilds, registry.broadcasts) == ({}, {})
    assert [await wanted(store, keys, worker) for worker in ("w", "e")] == [set(), set()]
    for key in (keys.guild(*GUILD.key), keys.broadcast("news"), keys.guilds):
        assert await store.command("EXISTS", key) == 0


async def test_a_refused_change_leaves_the_mirror_as_it_was(
    store: Store, keys: Keys, registry: Registry, leadership: Leadership
) -> None:
    """The mirror follows Redis, never the wish."""
    await put(registry, leadership, GUILD)
    await store.command("DEL", keys.leader)
    with pytest.raises(LeaseLost):
        await put(registry, leadership, replace(GUILD, worker="x"), NEWS)
    assert registry.guilds == {GUILD.key: GUILD}
    assert registry.broadcasts == {}
    assert await store.command("EXISTS", keys.want("x")) == 0


async def test_a_worker_without_a_lease_is_seen_as_such(store: Store, keys: Keys, registry: Registry) -> None:
    """Lease and record are looked at anew each time; an expired record is no word of the worker's end."""
    await Membership(store, keys, RECORD, LocalClock()).join()
    await registry.look_at_workers()
    assert (registry.workers["w"].leased, registry.workers["w"].record.gone) == (True, False)
    await store.command("DEL", keys.lease("w"))
    await registry.look_at_workers()
    assert (registry.workers["w"].leased, registry.workers["w"].record.gone) == (False, False)
    await store.command("DEL", keys.worker("w"))
    await registry.look_at_workers()
    assert (registry.workers["w"].leased, registry.workers["w"].record.gone) == (False, False)
    assert not (await loaded(store, keys)).workers["w"].leased


async def test_events_that_left_the_stream_unread_are_noticed(store: Store, keys: Keys, registry: Registry) -> None:
    """What was read may go, what was not must be made up for; an empty stream has lost nothing."""
    assert not await registry.missed_events("0-0")
    for number in (9, 10, 11):
        await store.command("XADD", keys.events, f"5-{number}", "event", "{}")
    assert not await registry.missed_events("5-9")
    assert not await registry.missed_events("5-11")
    await store.command("XTRIM", keys.events, "MAXLEN", 1)
    assert not await registry.missed_events("5-11")
    assert await registry.missed_events("5-9")


async def test_statuses_are_looked_at_under_the_generation_in_force(
    store: Store, keys: Keys, registry: Registry, leadership: Leadership
) -> None:
    """What was reported is found again without its event; what stands under another generation is not looked at."""
    await put(registry, leadership, GUILD, NEWS)
    await store.command("HSET", keys.guild(*GUILD.key), "status", '{"state":"failed","at":9,"code":"voice_closed"}')
    await store.command("HSET", keys.broadcast("news"), "status", '{"state":"ended","at":9}')
    await registry.look_at_statuses()
    assert registry.guilds[GUILD.key].status == GuildStatus(state="failed", at=9, code="voice_closed")
    assert registry.broadcasts["news"].status == BroadcastStatus(state="ended", at=9)
    await store.command("HSET", keys.guild(*GUILD.key), "status", '{"state":"playing","at":10}', "generation", 6)
    await registry.look_at_statuses()
    assert registry.guilds[GUILD.key].status == GuildStatus(state="failed", at=9, code="voice_closed")
