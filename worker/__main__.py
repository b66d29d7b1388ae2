"""`python -m worker`: the supervisor of this host's workers."""

from __future__ import annotations

import asyncio

from shared.main import run_process
from shared.process import raise_file_limit
from shared.settings import Settings
from worker.identity import host_name
from worker.supervisor import Supervisor


def main() -> None:
    raise_file_limit()

    async def work(settings: Settings, stop: asyncio.Event) -> None:
        await Supervisor(settings).run(stop)

    run_process("supervisor", host_name(), work)


if __name__ == "__main__":
    main()
