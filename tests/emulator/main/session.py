"""Main sessions: what outlives a connection."""

import asyncio
import secrets
from collections import deque
from typing import TYPE_CHECKING

from tests.emulator.main.wire import Intent, shard_of, write_event
from tests.emulator.main.world import Account

if TYPE_CHECKING:
    from tests.emulator.main.conversation import MainConversation


class MainSession:
    """One shard of a bot from Identify to its end; numbers events and keeps them for a resume."""

    def __init__(self, account: Account, shard: tuple[int, int], intents: int, replay_events: int) -> None:
        self.session_id = secrets.token_hex(16)
        self.account = account
        self.shard = shard
        self.intents = intents
        self.sequence = 0
        self.resumed = 0
        self.conversation: MainConversation | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self.no_ack = False
        self.refuse_resume = False
        self._kept: deque[str] = deque(maxlen=replay_events)

    @property
    def user_id(self) -> str:
        """The bot."""
        return self.account.user_id

    def hears_of(self, guild: str, intent: Intent | None) -> bool:
        """Whether an event of this guild is for this session."""
        wanted = intent is None or self.intents & intent
        return bool(wanted) and guild in self.account.guilds and shard_of(guild, self.shard[1]) == self.shard[0]

    def dispatch(self, event: str, data: object) -> None:
        """Number and keep an event, and send it if there is a connection."""
        self.sequence += 1
        text = write_event(event, data, self.sequence)
        self._kept.append(text)
        if self.conversation is not None:
            self.conversation.post(text)

    def missed(self, sequence: int) -> list[str] | None:
        """Events after this one, or None where some of them are forgotten."""
        count = self.sequence - sequence
        if not 0 <= count <= len(self._kept):
            return None
        return list(self._kept)[len(self._kept) - count :]

    def stop_expiry(self) -> None:
        """It has a connection again, or has ended."""
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None
