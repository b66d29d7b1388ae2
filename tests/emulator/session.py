"""Guilds and their voice sessions as the server knows them."""

import asyncio
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.emulator.faults import PendingFaults
from tests.emulator.messages import Outbox
from tests.emulator.records import CloseSide, SessionState, Voice
from tests.emulator.transport import Opener
from tests.emulator.wire import ABNORMAL_CLOSURE, RESUMABLE_SERVER_CLOSES

if TYPE_CHECKING:
    from tests.emulator.conversation import Conversation
    from tests.emulator.endpoint import Endpoint

_SPEAKING_CHANGES_KEPT = 64


@dataclass(slots=True)
class Closing:
    """How a WebSocket ended."""

    code: int
    by: CloseSide
    clean: bool

    @property
    def resumable(self) -> bool:
        """Whether the session may be resumed after it (reference section 2.6)."""
        if self.by == "client":
            return self.code not in (1000, 1001)
        return self.code in RESUMABLE_SERVER_CLOSES or 1001 < self.code < 4000


@dataclass(slots=True, eq=False)
class VoiceSession:
    """One voice session from Identify to its end. `row` is its place in the ledger."""

    guild: "Guild"
    row: int
    ssrc: int
    modes: list[str]
    outbox: Outbox = field(default_factory=Outbox)
    conversation: "Conversation | None" = None
    discovered: tuple[str, int] | None = None
    mode: str | None = None
    opener: Opener | None = None
    speaking: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_SPEAKING_CHANGES_KEPT))
    resumed: int = 0
    closing: Closing | None = None
    ended: bool = False
    early_check: asyncio.TimerHandle | None = None
    expiry: asyncio.TimerHandle | None = None

    @property
    def state(self) -> SessionState:
        """Live with a WebSocket, lost while it may be resumed, else ended."""
        if self.ended:
            return "ended"
        return "live" if self.conversation is not None else "lost"

    @property
    def connected(self) -> bool:
        """Whether it has a WebSocket and was given its key."""
        return self.conversation is not None and self.opener is not None

    def note_speaking(self, flags: int) -> None:
        """Remember a Speaking message with the time it came."""
        self.speaking.append((time.time_ns(), flags))

    def stop_timers(self) -> None:
        """Let no timer of this session fire any more."""
        for timer in (self.early_check, self.expiry):
            if timer is not None:
                timer.cancel()
        self.early_check = self.expiry = None


@dataclass(slots=True, eq=False)
class Guild:
    """One guild, its newest credentials and its sessions, oldest first."""

    guild: str
    channel: str
    user_id: str
    listener_id: str
    endpoint: "Endpoint"
    sampled: bool
    session_id: str = ""
    token: str = ""
    faults: PendingFaults = field(default_factory=PendingFaults)
    sessions: list[VoiceSession] = field(default_factory=list)
    heard_before: bool = False
    """Whether a session that was forgotten for want of room had been heard."""

    @property
    def current(self) -> VoiceSession | None:
        """The session that has not ended, if there is one."""
        return next((session for session in reversed(self.sessions) if not session.ended), None)

    def renew(self, channel: str) -> None:
        """Draw fresh credentials."""
        self.channel = channel
        self.session_id = secrets.token_hex(16)
        self.token = secrets.token_hex(16)

    def voice(self) -> Voice:
        """Its credentials as a client is given them."""
        name = f"{self.endpoint.address}:{self.endpoint.port}"
        return Voice(self.guild, self.channel, self.user_id, self.session_id, self.token, name)


def lost_connection() -> Closing:
    """A WebSocket that went away without a close frame."""
    return Closing(ABNORMAL_CLOSURE, "client", clean=False)
