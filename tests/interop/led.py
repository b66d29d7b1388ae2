"""A client program in a process of its own, led by lines of JSON."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.emulator.main.records import Bot

_HERE = Path(__file__).parent
_ANSWER_S = 20.0
_END_S = 10.0
_LONGEST_LINE_BYTES = 1 << 22


class ClientError(Exception):
    """The client could not do what it was told, or said nothing for too long."""


@dataclass(frozen=True)
class Kind:
    """A client program: how to start it, and where it looks for a CA to trust."""

    name: str
    command: Sequence[str]
    ca_variable: str


def kinds(environment: Path) -> list[Kind]:
    """The client programs, run with what `make interop` installed into `environment`."""
    python = environment / "python" / "bin" / "python"
    node = environment / "node" / "node"
    return [
        Kind("discord.py", [str(python), str(_HERE / "discord_py_client.py")], "SSL_CERT_FILE"),
        Kind("@discordjs/voice", [str(node), str(environment / "node" / "client.mjs")], "NODE_EXTRA_CA_CERTS"),
    ]


class LedClient:
    """One logged-in client for the length of an `async with`; what it writes to its error output goes to `log`.

    Raises: ClientError.
    """

    def __init__(self, kind: Kind, bot: Bot, ca_file: Path, log: Path) -> None:
        self._kind = kind
        self._bot = bot
        self._ca_file = ca_file
        self._log = log
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> Self:
        bot = self._bot
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._kind.command,
                *(bot.token, bot.api_url, bot.gateway_url),
                env=os.environ | {self._kind.ca_variable: str(self._ca_file)},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=_LONGEST_LINE_BYTES,
            )
        try:
            await self.hear("ready")
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def do(self, what: str, answer: str, **fields: str) -> dict[str, Any]:
        """Give a command, and wait for what the client tells of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **fields}).encode() + b"\n")
        return await self.hear(answer)

    async def hear(self, event: str) -> dict[str, Any]:
        """The next event of this name; others are passed over."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(_ANSWER_S):
                while line := await self._process.stdout.readline():
                    told: dict[str, Any] = json.loads(line)
                    if told["event"] == event:
                        return told
                    if told["event"] == "failed":
                        raise ClientError(f"{self._kind.name}: {told['error']}")
        except TimeoutError:
            raise ClientError(f"{self._kind.name} told nothing of {event!r} within {_ANSWER_S:g} s") from None
        raise ClientError(f"{self._kind.name} ended; see {self._log}")

    async def _end(self) -> None:
        process = self._process
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _END_S)
        except TimeoutError:
            process.kill()
            await process.wait()
