"""Reports: in the order of each record, written when Redis is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import redis
from structlog.testing import capture_logs

from shared.cli.redis_server import RedisServer
from shared.clock import LocalClock
from shared.errors import StoreUnavailable
from shared.schema import event as events
from shared.schema.event import Event
from shared.schema.records import GuildState, GuildStatus, WorkerRecord
from shared.store.client import Store
from shared.store.keys import Keys
from worker.membership import Membership
from worker.reporter import Reporter

BOUND_S = 10.0
KEPT = 8
"""Reports that wait per record."""
RECORD = WorkerRecord(id="w", name="w", role="fanout", host="h", capacity=9, headroom=9)


@asynccontextmanager
async def running(reporter: Reporter) -> AsyncIterator[None]:
    task = asyncio.create_task(reporter.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def tell(reporter: Reporter, key: str, state: GuildState, at: int, generation: int = 7) -> None:
    event = Event(type=f"guild.{state}", at=at, generation=generation)  # type: ignore[arg-type]
    reporter.tell(key, generation, GuildStatus(state=state, at=at), event)


async def status(store: Store, key: str) -> GuildStatus | None:
    found = await store.command("HGET", key, "status")
    return msgspec.json.decode(found, type=GuildStatus) if found else None


async def told(store: Store, keys: Keys) -> list[str]:
    return [
        events.decode(fields[events.FIELD]).type for _, fields in await store.command("XRANGE", keys.events, "-", "+")
    ]


async def test_every_state_of_a_record_is_written_in_its_order(store: Store, keys: Keys) -> None:
    """What was told in a row is written in a row, each record for itself; the newest stands in the end."""
    reporter = Reporter(Membership(store, keys, RECORD, LocalClock()))
    one, other = keys.guild("main", "1"), keys.guild("main", "2")
    for key in (one, other):
        await store.command("HSET", key, "generation", 7)
    tell(reporter, one, "connecting", 1)
    tell(reporter, other, "connecting", 2)
    tell(reporter, one, "playing", 3)
    async with running(reporter):
        await reporter.flushed(BOUND_S)
    assert await status(store, one) == GuildStatus(state="playing", at=3)
    assert await status(store, other) == GuildStatus(state="connecting", at=2)
    assert sorted(await told(store, keys)) == ["guild.connecting", "guild.connecting", "guild.playing"]


async def test_a_flood_of_reports_keeps_the_newest(store: Store, keys: Keys) -> None:
    """Reports that wait are bounded per record: the oldest are given up, never the last."""
    reporter = Reporter(Membership(store, keys, RECORD, LocalClock()))
    key = keys.guild("main", "1")
    await store.command("HSET", key, "generation", 7)
    for at in range(100):
        tell(reporter, key, "idle" if at % 2 else "playing", at)
    async with running(reporter):
        await reporter.flushed(BOUND_S)
    assert await status(store, key) == GuildStatus(state="idle", at=99)
    assert len(await told(store, keys)) < 20


async def test_states_are_written_as_they_come(store: Store, keys: Keys) -> None:
    """After one was written the next one is, too."""
    reporter = Reporter(Membership(store, keys, RECORD, LocalClock()))
    key = keys.guild("main", "1")
    await store.command("HSET", key, "generation", 7)
    async with running(reporter):
        tell(reporter, key, "connecting", 1)
        await reporter.flushed(BOUND_S)
        tell(reporter, key, "playing", 2)
        await reporter.flushed(BOUND_S)
    assert await told(store, keys) == ["guild.connecting", "guild.playing"]


async def test_a_state_told_while_another_is_being_written_is_written(
    store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes in the middle of a write is newer than it, and is not lost with it."""
    membership = Membership(store, keys, RECORD, LocalClock())
    reporter = Reporter(membership)
    key = keys.guild("main", "1")
    await store.command("HSET", key, "generation", 7)
    report = membership.report

    async def overtaken(*arguments: Any) -> list[bool | None]:
        done = await report(*arguments)
        monkeypatch.undo()
        tell(reporter, key, "playing", 2)  # the first one stands on Redis, its answer is not here yet
        return done

    monkeypatch.setattr(membership, "report", overtaken)
    async with running(reporter):
        tell(reporter, key, "idle", 1)
        await reporter.flushed(BOUND_S)
    assert await status(store, key) == GuildStatus(state="playing", at=2)
    assert await told(store, keys) == ["guild.idle", "guild.playing"]


async def test_a_flood_in_the_middle_of_a_write_costs_none_of_the_newest(
    store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that was pushed out while it was being written is not taken for the one that stands there now."""
    membership = Membership(store, keys, RECORD, LocalClock())
    reporter = Reporter(membership)
    key = keys.guild("main", "1")
    await store.command("HSET", key, "generation", 7)
    report = membership.report

    async def flooded(*arguments: Any) -> list[bool | None]:
        done = await report(*arguments)
        monkeypatch.undo()
        for at in range(2, 2 + KEPT):
            tell(reporter, key, "playing", at)
        return done

    monkeypatch.setattr(membership, "report", flooded)
    async with running(reporter):
        tell(reporter, key, "idle", 1)
        await reporter.flushed(BOUND_S)
    assert await told(store, keys) == ["guild.idle"] + ["guild.playing"] * KEPT


async def test_what_is_told_of_a_record_that_is_lost_is_told_when_it_is_back(
    store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in between must not be forgotten: nobody would ever do anything about it."""
    monkeypatch.setattr("worker.reporter._MISSING_EVERY_S", 0.02)
    reporter = Reporter(Membership(store, keys, RECORD, LocalClock()))
    key = keys.guild("main", "1")
    async with running(reporter):
        tell(reporter, key, "failed", 1)
        await reporter.flushed(BOUND_S)
        assert await told(store, keys) == []
        await store.command("HSET", key, "generation", 7)
        async with asyncio.timeout(BOUND_S):
            while not await told(store, keys):  # noqa: ASYNC110 - it is told in a second
                await asyncio.sleep(0.01)
    assert await told(store, keys) == ["guild.failed"]


async def test_a_report_whose_answer_was_lost_is_told_once(
    store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis did it and the answer never came: the report is made again, and its event stands there once."""
    membership = Membership(store, keys, RECORD, LocalClock())
    reporter = Reporter(membership)
    key = keys.guild("main", "1")
    await store.command("HSET", key, "generation", 7)
    report = membership.report

    async def unanswered(*arguments: Any) -> list[bool]:
        await report(*arguments)
        monkeypatch.undo()
        raise StoreUnavailable("the connection broke")

    monkeypatch.setattr(membership, "report", unanswered)
    async with running(reporter):
        tell(reporter, key, "playing", 1)
        tell(reporter, key, "idle", 2)
        tell(reporter, key, "playing", 3)
        await reporter.flushed(BOUND_S)
    assert await told(store, keys) == ["guild.playing", "guild.idle", "guild.playing"]


async def test_figures_push_no_event_out(store: Store, keys: Keys) -> None:
    """However often a status changes without an event, the events that wait are told; the newest status stands."""
    reporter = Reporter(Membership(store, keys, RECORD, LocalClock()))
    key = keys.guild("main", "1")
    await store.command("HSET", key, "generation", 7)
    tell(reporter, key, "connecting", 1)
    tell(reporter, key, "playing", 2)
    for epoch in range(100):
        reporter.tell(key, 7, GuildStatus(state="playing", at=3, mls_epoch=epoch), None)
    tell(reporter, key, "idle", 4)
    reporter.tell(key, 7, GuildStatus(state="idle", at=5, mls_epoch=100), None)
    async with running(reporter):
        await reporter.flushed(BOUND_S)
    assert await told(store, keys) == ["guild.connecting", "guild.playing", "guild.idle"]
    assert await status(store, key) == GuildStatus(state="idle", at=5, mls_epoch=100)


async def test_an_event_alone_changes_no_state(store: Store, keys: Keys) -> None:
    """Listeners come and go; the guild plays."""
    reporter = Reporter(Membership(store, keys, RECORD, LocalClock()))
    key = keys.guild("main", "1")
    await store.command("HSET", key, "generation", 7)
    tell(reporter, key, "playing", 1)
    reporter.tell(key, 7, None, Event(type="guild.listeners", at=2, listeners=3))
    async with running(reporter):
        await reporter.flushed(BOUND_S)
    assert await told(store, keys) == ["guild.playing", "guild.listeners"]
    assert await status(store, key) == GuildStatus(state="playing", at=1)


async def test_a_report_of_an_older_generation_holds_up_no_other(store: Store, keys: Keys) -> None:
    """What is refused is dropped, and the next is written."""
    reporter = Reporter(Membership(store, keys, RECORD, LocalClock()))
    lost, held = keys.guild("main", "1"), keys.guild("main", "2")
    for key in (lost, held):
        await store.command("HSET", key, "generation", 7)
    tell(reporter, lost, "playing", 1, generation=6)
    tell(reporter, held, "playing", 2)
    async with running(reporter):
        await reporter.flushed(BOUND_S)
    assert await status(store, lost) is None
    assert await status(store, held) == GuildStatus(state="playing", at=2)


async def test_reports_wait_out_an_absence_of_redis(own_redis_server: RedisServer, keys: Keys) -> None:
    """While Redis is away the states of each record are kept; they are written when Redis is back."""
    store = Store(own_redis_server.url)
    reporter = Reporter(Membership(store, keys, RECORD, LocalClock()))
    once, key = keys.guild("main", "1"), keys.guild("main", "2")
    with capture_logs() as lines:
        async with running(reporter), asyncio.timeout(BOUND_S):
            own_redis_server.stop()
            tell(reporter, once, "idle", 0)
            tell(reporter, key, "connecting", 1)
            while not any(line["event"] == "report.delayed" for line in lines):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.002)
            tell(reporter, key, "playing", 2)
            own_redis_server.start()
            with redis.Redis.from_url(own_redis_server.url) as direct:  # before the reporter's next try: no await
                direct.hset(once, "generation", 7)
                direct.hset(key, "generation", 7)
            await reporter.flushed(BOUND_S)
            assert await status(store, once) == GuildStatus(state="idle", at=0)
            assert await status(store, key) == GuildStatus(state="playing", at=2)
            assert await told(store, keys) == ["guild.idle", "guild.connecting", "guild.playing"]
    await store.close()


async def test_who_waits_for_the_last_report_waits_for_a_bounded_time(keys: Keys) -> None:
    """A worker that stops while Redis is away stops all the same."""
    away = Store("unix:///nowhere/redis.sock")
    reporter = Reporter(Membership(away, keys, RECORD, LocalClock()))
    tell(reporter, keys.guild("main", "1"), "idle", 1)
    with capture_logs() as lines:
        async with running(reporter), asyncio.timeout(BOUND_S):
            await reporter.flushed(0.05)
    assert any(line["event"] == "report.given_up" for line in lines)
    await away.close()


async def test_more_records_than_are_written_at_once_are_all_written(store: Store, keys: Keys) -> None:
    """Each in its order; a server that does not know the script yet is told it."""
    await store.command("SCRIPT", "FLUSH")
    reporter = Reporter(Membership(store, keys, RECORD, LocalClock()))
    records = [keys.guild("main", str(number)) for number in range(150)]
    for key in records:
        await store.command("HSET", key, "generation", 7)
        tell(reporter, key, "connecting", 1)
        tell(reporter, key, "playing", 2)
    async with running(reporter):
        await reporter.flushed(BOUND_S)
    assert [await status(store, key) for key in records] == [GuildStatus(state="playing", at=2)] * 150
    assert sorted(await told(store, keys)) == ["guild.connecting"] * 150 + ["guild.playing"] * 150


async def test_nothing_told_is_flushed(store: Store, keys: Keys) -> None:
    """Who has nothing to tell waits for nothing."""
    reporter = Reporter(Membership(store, keys, RECORD, LocalClock()))
    with capture_logs() as lines:
        await reporter.flushed(0.0)
    assert lines == []
