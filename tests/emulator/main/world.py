"""Bots, guilds, channels and who is where: what the REST interface and the main gateway tell about."""

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.emulator.main.records import BotRequest, ChannelPlan
from tests.emulator.main.wire import shard_of

_FIRST_USER_ID = 1_100_000_000_000_000_000


class NoSuchBotError(LookupError):
    """No bot of this user id was made, or it has no such session."""


class NoSuchCallError(RuntimeError):
    """The user is in no call of this guild."""


@dataclass(slots=True, eq=False)
class Account:
    """A bot's user: how it logs in, and what it may do."""

    user_id: str
    token: str = field(repr=False)
    privileged: int
    guilds: set[str] = field(default_factory=set)
    identifies: int = 0
    """Since the last renewal of its daily limit."""


@dataclass(slots=True, eq=False)
class Channel:
    """A channel with voice."""

    guild: str
    plan: ChannelPlan
    status: str = ""
    full: bool = False

    @property
    def channel(self) -> str:
        """Its id."""
        return self.plan.channel

    @property
    def stage(self) -> bool:
        """Whether those who join are an audience at first."""
        return self.plan.kind == "stage"


@dataclass(slots=True, eq=False)
class Guild:
    """A guild with its bots."""

    guild: str
    channels: dict[str, Channel] = field(default_factory=dict)
    bots: set[str] = field(default_factory=set)
    unavailable: bool = False


@dataclass(slots=True, eq=False)
class VoiceState:
    """Where a user is; `session_id` is that of the main session which asked for it."""

    guild: str
    channel: str
    user_id: str
    session_id: str
    self_mute: bool
    self_deaf: bool
    suppress: bool
    request_to_speak: str | None = None


class World:
    """All of it, by id."""

    def __init__(self) -> None:
        self.guilds: dict[str, Guild] = {}
        self._states: dict[str, dict[str, VoiceState]] = {}
        self._accounts: dict[str, Account] = {}
        self._by_token: dict[str, Account] = {}

    def admit_bot(self, wanted: BotRequest) -> tuple[Account, list[Guild]]:
        """Make a bot, or let one into more guilds; also gives the guilds it was not in before."""
        user_id = wanted.user_id or str(_FIRST_USER_ID + len(self._accounts))
        account = self._accounts.get(user_id)
        if account is None:
            account = Account(user_id, secrets.token_urlsafe(48), wanted.intents)
            self._accounts[user_id] = account
            self._by_token[account.token] = account
        entered = []
        for plan in wanted.guilds:
            guild = self.guilds.setdefault(plan.guild, Guild(plan.guild))
            for channel in plan.channels:
                known = guild.channels.setdefault(channel.channel, Channel(guild.guild, channel))
                known.plan = channel
            if user_id not in guild.bots:
                entered.append(guild)
            self.let_in(account, guild)
        return account, entered

    def let_in(self, account: Account, guild: Guild) -> None:
        """The bot is a member of the guild."""
        guild.bots.add(account.user_id)
        account.guilds.add(guild.guild)

    def expel_bot(self, account: Account, guild: Guild) -> None:
        """The bot is no member any more."""
        guild.bots.discard(account.user_id)
        account.guilds.discard(guild.guild)

    def revoke_token(self, account: Account) -> None:
        """The bot's token is worth nothing any more."""
        self._by_token.pop(account.token, None)

    def account(self, user_id: str) -> Account:
        """Raises: NoSuchBotError."""
        try:
            return self._accounts[user_id]
        except KeyError as error:
            raise NoSuchBotError(f"there is no bot with user id {user_id!r}") from error

    def accounts(self) -> Iterable[Account]:
        """All bots."""
        return self._accounts.values()

    def log_in(self, token: str) -> Account | None:
        """The bot of a token, with or without the word that introduces it."""
        return self._by_token.get(token.removeprefix("Bot "))

    def channel(self, channel_id: str) -> Channel | None:
        """A channel of any guild."""
        found = (guild.channels.get(channel_id) for guild in self.guilds.values())
        return next((channel for channel in found if channel is not None), None)

    def guilds_of(self, account: Account, shard: tuple[int, int]) -> list[Guild]:
        """The guilds that a shard of the bot is told about, in the order of their ids."""
        index, shards = shard
        mine = (guild for guild in account.guilds if shard_of(guild, shards) == index)
        return [self.guilds[guild] for guild in sorted(mine, key=int)]

    def state(self, guild: str, user_id: str) -> VoiceState | None:
        """Where a user is."""
        return self._states.get(guild, {}).get(user_id)

    def put(self, state: VoiceState) -> None:
        """A user is somewhere."""
        self._states.setdefault(state.guild, {})[state.user_id] = state

    def drop(self, state: VoiceState) -> None:
        """A user left, unless there is a newer state."""
        if self.state(state.guild, state.user_id) is state:
            del self._states[state.guild][state.user_id]

    def states_in(self, guild: str) -> list[VoiceState]:
        """Everybody in the guild's calls."""
        return list(self._states.get(guild, {}).values())

    def all_states(self) -> Iterator[VoiceState]:
        """Everybody in any call."""
        return (state for states in self._states.values() for state in states.values())

    def is_full(self, channel: Channel) -> bool:
        """Whether nobody else may join."""
        limit = channel.plan.user_limit
        inside = sum(state.channel == channel.channel for state in self.states_in(channel.guild))
        return channel.full or (limit > 0 and inside >= limit)
