"""`python -m worker.encode`: one encode worker, started by the supervisor."""

from __future__ import annotations

import asyncio
import signal
import sys

from shared.life import Life
from shared.main import run_process
from shared.process import die_with_parent, raise_file_limit
from shared.schema.records import WorkerRecord
from shared.settings import Settings
from worker.encode.app import EncodeWorker
from worker.identity import host_name, read_identity

_SOURCES_PER_WORKER = 64
"""A source costs a child of about 1 % of a core; the number of processes is what is limited here."""


def main() -> None:
    identity = read_identity(sys.argv[1:])
    die_with_parent(identity.parent, signal.SIGTERM)
    raise_file_limit()

    async def work(settings: Settings, stop: asyncio.Event) -> None:
        capacity = min(_SOURCES_PER_WORKER, settings.worker_capacity or _SOURCES_PER_WORKER)
        record = WorkerRecord(
            id=identity.id,
            name=identity.name,
            role="encode",
            host=host_name(),
            region=settings.region,
            capacity=capacity,
            headroom=capacity,
        )
        await EncodeWorker(settings, record, Life(identity.life)).run(stop)

    run_process("encode", identity.name, work)


if __name__ == "__main__":
    main()
