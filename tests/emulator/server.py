"""The voice servers' common memory: guilds, credentials, sessions."""

import asyncio
import secrets
from collections import deque
from collections.abc import Iterable
from ipaddress import IPv4Address

from tests.emulator.conversation import Conversation
from tests.emulator.datagrams import peer_address, peer_key
from tests.emulator.endpoint import Endpoint, Endpoints
from tests.emulator.faults import (
    CloseFault,
    DiscoveryLoseFirstFault,
    DiscoverySilentFault,
    DropFault,
    Fault,
    ModesFault,
    NoAckFault,
    RejectFault,
)
from tests.emulator.ledger import COUNTERS
from tests.emulator.messages import Identify, Refused, Resume, SelectProtocol
from tests.emulator.recorder import Recorder
from tests.emulator.records import Voice, WantedVoice
from tests.emulator.session import Closing, Guild, VoiceSession
from tests.emulator.transport import opener_for
from tests.emulator.wire import (
    LIVE_MODES,
    MODE_FROM_THE_FUTURE,
    Close,
    discovery_response,
    discovery_ssrc,
)

BOT_USER_ID = "1000000000000000001"
_LISTENER_ID_BASE = 2_000_000_000_000_000_000
_KEY_BYTES = 32
_SPEAKING_GRACE_S = 0.25
_RESUME_WINDOW_S = 60.0


class NoSuchGuildError(LookupError):
    """No credentials were ever issued for this guild."""


class NotConnectedError(RuntimeError):
    """The guild has no WebSocket that could be closed."""


class FullError(RuntimeError):
    """More guilds or sessions than the emulator has room for."""


class Rows:
    """Ledger rows of one kind: free ones first, then those of the sessions that ended longest ago."""

    def __init__(self, rows: Iterable[int]) -> None:
        self._free = deque(rows)
        self._ended: deque[VoiceSession] = deque()

    def take(self) -> tuple[int, VoiceSession | None]:
        """A row, and the ended session that has to give it up. Raises: FullError."""
        if self._free:
            return self._free.popleft(), None
        if not self._ended:
            raise FullError("no room for another voice session")
        oldest = self._ended.popleft()
        return oldest.row, oldest

    def ended(self, session: VoiceSession) -> None:
        """The session may give up its row when it is needed."""
        self._ended.append(session)

    def forget_ended(self) -> list[VoiceSession]:
        """Free the rows of all ended sessions and name these."""
        forgotten = list(self._ended)
        self._ended.clear()
        self._free.extend(session.row for session in forgotten)
        return forgotten


class VoiceServer:
    """Knows who may connect and what is going on; one for all endpoints."""

    def __init__(self, endpoints: Endpoints, sample: int, max_guilds: int, heartbeat_interval_ms: int) -> None:
        self.guilds: dict[str, Guild] = {}
        self.retired = dict.fromkeys(COUNTERS, 0)
        self.heartbeat_interval_ms = heartbeat_interval_ms
        self._endpoints = endpoints
        self._sample = sample
        self._max_guilds = max_guilds
        self._by_ssrc: dict[int, VoiceSession] = {}
        self._stopping = False
        self._recorder: Recorder
        self._sampled_rows: Rows
        self._brief_rows: Rows

    def use(self, recorder: Recorder) -> None:
        """Measure with this recorder; must come before anything else."""
        ledger = recorder.ledger
        self._recorder = recorder
        self._sampled_rows = Rows(range(ledger.sampled_rows))
        self._brief_rows = Rows(range(ledger.sampled_rows, ledger.rows))

    # credentials

    async def issue(self, wanted: WantedVoice) -> Voice:
        """Fresh credentials for a guild; older ones are void. Raises: FullError."""
        guild = self.guilds.get(wanted.guild)
        if guild is None:
            if len(self.guilds) >= self._max_guilds:
                raise FullError(f"no room for more than {self._max_guilds} guilds")
            endpoint = await self._endpoints.for_next_guild()
            self._recorder.watch(endpoint)
            number = len(self.guilds)
            listener = str(_LISTENER_ID_BASE + number)
            sampled = number < self._sample
            guild = Guild(wanted.guild, wanted.channel, BOT_USER_ID, listener, endpoint, sampled)
            self.guilds[wanted.guild] = guild
        self._replace(guild)
        guild.renew(wanted.channel)
        return guild.voice()

    def guild(self, name: str) -> Guild:
        """Raises: NoSuchGuildError."""
        try:
            return self.guilds[name]
        except KeyError as error:
            raise NoSuchGuildError(f"no credentials were issued for guild {name!r}") from error

    # the life of a session

    def identify(self, conversation: Conversation, endpoint: Endpoint, message: Identify) -> VoiceSession:
        """Begin a session. Raises: Refused."""
        guild = self._authenticate(message.server_id, endpoint, message.session_id, message.token)
        if message.user_id != guild.user_id:
            raise Refused(Close.SESSION_INVALID, "unknown user")
        guild.faults.check_identify()
        self._replace(guild)
        rows = self._rows_for(guild)
        try:
            row, displaced = rows.take()
        except FullError as error:
            raise Refused(Close.RATE_LIMITED, str(error)) from error
        if displaced is not None:
            self._retire(displaced)
        modes = guild.faults.take_modes([*LIVE_MODES, MODE_FROM_THE_FUTURE])
        session = VoiceSession(guild, row, self._free_ssrc(), modes, conversation=conversation)
        guild.sessions.append(session)
        self._by_ssrc[session.ssrc] = session
        self._recorder.add(session)
        return session

    def resume(self, conversation: Conversation, endpoint: Endpoint, message: Resume) -> tuple[VoiceSession, list[str]]:
        """Go on with a session; also gives the messages its client missed. Raises: Refused."""
        guild = self._authenticate(message.server_id, endpoint, message.session_id, message.token)
        session = guild.current
        if session is None:
            raise Refused(Close.SESSION_INVALID, "nothing to resume")
        missed = session.outbox.missed(message.seq_ack)
        if missed is None:
            raise Refused(Close.SESSION_INVALID, "seq_ack is too old or unknown")
        older, session.conversation = session.conversation, conversation
        if older is not None:
            older.want_close(Close.SESSION_INVALID, "Session is no longer valid.")
        if session.expiry is not None:
            session.expiry.cancel()
            session.expiry = None
        session.resumed += 1
        return session, missed

    def select(self, session: VoiceSession, message: SelectProtocol) -> bytes:
        """Check op 1, draw a key and let the chosen address send. Raises: Refused."""
        chosen = message.data
        if message.protocol != "udp":
            raise Refused(Close.UNKNOWN_PROTOCOL, "Unknown protocol.")
        if chosen.mode not in session.modes or chosen.mode not in LIVE_MODES:
            raise Refused(Close.UNKNOWN_MODE, "Unknown encryption mode.")
        if session.discovered != (chosen.address, chosen.port):
            raise Refused(Close.BAD_REQUEST, "not the address that IP discovery told")
        self._recorder.drain()
        key = secrets.token_bytes(_KEY_BYTES)
        session.mode = chosen.mode
        session.opener = opener_for(chosen.mode, key)
        self._recorder.select_peer(session, peer_key(chosen.address, chosen.port))
        return key

    def speaking(self, session: VoiceSession, flags: int) -> None:
        """The client announced its ssrc."""
        session.note_speaking(flags)
        self._recorder.allow(session)
        if session.early_check is not None:
            session.early_check.cancel()
            session.early_check = None

    def left(self, conversation: Conversation, session: VoiceSession, closing: Closing) -> None:
        """A WebSocket of the session closed; the session may outlive it."""
        if session.conversation is not conversation:
            return
        session.closing = closing
        session.conversation = None
        if self._stopping or not closing.resumable:
            self._end(session)
        elif not session.ended:
            session.expiry = asyncio.get_running_loop().call_later(_RESUME_WINDOW_S, self._end, session)

    def disconnect_all(self) -> list[Conversation]:
        """Ask every client to go away; gives the conversations that are to end."""
        self._stopping = True
        open_ones = []
        for session in self._live():
            session.stop_timers()
            if session.conversation is not None:
                session.conversation.want_close(Close.GOING_AWAY, "The server stops.")
                open_ones.append(session.conversation)
        return open_ones

    # measurements

    def forget(self) -> None:
        """Drop all measurements and all ended sessions."""
        for rows in (self._sampled_rows, self._brief_rows):
            for session in rows.forget_ended():
                session.guild.sessions.remove(session)
        self._recorder.forget()
        self.retired = dict.fromkeys(COUNTERS, 0)
        for guild in self.guilds.values():
            guild.heard_before = False

    # the recorder's listener

    def discovery_asked(self, endpoint: Endpoint, request: bytes, peer: int) -> None:
        """Answer IP discovery with the observed address, unless a fault forbids it."""
        ssrc = discovery_ssrc(request)
        session = None if ssrc is None else self._by_ssrc.get(ssrc)
        if ssrc is None or session is None or session.guild.endpoint is not endpoint:
            return
        if session.guild.faults.loses_discovery():
            return
        address, port = peer_address(peer)
        if not IPv4Address(address).is_loopback:
            return
        session.discovered = (address, port)
        endpoint.udp.sendto(discovery_response(ssrc, address, port), (address, port))

    def spoke_early(self, session: VoiceSession) -> None:
        """RTP before the first Speaking message: it has a moment to arrive (reference section 10)."""
        if session.early_check is None:
            loop = asyncio.get_running_loop()
            session.early_check = loop.call_later(_SPEAKING_GRACE_S, self._refuse_early, session)

    def spoke_from_elsewhere(self, session: VoiceSession) -> None:
        """RTP that is not from the address selected for the session."""
        self._throw_out(session, "RTP from an address that was not selected")

    def _refuse_early(self, session: VoiceSession) -> None:
        counts = self._recorder.ledger.counts
        counts["rtp_before_speaking"][session.row] += counts["packets"][session.row]
        self._throw_out(session, "RTP before Speaking")

    # faults

    def apply(self, fault: Fault) -> None:
        """Put a fault into force. Raises: NoSuchGuildError, NotConnectedError."""
        guild = self.guild(fault.guild)
        match fault:
            case CloseFault(code=code):
                self._conversation(guild).want_close(code, "closed on demand")
            case DropFault():
                self._conversation(guild).drop()
            case DiscoverySilentFault(on=on):
                guild.faults.discovery_silent = on
            case DiscoveryLoseFirstFault(n=n):
                guild.faults.discovery_lose = n
            case ModesFault(modes=modes):
                guild.faults.modes = modes
            case RejectFault(code=code):
                guild.faults.reject = code
            case NoAckFault(on=on):
                guild.faults.no_ack = on

    # helpers

    @staticmethod
    def _conversation(guild: Guild) -> Conversation:
        session = guild.current
        if session is None or session.conversation is None:
            raise NotConnectedError(f"guild {guild.guild!r} has no open WebSocket")
        return session.conversation

    def _authenticate(self, server_id: str, endpoint: Endpoint, session_id: str, token: str) -> Guild:
        guild = self.guilds.get(server_id)
        if guild is None or guild.endpoint is not endpoint or session_id != guild.session_id:
            raise Refused(Close.SESSION_INVALID, "Session is no longer valid.")
        if token != guild.token:
            raise Refused(Close.AUTHENTICATION_FAILED, "Authentication failed.")
        return guild

    def _free_ssrc(self) -> int:
        while True:
            ssrc = secrets.randbelow(2**32 - 1) + 1
            if ssrc not in self._by_ssrc:
                return ssrc

    def _live(self) -> list[VoiceSession]:
        return list(self._by_ssrc.values())

    def _rows_for(self, guild: Guild) -> Rows:
        return self._sampled_rows if guild.sampled else self._brief_rows

    def _replace(self, guild: Guild) -> None:
        """End what the guild had, because newer credentials or a newer Identify came."""
        session = guild.current
        if session is None:
            return
        if session.conversation is not None:
            session.conversation.want_close(Close.SESSION_INVALID, "Session is no longer valid.")
        self._end(session)

    def _throw_out(self, session: VoiceSession, reason: str) -> None:
        if session.conversation is not None:
            session.conversation.want_close(Close.BAD_REQUEST, reason)
        else:
            asyncio.get_running_loop().call_soon(self._end, session)

    def _end(self, session: VoiceSession) -> None:
        if session.ended:
            return
        self._recorder.drain()  # what the client sent before it closed is still in the socket
        session.ended = True
        session.stop_timers()
        self._recorder.remove(session)
        del self._by_ssrc[session.ssrc]
        self._rows_for(session.guild).ended(session)

    def _retire(self, session: VoiceSession) -> None:
        """Keep the sums of a session whose row is needed."""
        for name, counter in self._recorder.ledger.counts.items():
            self.retired[name] += int(counter[session.row])
        if self._recorder.ledger.counts["audio_packets"][session.row]:
            session.guild.heard_before = True
        session.guild.sessions.remove(session)
