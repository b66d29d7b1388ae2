"""The main gateway's common memory: sessions, limits, who is told what."""

import asyncio
from collections import Counter

from tests.emulator.main import shapes, wire
from tests.emulator.main.calls import Calls
from tests.emulator.main.conversation import InvalidSession, MainConversation
from tests.emulator.main.records import GatewayLimits, MainSessionRow
from tests.emulator.main.session import MainSession
from tests.emulator.main.wire import Close, Intent, Op
from tests.emulator.main.world import Account, Guild, NoSuchBotError, World
from tests.emulator.messages import Refused

_DAY_S = 86_400.0


class MainGateway:
    """Knows which sessions there are; one for all addresses it is reached at."""

    def __init__(self, world: World, limits: GatewayLimits) -> None:
        self.limits = limits
        self.resume_url = ""
        self.calls: Calls
        self.identifies = 0
        self.resumes = 0
        self.refused: Counter[int] = Counter()
        self._world = world
        self._sessions: dict[str, MainSession] = {}
        self._conversations: set[MainConversation] = set()
        self._identified_at: dict[tuple[str, int], float] = {}
        self._day_began: float | None = None
        self._stopping = False

    # the life of a session

    def identify(self, conversation: MainConversation, message: wire.Identify) -> MainSession:
        """Begin a session and tell it what there is. Raises: Refused, InvalidSession."""
        account = self._world.log_in(message.token)
        if account is None:
            raise Refused(Close.AUTHENTICATION_FAILED, "Authentication failed.")
        self._check_shard(account, message.shard)
        if not 0 <= message.intents <= wire.ANY_INTENT:
            raise Refused(Close.INVALID_INTENTS, "Invalid intent(s).")
        if message.intents & wire.PRIVILEGED & ~account.privileged:
            raise Refused(Close.DISALLOWED_INTENTS, "Disallowed intent(s).")
        self._count_identify(account, message.shard[0])
        session = MainSession(account, message.shard, message.intents, self.limits.replay_events)
        self._sessions[session.session_id] = session
        session.conversation = conversation
        self.identifies += 1
        guilds = self._world.guilds_of(account, message.shard)
        names = [guild.guild for guild in guilds]
        url = self.resume_url
        session.dispatch("READY", shapes.ready(account, session.session_id, session.shard, names, url))
        for guild in guilds:
            self._tell_guild(session, guild)
        return session

    def resume(self, conversation: MainConversation, message: wire.Resume) -> MainSession:
        """Go on with a session and tell what was missed. Raises: Refused, InvalidSession."""
        account = self._world.log_in(message.token)
        if account is None:
            raise Refused(Close.AUTHENTICATION_FAILED, "Authentication failed.")
        session = self._sessions.get(message.session_id)
        if session is None or session.account is not account:
            raise InvalidSession
        if message.seq > session.sequence or message.seq < 0:
            self.end(session)
            raise Refused(Close.INVALID_SEQUENCE, "Invalid seq.")
        missed = session.missed(message.seq)
        if missed is None or session.refuse_resume:
            self.end(session)
            raise InvalidSession
        older, session.conversation = session.conversation, conversation
        if older is not None:
            older.want_close(Close.UNKNOWN_ERROR, "Resumed elsewhere.")
        session.stop_expiry()
        session.resumed += 1
        self.resumes += 1
        for text in missed:
            conversation.post(text)
        session.dispatch("RESUMED", {"_trace": []})
        return session

    def left(self, conversation: MainConversation, session: MainSession, code: int, *, by_client: bool) -> None:
        """A WebSocket of the session closed; the session may outlive it."""
        if session.conversation is not conversation:
            return
        session.conversation = None
        final = wire.CLIENT_CLOSES_THAT_END if by_client else wire.SERVER_CLOSES_THAT_END
        if self._stopping or code in final:
            self.end(session)
        elif session.session_id in self._sessions:
            loop = asyncio.get_running_loop()
            session.expiry = loop.call_later(self.limits.resume_window_s, self.end, session)

    def end(self, session: MainSession) -> None:
        """Nothing of the session can be resumed; its calls end with it."""
        if self._sessions.pop(session.session_id, None) is not None:
            session.stop_expiry()
            self.calls.session_ended(session)

    def invalidate(self, session: MainSession, *, resumable: bool) -> None:
        """Tell the client that its session is invalid."""
        if session.conversation is not None:
            session.conversation.post(wire.write(Op.INVALID_SESSION, data=resumable))
        if not resumable:
            self.end(session)

    def opened(self, conversation: MainConversation) -> None:
        """A WebSocket opened."""
        self._conversations.add(conversation)

    def closed(self, conversation: MainConversation) -> None:
        """A WebSocket closed."""
        self._conversations.discard(conversation)

    def disconnect_all(self) -> list[MainConversation]:
        """Ask every client to go away; gives the conversations that are to end."""
        self._stopping = True
        for conversation in self._conversations:
            conversation.want_close(Close.GOING_AWAY, "The server stops.")
        for session in list(self._sessions.values()):
            session.stop_expiry()
        return list(self._conversations)

    def session(self, user_id: str, shard: int) -> MainSession:
        """The newest session of a shard that has not ended. Raises: NoSuchBotError."""
        account = self._world.account(user_id)
        mine = (one for one in self._sessions.values() if one.account is account and one.shard[0] == shard)
        newest = next(reversed(list(mine)), None)
        if newest is None:
            raise NoSuchBotError(f"bot {user_id!r} has no session on shard {shard}")
        return newest

    def note_refused(self, code: int) -> None:
        """A client was at fault; an invalid session counts as its opcode."""
        self.refused[code] += 1

    def rows(self) -> list[MainSessionRow]:
        """All sessions that have not ended, oldest first."""
        return [
            MainSessionRow(
                user_id=session.user_id,
                shard=session.shard,
                connected=session.conversation is not None,
                intents=session.intents,
                sequence=session.sequence,
                resumed=session.resumed,
                commands=0 if session.conversation is None else session.conversation.commands,
            )
            for session in self._sessions.values()
        ]

    def identifies_left(self, account: Account) -> tuple[int, int]:
        """How many are left, and in how many milliseconds all are given back."""
        left_ms = self._renew_day()
        return max(self.limits.identifies_per_day - account.identifies, 0), left_ms

    # events

    def tell(self, guild: str, event: str, data: object, intent: Intent | None = None, only: str | None = None) -> None:
        """Dispatch to the sessions concerned; `only` names the one user who is to hear it."""
        for session in self._sessions.values():
            if session.hears_of(guild, intent) and only in (None, session.user_id):
                session.dispatch(event, data)

    def tell_new_guild(self, guild: Guild, account: Account) -> None:
        """The bot came into a guild, or the guild is back."""
        for session in self._sessions.values():
            if session.account is account and session.hears_of(guild.guild, None):
                self._tell_guild(session, guild)

    def tell_members(self, session: MainSession, message: wire.RequestGuildMembers) -> None:
        """Answer op 8 with the bot alone, in one chunk."""
        guild = str(message.guild_id)
        if not session.hears_of(guild, None):
            return
        chunk = {
            "guild_id": guild,
            "members": [shapes.member(session.user_id)],
            "chunk_index": 0,
            "chunk_count": 1,
            "not_found": [],
            "nonce": message.nonce,
        }
        session.dispatch("GUILD_MEMBERS_CHUNK", chunk)

    def _tell_guild(self, session: MainSession, guild: Guild) -> None:
        if session.intents & Intent.GUILDS and not guild.unavailable:
            states = self._world.states_in(guild.guild)
            session.dispatch("GUILD_CREATE", shapes.guild(guild, states, session.account))

    # limits

    def _check_shard(self, account: Account, shard: tuple[int, int]) -> None:
        """Raises: Refused."""
        index, shards = shard
        if not 0 <= index < shards:
            raise Refused(Close.INVALID_SHARD, "Invalid shard.")
        if len(self._world.guilds_of(account, shard)) > self.limits.guilds_per_shard:
            raise Refused(Close.SHARDING_REQUIRED, "Sharding required.")

    def _count_identify(self, account: Account, shard: int) -> None:
        """Raises: InvalidSession: too soon. Refused: too many in a day, which costs the token."""
        self._renew_day()
        if account.identifies >= self.limits.identifies_per_day:
            self._world.revoke_token(account)
            raise Refused(Close.AUTHENTICATION_FAILED, "Too many identifies; the token was reset.")
        bucket = (account.user_id, shard % self.limits.max_concurrency)
        now = asyncio.get_running_loop().time()
        before = self._identified_at.get(bucket)
        if before is not None and now - before < self.limits.identify_every_s:
            raise InvalidSession
        account.identifies += 1
        self._identified_at[bucket] = now

    def _renew_day(self) -> int:
        """Begin another day if it is time; gives the milliseconds left of it."""
        now = asyncio.get_running_loop().time()
        if self._day_began is None or now - self._day_began >= _DAY_S:
            self._day_began = now
            for account in self._world.accounts():
                account.identifies = 0
        return int((self._day_began + _DAY_S - now) * 1000)
