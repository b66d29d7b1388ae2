"""CPU per packet of a fan-out worker with its sender, with and without end-to-end encryption, beside bare `sendmmsg` of
prebuilt packets in the same run.

    python -m tests.bench.fanout --guilds 1000

Measured: user and system time of worker and sender over windows of steady play, everything included (stream reader,
building, encryption, WebSockets, timers, sending), divided by the packets that left. Reference: a process that wakes
for the same slots and sends prebuilt packets of the same size to the same number of addresses, in batches of the same
size; its CPU is given twice: all of it, and inside `sendmmsg` alone. Medians of several windows. With end-to-end
encryption each guild is a voice channel with one other member, of whom there is no more than a key package.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from shared.cli.pool import LocalPool
from shared.cli.redis_server import RedisServer
from shared.process import cpu_ns
from shared.schema.records import WorkerStats
from shared.store.client import Store, reach
from shared.store.keys import Keys
from shared.store.time_sync import begin_time
from tests.emulator.client import EmulatorClient
from tests.emulator.records import ChannelKind
from tests.media.make_programme import PROGRAMME

RESULTS = Path(".run") / "bench"


class Window(NamedTuple):
    """One stretch of steady play."""

    worker_us: float
    sender_us: float
    packets: int

    @property
    def total_us(self) -> float:
        return self.worker_us + self.sender_us


def _child_of(pid: int, word: str) -> int:
    """The descendant of a process whose command line holds a word."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in map(int, children):
        command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        if word.encode() in command:
            return child
        try:
            return _child_of(child, word)
        except LookupError:
            continue
    raise LookupError(f"no {word} below {pid}")


async def _stats(store: Store, keys: Keys) -> WorkerStats:
    for worker in await store.command("SMEMBERS", keys.workers):
        fields = await store.command("HGETALL", keys.worker(worker))
        if fields["role"] == "fanout":
            return msgspec.json.decode(fields["stats"], type=WorkerStats)
    raise LookupError("no fan-out worker")


async def _join(store: Store, keys: Keys, discord: EmulatorClient, guilds: int, kind: ChannelKind) -> None:
    names = [(str(3 * 10**17 + n), str(4 * 10**17 + n)) for n in range(guilds)]
    voices = await discord.issue(names, kind=kind, ghosts=1)
    jobs: list[dict[str, object]] = [
        {"type": "broadcast.start", "broadcast": "bench", "source": {"url": PROGRAMME.name, "loop": True}}
    ]
    for voice in voices:
        credentials = {name: getattr(voice, name) for name in ("user_id", "session_id", "token", "endpoint")}
        jobs.append(
            {"type": "guild.join", "guild": voice.guild, "channel": voice.channel, "broadcast": "bench"}
            | {"voice": credentials}
        )
    await store.pipeline(
        [
            ("XADD", keys.jobs, "*", "job", json.dumps({"v": 1, "id": str(number)} | job))
            for number, job in enumerate(jobs)
        ]
    )


async def measure_worker(
    guilds: int, windows: int, window_s: float, kind: ChannelKind = "stage"
) -> tuple[list[Window], dict[str, object], list[float], list[float]]:
    """Windows of the product, the listeners' report, and both readings of the floor."""
    with RedisServer() as server, tempfile.TemporaryDirectory() as logs:
        keys = Keys("bench")
        store = Store(server.url)
        await reach(store)
        await begin_time(store, keys)
        pool = LocalPool(
            {
                "GUILDCAST_REDIS_URL": server.url,
                "GUILDCAST_NAMESPACE": keys.word,
                "GUILDCAST_FANOUT_WORKERS": "1",
                "GUILDCAST_WORKER_CAPACITY": str(guilds),
                "GUILDCAST_MEDIA_DIR": str(PROGRAMME.parent),
                "GUILDCAST_LOG_LEVEL": "warning",
            },
            Path(logs),
        )
        try:
            ready = json.loads(await pool.start("emulator", "tests.emulator", "--sample", "32", ready_line=True))
            await pool.start("coordinator", "coordinator")
            await pool.start("supervisor", "worker", more={"GUILDCAST_TLS_CA_FILE": ready["ca_file"]})
            async with EmulatorClient(ready["control"]) as discord:
                await _join(store, keys, discord, guilds, kind)
                await _until_playing(store, keys, discord, guilds, pool)
                worker = _child_of(pool.processes["supervisor"].pid, "worker.fanout")
                sender = _child_of(worker, "worker.fanout.sender")
                await asyncio.sleep(window_s)
                await discord.reset()
                found = []
                for _ in range(windows):
                    before, packets = (cpu_ns(worker), cpu_ns(sender)), (await discord.report()).packets
                    await asyncio.sleep(window_s)
                    after = (cpu_ns(worker), cpu_ns(sender))
                    count = (await discord.report()).packets - packets
                    found.append(
                        Window((after[0] - before[0]) / 1_000 / count, (after[1] - before[1]) / 1_000 / count, count)
                    )
                report = await discord.report(guilds=True)
                addresses = sorted({row.endpoint for row in report.guild_rows or []})
                stats = await _stats(store, keys)
                await pool.stop("supervisor")
                all_us, inside_us = await _floor(pool, guilds, len(addresses), windows, window_s)
            told = {
                "lost": report.lost,
                "kernel_drops": report.kernel_drops,
                "lateness_ms": msgspec.to_builtins(report.lateness_ms),
                "ticks_skipped": stats.ticks_skipped,
                "voice_addresses": len(addresses),
            }
            return found, told, all_us, inside_us
        finally:
            await pool.stop_all()
            await store.close()


async def _until_playing(store: Store, keys: Keys, discord: EmulatorClient, guilds: int, pool: LocalPool) -> None:
    deadline = time.monotonic() + 120
    while (await discord.report()).heard < guilds:
        if time.monotonic() > deadline:
            raise TimeoutError(pool.log_of("supervisor").read_text()[-2_000:])
        await asyncio.sleep(0.5)
    while (await _stats(store, keys)).guilds < guilds:  # noqa: ASYNC110 - a figure on Redis wakes nobody
        await asyncio.sleep(0.5)


async def _floor(
    pool: LocalPool, guilds: int, addresses: int, windows: int, window_s: float
) -> tuple[list[float], list[float]]:
    """Run the reference: microseconds per packet, all of it and inside `sendmmsg`."""
    all_us, inside_us = [], []
    for number in range(windows):
        name = f"floor-{number}"
        line = await pool.start(
            *(name, "tests.bench.bare_sendmmsg"),
            *("--guilds", str(guilds), "--addresses", str(addresses), "--seconds", str(window_s)),
            ready_line=True,
        )
        found = json.loads(line)
        await pool.stop(name)
        all_us.append(found["all_us"])
        inside_us.append(found["inside_us"])
    return all_us, inside_us


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guilds", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    kinds: dict[ChannelKind, str] = {"stage": "without DAVE", "voice": "with DAVE"}
    floor_us: list[float] = []
    inside_us: list[float] = []
    windows: dict[ChannelKind, list[Window]] = {"stage": [], "voice": []}
    told: dict[ChannelKind, list[dict[str, object]]] = {"stage": [], "voice": []}
    # In turns: what else a machine does drifts over minutes, and must fall on both alike.
    for kind in list(kinds) * options.rounds:
        found, report, all_us, sendmmsg_us = asyncio.run(
            measure_worker(options.guilds, options.windows, options.seconds, kind)
        )
        windows[kind] += found
        told[kind].append(report)
        floor_us += all_us
        inside_us += sendmmsg_us
    totals: dict[str, float] = {}
    results: dict[str, dict[str, object]] = {}
    sys.stdout.write(f"fan-out, {options.guilds} guilds, AES-GCM: us of CPU per packet\n")
    for kind, name in kinds.items():
        worker = statistics.median(window.worker_us for window in windows[kind])
        sender = statistics.median(window.sender_us for window in windows[kind])
        total = totals[name] = statistics.median(window.total_us for window in windows[kind])
        spread = max(window.total_us for window in windows[kind]) - min(window.total_us for window in windows[kind])
        results[name] = {"worker_us": worker, "sender_us": sender, "total_us": total, "spread_us": spread}
        results[name]["rounds"] = told[kind]
        sys.stdout.write(f"  {name:14} worker {worker:5.2f}  sender {sender:5.2f}  both {total:5.2f}")
        sys.stdout.write(f"  spread {spread:.2f}\n")
        for report in told[kind]:
            sys.stdout.write(f"  {'':14} {report}\n")
    floor, inside = statistics.median(floor_us), statistics.median(inside_us)
    sys.stdout.write(f"  bare sendmmsg   whole process {floor:.2f}, inside the call {inside:.2f}\n")
    plain, dave = totals.values()
    sys.stdout.write(
        f"  without DAVE: {plain / floor:.2f} x the whole bare process, {plain / inside:.2f} x its calls\n"
    )
    sys.stdout.write(f"  with DAVE: {dave / plain:.2f} x without\n")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "fanout.json").write_text(
        json.dumps({"guilds": options.guilds, "bare_us": floor, "bare_inside_us": inside, **results}, indent=1)
    )


if __name__ == "__main__":
    main()
