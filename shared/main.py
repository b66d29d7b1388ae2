"""What every `__main__` of a whole process shares: settings, logging, signals, exit status."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import NoReturn

import uvloop

from shared import logs
from shared.errors import EXIT_CONFIG, EXIT_UNAVAILABLE, ConfigError, StoreUnavailable
from shared.process import no_core_dump
from shared.settings import Settings, load_settings

Work = Callable[[Settings, asyncio.Event], Awaitable[None]]


def run_process(role: str, name: str, work: Work) -> NoReturn:
    """Run a process of guildcast to its end: settings, logging, signals, exit status.

    Args:
        role, name: stand in every log line.
        work: runs until the event is set by SIGTERM or SIGINT.
    Exits: 0; 78 for a wrong setting, 75 for a Redis that did not answer at the start, each with one line.
    """
    no_core_dump()
    try:
        logs.wait_for_no_reader()
        settings = load_settings()
        logs.configure(settings.log_level, settings.log_format, role=role, name=name)
        uvloop.run(_until_signal(settings, work))
    except ConfigError as error:
        sys.stderr.write(f"guildcast {role}: {error}\n")
        sys.exit(EXIT_CONFIG)
    except StoreUnavailable as error:
        sys.stderr.write(f"guildcast {role}: GUILDCAST_REDIS_URL: {error}\n")
        sys.exit(EXIT_UNAVAILABLE)
    sys.exit(0)


async def _until_signal(settings: Settings, work: Work) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await work(settings, stop)
