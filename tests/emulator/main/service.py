"""The REST interface and the main gateway, listening."""

import asyncio
import ssl
from contextlib import AsyncExitStack

from aiohttp import web

from tests.emulator.channel import Channel as VoiceChannel
from tests.emulator.endpoint import ADDRESSES
from tests.emulator.main.calls import Calls
from tests.emulator.main.control import MainControl
from tests.emulator.main.conversation import MainConversation
from tests.emulator.main.gateway import MainGateway
from tests.emulator.main.records import GatewayLimits
from tests.emulator.main.rest import BASE_PATH, Rest
from tests.emulator.main.voice import VoiceLink
from tests.emulator.main.world import World
from tests.emulator.server import VoiceServer

_PEER_CLOSE_WAIT_S = 1.0
_CANCEL_AFTER_S = 0.05
_FAREWELL_S = 0.2
_MAIN_ADDRESS, _RESUME_ADDRESS = ADDRESSES[0], ADDRESSES[1]


class MainService:
    """One listener for REST and new sessions, another that `READY` names for resumes; both take both.

    `api_url` and `gateway_url` are set by `start`.
    """

    def __init__(self, voice: VoiceServer, limits: GatewayLimits) -> None:
        self._world = World()
        self._gateway = MainGateway(self._world, limits)
        self._link = VoiceLink(voice)
        self._gateway.calls = Calls(self._world, self._link, self._gateway)
        voice.member_moved = self._member_moved
        self._rest = Rest(self._world, self._gateway)
        self.control = MainControl(self._world, self._gateway, self._link)

    async def start(self, stack: AsyncExitStack, tls: ssl.SSLContext) -> None:
        """Listen until the stack unwinds."""
        application = web.Application()
        application.add_routes([web.get("/", self._converse)])
        application.add_subapp(BASE_PATH, self._rest.application())
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=_CANCEL_AFTER_S, handle_signals=False)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        stack.push_async_callback(self._farewell)
        urls = []
        for address in (_MAIN_ADDRESS, _RESUME_ADDRESS):
            site = web.TCPSite(runner, address, 0, ssl_context=tls)
            await site.start()
            urls.append(f"{address}:{site.port}")
        self._rest.gateway_url = self.control.gateway_url = f"wss://{urls[0]}"
        self._gateway.resume_url = f"wss://{urls[1]}"
        self.control.api_url = f"https://{urls[0]}{BASE_PATH}"

    def _member_moved(self, channel: VoiceChannel, user_id: str, here: bool) -> None:
        self._gateway.calls.member_moved(channel.guild.guild, channel.channel, user_id, here=here)

    async def _converse(self, request: web.Request) -> web.WebSocketResponse:
        transport = request.transport
        if transport is None:
            raise web.HTTPBadRequest(text="the connection is gone")
        socket = web.WebSocketResponse(timeout=_PEER_CLOSE_WAIT_S, compress=False)
        await socket.prepare(request)
        conversation = MainConversation(self._gateway, socket)
        self._gateway.opened(conversation)
        try:
            await conversation.run(transport, dict(request.query))
        finally:
            self._gateway.closed(conversation)
        return socket

    async def _farewell(self) -> None:
        """Give the clients a moment to answer the closing of their WebSockets."""
        self._gateway.calls.close()
        leaving = [asyncio.create_task(each.done.wait()) for each in self._gateway.disconnect_all()]
        if leaving:
            _, waiting = await asyncio.wait(leaving, timeout=_FAREWELL_S)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
