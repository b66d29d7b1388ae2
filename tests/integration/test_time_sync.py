"""The common clock over real servers: one time for all, and the same time on the next server."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from shared.cli.redis_server import RedisServer
from shared.clock import CommonClock, LocalClock
from shared.errors import StoreError
from shared.store import client, time_sync
from shared.store.client import Store
from shared.store.keys import Keys
from shared.store.time_sync import TimeSync, begin_time

BOUND_S = 15.0
_JUMPED_BY = "jumped-by"
AHEAD_US = 3_000_000
"""The pool's time stands so far from the first server's clock, as after a failover from a server with another one."""
NEAR_US = 50_000
"""Far below what a lost timeline would be off by, far above what a busy machine measures wrong."""
WRONG = [(0.0, 0.0), (-700.0, -150.0), (12_345.0, 200.0)]
"""Seconds and ppm by which the processes' own clocks are wrong."""


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(BOUND_S):
        while not await condition():  # noqa: ASYNC110 - what is waited for happens on Redis
            await asyncio.sleep(0.01)


class Address:
    """Where the primary is to be found: a path that leads to one server, and later to another."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "primary.sock"
        self.url = f"unix://{self._path}"

    def lead_to(self, server: RedisServer) -> None:
        self._path.unlink(missing_ok=True)
        self._path.symlink_to(server.url.removeprefix("unix://"))


class Process:
    """One process's clock, and what keeps it."""

    def __init__(self, url: str, keys: Keys, error: tuple[float, float], host: str) -> None:
        self.store = Store(url)
        self.clock = CommonClock(LocalClock(*error))
        self.sync = TimeSync(self.store, keys, self.clock, host)

    def off_by_us(self) -> int:
        """Against the servers' clock, which is this machine's."""
        return self.clock.now_us() - time.time_ns() // 1_000

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.sync.follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Pool:
    """Two servers, an address, and processes of one namespace."""

    def __init__(self, exits: AsyncExitStack, folder: Path, keys: Keys) -> None:
        self._exits = exits
        self.keys = keys
        self.address = Address(folder)
        self.first, self.second = (exits.enter_context(RedisServer()) for _ in range(2))
        self.address.lead_to(self.first)

    async def process(self, error: tuple[float, float] = (0.0, 0.0), host: str = "a") -> Process:
        one = Process(self.address.url, self.keys, error, host)
        self._exits.push_async_callback(one.store.close)
        return one

    async def _on(self, server: RedisServer) -> Store:
        store = Store(server.url)
        self._exits.push_async_callback(store.close)
        return store

    async def run_id(self, server: RedisServer) -> str:
        return str((await (await self._on(server)).command("INFO", "server"))["run_id"])

    async def agreed(self, server: RedisServer) -> dict[str, str]:
        """What stands on a server about the servers' clocks."""
        found: dict[str, str] = await (await self._on(server)).command("HGETALL", self.keys.clock)
        return found

    async def is_new(self) -> None:
        """Nobody has lived by another time than the first server's."""
        await begin_time(await self._on(self.first), self.keys)

    async def agree_on(self, server: RedisServer, shift_us: int) -> None:
        """The pool has lived with this server by another one's time."""
        await (await self._on(server)).command("HSET", self.keys.clock, await self.run_id(server), shift_us)

    async def jump(self, by_us: int) -> None:
        """Set the first server's clock."""
        await (await self._on(self.first)).command("INCRBY", _JUMPED_BY, by_us)

    async def fail_over(self, *, data_lost: bool = False) -> None:
        """The first server dies, and the second one, which has its data or none, is the primary."""
        copy = await self._on(self.second)
        for run_id, shift_us in () if data_lost else (await self.agreed(self.first)).items():
            await copy.command("HSET", self.keys.clock, run_id, shift_us)
        self.first.stop()
        self.address.lead_to(self.second)

    async def until_agreed(self) -> dict[str, str]:
        """What stands on the second server, once the pool agreed about its clock."""
        run_id = await self.run_id(self.second)

        async def there() -> bool:
            return run_id in await self.agreed(self.second)

        await until(there)
        return await self.agreed(self.second)

    async def asked_in_vain(self, server: RedisServer) -> int:
        """How often a process was told that nothing is agreed on."""
        statistics = await (await self._on(server)).command("INFO", "commandstats")
        return int(statistics.get("cmdstat_hget", {"calls": 0})["calls"])  # called by the script only


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, so that tests do not wait for long."""
    monkeypatch.setattr(time_sync, "_EVERY_S", 0.02)
    monkeypatch.setattr(time_sync, "_ASK_EVERY_S", 0.01)


@pytest.fixture(autouse=True)
def settable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have TIME be what it is and what stands under a key: a real clock is not ours to set."""
    script = client._script
    jumped = f"""
local jumped_us = function()
  local time = redis.call('TIME')
  local us = time[1] * 1000000 + time[2] + (redis.call('GET', '{_JUMPED_BY}') or 0)
  return {{string.format('%d', math.floor(us / 1000000)), string.format('%d', us % 1000000)}}
end
"""

    def with_jumps(name: str) -> tuple[str, str]:
        text, sha = script(name)
        if name != "time":
            return text, sha
        changed = jumped + text.replace("redis.call('TIME')", "jumped_us()")
        assert changed.count("jumped_us()") == 1
        return changed, hashlib.sha1(changed.encode(), usedforsecurity=False).hexdigest()

    monkeypatch.setattr(client, "_script", with_jumps)


@pytest.fixture
async def pool(tmp_path: Path, keys: Keys) -> AsyncIterator[Pool]:
    async with AsyncExitStack() as exits:
        yield Pool(exits, tmp_path, keys)


async def until_all_add(processes: list[Process], shift_us: int) -> None:
    async def taken_over() -> bool:
        return {one.sync.shift_us for one in processes} == {shift_us}

    await until(taken_over)


async def test_processes_with_wrong_clocks_share_the_servers_time(pool: Pool) -> None:
    """In a new pool the common time is the server's, whatever a process's own clock says."""
    await pool.is_new()
    for error in WRONG:
        one = await pool.process(error)
        await one.sync.synchronise()
        assert abs(one.off_by_us()) < NEAR_US
        assert one.sync.shift_us == 0
    assert await pool.agreed(pool.first) == {await pool.run_id(pool.first): "0"}


async def test_a_failover_changes_nobodys_time(pool: Pool) -> None:
    """The next server's clock differs by 3 s: all notice, each measures for itself, and one number stands for all."""
    await pool.agree_on(pool.first, AHEAD_US)
    processes = [await pool.process(error) for error in WRONG]
    for one in processes:
        await one.sync.synchronise()
        assert abs(one.off_by_us() - AHEAD_US) < NEAR_US
    async with AsyncExitStack() as following:
        for one in processes:
            await following.enter_async_context(one.following())
        before = [one.clock.now_ns() - time.monotonic_ns() for one in processes]
        await pool.fail_over()
        agreed = await pool.until_agreed()
        (run_id,) = agreed
        assert run_id == await pool.run_id(pool.second)
        assert abs(int(agreed[run_id]) - AHEAD_US) < NEAR_US
        await until_all_add(processes, int(agreed[run_id]))
        after = [one.clock.now_ns() - time.monotonic_ns() for one in processes]
    for was, now in zip(before, after, strict=True):
        assert abs(now - was) < NEAR_US * 1_000


# a clock that jumps


def lives_by_ns(processes: list[Process]) -> list[int]:
    """The common time of each, beside this machine's clock that nobody sets."""
    return [one.clock.now_ns() - time.monotonic_ns() for one in processes]


def assert_same(before: list[int], after: list[int]) -> None:
    for was, now in zip(before, after, strict=True):
        assert abs(now - was) < NEAR_US * 1_000


async def all_follow(exits: AsyncExitStack, processes: list[Process]) -> None:
    for one in processes:
        await one.sync.synchronise()
        await exits.enter_async_context(one.following())

    async def others_are_known() -> bool:
        return all(one.sync._others_claim for one in processes)

    if len({one.sync._host for one in processes}) > 1:
        await until(others_are_known)


@pytest.mark.parametrize("hosts", ["aaa", "abc"])
@pytest.mark.parametrize("jump_us", [2_000_000, -30_000_000, 120_000])
async def test_a_jump_of_the_servers_clock_changes_nobodys_time(pool: Pool, jump_us: int, hosts: str) -> None:
    """An administrator sets it right: who runs and who starts later have one time, the one of before."""
    await pool.is_new()
    processes = [await pool.process(error, host) for error, host in zip(WRONG, hosts, strict=True)]
    async with AsyncExitStack() as exits:
        await all_follow(exits, processes)
        before = lives_by_ns(processes)
        await pool.jump(jump_us)

        async def agreed() -> bool:
            return (await pool.agreed(pool.first))[await pool.run_id(pool.first)] != "0"

        await until(agreed)
        shift_us = int((await pool.agreed(pool.first))[await pool.run_id(pool.first)])
        assert abs(shift_us + jump_us) < NEAR_US
        await until_all_add(processes, shift_us)
        newcomer = await pool.process((77.0, 50.0), "d")
        await newcomer.sync.synchronise()
        assert_same(before, lives_by_ns(processes))
        assert_same(before[:1], lives_by_ns([newcomer]))


@pytest.mark.parametrize("host", ["a", "b"])
async def test_who_starts_between_a_jump_and_its_discovery_has_the_time_of_the_others(pool: Pool, host: str) -> None:
    """It sees that they live by another time than TIME tells, and waits until they say so."""
    await pool.is_new()
    old = await pool.process(WRONG[1])
    await old.sync.synchronise()
    await old.sync._measure()
    before = lives_by_ns([old])
    await pool.jump(2_000_000)
    await old.sync._measure()  # once is chance
    newcomer = await pool.process((77.0, 50.0), host)
    starting = asyncio.create_task(newcomer.sync.synchronise())
    async with old.following(), asyncio.timeout(BOUND_S):
        await starting
    assert_same(before, lives_by_ns([newcomer]))


async def test_a_host_that_stood_still_does_not_change_the_time_of_the_others(pool: Pool) -> None:
    """Its own clock is behind, and the others see no jump: it slews, and says so."""
    await pool.is_new()
    stood_still, *others = [await pool.process(error, host) for error, host in zip(WRONG, "abc", strict=True)]
    async with AsyncExitStack() as exits:
        await all_follow(exits, [stood_still, *others])
        before = lives_by_ns(others)
        with capture_logs() as lines:
            stood_still.clock.local._offset_ns -= 2_000_000_000

            async def said() -> bool:
                return "clock.disagrees" in [line["event"] for line in lines]

            await until(said)
        assert_same(before, lives_by_ns(others))
        assert {one.sync.shift_us for one in [stood_still, *others]} == {0}
        assert abs(stood_still.clock.error_ns - 2_000_000_000) < NEAR_US * 1_000


async def test_a_slow_way_to_the_server_is_no_jump(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late its answers come: what the way may explain is not taken for the clock."""
    await pool.is_new()
    one = await pool.process()
    await one.sync.synchronise()
    read = TimeSync._read

    async def slowly(sync: TimeSync) -> time_sync._Reading:
        reading = await read(sync)
        return reading._replace(received_ns=reading.received_ns + 400_000_000)

    for way in (slowly, read):
        monkeypatch.setattr(TimeSync, "_read", way)
        for _ in range(10):
            await one.sync._measure()
    assert one.sync.shift_us == 0
    assert abs(one.off_by_us()) < NEAR_US


async def test_a_server_that_lost_what_was_agreed_is_told_again(pool: Pool) -> None:
    """It is the same server, so nobody would look: whoever starts would take TIME as it is."""
    await pool.agree_on(pool.first, AHEAD_US)
    one = await pool.process()
    await one.sync.synchronise()
    async with one.following():
        await (await pool._on(pool.first)).command("FLUSHALL")
        newcomer = await pool.process((77.0, 50.0), "b")
        await newcomer.sync.synchronise()
    assert newcomer.sync.shift_us == AHEAD_US


async def test_a_server_with_the_same_time_needs_no_shift(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks that differ by next to nothing are the same clock; what there is between them is slewed."""
    monkeypatch.setattr(time_sync, "_SAME_TIME_US", NEAR_US)  # 5 ms may be measured wrong on a busy machine
    await pool.is_new()
    one = await pool.process()
    await one.sync.synchronise()
    async with one.following():
        await pool.fail_over()
        assert await pool.until_agreed() == {await pool.run_id(pool.second): "0"}
    assert abs(one.off_by_us()) < NEAR_US


async def test_what_the_first_said_stands(pool: Pool) -> None:
    """Whoever comes later to the new server takes over what stands there, also where it would say another number."""
    await pool.agree_on(pool.first, AHEAD_US)
    late = await pool.process()
    await late.sync.synchronise()
    await pool.fail_over()
    await pool.agree_on(pool.second, AHEAD_US + 2 * NEAR_US)
    with capture_logs() as lines:
        async with late.following():
            await until_all_add([late], AHEAD_US + 2 * NEAR_US)
    assert "clock.disagrees" in [line["event"] for line in lines]
    assert abs(late.off_by_us() - AHEAD_US) < NEAR_US  # it slews there and does not jump


@pytest.mark.parametrize("data_lost", [False, True])
async def test_a_newcomer_waits_for_those_who_know_the_time(pool: Pool, data_lost: bool) -> None:
    """A process that starts just after a failover has no time to keep: it takes over that of the others.

    Also where the next server knows nothing: that it is empty does not mean that the pool is new.
    """
    await pool.agree_on(pool.first, AHEAD_US)
    old = await pool.process()
    await old.sync.synchronise()
    await pool.fail_over(data_lost=data_lost)
    newcomer = await pool.process((99.0, 0.0))
    starting = asyncio.create_task(newcomer.sync.synchronise())

    async def asked_in_vain() -> bool:
        return await pool.asked_in_vain(pool.second) >= 3

    await until(asked_in_vain)
    assert not starting.done()
    assert await pool.run_id(pool.second) not in await pool.agreed(pool.second)
    async with old.following(), asyncio.timeout(BOUND_S):
        await starting
    assert newcomer.sync.shift_us == old.sync.shift_us
    assert abs(newcomer.off_by_us() - AHEAD_US) < NEAR_US


@pytest.mark.parametrize("data_lost", [False, True])
async def test_a_newcomer_to_a_pool_in_which_nobody_is_left_takes_the_servers_time(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, data_lost: bool
) -> None:
    """All processes and the server were new at once: there is no time to keep, and nobody is waited for for long."""
    monkeypatch.setattr(time_sync, "_OTHERS_WITHIN_S", 0.1)
    await pool.agree_on(pool.first, AHEAD_US)
    await pool.fail_over(data_lost=data_lost)
    newcomer = await pool.process()
    async with asyncio.timeout(BOUND_S):
        await newcomer.sync.synchronise()
    assert await pool.agreed(pool.second) == {await pool.run_id(pool.second): "0"}
    assert abs(newcomer.off_by_us()) < NEAR_US


async def test_a_server_that_starts_anew_and_empty_changes_nobodys_time(pool: Pool) -> None:
    """Its run id is another one, and what was agreed is gone: those who know the time say so again."""
    await pool.agree_on(pool.first, AHEAD_US)
    one = await pool.process()
    await one.sync.synchronise()
    before = await pool.run_id(pool.first)
    async with one.following():
        pool.first.stop()
        pool.first.start()
        run_id = await pool.run_id(pool.first)
        assert run_id != before

        async def said_again() -> bool:
            return run_id in await pool.agreed(pool.first)

        await until(said_again)
        agreed_us = int((await pool.agreed(pool.first))[run_id])
        assert abs(agreed_us - AHEAD_US) < NEAR_US
        await until_all_add([one], agreed_us)
    assert abs(one.off_by_us() - AHEAD_US) < NEAR_US


async def test_while_redis_is_away_the_clock_goes_on_and_one_line_says_so(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No measurement is no reason to stop, nor to fill the log."""
    await pool.is_new()
    one = await pool.process()
    await one.sync.synchronise()
    failures = 0
    script = one.store.script

    async def counted(*arguments: Any) -> Any:
        nonlocal failures
        try:
            return await script(*arguments)
        except StoreError:
            failures += 1
            raise

    async def failed_often() -> bool:
        return failures >= 5

    monkeypatch.setattr(one.store, "script", counted)
    with capture_logs() as lines:
        async with one.following():
            pool.first.stop()
            await until(failed_often)
            assert abs(one.off_by_us()) < NEAR_US
    assert len([line for line in lines if line["event"] == "clock.sync_failed"]) == 1
