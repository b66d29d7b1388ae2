"""`python -m coordinator`: takes jobs and assigns guilds and sources to workers. Never touches audio."""

from __future__ import annotations

import asyncio
import re
import socket

from coordinator.app import Coordinator
from shared.main import run_process
from shared.process import raise_file_limit
from shared.settings import Settings


def main() -> None:
    raise_file_limit()
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:32] or "host"

    async def work(settings: Settings, stop: asyncio.Event) -> None:
        await Coordinator(settings, host).run(stop)

    run_process("coordinator", host, work)


if __name__ == "__main__":
    main()
