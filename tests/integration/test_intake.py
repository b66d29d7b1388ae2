"""Jobs: in order, each once, each failing alone; effect, status, event and the end of the entry are one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from coordinator.election import Leadership
from coordinator.intake import LARGEST_JOB_BYTES, Intake
from coordinator.jobs import JobEffects
from coordinator.recovery import Recovery
from coordinator.registry import Change, Registry
from shared.errors import LeaseLost, StoreError
from shared.schema import event as events
from shared.schema.event import Event
from shared.seal import Seal
from shared.store.client import Store
from shared.store.keys import Keys
from shared.voice_servers import VoiceServers

BOUND_S = 10.0
GUILD = "123456789012345678"
CHANNEL = "223456789012345678"
VOICE = {"user_id": GUILD, "session_id": "SECRET-session", "token": "SECRET-token", "endpoint": "voice.example:443"}
SERVERS = VoiceServers("voice.example")
SEAL_KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


def start(job_id: str, broadcast: str = "news", **more: Any) -> str:
    job = {"v": 1, "id": job_id, "type": "broadcast.start", "broadcast": broadcast, "source": {"url": "file:a"}}
    return json.dumps(job | more)


def stop(job_id: str, broadcast: str = "news", **more: Any) -> str:
    return json.dumps({"v": 1, "id": job_id, "type": "broadcast.stop", "broadcast": broadcast} | more)


def join(job_id: str, guild: str = GUILD, **more: Any) -> str:
    job = {"v": 1, "id": job_id, "type": "guild.join", "guild": guild, "channel": CHANNEL, "broadcast": "news"}
    return json.dumps(job | more)


def guild_job(job_id: str, kind: str, **more: Any) -> str:
    return json.dumps({"v": 1, "id": job_id, "type": kind, "guild": GUILD} | more)


class Pool:
    """One leader's part that takes jobs, over a real Redis."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self.store = store
        self.keys = keys
        self.leadership = Leadership(store, keys, "host")
        self.registry = Registry(store, keys)

    async def lead(self) -> None:
        """Begin a term of office: a new leader with a mirror of its own."""
        await self.store.command("DEL", self.keys.leader)
        self.leadership = Leadership(self.store, self.keys, "host")
        await self.leadership.campaign()
        self.registry = Registry(self.store, self.keys)
        await self.registry.load()

    @asynccontextmanager
    async def taking(self) -> AsyncIterator[asyncio.Task[None]]:
        effects = JobEffects(self.registry, self.leadership, Seal(SEAL_KEY), SERVERS, Recovery())
        self.changing = asyncio.Lock()
        intake = Intake(self.store, self.registry, self.leadership, effects, self.changing, asyncio.Event())
        keeping = asyncio.create_task(self.leadership.keep())
        task = asyncio.create_task(intake.run())
        try:
            yield task
        finally:
            for one in (task, keeping):
                one.cancel()
            await asyncio.gather(task, keeping, return_exceptions=True)

    async def add(self, *bodies: str) -> list[str]:
        """Put jobs into the stream; returns their entry ids."""
        return [await self.store.command("XADD", self.keys.jobs, "*", "job", body) for body in bodies]

    async def do(self, *bodies: str) -> list[str]:
        """Put jobs into the stream and have them taken."""
        ids = await self.add(*bodies)
        async with self.taking() as task:
            await self.drained(task)
        return ids

    async def drained(self, task: asyncio.Task[None]) -> None:
        async with asyncio.timeout(BOUND_S):
            while await self.store.command("XLEN", self.keys.jobs):
                if task.done():
                    task.result()
                await asyncio.sleep(0.002)
            async with self.changing:
                pass  # the last change stands on Redis; now the mirror has it, too

    async def status(self, job_id: str) -> tuple[str, str]:
        """State and code of a job."""
        state, code = await self.store.command("HMGET", self.keys.job(job_id), "state", "code")
        return str(state), str(code)

    async def message(self, job_id: str) -> str:
        return str(await self.store.command("HGET", self.keys.job(job_id), "message"))

    async def events(self) -> list[Event]:
        found = await self.store.command("XRANGE", self.keys.events, "-", "+")
        return [events.decode(fields[events.FIELD]) for _, fields in found]

    async def dead(self) -> list[dict[str, str]]:
        return [fields for _, fields in await self.store.command("XRANGE", self.keys.jobs_dead, "-", "+")]

    async def everything(self) -> str:
        """All that stands on Redis in this namespace, as one text."""
        text = ""
        async with asyncio.timeout(BOUND_S):
            for key in await self.store.command("KEYS", f"*{self.keys.word}*"):
                kind = await self.store.command("TYPE", key)
                command = {"hash": ("HGETALL", key), "string": ("GET", key), "set": ("SMEMBERS", key)}
                text += f"{key} {await self.store.command(*command.get(kind, ('XRANGE', key, '-', '+')))}\n"
        return text


@pytest.fixture
async def pool(store: Store, keys: Keys) -> Pool:
    made = Pool(store, keys)
    await made.lead()
    return made


async def test_a_job_that_is_done_says_so(pool: Pool) -> None:
    """Status, event and record stand together, and the entry is gone."""
    await pool.do(start("a"))
    assert await pool.status("a") == ("done", "")
    assert [(event.type, event.job) for event in await pool.events()] == [("job.done", "a")]
    assert await pool.store.command("EXISTS", pool.keys.broadcast("news")) == 1
    assert await pool.store.command("XLEN", pool.keys.jobs) == 0
    assert 86_000 < await pool.store.command("TTL", pool.keys.job("a")) <= 86_400


async def test_jobs_act_in_order(pool: Pool) -> None:
    """Each finds the world as the one before left it."""
    await pool.do(start("a"), start("b"), stop("c"), stop("d"), start("e"))
    states = [await pool.status(job_id) for job_id in "abcde"]
    assert states == [
        ("done", ""),
        ("failed", "broadcast_exists"),
        ("done", ""),
        ("failed", "broadcast_unknown"),
        ("done", ""),
    ]
    assert [event.job for event in await pool.events() if event.type.startswith("job.")] == list("abcde")


async def test_the_same_job_twice_is_done_once(pool: Pool) -> None:
    """A sender that did not hear back may send again, spaced and ordered as it likes."""
    body = start("a")
    again = json.dumps(dict(reversed(json.loads(body).items())), indent=4)
    await pool.do(body)
    run = pool.registry.broadcasts["news"].spec.run
    await pool.do(body, again)
    assert await pool.status("a") == ("done", "")
    assert pool.registry.broadcasts["news"].spec.run == run
    assert len(await pool.events()) == 1
    assert await pool.dead() == []


async def test_a_failed_job_sent_again_is_not_done_again(pool: Pool) -> None:
    """Once within 24 hours holds for failures, too: another try has another id."""
    await pool.do(stop("a"), start("b"), stop("a"))
    assert await pool.status("a") == ("failed", "broadcast_unknown")
    assert "news" in pool.registry.broadcasts


async def test_another_job_under_the_same_id_is_a_conflict_and_the_first_stays(pool: Pool) -> None:
    """The id is taken; the first one's status is not touched, and the second has no effect."""
    await pool.do(start("a"), start("a", "other"))
    assert await pool.status("a") == ("done", "")
    assert set(pool.registry.broadcasts) == {"news"}
    failed = [event for event in await pool.events() if event.type == "job.failed"]
    assert [(event.job, event.code) for event in failed] == [("a", "job_conflict")]
    assert [letter["code"] for letter in await pool.dead()] == ["job_conflict"]


@pytest.mark.parametrize(
    "body", ["nonsense", "", "[]", "null", '"text"', '{"id":"a"', "{" * 50_000, '{"a":' * 50_000, "\x00\ufffd"]
)
async def test_what_is_no_json_fails_under_its_entrys_id(pool: Pool, body: str) -> None:
    """An unreadable job has no id of its own; the next one is done."""
    entry, _ = await pool.do(body, start("next"))
    assert await pool.status(entry) == ("failed", "job_unreadable")
    assert await pool.status("next") == ("done", "")
    assert [letter["entry"] for letter in await pool.dead()] == [entry]


async def test_an_entry_without_a_job_fails_under_its_id(pool: Pool) -> None:
    """Somebody wrote another field: it is told and does not stop the others."""
    entry = await pool.store.command("XADD", pool.keys.jobs, "*", "jbo", start("a"))
    await pool.do(start("next"))
    assert await pool.status(entry) == ("failed", "job_unreadable")
    assert await pool.status("next") == ("done", "")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (json.dumps({"v": 1, "id": "bad", "type": "guild.dance"}), "guild.dance"),
        (json.dumps({"v": 1, "id": "bad", "type": 5}), "type"),
        (json.dumps({"v": 1, "id": "bad"}), "type"),
        (json.dumps({"v": 2, "id": "bad", "type": "guild.leave", "guild": GUILD}), "v"),
        (json.dumps({"v": 1, "id": "bad", "type": "guild.leave"}), "guild"),
        (guild_job("bad", "guild.leave", volume=3), "volume"),
        (guild_job("bad", "guild.leave", guild="12"), "guild"),
        (guild_job("bad", "guild.leave", guild=int(GUILD)), "guild"),
        (join("bad", voice=VOICE | {"endpoint": "http://x"}), "endpoint"),
        (join("bad", voice=VOICE | {"endpoint": "voice.example.evil"}), "voice.endpoint"),
        (start("bad", source={}), "source"),
        (start("bad", opus={"bitrate": 1}), "bitrate"),
    ],
)
async def test_a_wrong_job_fails_alone_and_its_mistake_is_named(pool: Pool, body: str, named: str) -> None:
    """The status names the field; the job after it is done; a copy without credentials is kept."""
    entry, _ = await pool.do(body, start("next"))
    assert await pool.status("bad") == ("failed", "job_invalid")
    assert named in await pool.message("bad")
    assert await pool.status("next") == ("done", "")
    (letter,) = await pool.dead()
    assert (letter["entry"], letter["code"]) == (entry, "job_invalid")
    (failed,) = [event for event in await pool.events() if event.type == "job.failed"]
    assert (failed.job, failed.code, failed.message) == ("bad", "job_invalid", await pool.message("bad"))


@pytest.mark.parametrize(
    "head", ['"id":7,"type":"guild.dance"', '"id":"","type":"guild.leave"', '"type":"guild.leave"']
)
async def test_a_job_without_a_usable_id_fails_under_its_entrys_id(pool: Pool, head: str) -> None:
    """Whoever forgot the id finds the failure by the id that Redis gave."""
    entry, _ = await pool.do('{"v":1,' + head + "}", start("next"))
    assert await pool.status(entry) == ("failed", "job_invalid")
    assert await pool.status("next") == ("done", "")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (json.dumps({"v": 1, "id": "early", "type": "broadcast.pause", "broadcast": "news"}), "broadcast.pause"),
        (start("early", source={"playlist": ["a"]}), "source.playlist"),
        (start("early", at=5), "at"),
        (join("early", at=5), "at"),
    ],
)
async def test_what_is_not_served_yet_says_so(pool: Pool, body: str, named: str) -> None:
    """A wish of a later version is refused whole, by name; the job after it is done."""
    await pool.do(body, start("next", "other"))
    assert await pool.status("early") == ("failed", "not_supported_yet")
    assert named in await pool.message("early")
    assert await pool.status("next") == ("done", "")
    assert set(pool.registry.broadcasts) == {"other"}
    assert not pool.registry.guilds


@pytest.mark.parametrize("body", [join("bad", volume=1, voice=VOICE), join("bad", voice=VOICE)[:-1], str([VOICE])])
async def test_a_dead_letter_has_no_credentials(pool: Pool, body: str) -> None:
    """Whatever was wrong with a job, its token and session stand nowhere on Redis."""
    await pool.do(body)
    assert len(await pool.dead()) == 1
    assert "SECRET" not in await pool.everything()


async def test_credentials_are_sealed_before_they_are_stored(pool: Pool) -> None:
    """With a key, a joined guild's token and session stand nowhere on Redis in clear."""
    await pool.do(join("a", voice=VOICE))
    assert await pool.status("a") == ("done", "")
    assert "SECRET" not in await pool.everything()
    stored = pool.registry.guilds["main", GUILD].spec.voice
    assert isinstance(stored, str)
    assert Seal(SEAL_KEY).open_voice(stored, "main", GUILD).token == "SECRET-token"


async def test_what_lets_one_into_a_source_is_sealed_before_it_is_stored(pool: Pool) -> None:
    """Password, query and headers stand nowhere on Redis in clear; host and path do."""
    source = {"url": "https://us:SECRET@host.example/live?SECRET", "headers": {"Cookie": "SECRET"}}
    await pool.do(start("a", source=source))
    assert await pool.status("a") == ("done", "")
    assert "SECRET" not in await pool.everything()
    spec = pool.registry.broadcasts["news"].spec
    assert spec.source.url == "https://host.example/live"
    assert Seal(SEAL_KEY).open_source(spec).url == source["url"]


BAD_HEADERS: list[tuple[dict[str, Any], str]] = [
    ({"Host": "a"}, "Authorization|Cookie|User-Agent|Referer|Accept|Icy-MetaData"),
    ({"Cookie": "a\r\nHost: b"}, "headers"),
    ({"Cookie": ""}, "headers"),
    ({"Cookie": " a"}, "headers"),
    ({"Cookie": "ü"}, "headers"),
    ({"Cookie": "a" * 4_097}, "headers"),
    ({"Cookie": 1}, "headers"),
]


@pytest.mark.parametrize(("headers", "named"), BAD_HEADERS)
async def test_a_header_that_is_not_allowed_is_one_clear_error(pool: Pool, headers: dict[str, Any], named: str) -> None:
    """It names the field, and what is allowed; nothing else suffers."""
    await pool.do(start("bad", source={"url": "https://host.example/", "headers": headers}), start("next", "other"))
    assert await pool.status("bad") == ("failed", "job_invalid")
    message = await pool.message("bad")
    assert named in message
    assert "source.headers" in message
    assert await pool.status("next") == ("done", "")


async def test_a_new_leader_goes_on_behind_what_was_done(pool: Pool) -> None:
    """Jobs that were taken are not taken again, those that came meanwhile are."""
    await pool.do(start("a"), start("b", "other"))
    await pool.add(stop("c"), join("d"))
    await pool.lead()
    assert set(pool.registry.broadcasts) == {"news", "other"}
    await pool.do()
    assert set(pool.registry.broadcasts) == {"other"}
    assert ("main", GUILD) in pool.registry.guilds
    assert [event.job for event in await pool.events() if event.type == "job.done"] == list("abcd")


@pytest.mark.parametrize("body", [join("x"), start("x", "other"), "nonsense"])
async def test_a_job_taken_by_a_deposed_leader_changes_nothing(pool: Pool, body: str) -> None:
    """Effect, status, event and the end of the entry are one: all is refused, and the next leader does the job."""
    await pool.do(start("a"))
    rival = Leadership(pool.store, pool.keys, "rival")
    await pool.store.command("DEL", pool.keys.leader)
    await rival.campaign()
    before = await pool.everything()
    mirror = (dict(pool.registry.guilds), dict(pool.registry.broadcasts))
    (entry,) = await pool.add(body)
    effects = JobEffects(pool.registry, pool.leadership, Seal(None), SERVERS, Recovery())
    intake = Intake(pool.store, pool.registry, pool.leadership, effects, asyncio.Lock(), asyncio.Event())
    async with asyncio.timeout(BOUND_S):
        with pytest.raises(LeaseLost):
            await intake.run()
    assert (pool.registry.guilds, pool.registry.broadcasts) == mirror
    assert await pool.store.command("XDEL", pool.keys.jobs, entry) == 1
    await pool.store.command("DEL", pool.keys.jobs)
    assert sorted((await pool.everything()).splitlines()) == sorted(
        line for line in before.splitlines() if not line.startswith(pool.keys.jobs + " ")
    )
    await pool.lead()
    await pool.do(body)
    assert len([event for event in await pool.events() if event.type.startswith("job.")]) == 2


async def test_many_jobs_are_each_done_once(pool: Pool) -> None:
    """More than one read brings, across a change of leaders in the middle."""
    await pool.add(*(join(f"j{number}", str(10**17 + number)) for number in range(250)))
    async with pool.taking(), asyncio.timeout(BOUND_S):
        while await pool.store.command("XLEN", pool.keys.jobs) > 120:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
    await pool.lead()
    await pool.do()
    done = [event.job for event in await pool.events() if event.type == "job.done"]
    assert done == [f"j{number}" for number in range(250)]
    assert len(pool.registry.guilds) == 250


async def test_a_stop_of_a_broadcast_that_nobody_holds_ends_it_at_once(pool: Pool) -> None:
    """What never reached a worker ends without one; with `leave` its guilds go, too."""
    await pool.do(start("a"), join("b"), stop("c", leave=True))
    assert not pool.registry.broadcasts
    assert not pool.registry.guilds
    kinds = [event.type for event in await pool.events() if not event.type.startswith("job.")]
    assert sorted(kinds) == ["broadcast.ended", "guild.stopped"]


async def test_a_stop_leaves_guilds_connected(pool: Pool) -> None:
    """Unless told otherwise, guilds stay, idle."""
    await pool.do(start("a"), join("b"), stop("c"))
    assert ("main", GUILD) in pool.registry.guilds


async def test_a_guild_that_was_not_joined_cannot_leave_or_get_credentials(pool: Pool) -> None:
    """The code says which of the two ids is unknown."""
    await pool.do(guild_job("a", "guild.leave"), guild_job("b", "guild.voice", channel=CHANNEL, voice=VOICE))
    assert [await pool.status(job_id) for job_id in "ab"] == [("failed", "guild_unknown")] * 2


async def test_a_second_join_is_an_update(pool: Pool) -> None:
    """Tuning to another broadcast keeps the credentials of the guild; another channel does not."""
    await pool.do(join("a", voice=VOICE))
    stored = pool.registry.guilds["main", GUILD].spec.voice
    await pool.do(join("b", broadcast="other"))
    spec = pool.registry.guilds["main", GUILD].spec
    assert (spec.broadcast, spec.voice, spec.job) == ("other", stored, "b")
    await pool.do(join("c", channel=GUILD))
    assert pool.registry.guilds["main", GUILD].spec.voice is None


# hostile senders


async def test_a_job_that_is_too_large_is_put_away_unread(pool: Pool) -> None:
    """Its length is told before it is read; what stands before and behind it is done."""
    huge = start("huge", "x" * LARGEST_JOB_BYTES)
    first, large, last = await pool.add(start("a"), huge, stop("b"))
    async with pool.taking() as task:
        await pool.drained(task)
    assert [await pool.status(one) for one in ("a", large, "b")] == [
        ("done", ""),
        ("failed", "job_invalid"),
        ("done", ""),
    ]
    (dead,) = await pool.store.command("XRANGE", pool.keys.jobs_dead, "-", "+")
    assert (dead[1]["entry"], dead[1]["job"]) == (large, "")
    assert str(len(huge)) in dead[1]["message"] or "bytes" in dead[1]["message"]
    assert first < large < last


async def test_many_large_jobs_are_read_few_at_a_time(pool: Pool) -> None:
    """What one answer of the server holds has a bound, however many wait."""
    word = "x" * (LARGEST_JOB_BYTES - 1_000)
    await pool.add(*(f'{{"v":1,"id":"j{number}","type":"{word}"}}' for number in range(5)))
    entries = await pool.store.script("jobs", [pool.keys.jobs], ["job", LARGEST_JOB_BYTES, 100])
    assert len(entries) == 2
    async with pool.taking() as task:
        await pool.drained(task)
    assert [(await pool.status(f"j{number}"))[0] for number in range(5)] == ["failed"] * 5


async def test_a_job_with_the_highest_id_ends_no_stream(pool: Pool) -> None:
    """It is taken as any other, and the stream goes on to number by the clock."""
    highest = 2**64 - 1
    await pool.store.command("XADD", pool.keys.jobs, f"{highest}-{highest}", "job", start("a"))
    async with pool.taking() as task:
        await pool.drained(task)
        for number in range(2):
            async with asyncio.timeout(BOUND_S):
                while True:
                    try:
                        await pool.add(start(f"later-{number}", f"b{number}"))
                        break
                    except StoreError:  # until it was set back
                        await asyncio.sleep(0.01)
            await pool.drained(task)
    assert [await pool.status(one) for one in ("a", "later-0", "later-1")] == [("done", "")] * 3


async def test_a_stop_and_a_start_back_to_back_end_the_first_run(pool: Pool) -> None:
    """Whoever waits for the end of a broadcast hears of it, also where the next one begins at once."""
    await pool.do(start("a"))
    change = Change(pool.registry)
    change.put_broadcast(replace(pool.registry.broadcasts["news"], worker="e", generation=5))
    await change.commit(pool.leadership)
    before = pool.registry.broadcasts["news"].spec.run
    await pool.do(stop("b"), start("c"))
    ended = [event for event in await pool.events() if event.type == "broadcast.ended"]
    assert [(event.run, event.reason) for event in ended] == [(before, "stopped")]
    assert pool.registry.broadcasts["news"].spec.run > before


@pytest.mark.parametrize("body", ["nonsense " * 1_000, json.dumps({"v": 1, "id": "a", "type": "t" * 100_000})])
async def test_no_text_that_goes_out_is_long(pool: Pool, body: str) -> None:
    """Whatever a job says: in event, status and dead letter it has a bound."""
    (entry,) = await pool.do(body)
    (event,) = await pool.events()
    (dead,) = await pool.store.command("XRANGE", pool.keys.jobs_dead, "-", "+")
    status = await pool.store.command("HGET", pool.keys.job(event.job), "message")
    for text in (event.message, status, dead[1]["message"]):
        assert 0 < len(text) <= 500
    assert len(dead[1]["job"]) <= 1_000
    assert entry
