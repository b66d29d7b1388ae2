"""For tests and tools: start the local Discord as a process, and talk to its control interface."""

import asyncio
import signal
import sys
from collections.abc import Iterable
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from tests.emulator.records import Failure, GuildPackets, Report, Voice, VoiceAnswer, VoiceRequest, WantedVoice

_ROOT = Path(__file__).resolve().parents[2]
_STOP_TIMEOUT_S = 5.0


class EmulatorError(Exception):
    """The emulator refused a request, or did not start."""


class _ReadyLine(msgspec.Struct):
    control: str
    ca_file: str


class EmulatorClient:
    """The control interface, typed: `async with EmulatorClient(url) as emulator:`. Raises: EmulatorError."""

    def __init__(self, control_url: str) -> None:
        self._url = control_url
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(self._url, timeout=aiohttp.ClientTimeout(total=60))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def issue(self, guilds: Iterable[tuple[str, str]]) -> list[Voice]:
        """Fresh voice credentials for pairs of guild and channel; older ones of these guilds are void."""
        body = VoiceRequest([WantedVoice(guild, channel) for guild, channel in guilds])
        answer = await self._ask("POST", "/voice", msgspec.json.encode(body))
        return msgspec.json.decode(answer, type=VoiceAnswer).voices

    async def report(self, *, guilds: bool = False) -> Report:
        """What was measured since the start or the last reset; with a row for each guild on demand."""
        answer = await self._ask("GET", "/report?guilds=1" if guilds else "/report")
        return msgspec.json.decode(answer, type=Report)

    async def reset(self) -> None:
        """Forget all measurements."""
        await self._ask("POST", "/reset")

    async def packets(self, guild: str) -> GuildPackets:
        """The recordings of a sampled guild."""
        return msgspec.msgpack.decode(await self._ask("GET", f"/guilds/{guild}/packets"), type=GuildPackets)

    async def fault(self, guild: str, kind: str, **fields: object) -> None:
        """Make something go wrong in a guild; kinds and fields are in `faults.py`."""
        await self._ask("POST", "/faults", msgspec.json.encode({"guild": guild, "kind": kind, **fields}))

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        async with self._http.request(method, path, data=body) as answer:
            raw = await answer.read()
            if answer.content_type == "application/json" and answer.status >= HTTPStatus.BAD_REQUEST:
                raise EmulatorError(f"{answer.status}: {msgspec.json.decode(raw, type=Failure).error}")
            if answer.status >= HTTPStatus.BAD_REQUEST:
                raise EmulatorError(f"{answer.status}: {raw.decode(errors='replace')}")
            return raw


class EmulatorProcess:
    """`python -m tests.emulator` for the length of an `async with`; `control_url` and `ca_file` are set inside it.

    Args:
        arguments: command line of the emulator.
        start_timeout_s: how long it may take to get ready.
    Raises: EmulatorError: it did not get ready.
    """

    def __init__(self, *arguments: str, start_timeout_s: float = 20.0) -> None:
        self._arguments = arguments
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process
        self.control_url: str
        self.ca_file: Path

    @property
    def pid(self) -> int:
        """Process id of the emulator."""
        return self._process.pid

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.emulator", *self._arguments, cwd=_ROOT, stdout=asyncio.subprocess.PIPE
        )
        try:
            await self._wait_ready()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _wait_ready(self) -> None:
        output = self._process.stdout
        if output is None:
            raise EmulatorError("the emulator has no output to read")
        try:
            line = await asyncio.wait_for(output.readline(), self._start_timeout_s)
            ready = msgspec.json.decode(line, type=_ReadyLine)
        except TimeoutError as error:
            raise EmulatorError(f"the emulator was not ready within {self._start_timeout_s} s") from error
        except msgspec.DecodeError as error:
            raise EmulatorError("the emulator did not start; see its error output") from error
        self.control_url = ready.control
        self.ca_file = Path(ready.ca_file)

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal the emulator, wait for its end (kill it when it lingers) and give its exit code."""
        if self._process.returncode is None:
            self._process.send_signal(number)
        try:
            return await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            self._process.kill()
            return await self._process.wait()
