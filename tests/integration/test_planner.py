"""The planner: even, fenced by generations, slow to judge and quick to place."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from coordinator import planner as planner_module
from coordinator import waiting
from coordinator.election import Leadership
from coordinator.planner import IDENTIFIES_AT_ONCE, Planner
from coordinator.reconcile import Reconciler
from coordinator.recovery import ATTEMPTS, FULL_FOR_S, Failure, Recovery
from coordinator.registry import Broadcast, Change, Guild, Registry
from shared.clock import LocalClock
from shared.errors import LeaseLost
from shared.schema import event as events
from shared.schema.event import Event
from shared.schema.records import (
    BroadcastSpec,
    GuildSpec,
    GuildStatus,
    GuildWant,
    OpusRecord,
    SourceRecord,
    SourceWant,
    VoiceRecord,
    WorkerRecord,
    WorkerRole,
    WorkerStats,
)
from shared.schema.wake import LOOK, read_wake
from shared.schema.want_version import take_version
from shared.store.client import Store
from shared.store.keys import Keys
from worker.membership import Membership, Report

BOUND_S = 10.0
GUILD_ID = "123456789012345678"
VOICE = VoiceRecord(user_id=GUILD_ID, session_id="s", token="t", endpoint="voice.example")


class Pool:
    """A leader's planning part over a real Redis, and workers that are nothing but their leases."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self.store = store
        self.keys = keys
        self.leadership = Leadership(store, keys, "a")
        self.registry = Registry(store, keys)
        self.recovery = Recovery()
        self.reconciler: Reconciler

    async def lead(self) -> Planner:
        """Begin a term of office; the planner's grace begins with it."""
        await self.store.command("DEL", self.keys.leader)
        self.leadership = Leadership(self.store, self.keys, "a")
        await self.leadership.campaign()
        self.registry = Registry(self.store, self.keys)
        await self.registry.load()
        self.recovery = Recovery()
        self.reconciler = Reconciler(self.registry, self.leadership, self.store)
        await self.reconciler.claim()
        return Planner(self.registry, self.leadership, self.recovery, self.reconciler)

    async def worker(self, worker_id: str, role: WorkerRole = "fanout", capacity: int = 100) -> Membership:
        record = WorkerRecord(id=worker_id, name=worker_id, role=role, host="h", capacity=capacity, headroom=capacity)
        member = Membership(self.store, self.keys, record, LocalClock())
        await member.join()
        return member

    async def guilds(self, number: int, *, voice: VoiceRecord | None = VOICE, first: int = 0) -> None:
        change = Change(self.registry)
        for n in range(first, first + number):
            spec = GuildSpec(bot="main", guild=str(10**17 + n), channel=GUILD_ID, broadcast="news", voice=voice)
            change.put_guild(Guild(spec, status=GuildStatus(state="wanted", at=1)))
        await change.commit(self.leadership)

    async def broadcast(self, name: str = "news") -> None:
        run = await self.leadership.draw()
        change = Change(self.registry)
        spec = BroadcastSpec(broadcast=name, run=run, source=SourceRecord(url="file:a"), opus=OpusRecord())
        change.put_broadcast(Broadcast(spec))
        await change.commit(self.leadership)

    async def wants(self, worker_id: str) -> dict[str, int]:
        """Generation of each guild that a worker shall hold."""
        raw = await self.store.command("HGETALL", self.keys.want(worker_id))
        assert take_version(raw) is not None or not raw
        return {name: msgspec.json.decode(body, type=GuildWant).generation for name, body in raw.items()}

    async def events(self) -> list[Event]:
        found = await self.store.command("XRANGE", self.keys.events, "-", "+")
        return [events.decode(fields[events.FIELD]) for _, fields in found]

    def loads(self) -> Counter[str]:
        return Counter(guild.worker for guild in self.registry.guilds.values())


@pytest.fixture
async def pool(store: Store, keys: Keys) -> Pool:
    return Pool(store, keys)


@pytest.fixture
def without_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that was elected long ago."""
    monkeypatch.setattr(planner_module, "GRACE_S", 0.0)


async def test_guilds_are_spread_evenly(pool: Pool) -> None:
    """Two equal workers carry the same; what each shall do stands in its want under a generation of its own."""
    planner = await pool.lead()
    await pool.worker("a")
    await pool.worker("b")
    await pool.guilds(51)
    await planner.step()
    assert sorted(pool.loads().values()) == [25, 26]
    wants = {name: await pool.wants(name) for name in "ab"}
    assert {name: len(want) for name, want in wants.items()} == dict(pool.loads())
    generations = [generation for want in wants.values() for generation in want.values()]
    assert len(set(generations)) == 51
    for guild in pool.registry.guilds.values():
        assert wants[guild.worker][guild.want_field] == guild.generation
        assert await pool.store.command("HGET", pool.keys.guild(*guild.key), "generation") == str(guild.generation)


@pytest.mark.parametrize(("guilds", "said"), [(3, "each"), (65, "look")])
async def test_a_worker_is_called_when_its_want_changes(pool: Pool, guilds: int, said: str) -> None:
    """Nobody waits for the next look, and a few that changed are named."""
    planner = await pool.lead()
    await pool.worker("a", capacity=100)
    await planner.step()  # its want is there, and empty
    await pool.guilds(guilds)
    heard = pool.store.hear([pool.keys.wake("a")], 10.0)
    try:
        assert await anext(heard) is None
        await planner.step()
        word = await anext(heard)
        assert word is not None
        assert read_wake(word) == sorted(await pool.wants("a")) if said == "each" else word == LOOK
    finally:
        await heard.aclose()


async def test_more_guilds_than_one_script_takes_are_placed(pool: Pool) -> None:
    """Placing goes in batches, and none is left between them."""
    planner = await pool.lead()
    for name in "abcd":
        await pool.worker(name, capacity=1_000)
    await pool.guilds(350)
    await planner.step()
    assert sorted(pool.loads().values()) == [87, 87, 88, 88]
    assert sum([len(set((await pool.wants(name)).values())) for name in "abcd"]) == 350


async def test_a_herd_of_guilds_is_given_out_at_a_pace(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is given no more at once than it can connect; the rest follows, and nobody is told of a lack of room."""
    monkeypatch.setattr(waiting, "TOLD_AFTER_MS", -1)
    planner = await pool.lead()
    await pool.worker("a", capacity=1_000)
    await pool.guilds(2 * IDENTIFIES_AT_ONCE + 1)
    await planner.step()
    assert pool.loads()["a"] == IDENTIFIES_AT_ONCE
    async with asyncio.timeout(BOUND_S):
        while pool.loads()[""]:
            before = pool.loads()["a"]
            await planner.step()
            assert pool.loads()["a"] - before <= IDENTIFIES_AT_ONCE
            await asyncio.sleep(0.02)
    assert not [event for event in await pool.events() if event.type == "guild.failed"]


async def test_a_guild_for_which_there_is_no_room_says_so(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those that do not fit are told of, once each."""
    monkeypatch.setattr(waiting, "TOLD_AFTER_MS", -1)
    planner = await pool.lead()
    await pool.worker("a", capacity=2)
    await pool.guilds(3)
    for _ in range(2):
        await planner.step()
    (failed,) = [event for event in await pool.events() if event.type == "guild.failed"]
    assert (failed.code, failed.guild) == ("no_worker", str(10**17 + 2))


async def test_guilds_that_failed_wait_behind_those_that_did_not(pool: Pool) -> None:
    """Whoever is in trouble does not take the turns of the others."""
    planner = await pool.lead()
    await pool.worker("a", capacity=1)
    await pool.guilds(2)
    troubled = next(iter(pool.registry.guilds.values()))
    change = Change(pool.registry)
    pool.recovery.failed(troubled, Failure("voice_timeout"), time.monotonic() - 5.0, change)
    await change.commit(pool.leadership)
    await planner.step()
    assert [guild.worker for guild in pool.registry.guilds.values()] == ["", "a"]


async def test_a_pass_that_finds_nothing_to_do_changes_nothing(pool: Pool) -> None:
    """Who is placed stays where it is."""
    planner = await pool.lead()
    await pool.worker("a")
    await pool.guilds(3)
    await planner.step()
    before, wants = dict(pool.registry.guilds), await pool.wants("a")
    await pool.worker("b")
    await planner.step()
    assert pool.registry.guilds == before
    assert await pool.wants("a") == wants


async def test_no_worker_is_given_more_than_it_takes(pool: Pool) -> None:
    """What was given and not told yet counts; what does not fit waits, and is placed when there is room."""
    planner = await pool.lead()
    await pool.worker("a", capacity=5)
    await pool.guilds(4)
    await planner.step()
    await pool.guilds(4, first=4)
    await planner.step()
    assert pool.loads() == {"a": 5, "": 3}
    await pool.worker("b", capacity=5)
    await planner.step()
    assert pool.loads() == {"a": 5, "b": 3}


async def test_guilds_go_where_most_headroom_is(pool: Pool) -> None:
    """Not where fewest guilds are: what they cost differs, and the worker knows."""
    planner = await pool.lead()
    dear, cheap = await pool.worker("a"), await pool.worker("b")
    await dear.renew(2, WorkerStats(held=30))
    await cheap.renew(50, WorkerStats(held=50))
    await pool.guilds(10)
    await planner.step()
    assert pool.loads() == {"b": 10}


async def test_headroom_that_costs_brought_down_is_not_given_twice(pool: Pool) -> None:
    """What was given is subtracted until the worker counts it, also where it has less room than its capacity says."""
    planner = await pool.lead()
    member = await pool.worker("a", capacity=1_000)
    await member.renew(5, WorkerStats(held=0))
    for first in (0, 4, 8):
        await pool.guilds(4, first=first)
        await planner.step()
    assert pool.loads() == {"a": 5, "": 7}
    await member.renew(2, WorkerStats(held=5))
    await planner.step()
    assert pool.loads() == {"a": 7, "": 5}


async def test_guilds_are_not_given_to_a_worker_without_headroom(pool: Pool) -> None:
    """Whatever its capacity: they go to another, or wait until it has room again."""
    planner = await pool.lead()
    full = await pool.worker("a")
    await full.renew(0, WorkerStats(held=0))
    await pool.worker("b", capacity=2)
    await pool.guilds(3)
    await planner.step()
    assert pool.loads() == {"b": 2, "": 1}
    await full.renew(10, WorkerStats(held=0))
    await planner.step()
    assert pool.loads() == {"b": 2, "a": 1}


async def refuse(pool: Pool, now_s: float) -> None:
    """Every worker tells that it has no room for what it was given."""
    change = Change(pool.registry)
    for guild in list(pool.registry.guilds.values()):
        if guild.worker:
            pool.recovery.failed(guild, Failure("worker_full"), now_s, change)
    await change.commit(pool.leadership)


async def test_a_guild_that_was_refused_goes_to_another_worker_at_once(pool: Pool) -> None:
    """The one that refused is given nothing meanwhile, whatever room it told before."""
    planner = await pool.lead()
    await pool.worker("a", capacity=50)
    await pool.worker("b", capacity=10)
    await pool.guilds(1)
    await planner.step()
    assert pool.loads() == {"a": 1}
    (first,) = pool.registry.guilds.values()
    await refuse(pool, time.monotonic())
    assert await pool.wants("a") == {}
    await planner.step()
    (second,) = pool.registry.guilds.values()
    assert (second.worker, second.generation > first.generation) == ("b", True)


async def test_a_guild_that_all_refuse_waits_and_is_placed_when_there_is_room(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so once, nobody is asked in between, and however often: no attempt is used up."""
    monkeypatch.setattr(waiting, "TOLD_AFTER_MS", -1)
    planner = await pool.lead()
    await pool.worker("a")
    await pool.guilds(1)
    for _ in range(2 * ATTEMPTS):
        await planner.step()
        assert pool.loads() == {"a": 1}
        await refuse(pool, time.monotonic() - FULL_FOR_S)  # long enough ago to try again at once
    await planner.step()
    await refuse(pool, time.monotonic())
    for _ in range(3):
        await planner.step()
        assert pool.loads() == {"": 1}
    (guild,) = pool.registry.guilds.values()
    assert guild.status is not None
    assert (guild.status.state, guild.status.code) == ("wanted", "no_worker")
    (told,) = [event for event in await pool.events() if event.type == "guild.failed"]
    assert told.code == "no_worker"
    await pool.worker("b")
    await planner.step()
    assert pool.loads() == {"b": 1}


async def test_without_workers_guilds_wait_and_are_placed_later(pool: Pool) -> None:
    """Desired state needs nobody to carry it out; whoever comes is given it."""
    planner = await pool.lead()
    await pool.guilds(3)
    await pool.broadcast()
    await planner.step()
    assert pool.loads() == {"": 3}
    assert pool.registry.broadcasts["news"].worker == ""
    await pool.worker("a")
    await pool.worker("e", "encode")
    await planner.step()
    assert pool.loads() == {"a": 3}
    assert pool.registry.broadcasts["news"].worker == "e"


async def test_guilds_go_to_fanout_workers_and_sources_to_encode_workers(pool: Pool) -> None:
    """Neither is given the other's work."""
    planner = await pool.lead()
    await pool.worker("e", "encode")
    await pool.guilds(2)
    await planner.step()
    assert pool.loads() == {"": 2}
    await pool.store.command("DEL", pool.keys.lease("e"))
    await pool.worker("a")
    await pool.broadcast()
    await planner.step()
    assert pool.loads() == {"a": 2}
    assert pool.registry.broadcasts["news"].worker == ""


async def test_a_source_that_nobody_can_hold_is_told_each_time(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once while it waits, and again after somebody held it in between."""
    monkeypatch.setattr(planner_module, "TOLD_AFTER_MS", -1)
    planner = await pool.lead()
    await pool.broadcast()
    for times in (1, 2):
        for _ in range(2):
            await planner.step()
        told = [event.code for event in await pool.events() if event.type == "broadcast.stalled"]
        assert told == ["no_worker"] * times
        member = await pool.worker(f"e{times}", "encode")
        await planner.step()
        assert pool.registry.broadcasts["news"].worker == member.id
        await gone(pool, member)


async def gone(pool: Pool, member: Membership) -> None:
    """The supervisor saw the process end."""
    await pool.store.command("HSET", pool.keys.worker(member.id), "gone", "true")


async def leaves(pool: Pool, member: Membership) -> None:  # noqa: ARG001
    """The worker said goodbye."""
    await member.leave()


async def unleased(pool: Pool, member: Membership) -> None:
    """Its lease ran out."""
    await pool.store.command("DEL", pool.keys.lease(member.id))


async def forgotten(pool: Pool, member: Membership) -> None:
    """Even its record expired."""
    await pool.store.command("DEL", pool.keys.lease(member.id), pool.keys.worker(member.id))


End = Callable[[Pool, Membership], Coroutine[Any, Any, None]]


@pytest.mark.usefixtures("without_grace")
@pytest.mark.parametrize("end", [gone, leaves, unleased, forgotten])
async def test_the_guilds_of_a_dead_worker_are_given_to_others(pool: Pool, end: End) -> None:
    """All of them, under higher generations; nothing of the worker is left, and its loss is told."""
    planner = await pool.lead()
    dying = await pool.worker("a")
    await pool.guilds(10)
    await planner.step()
    before = {guild.key: guild.generation for guild in pool.registry.guilds.values()}
    assert pool.loads() == {"a": 10}
    await pool.worker("b")
    await end(pool, dying)
    await planner.step()
    assert pool.loads() == {"b": 10}
    for guild in pool.registry.guilds.values():
        assert guild.generation > max(before.values())
    assert len(await pool.wants("b")) == 10
    for key in (pool.keys.worker("a"), pool.keys.lease("a")):
        assert await pool.store.command("EXISTS", key) == 0
    assert await pool.wants("a") == {}  # and it is not lost: should it live, it shall do nothing
    assert 0 < await pool.store.command("PTTL", pool.keys.want("a")) <= 60_000
    assert await pool.store.command("SMEMBERS", pool.keys.workers) == {"b"}
    assert [event.worker for event in await pool.events() if event.type == "worker.lost"] == ["a"]


@pytest.mark.usefixtures("without_grace")
async def test_a_report_of_a_worker_that_was_replaced_changes_nothing(pool: Pool) -> None:
    """Whoever comes back from the dead has no say in what it held."""
    planner = await pool.lead()
    dying = await pool.worker("a")
    await pool.guilds(1)
    await planner.step()
    (guild,) = pool.registry.guilds.values()
    key = pool.keys.guild(*guild.key)
    await pool.worker("b")
    await gone(pool, dying)
    await planner.step()
    report = Report(key, guild.generation, 1, GuildStatus(state="playing", at=5), None)
    assert await dying.report([report]) == [False]


async def test_a_worker_without_a_lease_is_not_judged_within_the_grace(pool: Pool) -> None:
    """After an outage all leases are gone at once: a new leader waits before it moves anything."""
    planner = await pool.lead()
    member = await pool.worker("a")
    await pool.guilds(5)
    await planner.step()
    await unleased(pool, member)
    await pool.worker("b")
    for _ in range(3):
        await planner.step()
    assert pool.loads() == {"a": 5}
    await member.renew(95, WorkerStats())
    await planner.step()
    assert pool.loads() == {"a": 5}


async def test_a_worker_without_a_lease_is_given_nothing_new(pool: Pool) -> None:
    """Not judged is not trusted either."""
    planner = await pool.lead()
    await unleased(pool, await pool.worker("a"))
    await pool.guilds(2)
    await planner.step()
    assert pool.loads() == {"": 2}


async def test_a_worker_that_is_known_to_be_dead_is_judged_at_once(pool: Pool) -> None:
    """Grace is for silence; a death that was reported needs none."""
    planner = await pool.lead()
    member = await pool.worker("a")
    await pool.guilds(2)
    await planner.step()
    await pool.worker("b")
    await gone(pool, member)
    await planner.step()
    assert pool.loads() == {"b": 2}


async def test_a_new_leader_moves_nothing(pool: Pool) -> None:
    """A change of leaders is not heard: who is held stays held, under the same generation."""
    planner = await pool.lead()
    for name in "ab":
        await pool.worker(name)
    await pool.guilds(8)
    await planner.step()
    before = dict(pool.registry.guilds)
    planner = await pool.lead()
    await planner.step()
    assert {key: (one.worker, one.generation) for key, one in pool.registry.guilds.items()} == {
        key: (one.worker, one.generation) for key, one in before.items()
    }


async def source_want(pool: Pool, worker_id: str) -> SourceWant | None:
    body = await pool.store.command("HGET", pool.keys.want(worker_id), "broadcast:news")
    return msgspec.json.decode(body, type=SourceWant) if body else None


@pytest.mark.usefixtures("without_grace")
async def test_a_source_publishes_under_its_generation_and_is_placed_anew(pool: Pool) -> None:
    """The generation is the publishing term, so that whoever published before is fenced; the run stays the same."""
    planner = await pool.lead()
    dying = await pool.worker("e1", "encode")
    await pool.broadcast()
    await planner.step()
    first = await source_want(pool, "e1")
    assert first is not None
    assert first.term == first.generation > first.spec.run
    await pool.worker("e2", "encode")
    await gone(pool, dying)
    await planner.step()
    second = await source_want(pool, "e2")
    assert second is not None
    assert await source_want(pool, "e1") is None
    assert second.term == second.generation > first.term
    assert second.spec == first.spec
    assert pool.registry.broadcasts["news"].worker == "e2"


async def test_a_guild_without_credentials_is_asked_about_and_not_placed(pool: Pool) -> None:
    """Nobody can connect it: the user's bot is asked once, and when the answer is there it is placed."""
    planner = await pool.lead()
    await pool.worker("a")
    await pool.guilds(1, voice=None)
    for _ in range(3):
        await planner.step()
    assert pool.loads() == {"": 1}
    assert [event.type for event in await pool.events() if event.guild] == ["guild.voice_wanted"]
    await pool.guilds(1)
    pool.recovery.renewed(next(iter(pool.registry.guilds.values())), time.monotonic())
    await planner.step()
    assert pool.loads() == {"a": 1}


async def test_a_worker_whose_record_expired_is_not_judged_in_the_grace(pool: Pool) -> None:
    """After a long outage all records are gone as all leases are; that alone takes no guild from its worker."""
    planner = await pool.lead()
    await pool.worker("a")
    await pool.guilds(1)
    await planner.step()
    await pool.store.command("DEL", pool.keys.worker("a"), pool.keys.lease("a"))
    again = await pool.lead()
    await again.step()
    assert pool.loads() == {"a": 1}


async def test_a_guild_that_is_backing_off_is_not_placed(pool: Pool) -> None:
    """A failure is tried again later, not at once."""
    planner = await pool.lead()
    await pool.worker("a")
    await pool.guilds(1)
    await planner.step()
    (guild,) = pool.registry.guilds.values()
    change = Change(pool.registry)
    pool.recovery.failed(guild, Failure("voice_timeout"), 1e12, change)
    await change.commit(pool.leadership)
    await planner.step()
    assert pool.loads() == {"": 1}
    assert await pool.wants("a") == {}


async def test_a_failure_of_an_earlier_generation_is_not_judged_under_the_next(pool: Pool) -> None:
    """What a worker told of its attempt is over when the guild is given out anew, until the next attempt tells."""
    planner = await pool.lead()
    member = await pool.worker("a")
    await pool.guilds(1)
    await planner.step()
    (guild,) = pool.registry.guilds.values()
    failed = GuildStatus(state="failed", at=5, worker="a", code="voice_timeout")
    assert await member.report([Report(pool.keys.guild(*guild.key), guild.generation, 1, failed, None)]) == [True]
    change = Change(pool.registry)
    pool.recovery.failed(guild, Failure("voice_timeout"), -1e12, change)  # long ago: nothing holds it back
    await change.commit(pool.leadership)
    await planner.step()
    await pool.registry.look_at_statuses()
    (again,) = pool.registry.guilds.values()
    assert again.worker == "a"
    assert again.generation > guild.generation
    assert again.status is None or again.status.state != "failed"


async def test_a_deposed_leader_places_nothing(pool: Pool) -> None:
    """Its plan is refused whole."""
    planner = await pool.lead()
    await pool.worker("a")
    await pool.guilds(2)
    await pool.store.command("DEL", pool.keys.leader)
    with pytest.raises(LeaseLost):
        await planner.step()
    assert await pool.wants("a") == {}
    assert pool.loads() == {"": 2}
