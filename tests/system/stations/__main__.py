"""The whole matrix in real time: `python -m tests.system.stations`; a column or a row by its name.

Each station goes through each of what may happen to it; all stations at once, one thing behind the other. What is
printed for each is for how long nothing came, how much of it was heard as silence, how late the run was before and
after, and what is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from shared.cli.redis_server import RedisServer
from shared.store.client import Store
from shared.store.keys import Keys
from tests.media.on_air import Air, on_air
from tests.system.stations.columns import COLUMNS, HAPPENINGS
from tests.system.stations.play import Verdict, play
from tests.system.stations.senders import icecast


async def run(columns: list[str], rows: list[str]) -> int:
    """Play all that was named; returns how many verdicts have faults."""
    faulty = 0
    with tempfile.TemporaryDirectory() as name, RedisServer() as redis:
        folder = Path(name)
        store, raw = Store(redis.url), Store(redis.url, raw=True)
        async with AsyncExitStack() as exits:
            exits.push_async_callback(store.close)
            exits.push_async_callback(raw.close)
            air = await exits.enter_async_context(on_air(store, raw, Keys("matrix"), folder))
            for row in rows:
                faulty += await _row(air, folder / row.replace(" ", "-"), columns, row)
    return faulty


async def _row(air: Air, folder: Path, columns: list[str], row: str) -> int:
    what = HAPPENINGS[row]
    folder.mkdir()  # noqa: ASYNC240 - a test's own folder

    async def one(column: str, port: int) -> Verdict:
        async with COLUMNS[column].open(folder, port) as station:
            return await play(air, station, what.happening, what.bounds(COLUMNS[column]))

    chosen = [column for column in columns if COLUMNS[column].fits & what.fits]
    async with icecast(folder, what.burst_bytes) as port:
        verdicts = await asyncio.gather(*(one(column, port) for column in chosen))
    faulty = 0
    for column, verdict in zip(chosen, verdicts, strict=True):
        faults = verdict.faults(what.bounds(COLUMNS[column]))
        faulty += bool(faults)
        print(
            f"{row:22} {column:16} missing {verdict.missing_s:5.1f} s  silent {verdict.silent_s:5.1f} s  "
            f"late {verdict.before_ms:6,} -> {verdict.after_ms:6,} ms  {'; '.join(faults) or 'as it should be'}",
            flush=True,
        )
    return faulty


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.stations", description=__doc__)
    parser.add_argument("--columns", nargs="*", choices=COLUMNS, default=list(COLUMNS), metavar="STATION")
    parser.add_argument("--rows", nargs="*", choices=HAPPENINGS, default=list(HAPPENINGS), metavar="HAPPENING")
    chosen = parser.parse_args()
    return 1 if uvloop.run(run(chosen.columns, chosen.rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
