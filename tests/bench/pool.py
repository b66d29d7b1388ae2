"""A pool and the local Discord as separate processes, for benchmarks: driven through Redis, as its users drive it."""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from shared.cli.pool import LocalPool
from shared.cli.redis_server import RedisServer
from shared.process import cpu_ns
from shared.schema.records import GuildStatus, WorkerStats
from shared.store.client import Store, reach
from shared.store.keys import Keys
from shared.store.time_sync import begin_time
from tests.emulator.client import EmulatorClient
from tests.emulator.records import ChannelKind, Voice
from tests.media.make_programme import PROGRAMME

_PLAYING_WITHIN_S = 180.0
_WORKERS_WITHIN_S = 30.0
_POLL_S = 0.25


class FanoutProcesses(NamedTuple):
    """Process ids of one fan-out worker."""

    worker_pid: int
    sender_pid: int

    def cpu_ns(self) -> tuple[int, int]:
        """CPU time of worker and sender so far."""
        return cpu_ns(self.worker_pid), cpu_ns(self.sender_pid)


class BenchPool:
    """`async with BenchPool(...) as pool`: Redis, local Discord, coordinator and supervisors with their workers.

    Args:
        capacity: guilds a fan-out worker may take.
        fanout_workers: on the one host.
        endpoint_guilds: guilds that share a voice address.
        sample: guilds whose packets the local Discord decrypts and keeps.
        listen_every: of so many voice addresses one is listened to.
        settings: more `GUILDCAST_*`.
        supervisors: for each its own settings; without, there is one.
        coordinator: settings of the coordinator alone.
    """

    def __init__(
        self,
        capacity: int,
        *,
        fanout_workers: int = 1,
        endpoint_guilds: int = 8,
        sample: int = 32,
        listen_every: int = 1,
        settings: dict[str, str] | None = None,
        supervisors: dict[str, dict[str, str]] | None = None,
        coordinator: dict[str, str] | None = None,
    ) -> None:
        self._supervisors = supervisors or {"supervisor": {}}
        self._coordinator = coordinator
        self._settings = {
            "GUILDCAST_FANOUT_WORKERS": str(fanout_workers),
            "GUILDCAST_WORKER_CAPACITY": str(capacity),
            "GUILDCAST_MEDIA_DIR": str(PROGRAMME.parent),
            "GUILDCAST_UDP_ADDRESS": "127.0.0.1",
            "GUILDCAST_LOG_LEVEL": "warning",
        } | (settings or {})
        self._emulator_arguments = (
            *("--sample", str(sample), "--endpoint-guilds", str(endpoint_guilds)),
            *("--listen-every", str(listen_every)),
        )
        self._job_numbers = itertools.count()
        self.keys = Keys("bench")
        self.redis: RedisServer
        self.store: Store
        self.discord: EmulatorClient
        self.processes: LocalPool
        self.ca_file: Path

    async def __aenter__(self) -> Self:
        self._logs = tempfile.TemporaryDirectory()
        self.redis = RedisServer()
        self.redis.__enter__()
        self.store = Store(self.redis.url)
        self.processes = LocalPool(
            {"GUILDCAST_REDIS_URL": self.redis.url, "GUILDCAST_NAMESPACE": self.keys.word} | self._settings,
            Path(self._logs.name),
        )
        try:
            await reach(self.store)
            await begin_time(self.store, self.keys)
            line = await self.processes.start("emulator", "tests.emulator", *self._emulator_arguments, ready_line=True)
            ready = json.loads(line)
            self.ca_file = Path(ready["ca_file"])
            self.discord = EmulatorClient(ready["control"])
            await self.discord.__aenter__()
            await self.processes.start("coordinator", "coordinator", more=self._coordinator)
            for name, more in self._supervisors.items():
                await self.processes.start(name, "worker", more={"GUILDCAST_TLS_CA_FILE": ready["ca_file"]} | more)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        if hasattr(self, "discord"):
            await self.discord.__aexit__(None, None, None)
        await self.processes.stop_all()
        await self.store.close()
        self.redis.__exit__(None, None, None)
        self._logs.cleanup()

    # jobs

    async def jobs(self, jobs: Sequence[dict[str, object]]) -> None:
        """Send jobs; each gets version and id."""
        await self.store.pipeline(
            [
                ("XADD", self.keys.jobs, "*", "job", json.dumps({"v": 1, "id": str(next(self._job_numbers))} | job))
                for job in jobs
            ]
        )

    async def broadcast(self, name: str = "bench", source: dict[str, object] | None = None) -> None:
        """Start a broadcast: the test programme in a loop, or another source."""
        source = source or {"url": PROGRAMME.name, "loop": True}
        await self.jobs([{"type": "broadcast.start", "broadcast": name, "source": source}])

    async def voices(
        self, guilds: int, kind: ChannelKind = "voice", *, ghosts: int = 1, members: int = 0, first: int = 0
    ) -> list[Voice]:
        """Voice credentials of so many guilds; each has ghosts to listen: key packages with nobody behind them.

        Members have somebody behind them: they can speak, and in sampled guilds they decrypt.
        """
        names = [(str(3 * 10**17 + n), str(4 * 10**17 + n)) for n in range(first, first + guilds)]
        return await self.discord.issue(names, kind=kind, ghosts=ghosts, members=members)

    async def join(self, voices: Sequence[Voice], *broadcasts: str) -> None:
        """Have guilds joined and tuned to these broadcasts in turns; without one, to that of `broadcast`."""
        await self.jobs(
            [
                {
                    "type": "guild.join",
                    "guild": voice.guild,
                    "channel": voice.channel,
                    "broadcast": broadcast,
                    "voice": {name: getattr(voice, name) for name in ("user_id", "session_id", "token", "endpoint")},
                }
                for voice, broadcast in zip(voices, itertools.cycle(broadcasts or ["bench"]), strict=False)
            ]
        )

    async def play(self, guilds: int, kind: ChannelKind = "voice") -> list[Voice]:
        """A broadcast, guilds tuned to it, and all of them heard."""
        await self.broadcast()
        voices = await self.voices(guilds, kind)
        await self.join(voices)
        await self.until_heard(guilds)
        return voices

    async def until_workers(self, number: int) -> None:
        """Wait until so many fan-out workers are there: who comes first is given everything. Raises: TimeoutError."""
        async with asyncio.timeout(_WORKERS_WITHIN_S):
            while len(await self.stats()) < number:  # noqa: ASYNC110 - figures on Redis wake nobody
                await asyncio.sleep(_POLL_S)

    async def until_heard(self, guilds: int) -> None:
        """Wait until packets of so many guilds came, and until the workers' own figures say so.

        Raises: TimeoutError with the end of the workers' log.
        """
        deadline_s = time.monotonic() + _PLAYING_WITHIN_S
        while (await self.discord.report()).heard < guilds or sum(one.guilds for one in await self.stats()) < guilds:
            if time.monotonic() > deadline_s:
                raise TimeoutError(self.log_end())
            await asyncio.sleep(_POLL_S)

    async def until_playing(self, guilds: int) -> None:
        """Wait until so many guilds that were heard before play again. Raises: TimeoutError."""
        async with asyncio.timeout(_PLAYING_WITHIN_S):
            await self.discord.reset()
            while (await self.discord.report()).heard < guilds:  # noqa: ASYNC110 - a report wakes nobody
                await asyncio.sleep(_POLL_S)

    def log_end(self) -> str:
        """What the supervisors and their workers logged last."""
        return "".join(self.processes.log_of(name).read_text()[-2_000:] for name in self._supervisors)

    # figures

    async def stats(self) -> list[WorkerStats]:
        """What each fan-out worker told last; renewed twice a second."""
        return [stats for _, stats in await self._fanout_workers()]

    async def held(self, voices: Sequence[Voice]) -> list[GuildStatus]:
        """What the worker that holds each guild told of it last."""
        commands = [("HGET", self.keys.guild("main", voice.guild), "status") for voice in voices]
        return [msgspec.json.decode(told, type=GuildStatus) for told in await self.store.pipeline(commands)]

    async def _fanout_workers(self) -> list[tuple[str, WorkerStats]]:
        found = []
        for worker in sorted(await self.store.command("SMEMBERS", self.keys.workers)):
            fields = await self.store.command("HGETALL", self.keys.worker(worker))
            if fields.get("role") == "fanout" and "stats" in fields:
                found.append((worker, msgspec.json.decode(fields["stats"], type=WorkerStats)))
        return found

    def fanout(self) -> list[FanoutProcesses]:
        """The fan-out workers' processes, the oldest of each supervisor first."""
        workers = self.below_supervisors("worker.fanout")
        return [FanoutProcesses(worker, descendants(worker, "worker.fanout.sender")[0]) for worker in workers]

    def below_supervisors(self, module: str) -> list[int]:
        """Process ids of all workers, senders or children that run a module."""
        supervisors = [self.processes.processes[name].pid for name in self._supervisors]
        return [pid for supervisor in supervisors for pid in descendants(supervisor, module)]


def descendants(pid: int, module: str) -> list[int]:
    """Process ids below `pid` that run `python -m module`, the oldest first."""
    found = []
    try:
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if module.encode() in command:
                found.append(child)
            found += descendants(child, module)
    except (FileNotFoundError, ProcessLookupError):
        pass  # it ended while it was looked at
    return found
