"""How long a new leader takes to serve a large pool on a Redis far away, and what it costs while nothing happens.

    python -m tests.bench.leading --guilds 10000 --round-trip-ms 20

The guilds stand on Redis before the leader starts; there is no worker, so all of them wait for one. It leads once it
has carried out a job that waits as well. Its cost is the time of its own thread once all have been told that they wait;
Redis and the line to it run elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from coordinator.app import Coordinator
from shared.cli.redis_server import RedisServer
from shared.schema.records import GuildSpec, VoiceRecord
from shared.settings import Settings
from shared.store.client import Store
from shared.store.keys import Keys
from tests.bench.results import table

_AT_ONCE = 1_000
_TOLD_WITHIN_S = 120.0
_IDLE_S = 20.0
_POLL_S = 0.02


@contextmanager
def far_away(server: RedisServer, folder: Path, round_trip_ms: float) -> Iterator[str]:
    """A line to a server, in a thread of its own: bytes arrive half a round trip after they were sent."""
    path = folder / "far.sock"
    loop = asyncio.new_event_loop()
    lines: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            loop.call_later(round_trip_ms / 2_000, writer.write, data)
        loop.call_later(round_trip_ms / 2_000, writer.close)

    def begin(line: Coroutine[None, None, None]) -> None:
        task = loop.create_task(line)
        lines.add(task)
        task.add_done_callback(lines.discard)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_unix_connection(server.url.removeprefix("unix://"))
        begin(carry(reader, to_server))
        begin(carry(from_server, writer))

    loop.run_until_complete(asyncio.start_unix_server(accept, path))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"unix://{path}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for line in lines:
            line.cancel()
        loop.run_until_complete(asyncio.gather(*lines, return_exceptions=True))
        loop.close()


async def fill(store: Store, keys: Keys, guilds: int) -> None:
    """Write the records of guilds that have credentials and no worker."""
    voice = VoiceRecord(user_id="1", session_id="s", token="t", endpoint="voice.example:443")
    for start in range(0, guilds, _AT_ONCE):
        commands: list[tuple[str, ...]] = []
        for number in range(start, min(guilds, start + _AT_ONCE)):
            guild = str(10**17 + number)
            spec = GuildSpec(bot="main", guild=guild, channel="5", broadcast="news", voice=voice)
            commands += [
                ("SADD", keys.guilds, f"main:{guild}"),
                ("HSET", keys.guild("main", guild), "spec", msgspec.json.encode(spec).decode(), "generation", "0"),
            ]
        await store.pipeline(commands)


def measure(guilds: int, round_trip_ms: float) -> tuple[float, float]:
    """Seconds until a job is carried out, and thread time per second of a leader with nothing to do."""
    with RedisServer() as server, TemporaryDirectory() as folder, far_away(server, Path(folder), round_trip_ms) as url:
        return asyncio.run(lead(Store(server.url), Settings(redis_url=url), guilds))


async def lead(near: Store, settings: Settings, guilds: int) -> tuple[float, float]:
    """Figures of one leader; `near` is its Redis without the way to it."""
    async with asyncio.timeout(_TOLD_WITHIN_S):
        keys, stop = Keys(settings.namespace), asyncio.Event()
        await fill(near, keys, guilds)
        leaves = {"v": 1, "type": "guild.leave", "id": "last", "guild": str(10**17)}
        await near.command("XADD", keys.jobs, "*", "job", msgspec.json.encode(leaves).decode())
        began_s = time.monotonic()
        leading = asyncio.create_task(Coordinator(settings, "here").run(stop))
        while await near.command("EXISTS", keys.guild("main", str(10**17))):  # noqa: ASYNC110 - it is on Redis
            await asyncio.sleep(_POLL_S)
        led_s = time.monotonic() - began_s
        last = keys.guild("main", str(10**17 + guilds - 1))
        while not await near.command("HEXISTS", last, "status"):  # noqa: ASYNC110 - as above
            await asyncio.sleep(1.0)
        before_s, cpu_s = time.monotonic(), time.thread_time()
        await asyncio.sleep(_IDLE_S)
        cost = (time.thread_time() - cpu_s) / (time.monotonic() - before_s)
        stop.set()
        await leading
        await near.close()
    return led_s, cost


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guilds", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    parser.add_argument("--round-trip-ms", type=float, default=20.0)
    arguments = parser.parse_args()
    rows = []
    for guilds in arguments.guilds:
        led_s, cost = measure(guilds, arguments.round_trip_ms)
        rows.append((f"{guilds:,}", led_s, cost * 1_000))
    title = f"A leader whose Redis is {arguments.round_trip_ms:g} ms away; no guild has a worker"
    table(title, ("guilds", "s until it leads", "ms of CPU a second, idle"), rows)


if __name__ == "__main__":
    main()
