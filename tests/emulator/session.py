"""Guilds and their voice sessions as the server knows them."""

import asyncio
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.emulator.dave.group import Told
from tests.emulator.downlink import Downlink
from tests.emulator.faults import PendingFaults
from tests.emulator.messages import Outbox
from tests.emulator.records import CloseSide, SessionState, Voice
from tests.emulator.transport import Opener
from tests.emulator.wire import ABNORMAL_CLOSURE, RESUMABLE_SERVER_CLOSES

if TYPE_CHECKING:
    from tests.emulator.channel import Channel
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
        return self.code in RESUMABLE_SERVER_CLOSES or self.code < 4000


@dataclass(slots=True, eq=False)
class VoiceSession:
    """One voice session from Identify to its end. `row` is its place in the ledger."""

    seat: "Seat"
    row: int
    ssrc: int
    modes: list[str]
    channel: "Channel"
    endpoint: "Endpoint"
    outbox: Outbox
    conversation: "Conversation | None" = None
    discovered: tuple[str, int] | None = None
    """The address that IP discovery told."""
    peer: tuple[str, int] | None = None
    """The address that IP discovery saw."""
    mode: str | None = None
    opener: Opener | None = None
    former_opener: Opener | None = None
    """Opens what was sealed before a key change, for a moment."""
    downlink: Downlink | None = None
    spoke: bool = False
    speaking: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_SPEAKING_CHANGES_KEPT))
    heartbeats: int = 0
    resumed: int = 0
    closing: Closing | None = None
    ended: bool = False
    dave_version: int = 0
    """Protocol version that op 4 told."""
    encrypted_from_ns: int | None = None
    """Since when no frame may come in the clear."""
    described_ns: int = 0
    """When op 4 was sent."""
    audible_ns: int = 0
    """Arrival of the first frame that a member could decrypt."""
    told: Told | None = None
    early_check: asyncio.TimerHandle | None = None
    expiry: asyncio.TimerHandle | None = None
    key_overlap: asyncio.TimerHandle | None = None

    @property
    def guild(self) -> "Guild":
        """The guild it is in."""
        return self.seat.guild

    @property
    def user(self) -> str:
        """Whose session it is."""
        return self.seat.user

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

    def send(self, op: int, data: object) -> None:
        """Send a sequenced JSON message, or keep it for the resume."""
        self._deliver(self.outbox.add(op, data))

    def send_binary(self, op: int, body: bytes) -> None:
        """Send a sequenced binary message, or keep it for the resume."""
        self._deliver(self.outbox.add_binary(op, body))

    def send_bytes(self, body: bytes) -> None:
        """Send a numbered binary frame of anything, or keep it for the resume."""
        self._deliver(self.outbox.add_bytes(body))

    def _deliver(self, message: str | bytes) -> None:
        if self.conversation is not None:
            self.conversation.say(message)

    def note_speaking(self, flags: int) -> None:
        """Remember a Speaking message with the time it came."""
        self.speaking.append((time.time_ns(), flags))

    def stop_timers(self) -> None:
        """Let no timer of this session fire any more."""
        for timer in (self.early_check, self.expiry, self.key_overlap):
            if timer is not None:
                timer.cancel()
        self.early_check = self.expiry = self.key_overlap = None


@dataclass(slots=True, eq=False)
class Seat:
    """What one user may connect with to one guild: its newest credentials, and what waits to go wrong for it."""

    guild: "Guild"
    user: str
    channel: "Channel"
    session_id: str = ""
    token: str = ""
    used: bool = False
    """A session began with these credentials."""
    faults: PendingFaults = field(default_factory=PendingFaults)

    @property
    def current(self) -> VoiceSession | None:
        """The session that has not ended, if there is one."""
        own = (session for session in reversed(self.guild.sessions) if session.seat is self)
        return next((session for session in own if not session.ended), None)

    def renew(self, channel: "Channel", session_id: str | None = None) -> None:
        """Draw fresh credentials; a main session has an id already."""
        self.channel, self.used = channel, False
        self.session_id = session_id or secrets.token_hex(16)
        self.token = secrets.token_hex(16)

    def voice(self) -> Voice:
        """The credentials as a client is given them."""
        channel = self.channel.channel
        return Voice(self.guild.guild, channel, self.user, self.session_id, self.token, self.guild.endpoint_name)


@dataclass(slots=True, eq=False)
class Guild:
    """One guild with its channels, the seats of its users, and their sessions, oldest first."""

    guild: str
    endpoint: "Endpoint"
    sampled: bool
    channels: dict[str, "Channel"] = field(default_factory=dict)
    seats: dict[str, Seat] = field(default_factory=dict)
    sessions: list[VoiceSession] = field(default_factory=list)
    heard_before: bool = False
    """Whether a session that was forgotten for want of room had been heard."""

    @property
    def endpoint_name(self) -> str:
        """Host and port of its voice server."""
        return f"{self.endpoint.address}:{self.endpoint.port}"

    def seat_of(self, session_id: str) -> Seat | None:
        """Whose newest credentials these are."""
        return next((seat for seat in self.seats.values() if seat.session_id == session_id), None)


def lost_connection() -> Closing:
    """A WebSocket that went away without a close frame."""
    return Closing(ABNORMAL_CLOSURE, "client", clean=False)
