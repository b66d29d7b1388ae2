"""The control interface: plain HTTP on loopback."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus

import msgspec
from aiohttp import web

from tests.emulator import report
from tests.emulator.channel import NoSuchMemberError, TakenError
from tests.emulator.faults import read_fault
from tests.emulator.main.world import NoSuchBotError, NoSuchCallError
from tests.emulator.recorder import Recorder
from tests.emulator.records import (
    Failure,
    JoinedMember,
    Listening,
    VoiceAnswer,
    VoiceRequest,
    WantedGhosts,
    WantedMember,
    WantedSpeech,
)
from tests.emulator.server import FullError, NoSuchGuildError, NotConnectedError, VoiceServer

_LARGEST_BODY_BYTES = 16 << 20
_MESSAGE_PACK = "application/msgpack"

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Control:
    """Issues credentials, tells what was measured, makes faults."""

    def __init__(self, server: VoiceServer, recorder: Recorder, others: Sequence[web.RouteDef]) -> None:
        self._server = server
        self._recorder = recorder
        self._others = others
        self._issuing = asyncio.Lock()

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application(middlewares=[_refusals], client_max_size=_LARGEST_BODY_BYTES)
        application.add_routes(
            [
                web.post("/voice", self._voice),
                web.get("/report", self._report),
                web.post("/reset", self._reset),
                web.get("/guilds/{guild}/packets", self._packets),
                web.post("/faults", self._faults),
                web.get("/guilds/{guild}/channels", self._listen),
                web.put("/guilds/{guild}/ghosts", self._ghosts),
                web.post("/guilds/{guild}/members", self._member_joins),
                web.delete("/guilds/{guild}/members/{user}", self._member_leaves),
                web.post("/guilds/{guild}/members/{user}/speech", self._member_speaks),
                *self._others,
            ]
        )
        return application

    async def _voice(self, request: web.Request) -> web.Response:
        wanted = msgspec.json.decode(await request.read(), type=VoiceRequest)
        async with self._issuing:
            voices = [await self._server.issue(each) for each in wanted.guilds]
        return _json(VoiceAnswer(voices))

    async def _report(self, request: web.Request) -> web.Response:
        self._recorder.drain()
        recordings = report.copy_recordings(self._server, self._recorder)
        timing = await asyncio.to_thread(report.measure_timing, recordings)
        with_guilds = request.query.get("guilds") == "1"
        return _json(report.count(self._server, self._recorder, timing, with_guilds=with_guilds))

    async def _reset(self, _: web.Request) -> web.Response:
        self._server.forget()
        return web.Response(status=HTTPStatus.NO_CONTENT)

    async def _packets(self, request: web.Request) -> web.Response:
        guild = self._server.guild(request.match_info["guild"])
        if not guild.sampled:
            return _json(Failure(f"guild {guild.guild!r} is not sampled"), HTTPStatus.CONFLICT)
        self._recorder.drain()
        return web.Response(body=report.packets(guild, self._recorder), content_type=_MESSAGE_PACK)

    async def _faults(self, request: web.Request) -> web.Response:
        self._server.apply(read_fault(await request.read()))
        return web.Response(status=HTTPStatus.NO_CONTENT)

    async def _listen(self, request: web.Request) -> web.Response:
        self._recorder.drain()
        return _json(Listening(report.listening(self._server.guild(request.match_info["guild"]))))

    async def _ghosts(self, request: web.Request) -> web.Response:
        wanted = msgspec.json.decode(await request.read(), type=WantedGhosts)
        self._server.channel(request.match_info["guild"], wanted.channel).set_ghosts(wanted.n)
        return web.Response(status=HTTPStatus.NO_CONTENT)

    async def _member_joins(self, request: web.Request) -> web.Response:
        wanted = msgspec.json.decode(await request.read(), type=WantedMember)
        channel = self._server.channel(request.match_info["guild"], wanted.channel)
        member = self._server.join_member(channel, wanted)
        return _json(JoinedMember(member.user, member.ssrc))

    async def _member_leaves(self, request: web.Request) -> web.Response:
        await self._server.leave_member(request.match_info["guild"], request.match_info["user"])
        return web.Response(status=HTTPStatus.NO_CONTENT)

    async def _member_speaks(self, request: web.Request) -> web.Response:
        wanted = msgspec.json.decode(await request.read(), type=WantedSpeech)
        self._server.speak(request.match_info["guild"], request.match_info["user"], wanted)
        return web.Response(status=HTTPStatus.NO_CONTENT)


def _json(body: msgspec.Struct, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


@web.middleware
async def _refusals(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """What the caller did wrong, as a status and a sentence."""
    try:
        return await handler(request)
    except msgspec.DecodeError as error:
        return _json(Failure(str(error)), HTTPStatus.BAD_REQUEST)
    except (NoSuchGuildError, NoSuchMemberError, NoSuchBotError) as error:
        return _json(Failure(str(error)), HTTPStatus.NOT_FOUND)
    except (NotConnectedError, FullError, TakenError, NoSuchCallError) as error:
        return _json(Failure(str(error)), HTTPStatus.CONFLICT)
