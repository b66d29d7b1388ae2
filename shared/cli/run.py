"""`guildcast run`: the main job on this machine. One source, N guilds of the local Discord, two fan-out workers.

Starts what it needs, shows a live table, and sums up what was measured at the listeners' end. Leaves nothing running.
Listeners who hear silence make it fail, and it says why.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from shared.cli.pool import LocalPool
from shared.cli.redis_server import RedisServer
from shared.cli.silence import ALLOWED_SHARE, silence_heard
from shared.errors import ConfigError, GuildcastError, StoreUnavailable
from shared.schema import event as events
from shared.schema.records import BroadcastStatus, WorkerRecord
from shared.settings import Settings
from shared.store.client import Store, reach
from shared.store.keys import Keys
from shared.store.time_sync import begin_time

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_SOURCE = ROOT / "tests" / "media" / "programme.ogg"
LOGS = ROOT / ".run" / "logs"
BROADCAST = "demo"
FANOUT_WORKERS = 2
ENCODE_WORKERS = 1
WORKERS_UP_WITHIN_S = 20.0
GUILDS_JOINED_WITHIN_S = 120.0
SOURCE_OPEN_WITHIN_S = 30.0
"""A pool tries a station that is away for ever; somebody who waits at a terminal wants to know."""
_MOST_SAMPLED = 256
_REFRESH_S = 0.5
_FIRST_GUILD = 300_000_000_000_000_000
_FIRST_CHANNEL = 400_000_000_000_000_000


@dataclass
class _Figures:
    """What the table shows, read from Redis."""

    workers: dict[str, WorkerRecord] = field(default_factory=dict)
    packets_per_s: dict[str, float] = field(default_factory=dict)
    cpu_percent: dict[str, float] = field(default_factory=dict)
    broadcast: BroadcastStatus | None = None
    on_guilds: int = 0
    trouble: str = ""
    heard_of: bool = False
    """The broadcast has played."""
    ended: bool = False
    failed: bool = False
    """It ended otherwise than by its own end."""


class Demo:
    """One run of the main job.

    Args:
        settings: effective settings; a Redis of the user's is used when `own_redis` is false.
        source: path or http(s) URL.
        duration_s: how long to play once all guilds are joined; None: until Ctrl-C.
    """

    def __init__(
        self, settings: Settings, *, own_redis: bool, source: str, guilds: int, duration_s: float | None
    ) -> None:
        self._settings = settings
        self._own_redis = own_redis
        self._source, self._media_dir = _source_and_folder(source)
        self._guilds = guilds
        self._duration_s = duration_s
        self._console = Console()
        self._figures = _Figures()
        self._stop = asyncio.Event()
        self._events_read = "0-0"
        self._played_until_ns = 0
        self._before: dict[str, WorkerRecord] = {}
        self._guilds_per_worker: dict[str, int] = {}

    async def run(self) -> int:
        """Do it; returns the exit status: 0 when every guild was heard, and heard no silence."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        shutil.rmtree(LOGS, ignore_errors=True)
        if not self._own_redis:
            return await self._with_redis(self._settings.redis_url)
        with RedisServer() as server:
            return await self._with_redis(server.url)

    async def _with_redis(self, url: str) -> int:
        store = Store(url, ca_file=self._settings.tls_ca_file)
        # A name of our own per run: nothing of a run that was broken off gets in the way.
        keys = Keys(f"demo-{os.getpid()}")
        environment = {
            "GUILDCAST_REDIS_URL": url,
            "GUILDCAST_NAMESPACE": keys.word,
            "GUILDCAST_FANOUT_WORKERS": str(FANOUT_WORKERS),
            "GUILDCAST_ENCODE_WORKERS": str(ENCODE_WORKERS),
            "GUILDCAST_LOG_FORMAT": "json",
            "GUILDCAST_UDP_PORTS": self._settings.udp_ports,
            "GUILDCAST_UDP_SOCKETS": self._settings.udp_sockets,
        }
        if self._settings.worker_capacity is not None:
            environment["GUILDCAST_WORKER_CAPACITY"] = str(max(self._settings.worker_capacity, self._guilds))
        if self._media_dir is not None:
            environment["GUILDCAST_MEDIA_DIR"] = str(self._media_dir)
        pool = LocalPool(environment, LOGS)
        try:
            await reach(store)
            await begin_time(store, keys)
            return await self._with_pool(pool, store, keys)
        except (EOFError, GuildcastError) as error:
            self._console.print(f"[red]guildcast run: {error}[/red]", highlight=False)
            return 1
        finally:
            await pool.stop_all()
            await _forget(store, keys)
            await store.close()

    async def _with_pool(self, pool: LocalPool, store: Store, keys: Keys) -> int:
        ready = json.loads(
            await pool.start(
                "emulator", "tests.emulator", "--sample", str(min(self._guilds, _MOST_SAMPLED)), ready_line=True
            )
        )
        trust = {"GUILDCAST_TLS_CA_FILE": ready["ca_file"]}
        await pool.start("coordinator", "coordinator")
        await pool.start("supervisor", "worker", more=trust)
        async with aiohttp.ClientSession(ready["control"]) as discord:
            await self._workers_up(pool, store, keys)
            await self._submit(store, keys, discord)
            joined = await self._show_joining(store, keys)
            if joined:
                self._before = dict(self._figures.workers)
                await self._show_playing(store, keys)
            await self._look(store, keys)
            self._played_until_ns = time.time_ns()
            statuses = [await pool.stop("supervisor"), await pool.stop("coordinator")]
            async with discord.get("/report?guilds=1", timeout=aiohttp.ClientTimeout(60)) as answer:
                report = await answer.json()
        return self._sum_up(report, statuses)

    async def _workers_up(self, pool: LocalPool, store: Store, keys: Keys) -> None:
        deadline = time.monotonic() + WORKERS_UP_WITHIN_S
        while len(await store.command("SMEMBERS", keys.workers)) < FANOUT_WORKERS + ENCODE_WORKERS:
            for name, process in pool.processes.items():
                if process.returncode is not None:
                    raise EOFError(f"{name} ended: {_last_line(pool.log_of(name))}")
            if time.monotonic() > deadline:
                raise EOFError(f"the workers did not come up within {WORKERS_UP_WITHIN_S:.0f} s, see {LOGS}")
            await asyncio.sleep(0.1)

    async def _submit(self, store: Store, keys: Keys, discord: aiohttp.ClientSession) -> None:
        # Voice channels with end-to-end encryption; where packets are looked into, somebody is there who decrypts.
        wanted: list[dict[str, object]] = [
            {"guild": str(_FIRST_GUILD + number), "channel": str(_FIRST_CHANNEL + number), "kind": "voice"}
            | ({"members": 1} if number < _MOST_SAMPLED else {"ghosts": 1})
            for number in range(self._guilds)
        ]
        async with discord.post("/voice", json={"guilds": wanted}) as answer:
            voices = (await answer.json())["voices"]
        jobs: list[dict[str, Any]] = [
            {
                "type": "broadcast.start",
                "broadcast": BROADCAST,
                "source": {"url": self._source, "loop": self._duration_s is None or self._media_dir is not None},
            }
        ]
        for voice in voices:
            guild, channel = voice.pop("guild"), voice.pop("channel")
            jobs.append(
                {"type": "guild.join", "guild": guild, "channel": channel, "broadcast": BROADCAST, "voice": voice}
            )
        await store.pipeline(
            [
                ("XADD", keys.jobs, "*", "job", msgspec.json.encode({"v": 1, "id": f"demo-{number}"} | job))
                for number, job in enumerate(jobs)
            ]
        )

    # what is shown

    async def _look(self, store: Store, keys: Keys) -> None:
        """Read the figures of all workers and of the broadcast."""
        figures = self._figures
        ids = sorted(await store.command("SMEMBERS", keys.workers))
        found = await store.pipeline([("HGETALL", keys.worker(worker_id)) for worker_id in ids])
        for fields in found:
            if "stats" not in fields:
                continue
            words = ("id", "name", "role", "host", "region")
            record = msgspec.convert(
                {name: value if name in words else msgspec.json.decode(value) for name, value in fields.items()},
                type=WorkerRecord,
            )
            before = figures.workers.get(record.name)
            if before is not None and before.id == record.id and record.stats.at_ns > before.stats.at_ns:
                span_ns = record.stats.at_ns - before.stats.at_ns
                sent = record.stats.packets_sent - before.stats.packets_sent
                figures.packets_per_s[record.name] = sent * 1e9 / span_ns
                figures.cpu_percent[record.name] = (record.stats.cpu_ns - before.stats.cpu_ns) * 100 / span_ns
            figures.workers[record.name] = record
        status = await store.command("HGET", keys.broadcast(BROADCAST), "status")
        if status:
            figures.broadcast = msgspec.json.decode(status, type=BroadcastStatus)
        figures.on_guilds = sum(record.stats.guilds for record in figures.workers.values())
        self._guilds_per_worker |= {
            record.name: max(record.stats.guilds, self._guilds_per_worker.get(record.name, 0))
            for record in figures.workers.values()
            if record.role == "fanout"
        }
        await self._read_events(store, keys)

    async def _read_events(self, store: Store, keys: Keys) -> None:
        figures = self._figures
        for entry_id, fields in await store.command("XRANGE", keys.events, f"({self._events_read}", "+"):
            self._events_read = entry_id
            event = events.decode(fields[events.FIELD])
            if event.type == "broadcast.playing":
                figures.heard_of = True
            elif event.type in ("broadcast.stalled", "guild.failed", "job.failed"):
                figures.trouble = f"{event.type} {event.guild}: {event.code}: {event.message}"
            elif event.type == "broadcast.ended":
                figures.ended, figures.failed = True, event.reason != "finished"
                if figures.failed:
                    figures.trouble = f"{event.type}: {event.reason}: {event.code}: {event.message}"

    def _table(self) -> Table:
        figures = self._figures
        table = Table(title="guildcast", title_justify="left")
        for column in ("worker", "guilds", "packets/s", "lateness p99.9", "CPU"):
            table.add_column(column, justify="left" if column == "worker" else "right")
        for name, record in sorted(figures.workers.items()):
            fanout = record.role == "fanout"
            table.add_row(
                name,
                str(record.stats.guilds) if fanout else "-",
                f"{figures.packets_per_s.get(name, 0):,.0f}" if fanout else "-",
                f"{record.stats.lateness_p999_us / 1_000:.1f} ms" if fanout else "-",
                f"{figures.cpu_percent.get(name, 0):.1f} %",
            )
        status = figures.broadcast
        position = "-"
        if status is not None and status.epoch_us:
            position = f"{max(0.0, time.time() - status.epoch_us / 1e6):.1f} s"
        underruns = max((record.stats.underruns for record in figures.workers.values()), default=0)
        state = status.state if status else "starting"
        silent_s = status.silent_ms / 1_000 if status else 0.0
        table.caption = (
            f"broadcast {BROADCAST}: {state}, position {position}, silent for {silent_s:.1f} s, underruns {underruns}"
        )
        if figures.trouble:
            table.caption += f"\n{escape(figures.trouble)}"
        return table

    async def _show_joining(self, store: Store, keys: Keys) -> bool:
        """Show a bar until all guilds are joined; False when that will not be."""
        progress = Progress(
            TextColumn("guilds joined"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=self._console
        )
        bar = progress.add_task("join", total=self._guilds)
        begun = time.monotonic()
        deadline = begun + GUILDS_JOINED_WITHIN_S
        with Live(console=self._console, refresh_per_second=4) as live:
            while not self._stop.is_set() and time.monotonic() < deadline:
                await self._look(store, keys)
                progress.update(bar, completed=self._figures.on_guilds)
                live.update(Group(self._table(), progress))
                never_open = not self._figures.heard_of and time.monotonic() - begun > SOURCE_OPEN_WITHIN_S
                if self._figures.ended or never_open:
                    return False
                playing = self._figures.broadcast is not None and self._figures.broadcast.state == "playing"
                if self._figures.on_guilds >= self._guilds and playing:
                    return True
                await self._pause(_REFRESH_S)
        return False

    async def _show_playing(self, store: Store, keys: Keys) -> None:
        end = time.monotonic() + self._duration_s if self._duration_s is not None else float("inf")
        with Live(self._table(), console=self._console, refresh_per_second=4) as live:
            while not self._stop.is_set() and time.monotonic() < end and not self._figures.ended:
                await self._pause(min(_REFRESH_S, max(0.0, end - time.monotonic())))
                await self._look(store, keys)
                live.update(self._table())

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return

    # the summary

    def _sum_up(self, report: dict[str, Any], statuses: list[int]) -> int:
        say = self._console.print
        encodes = self._figures.broadcast.encodes if self._figures.broadcast else 0
        say("[bold]At the listeners' end[/bold]", highlight=False)
        heard = sum(_heard(row) for row in report["guild_rows"])
        say(f"  guilds heard   {heard}/{self._guilds}", highlight=False)
        say(
            f"  packets        {report['packets']}: {report['lost']} lost, {report['duplicated']} duplicated, "
            f"{report['out_of_order']} out of order",
            highlight=False,
        )
        silence = silence_heard(report["guild_rows"], None if self._figures.ended else self._played_until_ns)
        say(
            f"  silence        {silence.share:.1%} of the time, {silence.worst_share:.1%} in the guild with most of it",
            highlight=False,
        )
        say(f"  encryption     {_encryption(report)}", highlight=False)
        for name in ("skew_ms", "lateness_ms"):
            one = report[name]
            figures = "  ".join(
                f"{word} {one[key]:.2f}" for word, key in _QUANTILES if one["count"] and one[key] is not None
            )
            say(
                f"  {name.removesuffix('_ms'):14} {figures or 'nothing heard'}{' ms' if figures else ''}",
                highlight=False,
            )
        say(f"  encodes        {encodes} for broadcast {BROADCAST}", highlight=False)
        for name, guilds in sorted(self._guilds_per_worker.items()):
            say(f"  {name:14} {guilds} guilds, {self._cost(name)}", highlight=False)
        if report["kernel_drops"]:
            say(f"  [yellow]the local Discord itself was too slow for {report['kernel_drops']} packets[/yellow]")
        if self._figures.trouble:
            say(f"  [yellow]{escape(self._figures.trouble)}[/yellow]", highlight=False)
        if silence.is_too_much:
            say(f"  [red]listeners heard silence for more than {ALLOWED_SHARE:.0%} of the time[/red]", highlight=False)
        if any(statuses):
            say(f"  [red]exit statuses of supervisor and coordinator: {statuses}, see {LOGS}[/red]")
        failed = silence.is_too_much or self._figures.failed or any(statuses)
        return 0 if heard == self._guilds and not failed else 1

    def _cost(self, name: str) -> str:
        before, after = self._before.get(name), self._figures.workers.get(name)
        if before is None or after is None or after.stats.packets_sent <= before.stats.packets_sent:
            return "no steady state to measure"
        packets = after.stats.packets_sent - before.stats.packets_sent
        return f"{(after.stats.cpu_ns - before.stats.cpu_ns) / 1_000 / packets:.1f} us CPU per packet with its sender"


_QUANTILES = (("p50", "p50"), ("p99", "p99"), ("p99.9", "p999"), ("max", "max"))


def _source_and_folder(source: str) -> tuple[str, Path | None]:
    """URL of a source, and the media folder where it is a file.

    Raises: ConfigError.
    """
    if source.lower().startswith(("http://", "https://")):
        return source, None
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"SOURCE: {source!r} is no readable file, allowed: a file or an http(s) URL")
    return path.as_uri(), path.parent


def _hearings(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What each member of a guild got."""
    members = [member for channel in row["channels"] for member in channel["members"]]
    return [hearing for member in members for hearing in member["hearing"].values()]


def _heard(row: dict[str, Any]) -> bool:
    """Whether a guild heard the programme: where members listen, they have to have decrypted it."""
    hearings = _hearings(row)
    return bool(row["heard"]) and (not hearings or any(one["decrypted"] for one in hearings))


def _encryption(report: dict[str, Any]) -> str:
    hearings = [hearing for row in report["guild_rows"] for hearing in _hearings(row)]
    decrypted, received = (sum(one[name] for one in hearings) for name in ("decrypted", "received"))
    clear = report["in_the_clear"]
    return f"{len(hearings)} members decrypted {decrypted}/{received} frames; {clear} in the clear"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else f"see {log}"


async def _forget(store: Store, keys: Keys) -> None:
    """Remove what this run left on a Redis that is not ours."""
    try:
        for pattern in (f"{keys.prefix}:*", f"{keys.word}:frames:*"):
            cursor = "0"
            while True:
                cursor, found = await store.command("SCAN", cursor, "MATCH", pattern, "COUNT", 500)
                await store.pipeline([("DEL", key) for key in found])
                if str(cursor) == "0":
                    break
    except StoreUnavailable:
        return  # gone already, and with it what was there
