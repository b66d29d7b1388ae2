"""All parts of the local Discord, started and stopped together."""

import asyncio
import tempfile
from contextlib import AsyncExitStack
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from tests.emulator.authority import CA_FILE, server_context
from tests.emulator.control import Control
from tests.emulator.conversation import Conversation
from tests.emulator.endpoint import ADDRESSES, Endpoints
from tests.emulator.ledger import Ledger
from tests.emulator.main.records import GatewayLimits
from tests.emulator.main.service import MainService
from tests.emulator.messages import GATEWAY_VERSIONS
from tests.emulator.payloads import PayloadTable
from tests.emulator.recorder import Recorder
from tests.emulator.server import VoiceServer

_READ_EVERY_S = 0.004
_REPORT_EVERY_S = 5.0
_PAYLOADS_KEPT = 1 << 16
_SESSIONS_PER_SAMPLED_GUILD = 4
_PEER_CLOSE_WAIT_S = 1.0
_FAREWELL_S = 0.2
_CANCEL_AFTER_S = 0.05


class LocalDiscord:
    """The local Discord inside this process: `async with LocalDiscord() as discord:`.

    Args:
        endpoint_guilds: guilds that share one voice server.
        control: host and port of the control interface; loopback only.
        folder: where `ca.pem` goes; None makes a temporary one.
        sample: the first so many guilds are decrypted and recorded in full.
        heartbeat_interval_ms: what Hello tells.
        full_depth, brief_depth: packets recorded per session of a sampled guild, of another guild.
        max_sessions: guilds that are not sampled, and their sessions, kept at most.
        gateway: limits of the main gateway, if not Discord's.
        listen_every: one of so many voice servers is listened to; of the others' guilds no more is known than that
            they are heard. Listening to thousands of guilds takes more of a machine than what is measured.
    """

    def __init__(
        self,
        *,
        endpoint_guilds: int = 8,
        control: tuple[str, int] = ("127.0.0.1", 0),
        folder: Path | None = None,
        sample: int = 128,
        heartbeat_interval_ms: int = 13_750,
        full_depth: int = 15_000,
        brief_depth: int = 1_500,
        max_sessions: int = 8_192,
        gateway: GatewayLimits | None = None,
        listen_every: int = 1,
    ) -> None:
        if not ip_address(control[0]).is_loopback:
            raise ValueError(f"the control interface must be on loopback, not {control[0]}")
        self._endpoint_guilds = endpoint_guilds
        self._listen_every = listen_every
        self._control = control
        self._folder = folder
        self._sample = sample
        self._heartbeat_interval_ms = heartbeat_interval_ms
        self._max_sessions = max_sessions
        self._gateway = gateway or GatewayLimits()
        self._ledger = Ledger(sample * _SESSIONS_PER_SAMPLED_GUILD, max_sessions, full_depth, brief_depth)
        self._stack = AsyncExitStack()
        self._server: VoiceServer
        self._endpoints: Endpoints
        self.control_url: str
        self.api_url: str
        self.ca_file: Path
        self.reading: asyncio.Task[None]
        """Ends only with an error, or when the emulator stops."""

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def _start(self, stack: AsyncExitStack) -> None:
        folder = self._folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="local-discord-")))
        folder.mkdir(parents=True, exist_ok=True)
        tls = server_context(folder, ADDRESSES)
        self.ca_file = folder.resolve() / CA_FILE
        voice = web.Application()
        voice.add_routes([web.get("/", self._converse)])
        runner = web.AppRunner(voice, access_log=None, shutdown_timeout=_CANCEL_AFTER_S, handle_signals=False)
        self._endpoints = Endpoints(runner, tls, self._endpoint_guilds, self._listen_every)
        stack.callback(self._endpoints.close)
        self._server = VoiceServer(
            self._endpoints, self._sample, self._sample + self._max_sessions, self._heartbeat_interval_ms
        )
        recorder = Recorder(self._ledger, PayloadTable(_PAYLOADS_KEPT), self._server)
        stack.callback(recorder.close)
        self._server.use(recorder)
        await runner.setup()
        stack.push_async_callback(self._server.close_channels)
        stack.push_async_callback(runner.cleanup)
        stack.push_async_callback(self._farewell)
        main = MainService(self._server, self._gateway)
        await main.start(stack, tls)
        self.api_url = main.control.api_url
        control = web.AppRunner(
            Control(self._server, recorder, main.control.routes()).application(),
            access_log=None,
            shutdown_timeout=_CANCEL_AFTER_S,
        )
        await control.setup()
        stack.push_async_callback(control.cleanup)
        site = web.TCPSite(control, *self._control)
        await site.start()
        self.control_url = f"http://{self._control[0]}:{site.port}"
        self.reading = asyncio.create_task(_read_on(recorder, self._server))
        stack.push_async_callback(self._stop_reading)

    async def _converse(self, request: web.Request) -> web.WebSocketResponse:
        version = next((each for each in GATEWAY_VERSIONS if request.query.get("v") == str(each)), None)
        if version is None:
            raise web.HTTPBadRequest(text=f"only v={GATEWAY_VERSIONS[0]} to v={GATEWAY_VERSIONS[-1]} are served")
        transport = request.transport
        if transport is None:
            raise web.HTTPBadRequest(text="the connection is gone")
        address, port = transport.get_extra_info("sockname")[:2]
        endpoint = self._endpoints.at(address, port)
        if endpoint.coming.away_until_s > asyncio.get_running_loop().time():
            raise web.HTTPServiceUnavailable(text="the edge is away on demand")
        if elsewhere := endpoint.coming.take_redirect():
            raise web.HTTPFound(elsewhere)
        socket = web.WebSocketResponse(timeout=_PEER_CLOSE_WAIT_S, compress=False)
        await socket.prepare(request)
        await Conversation(self._server, endpoint, socket, version).run(transport)
        return socket

    async def _farewell(self) -> None:
        """Give the clients a moment to answer the closing of their WebSockets."""
        leaving = [asyncio.create_task(each.done.wait()) for each in self._server.disconnect_all()]
        if leaving:
            _, waiting = await asyncio.wait(leaving, timeout=_FAREWELL_S)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _stop_reading(self) -> None:
        """Raises what made the reading end before its time."""
        self.reading.cancel()
        try:
            await self.reading
        except asyncio.CancelledError:
            return


async def _read_on(recorder: Recorder, server: VoiceServer) -> None:
    """Drain the sockets at a fixed pace: few large batches cost less than many small ones (reference section 10).

    Clients are sent a receiver report from time to time, without which discord.py's reader may sleep on.
    """
    clock = asyncio.get_running_loop().time
    report_s = clock() + _REPORT_EVERY_S
    while True:
        recorder.drain()
        if clock() >= report_s:
            report_s += _REPORT_EVERY_S
            server.send_reports()
        await asyncio.sleep(_READ_EVERY_S)
