"""A whole pool for end-to-end tests: Redis, the local Discord, coordinator and supervisors, each a real process."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import msgspec

from shared.cli.pool import LocalPool
from shared.cli.redis_server import RedisServer
from shared.schema import event as events
from shared.schema.event import Event
from shared.schema.frame_entry import FIELD, FrameEntry, unpack
from shared.schema.records import BroadcastStatus, GuildStatus, WorkerStats
from shared.store.client import Store
from shared.store.keys import Keys
from shared.store.time_sync import begin_time
from tests.emulator.client import EmulatorClient
from tests.emulator.payloads import SILENCE_ID
from tests.emulator.records import ChannelKind, GuildPackets, GuildReport, SessionReport

PATIENCE_S = 15.0
"""For whatever must happen soon; a bound, never a measure."""
_POLL_S = 0.05
_FIGURES_WITHIN_S = 2.0
_TAIL_LINES = 40
_FIRST_GUILD = 300_000_000_000_000_000
_FIRST_CHANNEL = 400_000_000_000_000_000
_FAULTS = (
    *("lost", "duplicated", "out_of_order", "nonce_reused", "decrypt_failed"),
    *("wrong_header", "wrong_timestamp", "rtp_before_speaking"),
)

_T = TypeVar("_T")


async def until(
    condition: Callable[[], Awaitable[_T]], what: str, within_s: float = PATIENCE_S, every_s: float = _POLL_S
) -> _T:
    """Ask until the answer is truthy, and give it."""
    try:
        async with asyncio.timeout(within_s):
            while not (found := await condition()):  # noqa: ASYNC110 - other processes set no event of ours
                await asyncio.sleep(every_s)
            return found
    except TimeoutError:
        raise AssertionError(f"not within {within_s:g} s: {what}") from None


def python_module(module: str, *arguments: str) -> list[str]:
    """Command line of a process of ours."""
    return [sys.executable, "-m", module, *arguments]


def process_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Environment with these settings and no others of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GUILDCAST_")}
    return kept | dict(settings)


class Finished(NamedTuple):
    """A process that has ended."""

    status: int
    out: str
    err: str


async def run_to_end(command: Sequence[str], environment: Mapping[str, str], within_s: float = PATIENCE_S) -> Finished:
    """Run a process; one that does not end is killed, and the test fails."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=dict(environment),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(within_s):
            out, err = await process.communicate()
    except TimeoutError:
        raise AssertionError(f"{command} did not end within {within_s:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Finished(process.returncode, out.decode(), err.decode())


class Process(NamedTuple):
    """A process of the system."""

    pid: int
    parent: int
    argv: tuple[str, ...]

    @property
    def module(self) -> str:
        """What `python -m` runs, empty for anything else."""
        return self.argv[self.argv.index("-m") + 1] if "-m" in self.argv[:-1] else ""

    @property
    def worker_id(self) -> str:
        return self.argv[self.argv.index("--id") + 1] if "--id" in self.argv[:-1] else ""

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return _process(self.pid) == self


def _process(pid: int) -> Process | None:
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        argv = tuple(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1])
    except OSError:
        return None
    return None if state == "Z" else Process(pid, int(parent), argv)


def processes() -> list[Process]:
    """All that run now."""
    found = [_process(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [one for one in found if one is not None]


def descendants(pid: int) -> list[Process]:
    """Children, their children and so on."""
    everything = processes()
    parents, family = {pid}, []
    while children := [one for one in everything if one.parent in parents]:
        family += children
        parents = {one.pid for one in children}
    return family


async def gone(some: Iterable[Process], within_s: float = PATIENCE_S) -> None:
    """Wait until none of these processes runs."""
    names = [one.module or one.argv for one in some]
    some = list(some)

    async def all_ended() -> bool:
        # A child handed to init by the death of its parent has another parent, but is the same process.
        now = {one.pid: one.argv for one in processes()}
        return not any(now.get(one.pid) == one.argv for one in some)

    await until(all_ended, f"the end of {names}", within_s)


class Job(NamedTuple):
    """What became of a job."""

    id: str
    state: str
    code: str
    message: str


class Stack:
    """One pool, in a namespace on a Redis server of its own.

    Args:
        folder: for media and logs.
        supervisors: for each its settings; without, one with two fan-out workers and one encode worker.
        coordinator: settings of the coordinator alone.
        settings: settings of all.
        emulator: more command line of the local Discord.
    """

    def __init__(
        self,
        folder: Path,
        *,
        supervisors: Mapping[str, Mapping[str, str]] | None = None,
        coordinator: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
        emulator: Sequence[str] = (),
    ) -> None:
        self.media = folder / "media"
        self.logs = folder / "logs"
        self.media.mkdir()
        self.keys = Keys("e2e")
        self.redis = RedisServer()
        self.pool: LocalPool
        self.store: Store
        self.frames: Store
        self.discord: EmulatorClient
        self.ca_file: Path
        self._supervisors = {name: dict(more) for name, more in (supervisors or {"supervisor": {}}).items()}
        self._coordinator = dict(coordinator or {})
        self._emulator = emulator
        self._settings = {
            "GUILDCAST_NAMESPACE": self.keys.word,
            "GUILDCAST_FANOUT_WORKERS": "2",
            "GUILDCAST_ENCODE_WORKERS": "1",
            "GUILDCAST_WORKER_CAPACITY": "64",
            "GUILDCAST_LOG_FORMAT": "json",
            "GUILDCAST_MEDIA_DIR": str(self.media),
            "PYTHONASYNCIODEBUG": "",  # `make test` sets it; what is measured is the product as it runs
        } | dict(settings or {})
        self._numbers = itertools.count(1)
        self._skipped_before = 0
        """By the time the pool was last empty."""
        self._exits = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as exits:
            exits.enter_context(self.redis)
            self.pool = LocalPool(self._settings | {"GUILDCAST_REDIS_URL": self.redis.url}, self.logs)
            exits.push_async_callback(self.pool.stop_all)
            self.store, self.frames = Store(self.redis.url), Store(self.redis.url, raw=True)
            exits.push_async_callback(self.store.close)
            exits.push_async_callback(self.frames.close)
            await begin_time(self.store, self.keys)
            ready = msgspec.json.decode(
                await self.pool.start("emulator", "tests.emulator", "--sample", "128", *self._emulator, ready_line=True)
            )
            self.ca_file = Path(ready["ca_file"])
            for more in self._supervisors.values():
                more["GUILDCAST_TLS_CA_FILE"] = str(self.ca_file)
            self.discord = await exits.enter_async_context(EmulatorClient(ready["control"]))
            await self.whole()
            self._exits = exits.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exits.__aexit__(kind, error, trace)

    # processes

    async def whole(self) -> None:
        """Start what does not run, and wait until all workers are there and somebody leads."""
        await self.start_coordinator()
        for name, more in self._supervisors.items():
            if not self._running(name):
                await self.pool.start(name, "worker", more=more)
        wanted = sum(
            int((self._settings | more)[f"GUILDCAST_{role}_WORKERS"])
            for more in self._supervisors.values()
            for role in ("FANOUT", "ENCODE")
        )

        async def complete() -> bool:
            leads = await self.store.command("EXISTS", self.keys.leader)
            return bool(leads) and len(await self.leased_workers()) == wanted

        await until(complete, f"{wanted} workers and a leader", 30)

    async def start_coordinator(self) -> None:
        if not self._running("coordinator"):
            await self.pool.start("coordinator", "coordinator", more=self._coordinator)

    def _running(self, name: str) -> bool:
        process = self.pool.processes.get(name)
        return process is not None and process.returncode is None

    async def leased_workers(self) -> list[str]:
        """Ids of the workers that hold a lease; one that left or died holds none."""
        ids = sorted(await self.store.command("SMEMBERS", self.keys.workers))
        leased = await self.store.pipeline([("EXISTS", self.keys.lease(one)) for one in ids])
        return [one for one, held in zip(ids, leased, strict=True) if held]

    def children(self, module: str, *, supervisor: str | None = None) -> list[Process]:
        """Processes below one supervisor, or all, that run a module: `worker.fanout`, `worker.fanout.sender` .."""
        names = [supervisor] if supervisor else list(self._supervisors)
        pids = [self.pool.processes[name].pid for name in names if self._running(name)]
        return [one for pid in pids for one in descendants(pid) if one.module == module]

    def worker(self, worker_id: str) -> Process:
        """The process of a fan-out or encode worker."""
        return next(
            one
            for name in self._supervisors
            for one in descendants(self.pool.processes[name].pid)
            if one.worker_id == worker_id and one.module in ("worker.fanout", "worker.encode")
        )

    async def stop_within(self, name: str, within_s: float) -> int:
        """SIGTERM a process this stack started; its exit status, if it has one in time."""
        process = self.pool.processes[name]
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(within_s):
                status = await process.wait()
        except TimeoutError:
            raise AssertionError(f"{name} did not end within {within_s:g} s of SIGTERM") from None
        del self.pool.processes[name]
        return status

    async def kill(self, name: str) -> None:
        """SIGKILL a process this stack started."""
        process = self.pool.processes.pop(name)
        process.kill()
        await process.wait()

    @asynccontextmanager
    async def redis_stopped(self) -> AsyncIterator[None]:
        """Redis answers nothing inside this block, and has forgotten nothing after it."""
        os.kill(self.redis.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.redis.pid, signal.SIGCONT)

    def tail(self) -> str:
        """The ends of all logs."""
        parts = []
        for log in sorted(self.logs.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            parts += [f"--- {log.name}", *lines]
        return "\n".join(parts)

    def logged(self, event: str, **fields: object) -> int:
        """How often the processes logged an event with these values."""
        lines = [line for log in self.logs.glob("*.log") for line in log.read_text(errors="replace").splitlines()]
        records = [msgspec.json.decode(line) for line in lines if line.startswith("{")]
        return sum({"event": event, **fields}.items() <= record.items() for record in records)

    # jobs and events

    def new_id(self, word: str = "job") -> str:
        return f"{word}-{next(self._numbers)}"

    async def send(self, body: Mapping[str, Any] | str) -> str:
        """Put a job on the stream as it is; the entry's id."""
        text = body if isinstance(body, str) else msgspec.json.encode(body).decode()
        return str(await self.store.command("XADD", self.keys.jobs, "*", "job", text))

    async def outcome(self, job_id: str) -> Job:
        """Wait for what becomes of a job."""

        async def settled() -> dict[str, str]:
            fields: dict[str, str] = await self.store.command("HGETALL", self.keys.job(job_id))
            return fields if fields.get("state") in ("done", "failed") else {}

        fields = await until(settled, f"an outcome of job {job_id}")
        return Job(job_id, fields["state"], fields.get("code", ""), fields.get("message", ""))

    async def submit(self, kind: str, **fields: Any) -> Job:
        """Send a job of the usual form and wait for its outcome."""
        body = {"v": 1, "id": self.new_id(), "type": kind} | fields
        await self.send(body)
        return await self.outcome(str(body["id"]))

    async def do(self, kind: str, **fields: Any) -> str:
        """A job that must be done; its id."""
        job = await self.submit(kind, **fields)
        assert job.state == "done", job
        return job.id

    async def events(self, kind: str = "", **fields: Any) -> list[Event]:
        """Events so far of a type, with these values."""
        found = await self.store.command("XRANGE", self.keys.events, "-", "+")
        told = [events.decode(entry[events.FIELD]) for _, entry in found]
        return [
            one
            for one in told
            if kind in ("", one.type) and all(getattr(one, name) == value for name, value in fields.items())
        ]

    async def wait_event(self, kind: str, within_s: float = PATIENCE_S, **fields: Any) -> Event:
        """The first such event, once it is there."""

        async def told() -> list[Event]:
            return await self.events(kind, **fields)

        return (await until(told, f"event {kind} {fields}", within_s))[0]

    # broadcasts and guilds

    async def start(self, source: str | Path, *, broadcast: str = "", **more: Any) -> str:
        """Start a broadcast of a file or URL; its id."""
        broadcast = broadcast or self.new_id("radio")
        url = source.as_uri() if isinstance(source, Path) else source
        await self.do("broadcast.start", broadcast=broadcast, source={"url": url} | more)
        return broadcast

    def new_guilds(self, count: int) -> list[tuple[str, str]]:
        """Guilds and channels that no other test has used."""
        numbers = [next(self._numbers) for _ in range(count)]
        return [(str(_FIRST_GUILD + number), str(_FIRST_CHANNEL + number)) for number in numbers]

    async def voice(
        self, guild: str, channel: str, *, kind: ChannelKind | None = "voice", members: int | None = 1
    ) -> dict[str, str]:
        """Fresh voice credentials as a job takes them; a channel that is new has members who listen and decrypt.

        With `kind` None the channel is known already.
        """
        issued = (await self.discord.issue([(guild, channel)], kind=kind, members=members))[0]
        told: dict[str, str] = msgspec.to_builtins(issued)
        return {name: told[name] for name in ("user_id", "session_id", "token", "endpoint")}

    async def join(
        self, count: int, broadcast: str, *, state: str = "playing", kind: ChannelKind = "voice", members: int = 1
    ) -> list[str]:
        """Join fresh guilds and wait until all are in a state: `playing`, or `idle` before the broadcast starts."""
        guilds = self.new_guilds(count)
        await self.join_these(guilds, broadcast, kind=kind, members=members)
        names = [guild for guild, _ in guilds]
        await self.wait_state(names, state)
        return names

    async def join_these(
        self,
        guilds: Sequence[tuple[str, str]],
        broadcast: str,
        *,
        kind: ChannelKind | None = "voice",
        members: int | None = None,
    ) -> None:
        jobs = []
        for guild, channel in guilds:
            jobs.append({"v": 1, "id": self.new_id(), "type": "guild.join", "guild": guild, "channel": channel})
            jobs[-1] |= {"broadcast": broadcast, "voice": await self.voice(guild, channel, kind=kind, members=members)}
        for job in jobs:
            await self.send(job)
        for job in jobs:
            assert (await self.outcome(str(job["id"]))).state == "done"

    async def guild(self, guild: str) -> tuple[str, GuildStatus | None]:
        """The worker that holds a guild, and the guild's status."""
        fields: dict[str, str] = await self.store.command("HGETALL", self.keys.guild("main", guild))
        status = fields.get("status")
        return fields.get("worker", ""), msgspec.json.decode(status, type=GuildStatus) if status else None

    async def wait_state(self, guilds: Iterable[str], state: str, within_s: float = PATIENCE_S) -> list[GuildStatus]:
        """Wait until every guild's status says so, told by the worker that holds it."""

        async def reached(guild: str) -> GuildStatus | None:
            worker, status = await self.guild(guild)
            told_by_holder = status is not None and (not worker or status.worker == worker)
            return status if status is not None and status.state == state and told_by_holder else None

        found = [await until(partial(reached, guild), f"guild {guild} {state}", within_s) for guild in guilds]
        return [status for status in found if status is not None]

    async def by_worker(self, guilds: Iterable[str]) -> dict[str, list[str]]:
        """Guilds by the worker that holds them."""
        held: dict[str, list[str]] = {}
        for guild in guilds:
            held.setdefault((await self.guild(guild))[0], []).append(guild)
        return held

    async def run_of(self, broadcast: str) -> int:
        return int(await self.store.command("HGET", self.keys.broadcast(broadcast), "run"))

    async def broadcast(self, broadcast: str) -> BroadcastStatus:
        """Its status; it has one from its start to its end."""
        return msgspec.json.decode(
            await self.store.command("HGET", self.keys.broadcast(broadcast), "status"), type=BroadcastStatus
        )

    async def published(self, run: int) -> list[FrameEntry]:
        """All entries of a run's frame stream."""
        found = await self.frames.command("XRANGE", self.keys.frames(run), "-", "+")
        return [unpack(entry_id.decode(), fields[FIELD.encode()]) for entry_id, fields in found]

    async def wait_lead(self, run: int, lead_s: float) -> None:
        """Wait until frames are published that far ahead of the listeners."""

        async def far_ahead() -> bool:
            last = await self.frames.command("XREVRANGE", self.keys.frames(run), "+", "-", "COUNT", 1)
            seconds, microseconds = await self.store.command("TIME")
            if not last:
                return False
            entry = unpack(last[0][0].decode(), last[0][1][FIELD.encode()])
            end_us = entry.epoch_us + entry.next_index * 20_000
            return end_us - (int(seconds) * 1_000_000 + int(microseconds)) >= lead_s * 1e6

        await until(far_ahead, f"{lead_s} s ahead")

    async def clear(self) -> None:
        """Stop all broadcasts and leave all guilds, as a user would."""
        for broadcast in await self.store.command("SMEMBERS", self.keys.broadcasts):
            await self.submit("broadcast.stop", broadcast=broadcast, leave=True)
        for member in await self.store.command("SMEMBERS", self.keys.guilds):
            await self.submit("guild.leave", guild=member.split(":")[1])

        async def nothing_left() -> bool:
            left = await self.store.pipeline([("SCARD", self.keys.guilds), ("SCARD", self.keys.broadcasts)])
            return not any(int(count) for count in left)

        await until(nothing_left, "an empty pool")
        self._skipped_before = await self._skipped()

    # what listeners got

    async def heard(self, guilds: Iterable[str]) -> dict[str, GuildReport]:
        """What the local Discord measured in each guild."""
        report = await self.discord.report(guilds=True)
        wanted = set(guilds)
        return {row.guild: row for row in report.guild_rows or () if row.guild in wanted}

    async def sessions(self, guild: str) -> list[SessionReport]:
        return (await self.heard([guild]))[guild].sessions

    async def hear_more(
        self, guilds: Iterable[str], packets: int, within_s: float = PATIENCE_S, every_s: float = _POLL_S
    ) -> None:
        """Wait until the newest session of each guild got so many more packets of sound."""
        guilds = list(guilds)

        async def counts() -> dict[str, tuple[int, int]]:
            rows = await self.heard(guilds)
            newest = {guild: rows[guild].sessions[-1] for guild in guilds if rows[guild].sessions}
            return {guild: (one.ssrc, one.audio_packets) for guild, one in newest.items()}

        before = await counts()

        async def enough() -> bool:
            now = await counts()
            for guild in guilds:
                ssrc, count = now.get(guild, (0, 0))
                ssrc_before, count_before = before.get(guild, (0, 0))
                if count - (count_before if ssrc == ssrc_before else 0) < packets:
                    return False
            return True

        await until(enough, f"{packets} more packets in {len(guilds)} guilds", within_s, every_s)

    async def packets(self, guild: str) -> GuildPackets:
        return await self.discord.packets(guild)

    async def longest_silence_s(self, guild: str) -> float:
        """The longest time without a frame of sound that somebody could decrypt, from the first one on."""
        heard = await self.packets(guild)
        arrivals = sorted(
            at
            for session in heard.sessions
            for at, payload in zip(session.arrival_ns, session.payload, strict=True)
            if payload > SILENCE_ID
        )
        return max((after - before for before, after in pairwise(arrivals)), default=0) / 1e9

    async def faults(self, session: SessionReport) -> dict[str, int]:
        """What was wrong with the packets of a session, empty when nothing was.

        Ticks that the pool itself counted as skipped since it was last empty are the machine's fault: it stood still
        for three frames or more.
        A loss that no worker owns up to is ours.
        """
        found = {name: getattr(session, name) for name in _FAULTS if getattr(session, name)}
        lost = found.get("lost", 0)
        if not lost:
            return found
        deadline_s = time.monotonic() + _FIGURES_WITHIN_S
        while await self._skipped() - self._skipped_before < lost:
            if time.monotonic() > deadline_s:
                return found
            await asyncio.sleep(_POLL_S)  # figures come with the lease
        return {name: count for name, count in found.items() if name != "lost"}

    async def _skipped(self) -> int:
        """Ticks that workers said they skipped."""
        return sum(one.ticks_skipped for one in await self.worker_stats())

    async def worker_stats(self) -> list[WorkerStats]:
        """Figures of all workers, as of their last leases."""
        ids = await self.store.command("SMEMBERS", self.keys.workers)
        told = await self.store.pipeline([("HGET", self.keys.worker(one), "stats") for one in ids])
        return [msgspec.json.decode(stats, type=WorkerStats) for stats in told if stats]


def ended_cleanly(session: SessionReport) -> bool:
    """Five frames of silence, speaking off, and a clean close by us."""
    return (
        session.trailing_silence == 5
        and session.speaking[-1][1] == 0
        and session.close_code == 1000
        and session.close_by == "client"
        and session.close_clean is True
    )
