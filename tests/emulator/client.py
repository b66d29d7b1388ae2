"""For tests and tools: start the local Discord as a process, and talk to its control interface."""

import asyncio
import io
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from tests.emulator.main.records import Bot, BotRequest, GuildPlan, MainReport
from tests.emulator.records import (
    ChannelKind,
    ChannelReport,
    Failure,
    GuildPackets,
    JoinedMember,
    Listening,
    Report,
    Voice,
    VoiceAnswer,
    VoiceRequest,
    WantedGhosts,
    WantedMember,
    WantedSpeech,
    WantedVoice,
)

_ROOT = Path(__file__).resolve().parents[2]
_STOP_TIMEOUT_S = 5.0


class EmulatorError(Exception):
    """The emulator refused a request, or did not start."""


class _ReadyLine(msgspec.Struct):
    control: str
    ca_file: str


class MembersClient:
    """The part of the control interface that is about members. Raises: EmulatorError."""

    def __init__(self, ask: Callable[[str, str, bytes | None], Awaitable[bytes]]) -> None:
        self._ask = ask

    async def join(
        self, guild: str, user: str | None = None, *, channel: str | None = None, delay_ms: int = 10
    ) -> JoinedMember:
        """Let a member come; see `WantedMember`."""
        body = msgspec.json.encode(WantedMember(user, channel, delay_ms))
        answer = await self._ask("POST", f"/guilds/{guild}/members", body)
        return msgspec.json.decode(answer, type=JoinedMember)

    async def leave(self, guild: str, user: str) -> None:
        """Let a member go."""
        await self._ask("DELETE", f"/guilds/{guild}/members/{user}", None)

    async def speak(
        self, guild: str, user: str, frames: Iterable[bytes] = (), *, seconds: float = 0, hertz: int = 440
    ) -> None:
        """Let a member say Opus frames, or a tone, and five frames of silence; does not wait for the end."""
        body = msgspec.json.encode(WantedSpeech(list(frames), seconds, hertz))
        await self._ask("POST", f"/guilds/{guild}/members/{user}/speech", body)


class EmulatorClient:
    """The control interface, typed: `async with EmulatorClient(url) as emulator:`. Raises: EmulatorError."""

    def __init__(self, control_url: str) -> None:
        self._url = control_url
        self._http: aiohttp.ClientSession
        self.members = MembersClient(self._ask)

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(self._url, timeout=aiohttp.ClientTimeout(total=60))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def issue(
        self,
        guilds: Iterable[tuple[str, str]],
        *,
        user: str | None = None,
        kind: ChannelKind | None = None,
        members: int | None = None,
        ghosts: int | None = None,
    ) -> list[Voice]:
        """Fresh voice credentials for pairs of guild and channel; the user's older ones of these guilds are void.

        Args:
            user: whose; None is the bot.
            kind, members, ghosts: see `WantedVoice`.
        """
        wanted = [WantedVoice(guild, channel, user, kind, members, ghosts) for guild, channel in guilds]
        answer = await self._ask("POST", "/voice", msgspec.json.encode(VoiceRequest(wanted)))
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

    async def listen(self, guild: str) -> list[ChannelReport]:
        """The channels of a guild, and what the members in them heard."""
        return msgspec.json.decode(await self._ask("GET", f"/guilds/{guild}/channels"), type=Listening).channels

    async def ghosts(self, guild: str, n: int, *, channel: str | None = None) -> None:
        """Let exactly so many ghosts be in a channel: the one the bot was sent to last, or another."""
        await self._ask("PUT", f"/guilds/{guild}/ghosts", msgspec.json.encode(WantedGhosts(n, channel)))

    async def fault(self, guild: str, kind: str, **fields: object) -> None:
        """Make something go wrong in a guild, for one user of it; kinds and fields are in `faults.py`."""
        await self._ask("POST", "/faults", msgspec.json.encode({"guild": guild, "kind": kind, **fields}))

    async def bot(self, guilds: Iterable[GuildPlan] = (), *, user_id: str | None = None, intents: int = 0) -> Bot:
        """Make a bot that is in these guilds, or let one into more; see `BotRequest`."""
        body = BotRequest(user_id, list(guilds), intents)
        return msgspec.json.decode(await self._ask("POST", "/bots", msgspec.json.encode(body)), type=Bot)

    async def main_report(self) -> MainReport:
        """Main sessions, and who is in which call."""
        return msgspec.json.decode(await self._ask("GET", "/gateway"), type=MainReport)

    async def main_fault(self, kind: str, **fields: object) -> None:
        """Make something go wrong between a bot and the main gateway; kinds and fields are in `main/faults.py`."""
        await self._ask("POST", "/gateway/faults", msgspec.json.encode({"kind": kind, **fields}))

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        # a file, because of a body of a megabyte the client library warns
        data = None if body is None else io.BytesIO(body)
        async with self._http.request(method, path, data=data) as answer:
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
