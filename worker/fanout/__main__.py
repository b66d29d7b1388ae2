"""`python -m worker.fanout`: one fan-out worker, started by the supervisor."""

from __future__ import annotations

import asyncio
import signal
import sys

from shared.life import Life
from shared.main import run_process
from shared.process import die_with_parent, raise_file_limit
from shared.schema.records import WorkerRecord
from shared.settings import Settings
from worker.fanout.app import FanoutWorker
from worker.fanout.capacity import admission_of
from worker.identity import host_name, read_identity
from worker.voice.library_log import LibraryLog


def main() -> None:
    identity = read_identity(sys.argv[1:])
    die_with_parent(identity.parent, signal.SIGTERM)
    files = raise_file_limit()
    LibraryLog("dave").install()

    async def work(settings: Settings, stop: asyncio.Event) -> None:
        admission = await admission_of(settings, files)
        record = WorkerRecord(
            id=identity.id,
            name=identity.name,
            role="fanout",
            host=host_name(),
            region=settings.region,
            capacity=admission.capacity,
            headroom=admission.capacity,
        )
        await FanoutWorker(settings, record, identity.ports, admission, Life(identity.life)).run(stop)

    run_process("fanout", identity.name, work)


if __name__ == "__main__":
    main()
