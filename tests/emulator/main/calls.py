"""Who is in which call: joins, moves, leaves, and how they are told (reference section 1.2)."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tests.emulator.main import shapes
from tests.emulator.main.faults import CloseOrder, JoinFault
from tests.emulator.main.session import MainSession
from tests.emulator.main.voice import VoiceLink
from tests.emulator.main.wire import Intent, VoiceStateUpdate
from tests.emulator.main.world import Account, Channel, Guild, NoSuchCallError, VoiceState, World
from tests.emulator.records import Voice
from tests.emulator.session import VoiceSession

DISCONNECTED, TERMINATED = 4014, 4022
"""Close codes of the voice gateway for whoever is no longer in the call; the second one, where nobody is left in it."""
_NEWS_MS = 50
"""How long it takes until the voice servers know of a leave: a client's own close may come first."""


class Teller(Protocol):
    """Whoever dispatches events."""

    def tell(self, guild: str, event: str, data: object, intent: Intent | None = None, only: str | None = None) -> None:
        """See `MainGateway.tell`."""


@dataclass(slots=True)
class JoinFaults:
    """What still waits to go wrong with the joins of one guild."""

    answer: JoinFault | None = None
    left: int = 0
    ignore_rejoin: bool = False

    def take(self) -> JoinFault | None:
        """The fault of the join at hand."""
        fault = self.answer
        if fault is not None and fault.times:
            self.left -= 1
            if self.left <= 0:
                self.answer = None
        return fault


class Calls:
    """Changes voice states and tells of it; voice sessions follow."""

    def __init__(self, world: World, voice: VoiceLink, teller: Teller) -> None:
        self._world = world
        self._voice = voice
        self._teller = teller
        self._faults: dict[str, JoinFaults] = {}
        self._later: set[asyncio.TimerHandle] = set()
        self._closed = False

    def close(self) -> None:
        """Do nothing any more that is due later."""
        self._closed = True
        for handle in self._later:
            handle.cancel()
        self._later.clear()

    # what bots ask for

    async def request(self, session: MainSession, wanted: VoiceStateUpdate) -> None:
        """Op 4. What the bot may not do is passed over in silence, as Discord does."""
        guild = self._world.guilds.get(str(wanted.guild_id))
        if guild is None or guild.unavailable or not session.hears_of(guild.guild, None):
            return
        state = self._world.state(guild.guild, session.user_id)
        if wanted.channel_id is None:
            if state is not None:
                self._leave(state)
            return
        channel = guild.channels.get(str(wanted.channel_id))
        if channel is None or not channel.plan.connect:
            return
        if state is not None and state.channel == channel.channel and self._keeps(state, session):
            self._set_flags(state, wanted)
        elif (state is not None and state.channel == channel.channel) or not self._world.is_full(channel):
            await self._join(session, channel, wanted)

    def set_stage_voice(self, state: VoiceState, *, suppress: bool | None, request_to_speak: str | None) -> None:
        """A bot on a stage changes its own state."""
        if suppress is not None:
            state.suppress = suppress
        state.request_to_speak = request_to_speak if state.suppress else None
        self._tell_state(state)

    def session_ended(self, session: MainSession) -> None:
        """Calls that were asked for by this session end."""
        for state in list(self._world.all_states()):
            if state.session_id == session.session_id:
                self._leave(state)

    def leave_guild(self, guild: Guild, account: Account) -> None:
        """The bot is thrown out of the guild, or cannot reach it any more."""
        state = self._world.state(guild.guild, account.user_id)
        if state is not None:
            self._leave(state)

    def member_moved(self, guild: str, channel: str, user_id: str, *, here: bool) -> None:
        """Somebody who is no bot came to a channel, or left it."""
        if here:
            session_id = secrets.token_hex(16)
            state = VoiceState(guild, channel, user_id, session_id, self_mute=False, self_deaf=False, suppress=False)
            self._world.put(state)
            self._tell_state(state)
        else:
            left = self._world.state(guild, user_id)
            if left is not None:
                self._world.drop(left)
                self._tell_state(left, left=True)

    # what happens to them

    def faults(self, guild: str) -> JoinFaults:
        """What goes wrong with the next joins of a guild."""
        return self._faults.setdefault(guild, JoinFaults())

    def state(self, guild: str, user_id: str | None) -> VoiceState:
        """Where a user is; None stands for the only bot in the guild's calls. Raises: NoSuchCallError."""
        bots = self._world.guilds[guild].bots if user_id is None else {user_id}
        states = [each for each in self._world.states_in(guild) if each.user_id in bots]
        if len(states) != 1:
            raise NoSuchCallError(f"{len(states)} users of guild {guild!r} are meant, not one")
        return states[0]

    def kick(self, state: VoiceState, order: CloseOrder, code: int | None, gap_ms: int) -> None:
        """Disconnect a user."""
        line = self._voice.line(state.guild, state.user_id)
        if code is None:
            inside = [each for each in self._world.states_in(state.guild) if each.channel == state.channel]
            code = DISCONNECTED if len(inside) > 1 else TERMINATED

        def tell() -> None:
            if self._world.state(state.guild, state.user_id) is state:  # else the bot joined anew in the meantime
                self._forget(state)
                self._tell_state(state, left=True)

        self._in_order(order, tell, line, code, gap_ms)

    async def move(self, state: VoiceState, channel: Channel, order: CloseOrder, code: int, gap_ms: int) -> None:
        """Put a user into another channel."""
        line = self._voice.line(state.guild, state.user_id)
        state.channel = channel.channel
        state.suppress = channel.stage
        voice = await self._voice.admit(channel, state.user_id, state.session_id)

        def tell() -> None:
            self._tell_state(state)
            self._tell_server(voice, voice.endpoint)

        self._in_order(order, tell, line, code, gap_ms)

    async def renew(self, state: VoiceState, code: int, null_ms: int | None = None) -> None:
        """Fresh credentials for whoever is in a call; with `null_ms` there is no voice server for so long."""
        line = self._voice.line(state.guild, state.user_id)
        channel = self._world.guilds[state.guild].channels[state.channel]
        voice = await self._voice.admit(channel, state.user_id, state.session_id)
        self._tell_server_by_and_by(voice, null_ms)
        if line is not None:
            self._voice.expel(line, code)

    async def relocate(self, guild: str, code: int, null_ms: int | None) -> None:
        """The guild's calls go to another voice server."""
        await self._voice.relocate(guild)
        for state in self._world.states_in(guild):
            if state.user_id in self._world.guilds[guild].bots:
                await self.renew(state, code, null_ms)

    # helpers

    def _keeps(self, state: VoiceState, session: MainSession) -> bool:
        """Whether joining where one is changes nothing: so it is as long as the voice session lives."""
        if self.faults(state.guild).ignore_rejoin:
            return True
        line = self._voice.line(state.guild, state.user_id)
        return line is not None and self._voice.is_live(line) and state.session_id == session.session_id

    def _set_flags(self, state: VoiceState, wanted: VoiceStateUpdate) -> None:
        if (state.self_mute, state.self_deaf) != (wanted.self_mute, wanted.self_deaf):
            state.self_mute, state.self_deaf = wanted.self_mute, wanted.self_deaf
            self._tell_state(state)

    async def _join(self, session: MainSession, channel: Channel, wanted: VoiceStateUpdate) -> None:
        fault = self.faults(channel.guild).take() or JoinFault(channel.guild)
        if fault.answer == "nothing":
            return
        line = self._voice.line(channel.guild, session.user_id)
        state = VoiceState(
            channel.guild,
            channel.channel,
            session.user_id,
            session.session_id,
            wanted.self_mute,
            wanted.self_deaf,
            suppress=channel.stage,
        )
        self._world.put(state)
        voice = await self._voice.admit(channel, session.user_id, session.session_id)

        def tell_state() -> None:
            self._tell_state(state)

        def tell_server() -> None:
            self._tell_server_by_and_by(voice, fault.null_ms)

        tellers: dict[str, list[Callable[[], None]]] = {
            "both": [tell_state, tell_server],
            "swapped": [tell_server, tell_state],
            "state_only": [tell_state],
            "server_only": [tell_server],
        }
        for tell in tellers[fault.answer]:
            self._after(fault.delay_ms, tell)
        self._expel_later(line)

    def _leave(self, state: VoiceState) -> None:
        line = self._voice.line(state.guild, state.user_id)
        self._forget(state)
        self._tell_state(state, left=True)
        self._expel_later(line)

    def _forget(self, state: VoiceState) -> None:
        self._world.drop(state)
        self._voice.revoke(state.guild, state.user_id)

    def _expel_later(self, line: VoiceSession | None) -> None:
        if line is not None:
            self._after(_NEWS_MS, lambda: self._voice.expel(line, DISCONNECTED))

    def _in_order(
        self, order: CloseOrder, tell: Callable[[], None], line: VoiceSession | None, code: int, gap_ms: int
    ) -> None:
        def close() -> None:
            if line is not None:
                self._voice.expel(line, code)

        steps = {
            "events_first": [tell, close],
            "close_first": [close, tell],
            "events_only": [tell],
            "close_only": [close],
        }[order]
        for number, step in enumerate(steps):
            self._after(number * gap_ms, step)

    def _tell_state(self, state: VoiceState, *, left: bool = False) -> None:
        shape = shapes.voice_state(state, left=left)
        self._teller.tell(state.guild, "VOICE_STATE_UPDATE", shape, Intent.GUILD_VOICE_STATES)

    def _tell_server_by_and_by(self, voice: Voice, null_ms: int | None) -> None:
        if null_ms is None:
            self._tell_server(voice, voice.endpoint)
            return
        self._tell_server(voice, None)
        self._after(null_ms, lambda: self._tell_server(voice, voice.endpoint))

    def _tell_server(self, voice: Voice, endpoint: str | None) -> None:
        update = {"token": voice.token, "guild_id": voice.guild, "endpoint": endpoint}
        self._teller.tell(voice.guild, "VOICE_SERVER_UPDATE", update, only=voice.user_id)

    def _after(self, delay_ms: int, step: Callable[[], None]) -> None:
        """Now, or later if the emulator still runs then."""
        if not delay_ms:
            step()
            return
        if self._closed:
            return

        def run() -> None:
            self._later.discard(handle)
            step()

        handle = asyncio.get_running_loop().call_later(delay_ms / 1000, run)
        self._later.add(handle)
