"""The leader: one at a time, terms that only grow, and nothing written by one who was replaced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from coordinator import election
from coordinator.election import LEASE_MS, Leadership, Transaction
from shared.errors import LeaseLost
from shared.schema import event as events
from shared.schema.event import Event
from shared.store.client import Store
from shared.store.keys import Keys

BOUND_S = 10.0
FAR_MS = 9_000_000_000_000
"""A counter far above any clock, as if TIME had once been in the year 2255."""


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates ask often, so that tests do not wait for long."""
    monkeypatch.setattr(election, "RENEW_EVERY_S", 0.02)


@pytest.fixture
async def away() -> AsyncIterator[Store]:
    """A client of a server that is not there."""
    store = Store("unix:///nowhere/redis.sock")
    yield store
    await store.close()


async def leader(store: Store, keys: Keys, host: str = "a") -> Leadership:
    one = Leadership(store, keys, host)
    async with asyncio.timeout(BOUND_S):
        await one.campaign()
    return one


async def depose(store: Store, keys: Keys) -> None:
    """The lease runs out."""
    await store.command("DEL", keys.leader)


async def test_only_one_of_two_candidates_leads(store: Store, keys: Keys) -> None:
    """The second stands by until the first has given up, and then leads under a higher term."""
    first = await leader(store, keys, "a")
    keeping = asyncio.create_task(first.keep())
    second = Leadership(store, keys, "b")
    waiting = asyncio.create_task(second.campaign())
    for _ in range(20):
        await store.command("PING")
        await asyncio.sleep(0.005)
    assert not waiting.done()
    assert second.term == 0
    term = first.term
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    await first.resign()
    async with asyncio.timeout(BOUND_S):
        await waiting
    assert second.term > term
    assert await store.command("HGET", keys.leader, "id") == second.id


async def test_of_many_at_once_one_leads(store: Store, keys: Keys) -> None:
    """However many ask in the same moment."""
    candidates = [store.script("lead", [keys.leader, keys.term], [f"c{number}", LEASE_MS, 0]) for number in range(20)]
    terms = await asyncio.gather(*candidates)
    assert len([term for term in terms if term]) == 1


async def test_the_lease_has_an_end(store: Store, keys: Keys) -> None:
    """A leader that is gone without a word is replaced when its lease has run out."""
    await leader(store, keys)
    assert 0 < await store.command("PTTL", keys.leader) <= LEASE_MS


async def test_a_lease_is_renewed_under_the_same_term(store: Store, keys: Keys) -> None:
    """Keeping the lease makes it longer and changes nothing else."""
    one = await leader(store, keys)
    term = one.term
    await store.command("PEXPIRE", keys.leader, 1_000)
    keeping = asyncio.create_task(one.keep())
    async with asyncio.timeout(BOUND_S):
        while await store.command("PTTL", keys.leader) <= 1_000:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)
    assert one.term == term
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_a_second_id_under_a_known_term_is_refused(store: Store, keys: Keys) -> None:
    """Knowing the term is not leading: the id must be the one that drew it."""
    one = await leader(store, keys)
    for term in (one.term, 0):
        assert await store.script("lead", [keys.leader, keys.term], ["thief", LEASE_MS, term]) == 0
    assert await store.script("draw", [keys.leader, keys.term], ["thief", one.term, 1]) == 0
    assert await store.script("commit", [keys.leader, keys.clock], ["thief", one.term, '[["SET",2,"x"]]']) == 0
    assert await store.script("resign", [keys.leader], ["thief", one.term]) == 0
    assert await store.command("HGET", keys.leader, "id") == one.id
    assert await store.command("EXISTS", keys.clock) == 0


async def test_an_old_term_under_the_own_id_is_refused(store: Store, keys: Keys) -> None:
    """A leader that slept through its lease does not renew what it had."""
    one = await leader(store, keys)
    old = one.term
    await depose(store, keys)
    assert await store.script("lead", [keys.leader, keys.term], [one.id, LEASE_MS, old]) == 0
    await leader(store, keys, "b")
    assert await store.script("lead", [keys.leader, keys.term], [one.id, LEASE_MS, old]) == 0


async def test_a_leader_that_was_replaced_steps_down(store: Store, keys: Keys) -> None:
    """Keeping a lease that somebody else holds ends with LeaseLost."""
    one = await leader(store, keys)
    await depose(store, keys)
    await leader(store, keys, "b")
    async with asyncio.timeout(BOUND_S):
        with pytest.raises(LeaseLost):
            await one.keep()


async def test_terms_begin_at_the_servers_time(store: Store, keys: Keys) -> None:
    """A counter that was lost is made up for by the clock: terms are above all that were drawn before."""
    before_ms = int((await store.command("TIME"))[0]) * 1_000
    one = await leader(store, keys)
    assert one.term >= before_ms
    assert int(await store.command("GET", keys.term)) == one.term


async def test_terms_grow_even_if_the_servers_clock_is_behind(store: Store, keys: Keys) -> None:
    """A clock that went back does not bring terms back."""
    await store.command("SET", keys.term, FAR_MS)
    one = await leader(store, keys)
    assert one.term == FAR_MS + 1
    assert await one.draw() == FAR_MS + 2
    await one.resign()
    other = await leader(store, keys, "b")
    assert other.term == FAR_MS + 3


async def test_draws_are_consecutive_and_never_twice(store: Store, keys: Keys) -> None:
    """A draw of many owns them all: the next one begins above."""
    one = await leader(store, keys)
    seen = {one.term}
    for count in (1, 1, 5, 100, 1):
        first = await one.draw(count)
        drawn = set(range(first, first + count))
        assert not drawn & seen
        assert first > max(seen)
        seen |= drawn
    assert int(await store.command("GET", keys.term)) == max(seen)


async def test_terms_are_exact_numbers(store: Store, keys: Keys) -> None:
    """Nowhere do they turn into a power of ten, as numbers in Lua may."""
    await store.command("SET", keys.term, 2**53 - 1_000)
    one = await leader(store, keys)
    assert await one.draw(7) == one.term + 1
    assert await store.command("GET", keys.term) == str(one.term + 7)
    assert await store.command("HGET", keys.leader, "term") == str(one.term)


async def test_a_draw_of_one_who_does_not_lead_is_refused(store: Store, keys: Keys) -> None:
    """Who was replaced gives out no generation and no run."""
    one = await leader(store, keys)
    counter = await store.command("GET", keys.term)
    await depose(store, keys)
    with pytest.raises(LeaseLost):
        await one.draw()
    assert await store.command("GET", keys.term) == counter


def change(keys: Keys) -> Transaction:
    transaction = Transaction(keys)
    transaction.add("SET", keys.clock, "näïve \x00 \U0001f3b5")
    transaction.add("HSET", keys.worker("w"), "a", 1, "b", "2")
    transaction.add("SADD", keys.workers, "w")
    transaction.event(Event(type="worker.up", at=1, worker="w"))
    return transaction


async def test_a_commit_does_all_changes(store: Store, keys: Keys) -> None:
    """What is collected is done, with every byte of its text."""
    one = await leader(store, keys)
    await one.commit(change(keys))
    assert await store.command("GET", keys.clock) == "näïve \x00 \U0001f3b5"
    assert await store.command("HGETALL", keys.worker("w")) == {"a": "1", "b": "2"}
    ((_, fields),) = await store.command("XRANGE", keys.events, "-", "+")
    assert events.decode(fields[events.FIELD]) == Event(type="worker.up", at=1, worker="w")


async def test_a_commit_of_a_deposed_leader_changes_nothing(store: Store, keys: Keys) -> None:
    """All of it is refused, whoever leads now, and even while nobody does."""
    one = await leader(store, keys)
    await depose(store, keys)
    with pytest.raises(LeaseLost):
        await one.commit(change(keys))
    other = await leader(store, keys, "b")
    with pytest.raises(LeaseLost):
        await one.commit(change(keys))
    for key in (keys.clock, keys.worker("w"), keys.workers, keys.events):
        assert await store.command("EXISTS", key) == 0
    await other.commit(change(keys))


async def test_an_empty_commit_asks_nothing(store: Store, keys: Keys) -> None:
    """No change needs no leader."""
    await Leadership(store, keys, "a").commit(Transaction(keys))


async def test_who_resigns_makes_room_at_once(store: Store, keys: Keys) -> None:
    """A coordinator that stops does not leave the pool to wait for its lease."""
    one = await leader(store, keys)
    await one.resign()
    assert await store.command("EXISTS", keys.leader) == 0
    assert one.term == 0
    await one.resign()  # there is nothing to give up any more


async def test_who_was_replaced_resigns_nothing(store: Store, keys: Keys) -> None:
    """A late goodbye does not end the next leader's lease."""
    one = await leader(store, keys)
    await depose(store, keys)
    other = await leader(store, keys, "b")
    await one.resign()
    assert await store.command("HGET", keys.leader, "id") == other.id


async def test_a_leader_without_redis_steps_down_when_its_lease_is_over(
    away: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Redis is away a leader waits; when its lease must have run out it leads no more."""
    monkeypatch.setattr(election, "LEASE_MS", 100)
    one = Leadership(away, keys, "a")
    one.term = 5
    before = time.monotonic()
    async with asyncio.timeout(BOUND_S):
        with pytest.raises(LeaseLost):
            await one.keep()
    assert time.monotonic() - before >= 0.1  # not before the lease can be over
