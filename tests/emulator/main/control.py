"""The control interface's part about bots: make them, see them, let things go wrong."""

import asyncio
from http import HTTPStatus

import msgspec
from aiohttp import web

from tests.emulator.main import faults
from tests.emulator.main.gateway import MainGateway
from tests.emulator.main.records import Bot, BotRequest, MainReport, VoiceStateRow
from tests.emulator.main.voice import VoiceLink
from tests.emulator.main.wire import Op, write
from tests.emulator.main.world import Channel, Guild, World
from tests.emulator.server import NoSuchGuildError, NotConnectedError


class MainControl:
    """Handlers for the control interface. Raises what that turns into refusals."""

    def __init__(self, world: World, gateway: MainGateway, link: VoiceLink) -> None:
        self.api_url = ""
        self.gateway_url = ""
        self._world = world
        self._gateway = gateway
        self._link = link
        self._opening = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        """The routes."""
        return [
            web.post("/bots", self._bots),
            web.get("/gateway", self._report),
            web.post("/gateway/faults", self._faults),
        ]

    async def _bots(self, request: web.Request) -> web.Response:
        wanted = msgspec.json.decode(await request.read(), type=BotRequest)
        account, entered = self._world.admit_bot(wanted)
        async with self._opening:
            for plan in wanted.guilds:
                for channel in plan.channels:
                    await self._link.open(self._world.guilds[plan.guild].channels[channel.channel])
        for guild in entered:
            self._gateway.tell_new_guild(guild, account)
        return _json(Bot(account.user_id, account.token, self.api_url, self.gateway_url))

    async def _report(self, _: web.Request) -> web.Response:
        gateway, world = self._gateway, self._world
        states = [
            VoiceStateRow(
                guild=state.guild,
                channel=state.channel,
                user_id=state.user_id,
                self_mute=state.self_mute,
                self_deaf=state.self_deaf,
                suppress=state.suppress,
            )
            for state in world.all_states()
        ]
        channels = (channel for guild in world.guilds.values() for channel in guild.channels.values())
        report = MainReport(
            sessions=gateway.rows(),
            voice_states=states,
            channel_status={channel.channel: channel.status for channel in channels if channel.status},
            identifies=gateway.identifies,
            resumes=gateway.resumes,
            refused={str(int(code)): count for code, count in gateway.refused.items()},
        )
        return _json(report)

    async def _faults(self, request: web.Request) -> web.Response:
        fault = faults.read_fault(await request.read())
        if isinstance(fault, faults.GuildFault):
            await self._apply_to_guild(fault)
        else:
            self._apply_to_session(fault)
        return web.Response(status=HTTPStatus.NO_CONTENT)

    async def _apply_to_guild(self, fault: faults.GuildFault) -> None:
        """Raises: NoSuchGuildError, NoSuchCallError, NoSuchBotError."""
        calls = self._gateway.calls
        guild = self._guild(fault.guild)
        match fault:
            case faults.JoinFault():
                pending = calls.faults(guild.guild)
                pending.answer, pending.left = fault, fault.times
            case faults.FullFault():
                _channel(guild, fault.channel).full = fault.on
            case faults.IgnoreRejoinFault():
                calls.faults(guild.guild).ignore_rejoin = fault.on
            case faults.KickFault():
                calls.kick(calls.state(guild.guild, fault.user_id), fault.order, fault.code, fault.gap_ms)
            case faults.MoveFault():
                state, channel = calls.state(guild.guild, fault.user_id), _channel(guild, fault.channel)
                await calls.move(state, channel, fault.order, fault.code, fault.gap_ms)
            case faults.ServerFault():
                await calls.relocate(guild.guild, fault.code, fault.null_ms)
            case faults.TokenFault():
                await calls.renew(calls.state(guild.guild, fault.user_id), fault.code)
            case faults.GuildGoneFault():
                self._guild_gone(guild, fault)

    def _guild_gone(self, guild: Guild, fault: faults.GuildGoneFault) -> None:
        """Raises: NoSuchBotError."""
        gateway, world = self._gateway, self._world
        users = [fault.user_id] if fault.user_id is not None else sorted(guild.bots)
        accounts = [world.account(user_id) for user_id in users]
        guild.unavailable = fault.on and fault.unavailable
        for account in accounts:
            if not fault.on:
                world.let_in(account, guild)
                gateway.tell_new_guild(guild, account)
                continue
            gateway.calls.leave_guild(guild, account)
            told: dict[str, object] = {"id": guild.guild}
            if fault.unavailable:
                told["unavailable"] = True
            gateway.tell(guild.guild, "GUILD_DELETE", told, only=account.user_id)
            if not fault.unavailable:
                world.expel_bot(account, guild)

    def _apply_to_session(self, fault: faults.SessionFault) -> None:
        """Raises: NoSuchBotError, NotConnectedError."""
        session = self._gateway.session(fault.user_id, fault.shard)
        conversation = session.conversation
        match fault:
            case faults.NoAckFault(on=on):
                session.no_ack = on
            case faults.RefuseResumeFault():
                session.refuse_resume = True
            case _ if conversation is None:
                raise NotConnectedError(f"bot {fault.user_id!r} has no open WebSocket on shard {fault.shard}")
            case faults.CloseFault(code=code):
                conversation.want_close(code, "closed on demand")
            case faults.DropFault():
                conversation.drop()
            case faults.ReconnectFault():
                conversation.post(write(Op.RECONNECT))
            case faults.InvalidateFault(resumable=resumable):
                self._gateway.invalidate(session, resumable=resumable)
            case faults.HeartbeatFault():
                conversation.post(write(Op.HEARTBEAT))

    def _guild(self, name: str) -> Guild:
        """Raises: NoSuchGuildError."""
        try:
            return self._world.guilds[name]
        except KeyError as error:
            raise NoSuchGuildError(f"no bot is in a guild {name!r}") from error


def _channel(guild: Guild, name: str) -> Channel:
    """Raises: NoSuchGuildError."""
    try:
        return guild.channels[name]
    except KeyError as error:
        raise NoSuchGuildError(f"guild {guild.guild!r} has no channel {name!r}") from error


def _json(body: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")
