"""The REST interface, as far as a bot of voice needs it."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import datetime
from http import HTTPStatus
from typing import TypeVar

import msgspec
from aiohttp import web

from tests.emulator.main import shapes, wire
from tests.emulator.main.gateway import MainGateway
from tests.emulator.main.wire import Intent
from tests.emulator.main.world import Account, Channel, VoiceState, World

BASE_PATH = f"/api/v{wire.API_VERSION}"
_LARGEST_STATUS = 500
_UNKNOWN_CHANNEL = 10003
_UNKNOWN_GUILD = 10004
_UNKNOWN_VOICE_STATE = 10065
_MISSING_PERMISSIONS = 50013
_INVALID_FORM = 50035

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_ACCOUNT: web.RequestKey[Account] = web.RequestKey("account", Account)


_Body = TypeVar("_Body", bound=msgspec.Struct)


class ModifyVoiceState(msgspec.Struct):
    """Body of `PATCH /guilds/{guild}/voice-states/@me`; what is left out stays as it is."""

    channel_id: str | int | None = None
    suppress: bool | None = None
    request_to_speak_timestamp: str | None = None


class SetVoiceStatus(msgspec.Struct):
    """Body of `PUT /channels/{channel}/voice-status`."""

    status: str | None


class ApiError(Exception):
    """A refusal in the API's own form."""

    def __init__(self, status: HTTPStatus, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Rest:
    """Answers requests of bots."""

    def __init__(self, world: World, gateway: MainGateway) -> None:
        self.gateway_url = ""
        self._world = world
        self._gateway = gateway
        self._limits = gateway.limits
        self._recent: dict[str, deque[float]] = {}

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application(middlewares=[self._check])
        application.add_routes(
            [
                web.get("/gateway", self._url),
                web.get("/gateway/bot", self._bot_url),
                web.get("/users/@me", self._user),
                web.get("/oauth2/applications/@me", self._application),
                web.get("/applications/@me", self._application),
                web.get("/guilds/{guild}/voice-states/@me", self._voice_state),
                web.patch("/guilds/{guild}/voice-states/@me", self._modify_voice_state),
                web.get("/channels/{channel}", self._channel),
                web.put("/channels/{channel}/voice-status", self._set_voice_status),
            ]
        )
        return application

    # the gateway's address

    async def _url(self, _: web.Request) -> web.Response:
        return _json({"url": self.gateway_url})

    async def _bot_url(self, request: web.Request) -> web.Response:
        left, reset_after_ms = self._gateway.identifies_left(request[_ACCOUNT])
        limit = {
            "total": self._limits.identifies_per_day,
            "remaining": left,
            "reset_after": reset_after_ms,
            "max_concurrency": self._limits.max_concurrency,
        }
        return _json({"url": self.gateway_url, "shards": self._limits.shards, "session_start_limit": limit})

    # the bot itself

    async def _user(self, request: web.Request) -> web.Response:
        return _json(shapes.user(request[_ACCOUNT].user_id))

    async def _application(self, request: web.Request) -> web.Response:
        return _json(shapes.application(request[_ACCOUNT]))

    # voice

    async def _voice_state(self, request: web.Request) -> web.Response:
        return _json(shapes.voice_state(self._own_state(request)))

    async def _modify_voice_state(self, request: web.Request) -> web.Response:
        wanted = await _body(request, ModifyVoiceState)
        state = self._own_state(request)
        channel = self._world.guilds[state.guild].channels[state.channel]
        named = None if wanted.channel_id is None else str(wanted.channel_id)
        if not channel.stage or named not in (None, channel.channel):
            raise ApiError(HTTPStatus.BAD_REQUEST, "Invalid Form Body", _INVALID_FORM)
        if wanted.suppress is False and not channel.plan.speak:
            raise ApiError(HTTPStatus.FORBIDDEN, "Missing Permissions", _MISSING_PERMISSIONS)
        asked = wanted.request_to_speak_timestamp
        if asked is not None:
            _check_time(asked)
        self._gateway.calls.set_stage_voice(state, suppress=wanted.suppress, request_to_speak=asked)
        return web.Response(status=HTTPStatus.NO_CONTENT)

    async def _channel(self, request: web.Request) -> web.Response:
        return _json(shapes.channel(self._channel_of(request)))

    async def _set_voice_status(self, request: web.Request) -> web.Response:
        wanted = await _body(request, SetVoiceStatus)
        channel = self._channel_of(request)
        if len(wanted.status or "") > _LARGEST_STATUS:
            raise ApiError(HTTPStatus.BAD_REQUEST, "Invalid Form Body", _INVALID_FORM)
        inside = self._world.state(channel.guild, request[_ACCOUNT].user_id)
        if channel.stage or inside is None or inside.channel != channel.channel:
            raise ApiError(HTTPStatus.FORBIDDEN, "Missing Permissions", _MISSING_PERMISSIONS)
        channel.status = wanted.status or ""
        told = {"id": channel.channel, "guild_id": channel.guild, "status": channel.status or None}
        self._gateway.tell(channel.guild, "VOICE_CHANNEL_STATUS_UPDATE", told, Intent.GUILDS)
        return web.Response(status=HTTPStatus.NO_CONTENT)

    # helpers

    def _own_state(self, request: web.Request) -> VoiceState:
        """Raises: ApiError."""
        account, guild = request[_ACCOUNT], request.match_info["guild"]
        if guild not in account.guilds:
            raise ApiError(HTTPStatus.NOT_FOUND, "Unknown Guild", _UNKNOWN_GUILD)
        state = self._world.state(guild, account.user_id)
        if state is None:
            raise ApiError(HTTPStatus.NOT_FOUND, "Unknown Voice State", _UNKNOWN_VOICE_STATE)
        return state

    def _channel_of(self, request: web.Request) -> Channel:
        """Raises: ApiError."""
        channel = self._world.channel(request.match_info["channel"])
        if channel is None or channel.guild not in request[_ACCOUNT].guilds:
            raise ApiError(HTTPStatus.NOT_FOUND, "Unknown Channel", _UNKNOWN_CHANNEL)
        return channel

    @web.middleware
    async def _check(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Who asks, whether too often, and refusals in the API's own form."""
        try:
            if not request.path.endswith("/gateway"):
                account = self._world.log_in(request.headers.get("Authorization", ""))
                if account is None:
                    raise ApiError(HTTPStatus.UNAUTHORIZED, "401: Unauthorized")
                wait_s = self._wait_s(account)
                if wait_s > 0:
                    told = {"message": "You are being rate limited.", "retry_after": wait_s, "global": True}
                    headers = {"Retry-After": str(int(wait_s) + 1), "X-RateLimit-Global": "true"}
                    return _json(told, HTTPStatus.TOO_MANY_REQUESTS, headers)
                request[_ACCOUNT] = account
            return await handler(request)
        except ApiError as error:
            return _json({"message": str(error), "code": error.code}, error.status)
        except web.HTTPException as error:
            return _json({"message": f"{error.status}: {error.reason}", "code": 0}, HTTPStatus(error.status))

    def _wait_s(self, account: Account) -> float:
        """How long the bot has to wait before its next request."""
        recent = self._recent.setdefault(account.user_id, deque(maxlen=self._limits.requests_per_s))
        now = asyncio.get_running_loop().time()
        if len(recent) == recent.maxlen and now - recent[0] < 1.0:
            return 1.0 - (now - recent[0])
        recent.append(now)
        return 0.0


async def _body(request: web.Request, kind: type[_Body]) -> _Body:
    """Raises: ApiError."""
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.DecodeError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, "Invalid Form Body", _INVALID_FORM) from error


def _check_time(text: str) -> None:
    """Raises: ApiError."""
    try:
        datetime.fromisoformat(text)
    except ValueError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, "Invalid Form Body", _INVALID_FORM) from error


def _json(body: object, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> web.Response:
    raw = msgspec.json.encode(body)
    return web.Response(body=raw, status=status, content_type="application/json", headers=headers)
