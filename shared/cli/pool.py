"""Processes of a pool on this machine: what `make run` and the end-to-end tests stand on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import BinaryIO

from shared.process import parent_death_signal

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.0/8"
_LOCAL_DISCORD = {"GUILDCAST_VOICE_HOSTS": LOOPBACK, "GUILDCAST_VOICE_NETWORKS": LOOPBACK}
"""Its voice servers are on this machine, and nobody else's are asked."""


class LocalPool:
    """Named processes with one environment; each writes its own log file.

    Args:
        environment: settings (`GUILDCAST_*`) of all of them; the caller's own settings are not handed on.
        logs: folder for the log files.
    """

    def __init__(self, environment: dict[str, str], logs: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GUILDCAST_")}
        # The local Discord lies beside the packages, wherever the caller stands.
        self._environment = kept | {"PYTHONPATH": str(ROOT)} | _LOCAL_DISCORD | environment
        self._logs = logs
        self.processes: dict[str, asyncio.subprocess.Process] = {}

    def log_of(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    async def start(
        self, name: str, module: str, *arguments: str, more: dict[str, str] | None = None, ready_line: bool = False
    ) -> str:
        """Start `python -m module`; returns its first line of output if it is one that says when it is ready.

        Raises: OSError; EOFError: it ended before it was ready.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        log: BinaryIO
        with self.log_of(name).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, *arguments),
                env=self._environment | (more or {}),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if ready_line else log,
                stderr=log,
                start_new_session=True,
                preexec_fn=parent_death_signal,
            )
        self.processes[name] = process
        if not ready_line:
            return ""
        assert process.stdout is not None
        async with asyncio.timeout(30):
            line = await process.stdout.readline()
        if not line:
            raise EOFError(f"{name} ended at its start, see {self.log_of(name)}")
        return line.decode()

    async def stop(self, name: str, number: signal.Signals = signal.SIGTERM, within_s: float = 5.0) -> int:
        """End a process and return its exit status; one that does not obey is killed."""
        process = self.processes.pop(name)
        if process.returncode is None:
            process.send_signal(number)
        try:
            async with asyncio.timeout(within_s):
                return await process.wait()
        except TimeoutError:
            process.kill()
            return await process.wait()

    async def stop_all(self) -> None:
        """End what still runs, the latest first."""
        for name in reversed(list(self.processes)):
            await self.stop(name)
