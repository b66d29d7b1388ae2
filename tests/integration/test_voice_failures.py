"""Voice failures, from a worker's report over a real Redis to what the coordinator makes of it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import pytest

from coordinator import app, recovery
from coordinator.app import Coordinator
from shared.clock import LocalClock, unix_ms
from shared.schema import event as events
from shared.schema.event import Event, guild_event
from shared.schema.records import GuildState, GuildStatus, GuildWant, WorkerRecord, WorkerStats
from shared.settings import Settings
from shared.store.client import Store
from shared.store.keys import Keys
from worker.membership import Membership, Report

BOUND_S = 15.0
BOT = "123456789012345678"
GUILD = "323456789012345678"
CHANNEL = "423456789012345678"
ANSWER_WITHIN_MS = 250
VOICE = {"user_id": BOT, "session_id": "s", "token": "t", "endpoint": "voice.example:443"}

_T = TypeVar("_T")


async def until(condition: Callable[[], Awaitable[_T]], what: str) -> _T:
    """Ask until the answer is truthy, and give it."""
    try:
        async with asyncio.timeout(BOUND_S):
            while not (found := await condition()):  # noqa: ASYNC110 - what is waited for happens on Redis
                await asyncio.sleep(0.01)
            return found
    except TimeoutError:
        raise AssertionError(f"not within {BOUND_S:g} s: {what}") from None


class Pool:
    """A coordinator, one worker that is nothing but its lease and its reports, and a user who sends jobs."""

    def __init__(self, store: Store, keys: Keys, url: str) -> None:
        self.store = store
        self.keys = keys
        self.member = Membership(
            store,
            keys,
            WorkerRecord(id="w", name="w", role="fanout", host="h", capacity=9_000, headroom=9_000),
            LocalClock(),
        )
        self._settings = Settings(redis_url=url, namespace=keys.word, voice_hosts="voice.example")
        self._numbers = itertools.count(1)
        self._generation = 0
        self.first_ends: asyncio.Event
        """Set: the first coordinator resigns."""

    @asynccontextmanager
    async def coordinator(self) -> AsyncIterator[asyncio.Event]:
        """Somebody leads, from here to there, or until what is given is set."""
        stop = asyncio.Event()
        task = asyncio.create_task(Coordinator(self._settings, "host").run(stop))
        try:
            yield stop
        finally:
            stop.set()
            await task

    async def leader(self) -> str:
        """Who leads, empty while nobody does."""
        return await self.store.command("HGET", self.keys.leader, "id") or ""

    async def beat(self) -> None:
        """Keep the worker's lease."""
        while True:
            await self.member.renew(9_000, WorkerStats())
            await asyncio.sleep(0.5)

    async def job(self, kind: str, guild: str = GUILD, **more: Any) -> None:
        """Send a job and wait until it is done."""
        job_id = f"job-{next(self._numbers)}"
        body = json.dumps({"v": 1, "id": job_id, "type": kind, "guild": guild} | more)
        await self.store.command("XADD", self.keys.jobs, "*", "job", body)

        async def settled() -> str | None:
            state: str | None = await self.store.command("HGET", self.keys.job(job_id), "state")
            return state

        assert await until(settled, f"an outcome of {kind}") == "done"

    async def join(self, guild: str = GUILD, **more: Any) -> None:
        await self.job("guild.join", guild, **({"channel": CHANNEL, "broadcast": "news", "voice": VOICE} | more))

    async def wanted(self, guild: str = GUILD) -> GuildWant | None:
        """What the worker shall do about a guild."""
        body = await self.store.command("HGET", self.keys.want("w"), f"guild:main:{guild}")
        return msgspec.json.decode(body, type=GuildWant) if body else None

    async def placed(self, guild: str = GUILD) -> GuildWant:
        """The guild under a generation that this was not asked about before."""

        async def anew() -> GuildWant | None:
            want = await self.wanted(guild)
            return want if want is not None and want.generation > self._generation else None

        want = await until(anew, "a guild that is placed")
        assert want is not None
        self._generation = want.generation
        return want

    async def tell(self, want: GuildWant, state: GuildState, **more: Any) -> None:
        """Report as the worker does."""
        status = GuildStatus(state=state, at=unix_ms(), worker="w", **more)
        event = guild_event(want.spec, status, worker="w", generation=want.generation)
        key = self.keys.guild("main", want.spec.guild)
        assert await self.member.report([Report(key, want.generation, next(self._numbers), status, event)]) == [True]

    async def close(self, want: GuildWant, close_code: int) -> None:
        """The voice server ended the session."""
        message = f"voice gateway closed with {close_code}"
        await self.tell(want, "failed", code="voice_closed", close_code=close_code, message=message)

    async def status(self, guild: str = GUILD) -> GuildStatus:
        body = await self.store.command("HGET", self.keys.guild("main", guild), "status")
        return msgspec.json.decode(body, type=GuildStatus)

    async def events(self, kind: str, guild: str = GUILD) -> list[Event]:
        """What the coordinator and the worker told of a guild."""
        found = await self.store.command("XRANGE", self.keys.events, "-", "+")
        told = [events.decode(fields[events.FIELD]) for _, fields in found]
        return [event for event in told if (event.type, event.guild) == (kind, guild)]

    async def event(self, kind: str, number: int = 1, guild: str = GUILD, **fields: object) -> Event:
        """The event of that number with these values, once it is there."""

        async def told() -> list[Event]:
            some = await self.events(kind, guild)
            return [event for event in some if fields.items() <= msgspec.structs.asdict(event).items()][number - 1 :]

        return (await until(told, f"{kind} {number} {fields}"))[0]


@pytest.fixture
async def pool(store: Store, keys: Keys, redis_server: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    """A pool in which nobody has to wait for long."""
    monkeypatch.setattr(recovery, "ANSWER_WITHIN_MS", ANSWER_WITHIN_MS)
    monkeypatch.setattr(app, "_PLAN_EVERY_S", 0.05)
    monkeypatch.setattr(recovery, "_FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(recovery, "_LONGEST_BACKOFF_S", 0.1)
    monkeypatch.setattr(recovery, "PLAIN_WITHIN_MS", ANSWER_WITHIN_MS)
    one = Pool(store, keys, redis_server.url)
    await one.member.join()
    beating = asyncio.create_task(one.beat())
    try:
        async with one.coordinator() as one.first_ends:
            yield one
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


async def passes_are_made(pool: Pool) -> None:
    """Wait until the planner has looked at everything at least twice more: it places a guild that comes now."""
    for number in (1, 2):
        guild = str(10**18 + number + unix_ms() % 10**6 * 10)
        await pool.join(guild)

        async def there(guild: str = guild) -> GuildWant | None:
            return await pool.wanted(guild)

        await until(there, "a guild that came later")


@pytest.mark.parametrize("close_code", [1000, 4013, 4015, 1006])
async def test_a_session_that_could_not_be_resumed_is_identified_afresh(pool: Pool, close_code: int) -> None:
    """The guild is placed again under a higher generation, with the credentials it had, and nobody is asked."""
    await pool.join()
    first = await pool.placed()
    await pool.close(first, close_code)
    second = await pool.placed()
    assert second.spec == first.spec
    assert await pool.events("guild.voice_wanted") == []


@pytest.mark.parametrize("close_code", [4004, 4006, 4009, 4011])
async def test_a_void_session_goes_on_with_the_users_credentials(pool: Pool, close_code: int) -> None:
    """The bot is asked, answers, and its credentials are used."""
    await pool.join()
    await pool.close(await pool.placed(), close_code)
    event = await pool.event("guild.voice_wanted")
    assert (event.close_code, event.rejoin, event.leave_first) == (close_code, True, True)
    assert (await pool.status()).state == "voice_wanted"
    await pool.job("guild.voice", channel=CHANNEL, voice=VOICE | {"token": "fresh"})
    again = await pool.placed()
    assert again.spec.voice is not None
    assert not isinstance(again.spec.voice, str)
    assert again.spec.voice.token == "fresh"


async def test_the_credentials_in_use_are_nothing_new(pool: Pool) -> None:
    """Bots forward every VOICE_SERVER_UPDATE: the same once more changes no generation, another token does."""
    await pool.join()
    first = await pool.placed()
    await pool.job("guild.voice", channel=CHANNEL, voice=VOICE)
    await pool.join()
    await passes_are_made(pool)
    want = await pool.wanted()
    assert want is not None
    assert want.generation == first.generation
    await pool.job("guild.voice", channel=CHANNEL, voice=VOICE | {"token": "fresh"})
    assert (await pool.placed()).generation > first.generation


async def test_a_kick_stays_a_kick(pool: Pool) -> None:
    """The bot answered before it knew: its old credentials are refused, and it is not asked to join again."""
    await pool.join()
    want = await pool.placed()
    await pool.tell(want, "playing")
    await pool.close(want, 4014)
    assert (await pool.event("guild.voice_wanted")).rejoin is False
    await pool.job("guild.voice", channel=CHANNEL, voice=VOICE)
    await pool.close(await pool.placed(), 4006)
    assert (await pool.event("guild.voice_wanted", 2)).rejoin is False
    assert (await pool.event("guild.stopped")).code == "kicked"


@pytest.mark.parametrize("close_code", [4014, 4022])
async def test_a_moved_bot_is_followed(pool: Pool, close_code: int) -> None:
    """The server disconnected it; the user's bot says where it is now, and the guild goes on there."""
    await pool.join()
    await pool.close(await pool.placed(), close_code)
    event = await pool.event("guild.voice_wanted")
    assert (event.reason, event.close_code, event.rejoin) == ("disconnected", close_code, False)
    await pool.job("guild.voice", channel=BOT, voice=VOICE)
    assert (await pool.placed()).spec.channel == BOT
    assert await pool.events("guild.stopped") == []


async def test_a_kicked_bot_stays_out_until_it_is_asked_for(pool: Pool) -> None:
    """Nobody answers: the guild has stopped, and stays so, also under the next leader; a new join brings it back."""
    await pool.join()
    await pool.close(await pool.placed(), 4014)
    stopped = await pool.event("guild.stopped")
    assert (stopped.code, stopped.close_code, stopped.final) == ("kicked", 4014, True)
    async with pool.coordinator():  # stands by, and leads when the first is gone
        first = await pool.leader()
        assert first
        pool.first_ends.set()

        async def another_leads() -> bool:
            return await pool.leader() not in ("", first)

        await until(another_leads, "another leader")
        await passes_are_made(pool)
        status = await pool.status()
        assert (status.state, status.code, status.final) == ("stopped", "kicked", True)
        assert len(await pool.events("guild.voice_wanted")) == 1
        await pool.join()
        await pool.placed()


async def test_a_kicked_bot_may_be_told_to_leave(pool: Pool) -> None:
    """guild.leave is an answer, too: nothing of the guild is left."""
    await pool.join()
    await pool.close(await pool.placed(), 4014)
    await pool.event("guild.voice_wanted")
    await pool.job("guild.leave")
    await pool.event("guild.stopped", code="")
    await passes_are_made(pool)
    assert await pool.store.command("EXISTS", pool.keys.guild("main", GUILD)) == 0
    assert len(await pool.events("guild.stopped")) == 1


async def test_a_kicked_bot_joins_again_where_that_was_asked_for(pool: Pool) -> None:
    """`on_kick: rejoin`: the bot is asked to join, and again when it does not answer."""
    await pool.join(on_kick="rejoin")
    await pool.close(await pool.placed(), 4014)
    first = await pool.event("guild.voice_wanted")
    again = await pool.event("guild.voice_wanted", 2)
    assert (first.rejoin, first.leave_first, again.rejoin, again.leave_first) == (True, False, True, True)
    await pool.event("guild.failed", code="voice_credentials_missing")
    await pool.job("guild.voice", channel=CHANNEL, voice=VOICE)
    await pool.placed()


@pytest.mark.parametrize("close_code", [4012, 4016, 4017, 4021])
async def test_a_guild_that_cannot_be_helped_never_loops(pool: Pool, close_code: int) -> None:
    """It is failed and held by nobody, also when its worker is lost, until the user asks for it anew."""
    await pool.join()
    await pool.close(await pool.placed(), close_code)
    failed = await pool.event("guild.failed", final=True)
    assert (failed.close_code, failed.worker) == (close_code, "")
    await passes_are_made(pool)
    status = await pool.status()
    assert (status.state, status.close_code, status.final, status.retry_at) == ("failed", close_code, True, None)
    assert await pool.wanted() is None
    assert await pool.events("guild.voice_wanted") == []
    await pool.join(voice=None)  # the credentials that it had are tried again
    await pool.placed()


async def test_what_looks_like_our_mistake_is_tried_once_more_only(pool: Pool) -> None:
    """4020, answered with new credentials, and 4020 again: the guild stops."""
    await pool.join()
    await pool.close(await pool.placed(), 4020)
    await pool.event("guild.voice_wanted")
    await pool.job("guild.voice", channel=CHANNEL, voice=VOICE)
    await pool.close(await pool.placed(), 4020)
    assert (await pool.event("guild.failed", final=True)).close_code == 4020


async def test_a_guild_that_fails_on_and_on_is_left_alone_for_long(pool: Pool) -> None:
    """A server that ends every session at once sees a dozen of them, and then none for a quarter of an hour."""
    await pool.join()
    sessions = 0

    async def next_one() -> GuildWant | Event | None:
        given_up = [event for event in await pool.events("guild.failed") if event.code == "too_many_attempts"]
        if given_up:
            return given_up[0]
        if (await pool.status()).state == "voice_wanted":
            await pool.job("guild.voice", channel=CHANNEL, voice=VOICE)
        want = await pool.wanted()
        return want if want is not None and want.generation > pool._generation else None

    while isinstance(want := await until(next_one, "what comes next"), GuildWant):
        await pool.placed()
        sessions += 1
        assert sessions <= recovery.ATTEMPTS
        await pool.close(want, 4015)
    assert sessions >= 5
    status = await pool.status()
    assert (status.state, status.code) == ("failed", "too_many_attempts")
    assert status.retry_at is not None
    assert status.retry_at - status.at >= recovery.LONG_RETRY_S * 1_000


async def test_an_unanswered_question_is_asked_again_and_again_and_then_rarely(pool: Pool) -> None:
    """A bot that is not there is asked a dozen times, each told as a failure, and then each quarter of an hour."""
    await pool.join(voice=None)
    last = await pool.event("guild.failed", code="too_many_attempts")
    assert f"{ANSWER_WITHIN_MS} ms" in last.message
    assert len(await pool.events("guild.voice_wanted")) == recovery.ATTEMPTS
    await passes_are_made(pool)
    assert len(await pool.events("guild.voice_wanted")) == recovery.ATTEMPTS


async def test_a_bot_is_not_asked_for_all_its_guilds_at_once(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sessions of a bot end together: it is asked for as many as it can answer; each answer brings the next."""
    monkeypatch.setattr(recovery, "ANSWER_WITHIN_MS", 60_000)
    monkeypatch.setattr(recovery, "QUESTIONS_OPEN", 3)
    guilds = [str(5 * 10**17 + number) for number in range(8)]
    for guild in guilds:
        await pool.join(guild)
    for guild in guilds:

        async def there(guild: str = guild) -> GuildWant | None:
            return await pool.wanted(guild)

        want = await until(there, "a placed guild")
        assert want is not None
        await pool.close(want, 4009)

    async def asked() -> list[str]:
        return [guild for guild in guilds if await pool.events("guild.voice_wanted", guild)]

    async def some_asked() -> list[str]:
        found = await asked()
        return found if len(found) >= 3 else []

    first = await until(some_asked, "the first questions")
    await passes_are_made(pool)
    assert await asked() == first
    assert len(first) == 3
    for guild in first:
        await pool.job("guild.voice", guild, channel=CHANNEL, voice=VOICE)

    async def the_next_asked() -> bool:
        return len(await asked()) == 6

    await until(the_next_asked, "the next questions")
