"""The Redis client: bounded in time, retries nothing, and says what happened in our own words."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from importlib.resources import files
from pathlib import Path

import pytest

from shared.cli.redis_server import RedisServer
from shared.errors import StaleId, StoreError, StoreUnavailable
from shared.store import client
from shared.store.client import Store, reach
from shared.store.keys import Keys
from tests.integration.test_time_sync import Address

BOUND_S = 10.0
SCRIPTS = sorted(
    one.name.removesuffix(".lua") for one in (files("shared.store") / "scripts").iterdir() if one.name.endswith(".lua")
)


MakeStore = Callable[..., Store]


@pytest.fixture
async def new_store() -> AsyncIterator[MakeStore]:
    """Makes clients and closes them, whatever comes."""
    made: list[Store] = []

    def make(url: str, *, block_s: float = 0.0) -> Store:
        made.append(Store(url, block_s=block_s))
        return made[-1]

    yield make
    for one in made:
        await one.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls give up soon, so that the test does not wait for long."""
    monkeypatch.setattr(client, "CALL_TIMEOUT_S", 0.2)


@pytest.fixture
def deaf() -> Iterator[str]:
    """URL of a server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"redis://127.0.0.1:{listening.getsockname()[1]}/0"


async def test_a_server_that_is_not_there_is_unavailable(new_store: MakeStore) -> None:
    """Nobody listens: the caller is told, and may try again."""
    store = new_store("unix:///nowhere/redis.sock")
    with pytest.raises(StoreUnavailable) as caught:
        await store.command("PING")
    assert caught.value.retryable


@pytest.mark.usefixtures("impatient")
async def test_a_server_that_does_not_answer_is_unavailable(new_store: MakeStore, deaf: str) -> None:
    """No call hangs: one that is not answered in time ends with the same error, whichever kind it is."""
    store = new_store(deaf)
    calls = [
        store.command("PING"),
        store.pipeline([("PING",)]),
        store.transaction([("PING",)]),
        store.script("resign", ["k"], ["id", 1]),
        anext(store.hear(["channel"], 0.1)),
    ]
    async with asyncio.timeout(BOUND_S):
        ended = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(one) for one in ended] == [StoreUnavailable] * len(calls)


async def test_nothing_is_tried_twice(new_store: MakeStore) -> None:
    """A command whose answer was lost may have been done: the client never repeats it by itself."""
    visits = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal visits
        visits += 1
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    store = new_store(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
    with pytest.raises(StoreUnavailable):
        await store.command("INCR", "n")
    assert visits == 1
    server.close()
    await server.wait_closed()


@pytest.mark.usefixtures("impatient")
async def test_a_blocking_read_waits_longer_than_a_call(
    new_store: MakeStore, redis_server: RedisServer, keys: Keys
) -> None:
    """A read that blocks is no call that hangs: its time is added to the time-out."""
    store = new_store(redis_server.url, block_s=0.5)
    assert not await store.command("XREAD", "BLOCK", 400, "STREAMS", keys.jobs, "0-0")


async def test_a_refusal_is_no_absence(store: Store, keys: Keys) -> None:
    """What Redis says no to is an error that trying again does not help."""
    with pytest.raises(StoreError) as caught:
        await store.command("HGET", keys.jobs)
    assert not isinstance(caught.value, StoreUnavailable)
    assert not caught.value.retryable


async def test_an_id_that_is_not_above_the_last_is_told_apart(store: Store, keys: Keys) -> None:
    """A publisher tells by the class of the error that its id was refused, in a command and in a pipeline."""
    await store.command("XADD", keys.jobs, "5-5", "f", "x")
    with pytest.raises(StaleId):
        await store.command("XADD", keys.jobs, "5-5", "f", "x")
    with pytest.raises(StaleId):
        await store.pipeline([("XADD", keys.jobs, "4-9", "f", "x"), ("PING",)])


async def test_a_full_server_is_unavailable(new_store: MakeStore, own_redis_server: RedisServer) -> None:
    """Out of memory passes: what is refused for it may be tried again, and nobody is taken for fenced."""
    store = new_store(own_redis_server.url)
    await store.command("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(StoreUnavailable):
        await store.command("SET", "key", "value")


async def test_a_transaction_is_done_whole_or_not_at_all(store: Store, keys: Keys) -> None:
    """A command that Redis does not know spoils the others with it."""
    with pytest.raises(StoreError):
        await store.transaction([("SET", keys.term, "1"), ("NONSENSE",)])
    assert await store.command("EXISTS", keys.term) == 0
    assert await store.transaction([("SET", keys.term, "1"), ("GET", keys.term)]) == [True, "1"]


async def test_an_empty_pipeline_asks_nothing(new_store: MakeStore) -> None:
    """Nothing to do needs no server."""
    store = new_store("unix:///nowhere/redis.sock")
    assert await store.pipeline([]) == []


async def test_replies_are_text_or_bytes_as_asked(store: Store, raw_store: Store, keys: Keys) -> None:
    """Frames are bytes, everything else is text; bytes that are no text do not break the reader of text."""
    await raw_store.command("SET", keys.term, b"\xff\xfea")
    assert await raw_store.command("GET", keys.term) == b"\xff\xfea"
    assert (await store.command("GET", keys.term)).endswith("a")
    sibling = store.sibling(raw=True)
    assert await sibling.command("GET", keys.term) == b"\xff\xfea"
    await sibling.close()


async def test_a_script_is_sent_again_when_the_server_forgot_it(store: Store, keys: Keys) -> None:
    """A flushed or new server has no scripts: the call is done all the same, once."""
    await store.command("SCRIPT", "FLUSH")
    term = await store.script("lead", [keys.leader, keys.term], ["me", 60_000, 0])
    assert term > 0
    await store.command("SCRIPT", "FLUSH")
    assert await store.script("draw", [keys.leader, keys.term], ["me", term, 5]) > term
    assert await store.script("draw", [keys.leader, keys.term], ["me", term, 1]) == int(
        await store.command("GET", keys.term)
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_opens_with_its_keys(name: str) -> None:
    """What a script touches can be read at its top."""
    text = (files("shared.store") / "scripts" / f"{name}.lua").read_text()
    assert text.startswith("--")
    assert "-- KEYS[1]" in text or "Touches no key." in text
    assert "-- Returns" in text


async def test_a_listener_is_told_first_that_it_listens_then_what_is_said(store: Store, keys: Keys) -> None:
    """What was said before the first item must be looked up; what is said after it is heard; quiet is heard, too."""
    async with aclosing(store.hear([keys.wake_all, keys.wake_leader], 0.2)) as heard, asyncio.timeout(BOUND_S):
        assert await anext(heard) is None
        await store.command("PUBLISH", keys.wake_leader, "lead")
        await store.command("PUBLISH", keys.wake("somebody"), "nothing")
        await store.command("PUBLISH", keys.wake_all, "look")
        assert [await anext(heard), await anext(heard)] == ["lead", "look"]
        assert await anext(heard) is None


async def test_a_listener_is_told_that_time_passed_however_much_is_said(store: Store, keys: Keys) -> None:
    """Who has to look every so often is not kept from it by messages."""
    async with aclosing(store.hear([keys.wake_all], 0.2)) as heard, asyncio.timeout(BOUND_S):
        assert await anext(heard) is None
        word: str | None = ""
        while word is not None:
            await store.command("PUBLISH", keys.wake_all, "look")
            word = await anext(heard)


async def test_a_listener_whose_server_ends_is_told(
    new_store: MakeStore, own_redis_server: RedisServer, keys: Keys
) -> None:
    """Nobody waits at a dead line: the listener must come again, and look up what it missed."""
    store = new_store(own_redis_server.url)
    async with aclosing(store.hear([keys.wake_all], 30.0)) as heard, asyncio.timeout(BOUND_S):
        assert await anext(heard) is None
        own_redis_server.stop()
        with pytest.raises(StoreUnavailable):
            await anext(heard)
    own_redis_server.start()
    async with aclosing(store.hear([keys.wake_all], 30.0)) as again, asyncio.timeout(BOUND_S):
        assert await anext(again) is None


async def test_a_server_that_comes_late_is_reached(new_store: MakeStore, own_redis_server: RedisServer) -> None:
    """A process that starts before Redis waits for it, bounded."""
    own_redis_server.stop()
    store = new_store(own_redis_server.url)
    waiting = asyncio.create_task(reach(store))
    await asyncio.sleep(0)  # it begins to try
    own_redis_server.start()
    async with asyncio.timeout(BOUND_S):
        await waiting


async def test_a_server_that_never_comes_is_given_up(new_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its start a process waits for Redis for a bounded time."""
    monkeypatch.setattr(client, "START_TIMEOUT_S", 0.3)
    store = new_store("unix:///nowhere/redis.sock")
    async with asyncio.timeout(BOUND_S):
        with pytest.raises(StoreUnavailable):
            await reach(store)


@pytest.mark.usefixtures("impatient")
async def test_a_server_that_stood_still_is_used_again(new_store: MakeStore, own_redis_server: RedisServer) -> None:
    """After a time-out the next call does not get the late answer of the one before."""
    store = new_store(own_redis_server.url)
    await store.command("SET", "a", "1")
    os.kill(own_redis_server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(StoreUnavailable):
            await store.command("GET", "a")
    finally:
        os.kill(own_redis_server.pid, signal.SIGCONT)
    await reach(store)
    assert await store.command("ECHO", "mine") == "mine"


@pytest.mark.parametrize("kind", ["command", "pipeline", "transaction", "script", "read"])
async def test_a_primary_that_was_demoted_is_left(
    new_store: MakeStore, own_redis_server: RedisServer, tmp_path: Path, kind: str
) -> None:
    """It still answers where connections stand; the first refusal closes them, and the next call finds the new one."""
    with RedisServer() as promoted:
        address = Address(tmp_path)
        address.lead_to(own_redis_server)
        store = new_store(address.url)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "command": lambda: store.command("SET", "k", 1),
            "pipeline": lambda: store.pipeline([("PING",), ("SET", "k", 1)]),
            "transaction": lambda: store.transaction([("SET", "k", 1)]),
            "script": lambda: store.script("lead", ["k", "term"], ["id", 1_000, 0]),
            "read": lambda: store.command("GET", "k"),
        }
        before = await server_of(store)
        await asyncio.gather(*(store.command("TIME") for _ in range(5)))  # on connections of their own
        await store.command("CONFIG", "SET", "replica-serve-stale-data", "no" if kind == "read" else "yes")
        await store.command("REPLICAOF", "127.0.0.1", 1)
        address.lead_to(promoted)
        assert kind == "read" or await server_of(store) == before
        with pytest.raises(StoreUnavailable):
            await calls[kind]()
        assert await server_of(store) != before
        await asyncio.gather(*(calls[kind]() for _ in range(5)))


async def server_of(store: Store) -> str:
    """Run id of the server that answers."""
    run_id = (await store.script("time", ["clock", "claims"], ["", ""]))[2]
    return str(run_id)


def test_our_own_server_takes_connections_when_it_has_started(own_redis_server: RedisServer) -> None:
    """Also where the path of one that was killed lies about: a path is not yet somebody who listens."""
    path = own_redis_server.url.removeprefix("unix://")
    own_redis_server.stop()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    own_redis_server.start()
    with socket.socket(socket.AF_UNIX) as alive:
        alive.connect(path)
