"""The voice servers' common memory: guilds, credentials, sessions."""

import asyncio
import dataclasses
import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address

from tests.emulator.channel import Channel, NoSuchMemberError, TakenError
from tests.emulator.conversation import Conversation
from tests.emulator.datagrams import peer_address, peer_key
from tests.emulator.dave.external_sender import ExternalSender
from tests.emulator.dave.group import DaveOp
from tests.emulator.downlink import Bends, Downlink, Source
from tests.emulator.endpoint import Endpoint, Endpoints
from tests.emulator.faults import (
    AwayFault,
    BatchFault,
    ClientsUnlistedFault,
    CloseAtFault,
    CloseFault,
    CloseOnConnectFault,
    CommitTwiceFault,
    CredentialsOnceFault,
    DamageFault,
    DiscoveryLoseFirstFault,
    DiscoverySilentFault,
    DiscoveryWrongFault,
    DowngradeFault,
    DropFault,
    EpochRestartFault,
    ExecuteFault,
    ExternalSenderFirstFault,
    Fault,
    FirstSeqFault,
    ForeignWelcomeFault,
    GarbageFault,
    HelloIntervalFault,
    HelloLateFault,
    KickFault,
    ListingLateFault,
    ModesFault,
    NewKeyFault,
    NoAckFault,
    PathFault,
    PingSilentFault,
    ProposalFault,
    ReadyFault,
    RedirectFault,
    RejectFault,
    RtpFault,
    SaidFault,
    SayFault,
    ServerHeartbeatFault,
    SeveredFault,
    SpeakingRelayFault,
    StrayFault,
    TwoProposalsFault,
    UpgradeFault,
)
from tests.emulator.ledger import COUNTERS
from tests.emulator.members import GhostPool, Member, Utterance
from tests.emulator.messages import (
    FIRST_NUMBERED_VERSION,
    Identify,
    Outbox,
    Refused,
    Resume,
    SelectProtocol,
    write,
)
from tests.emulator.recorder import Recorder
from tests.emulator.records import ChannelKind, Voice, WantedMember, WantedSpeech, WantedVoice
from tests.emulator.session import Closing, Guild, Seat, VoiceSession
from tests.emulator.tone import FRAMES_PER_SECOND, second_of_tone
from tests.emulator.transport import opener_for, sealer_for
from tests.emulator.wire import (
    LIVE_MODES,
    MODE_FROM_THE_FUTURE,
    SILENCE_FRAME,
    Close,
    Op,
    discovery_response,
    discovery_ssrc,
    legacy_discovery_response,
    pong,
)

BOT_USER_ID = "1000000000000000001"
_MEMBER_ID_BASE = 3_000_000_000_000_000_000
_KEY_BYTES = 32
_SPEAKING_GRACE_S = 0.25
_KEY_OVERLAP_S = 0.25
_RESUME_WINDOW_S = 60.0
_SILENCE_AT_END = 5
_LAST_PORT = 2**16 - 1


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
        self._member_ssrcs: set[int] = set()
        self._member_numbers = itertools.count()
        self._external_sender = ExternalSender()
        self._ghost_pool = GhostPool()
        self._stopping = False
        self.member_moved: Callable[[Channel, str, bool], None] | None = None
        """Called when a member came to a channel, or left it."""
        self._recorder: Recorder
        self._sampled_rows: Rows
        self._brief_rows: Rows

    def use(self, recorder: Recorder) -> None:
        """Measure with this recorder; must come before anything else."""
        ledger = recorder.ledger
        self._recorder = recorder
        self._sampled_rows = Rows(range(ledger.sampled_rows))
        self._brief_rows = Rows(range(ledger.sampled_rows, ledger.rows))

    # guilds, channels, credentials

    async def issue(self, wanted: WantedVoice) -> Voice:
        """Fresh credentials of a user for a guild; older ones are void. Raises: FullError, TakenError."""
        guild = await self.open_guild(wanted.guild)
        channel = self.open_channel(guild, wanted.channel, wanted.kind, wanted.members, wanted.ghosts)
        return self.renew(guild, channel, wanted.user or BOT_USER_ID).voice()

    async def open_guild(self, name: str) -> Guild:
        """The guild of this name, new or known. Raises: FullError."""
        guild = self.guilds.get(name)
        if guild is None:
            if len(self.guilds) >= self._max_guilds:
                raise FullError(f"no room for more than {self._max_guilds} guilds")
            endpoint = await self._endpoints.for_next_guild()
            self._recorder.watch(endpoint)
            guild = self.guilds[name] = Guild(name, endpoint, sampled=len(self.guilds) < self._sample)
        return guild

    def open_channel(
        self,
        guild: Guild,
        name: str,
        kind: ChannelKind | None = None,
        members: int | None = None,
        ghosts: int | None = None,
    ) -> Channel:
        """The channel of this name, new or known, with at least so many members and ghosts.

        A new one is a stage unless told otherwise, and somebody is there to listen: a ghost, unless told otherwise.
        Raises: TakenError: it is known as one of another kind.
        """
        channel = guild.channels.get(name)
        if channel is None:
            if ghosts is None and not members:
                ghosts = 1
            channel = Channel(guild, name, kind or "stage", self._external_sender, self._ghost_pool, self._recorder)
            guild.channels[name] = channel
        elif kind is not None and kind != channel.kind:
            raise TakenError(f"channel {name!r} of guild {guild.guild!r} is of kind {channel.kind!r}")
        for _ in range((members or 0) - len(channel.members)):
            self.join_member(channel, WantedMember())
        channel.set_ghosts(max(ghosts or 0, len(channel.ghosts)))
        return channel

    def renew(self, guild: Guild, channel: Channel, user: str) -> Seat:
        """Fresh credentials; the session of the older ones ends."""
        seat = self.take_seat(guild, channel, user)
        self._replace(seat)
        seat.renew(channel)
        return seat

    @staticmethod
    def take_seat(guild: Guild, channel: Channel, user: str) -> Seat:
        """A user's seat, without credentials if it is a new one."""
        seat = guild.seats.get(user)
        if seat is None:
            seat = guild.seats[user] = Seat(guild, user, channel)
        return seat

    async def relocate(self, guild: Guild) -> None:
        """Fresh credentials of the guild are for another voice server from now on; sessions stay where they are."""
        guild.endpoint = await self._endpoints.other_than(guild.endpoint)
        self._recorder.watch(guild.endpoint)

    def guild(self, name: str) -> Guild:
        """Raises: NoSuchGuildError."""
        try:
            return self.guilds[name]
        except KeyError as error:
            raise NoSuchGuildError(f"no credentials were issued for guild {name!r}") from error

    def channel(self, guild_name: str, name: str | None = None) -> Channel:
        """A channel of a guild; None: where its bot was sent last. Raises: NoSuchGuildError."""
        guild = self.guild(guild_name)
        if name is None:
            return self.seat(guild_name, None).channel
        try:
            return guild.channels[name]
        except KeyError as error:
            raise NoSuchGuildError(f"guild {guild_name!r} has no channel {name!r}") from error

    def seat(self, guild_name: str, user: str | None) -> Seat:
        """A user's seat; None: the bot's, or else the first. Raises: NoSuchGuildError."""
        seats = self.guild(guild_name).seats
        if user is None:
            user = BOT_USER_ID if BOT_USER_ID in seats or not seats else next(iter(seats))
        try:
            return seats[user]
        except KeyError as error:
            raise NoSuchGuildError(f"no credentials were issued to {user!r} for guild {guild_name!r}") from error

    # members

    def join_member(self, channel: Channel, wanted: WantedMember) -> Member:
        """Raises: TakenError."""
        user = wanted.user or str(_MEMBER_ID_BASE + next(self._member_numbers))
        ssrc = self._free_ssrc()
        member = channel.join_member(user, ssrc, wanted.delay_ms / 1000)
        self._member_ssrcs.add(ssrc)
        if self.member_moved is not None:
            self.member_moved(channel, user, True)
        return member

    async def leave_member(self, guild: str, user: str) -> None:
        """Raises: NoSuchGuildError, NoSuchMemberError."""
        channel = self._channel_of(guild, user)
        self._recorder.drain()
        self._member_ssrcs.discard(channel.member(user).ssrc)
        await channel.leave_member(user)
        if self.member_moved is not None:
            self.member_moved(channel, user, False)

    def speak(self, guild: str, user: str, wanted: WantedSpeech) -> None:
        """Let a member say frames, or a tone, and then silence.

        Raises: NoSuchGuildError, NoSuchMemberError, TakenError.
        """
        channel = self._channel_of(guild, user)
        frames: Iterable[bytes] = wanted.frames
        if wanted.seconds:
            tone = second_of_tone(wanted.hertz)
            frames = (tone[number % len(tone)] for number in range(round(wanted.seconds * FRAMES_PER_SECOND)))
        said = [*(Utterance(frame) for frame in frames), *[Utterance(SILENCE_FRAME)] * _SILENCE_AT_END]
        channel.say(channel.member(user), said)

    def _channel_of(self, guild: str, user: str) -> Channel:
        for channel in self.guild(guild).channels.values():
            if user in channel.members:
                return channel
        raise NoSuchMemberError(f"no member {user!r} in guild {guild!r}")

    # the life of a session

    def identify(self, conversation: Conversation, endpoint: Endpoint, message: Identify) -> VoiceSession:
        """Begin a session. Raises: Refused."""
        seat = self._authenticate(message.server_id, endpoint, message.session_id, message.token)
        if message.user_id != seat.user:
            raise Refused(Close.SESSION_INVALID, "unknown user")
        seat.faults.check_identify()
        if seat.used and seat.faults.credentials_once:
            raise Refused(Close.SESSION_INVALID, "Session is no longer valid.")
        if seat.channel.kind == "voice" and message.max_dave_protocol_version < 1:
            raise Refused(Close.DAVE_REQUIRED, "E2EE/DAVE protocol required")
        self._replace(seat)
        seat.used = True
        rows = self._rows_for(seat.guild)
        try:
            row, displaced = rows.take()
        except FullError as error:
            raise Refused(Close.RATE_LIMITED, str(error)) from error
        if displaced is not None:
            self._retire(displaced)
        modes = seat.faults.take_modes([*LIVE_MODES, MODE_FROM_THE_FUTURE])
        numbered = conversation.version >= FIRST_NUMBERED_VERSION
        outbox = Outbox(seat.faults.take_first_seq(), numbered=numbered)
        session = VoiceSession(seat, row, self._free_ssrc(), modes, seat.channel, endpoint, outbox, conversation)
        seat.guild.sessions.append(session)
        self._by_ssrc[session.ssrc] = session
        self._recorder.add(session)
        return session

    def resume(
        self, conversation: Conversation, endpoint: Endpoint, message: Resume
    ) -> tuple[VoiceSession, list[str | bytes]]:
        """Go on with a session; also gives the messages its client missed. Raises: Refused."""
        seat = self._authenticate(message.server_id, endpoint, message.session_id, message.token)
        seat.faults.check("resume")
        session = seat.current
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
        seat.faults.untold = False
        return session, missed

    def select(self, session: VoiceSession, message: SelectProtocol) -> bytes:
        """Check op 1, draw a key and let the chosen address send. Raises: Refused."""
        chosen = message.data
        session.seat.faults.check("select")
        if message.protocol != "udp":
            raise Refused(Close.UNKNOWN_PROTOCOL, "Unknown protocol.")
        if chosen.mode not in session.modes or chosen.mode not in LIVE_MODES:
            raise Refused(Close.UNKNOWN_MODE, "Unknown encryption mode.")
        # disgo hands back the field with the zero bytes that fill it, and Discord takes that.
        address = chosen.address.rstrip("\0")
        if session.peer is None or session.discovered != (address, chosen.port):
            raise Refused(Close.BAD_REQUEST, "not the address that IP discovery told")
        self._recorder.drain()
        session.mode = chosen.mode
        session.former_opener = None
        self._recorder.select_peer(session, peer_key(*session.peer))
        return self._draw_key(session, chosen.mode, session.peer)

    def renew_key(self, session: VoiceSession) -> bytes:
        """Draw another key; the former opens for a moment what was under way. Raises: NotConnectedError."""
        if session.mode is None or session.peer is None:
            raise NotConnectedError("the session has no key yet")
        self._recorder.drain()
        session.former_opener = session.opener
        self._recorder.ledger.renew_key(session.row, both_valid=True)
        if session.key_overlap is not None:
            session.key_overlap.cancel()
        session.key_overlap = asyncio.get_running_loop().call_later(_KEY_OVERLAP_S, self._forget_former_key, session)
        return self._draw_key(session, session.mode, session.peer)

    def _forget_former_key(self, session: VoiceSession) -> None:
        self._recorder.drain()
        session.former_opener = None
        self._recorder.ledger.renew_key(session.row)

    @staticmethod
    def _draw_key(session: VoiceSession, mode: str, peer: tuple[str, int]) -> bytes:
        key = secrets.token_bytes(_KEY_BYTES)
        session.opener = opener_for(mode, key)
        session.downlink = Downlink(session.endpoint.udp, peer, sealer_for(mode, key))
        return key

    def speaking(self, session: VoiceSession, flags: int) -> None:
        """The client announced its ssrc."""
        session.note_speaking(flags)
        self._recorder.allow(session)
        if session.early_check is not None:
            session.early_check.cancel()
            session.early_check = None
        session.channel.speaking(session)

    def left(self, conversation: Conversation, session: VoiceSession, closing: Closing) -> None:
        """A WebSocket of the session closed; the session may outlive it."""
        if session.conversation is not conversation:
            return
        session.closing = closing
        session.conversation = None
        if self._stopping or not closing.resumable:
            self._end(session)
        elif not session.ended:
            session.channel.sever(session)
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

    def send_reports(self) -> None:
        """Send every client a receiver report about what it sends."""
        for session in self._live():
            if session.downlink is not None and session.spoke:
                session.downlink.send_report(session.ssrc)

    async def close_channels(self) -> None:
        """Let no member go on."""
        for guild in self.guilds.values():
            for channel in guild.channels.values():
                await channel.close()

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
            for channel in guild.channels.values():
                channel.forget()

    # the recorder's listener

    def discovery_asked(self, endpoint: Endpoint, request: bytes, peer: int) -> None:
        """Answer IP discovery with the observed address, unless a fault forbids it."""
        ssrc = discovery_ssrc(request)
        session = None if ssrc is None else self._by_ssrc.get(ssrc)
        if ssrc is None or session is None or session.endpoint is not endpoint:
            return
        faults = session.seat.faults
        if faults.loses_discovery():
            return
        address, port = peer_address(peer)
        if not IPv4Address(address).is_loopback:
            return
        wrong = faults.take_discovery()
        told_port = port
        if wrong == "port":
            told_port = port + 1 if port < _LAST_PORT else port - 1
        if wrong in (None, "port"):
            session.peer, session.discovered = (address, port), (address, told_port)
        response = discovery_response(ssrc ^ 1 if wrong == "ssrc" else ssrc, address, told_port)
        if wrong == "type":
            response = request[:2] + response[2:]
        elif wrong == "legacy":
            response = legacy_discovery_response(ssrc, address, port)
        endpoint.udp.sendto(response, (address, port))

    def pinged(self, session: VoiceSession, endpoint: Endpoint, ping: bytes, peer: int) -> None:
        """Answer a ping of a session, unless a fault forbids it."""
        address = peer_address(peer)
        if not session.seat.faults.ping_silent and IPv4Address(address[0]).is_loopback:
            endpoint.udp.sendto(pong(ping), address)

    def moved(self, session: VoiceSession, peer: int) -> None:
        """RTP comes from another address: a NAT bound it anew, and it is followed (reference section 11, 11)."""
        session.peer = peer_address(peer)
        if session.downlink is not None:
            session.downlink.peer = session.peer

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
        """Put a fault into force.

        Raises: NoSuchGuildError, NotConnectedError, NoSuchMemberError.
        """
        if isinstance(fault, SaidFault):
            self._say_wrongly(fault)
            return
        seat = self.seat(fault.guild, fault.user)
        if not (_await_next(seat, fault) or self._strike_socket(seat, fault)):
            self._strike_group(seat, fault)

    def _strike_socket(self, seat: Seat, fault: Fault) -> bool:
        """Faults that act at once on a WebSocket, or on the next one to the endpoint."""
        coming = seat.guild.endpoint.coming
        match fault:
            case AwayFault(ms=ms, how="503"):
                coming.away_until_s = asyncio.get_running_loop().time() + ms / 1000
            case AwayFault(ms=ms):
                self._endpoints.shut(seat.guild.endpoint, ms / 1000)
            case PathFault(how=how):
                self._endpoints.set_path(seat.guild.endpoint, how)
                self._recorder.watch_again(seat.guild.endpoint)
            case RedirectFault(to=to):
                coming.redirect = to
            case HelloLateFault(ms=ms):
                coming.hello_late_ms = ms
            case HelloIntervalFault(ms=ms):
                coming.interval_ms = ms
            case CloseOnConnectFault(code=code):
                coming.close = code
            case CloseFault(code=code):
                self._conversation(seat).want_close(code, "closed on demand")
            case KickFault(code=code):
                self._conversation(seat).want_close(code, "Disconnected.")
                seat.renew(seat.channel)
            case DropFault():
                self._conversation(seat).drop()
            case ServerHeartbeatFault():
                self._conversation(seat).say(write(Op.HEARTBEAT, {"t": time.time_ns() // 1_000_000, "seq_ack": -1}))
            case SayFault(text=text, data=data, n=n):
                for _ in range(n):
                    if text is None:
                        self._session(seat).send_bytes(data)
                    else:
                        self._conversation(seat).say(text)
            case NewKeyFault():
                session = self._session(seat)
                self._conversation(seat).describe(session, self.renew_key(session))
            case StrayFault(what=what, n=n):
                downlink = self._session(seat).downlink
                if downlink is None:
                    raise NotConnectedError("the session has no key yet")
                for number in range(n):
                    if what == "rtcp":
                        downlink.send_report(1)
                    else:
                        downlink.send_unknown(Source(1, number, number, SILENCE_FRAME))
            case _:
                return False
        return True

    def _strike_group(self, seat: Seat, fault: Fault) -> None:
        """Faults of the DAVE group of the channel. Raises: NotConnectedError: there is none."""
        channel, group = seat.channel, seat.channel.group
        if group is None:
            raise NotConnectedError(f"channel {channel.channel!r} has no end-to-end encryption")
        match fault:
            case DowngradeFault():
                channel.dispatch(group.downgrade())
            case UpgradeFault():
                channel.dispatch(group.upgrade())
            case EpochRestartFault():
                channel.dispatch(group.restart())
            case BatchFault(ms=ms):
                group.batch_s = ms / 1000
            case TwoProposalsFault():
                for _ in range(2):
                    channel.set_ghosts(len(channel.ghosts) + 1)
            case ProposalFault(wrong=wrong):
                channel.propose_wrongly(self._session(seat), unknown_user=wrong == "user")
            case ExecuteFault(how="unknown"):
                self._session(seat).send(DaveOp.EXECUTE_TRANSITION, {"transition_id": 2**16 - 2})
            case GarbageFault(op=op, size=size):
                self._session(seat).send_binary(op, secrets.token_bytes(size))
            case _:
                raise NotImplementedError(fault)

    def _say_wrongly(self, fault: SaidFault) -> None:
        if fault.user is None:
            raise NoSuchMemberError("this fault needs the user id of a member")
        channel = self._channel_of(fault.guild, fault.user)
        member = channel.member(fault.user)
        tone = second_of_tone(440)
        frames = [tone[number % len(tone)] for number in range(fault.n)]
        if fault.how == "stale":
            if not member.may_speak or member.dave is None:
                raise NotConnectedError(f"member {fault.user!r} has no keys in force")
            member.stash(frames)
            return
        if fault.how == "silence":
            frames = [SILENCE_FRAME] * fault.n
        channel.say(member, [Utterance(frame, plain=True) for frame in frames], first=True)

    # helpers

    @staticmethod
    def _session(seat: Seat) -> VoiceSession:
        session = seat.current
        if session is None:
            raise NotConnectedError(f"{seat.user!r} has no session in guild {seat.guild.guild!r}")
        return session

    @staticmethod
    def _conversation(seat: Seat) -> Conversation:
        session = seat.current
        if session is None or session.conversation is None:
            raise NotConnectedError(f"guild {seat.guild.guild!r} has no open WebSocket")
        return session.conversation

    def _authenticate(self, server_id: str, endpoint: Endpoint, session_id: str, token: str) -> Seat:
        guild = self.guilds.get(server_id)
        seat = None if guild is None or guild.endpoint is not endpoint else guild.seat_of(session_id)
        if seat is None:
            raise Refused(Close.SESSION_INVALID, "Session is no longer valid.")
        if token != seat.token:
            raise Refused(Close.AUTHENTICATION_FAILED, "Authentication failed.")
        return seat

    def _free_ssrc(self) -> int:
        while True:
            ssrc = secrets.randbelow(2**32 - 1) + 1
            if ssrc not in self._by_ssrc and ssrc not in self._member_ssrcs:
                return ssrc

    def _live(self) -> list[VoiceSession]:
        return list(self._by_ssrc.values())

    def _rows_for(self, guild: Guild) -> Rows:
        return self._sampled_rows if guild.sampled else self._brief_rows

    def _replace(self, seat: Seat) -> None:
        """End what the user had, because newer credentials or a newer Identify came."""
        session = seat.current
        if session is None:
            return
        self.expel(session, Close.SESSION_INVALID, "Session is no longer valid.")

    def expel(self, session: VoiceSession, code: int, reason: str) -> None:
        """End a session, and close its WebSocket."""
        if session.conversation is not None:
            session.conversation.want_close(code, reason)
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
        session.channel.exit(session)

    def _retire(self, session: VoiceSession) -> None:
        """Keep the sums of a session whose row is needed."""
        for name, counter in self._recorder.ledger.counts.items():
            self.retired[name] += int(counter[session.row])
        if self._recorder.ledger.counts["audio_packets"][session.row]:
            session.guild.heard_before = True
        session.guild.sessions.remove(session)


def _await_next(seat: Seat, fault: Fault) -> bool:
    """Faults that wait for something to happen."""
    faults = seat.faults
    match fault:
        case RejectFault(code=code):
            faults.reject = code
        case CredentialsOnceFault(on=on):
            faults.credentials_once = on
        case CloseAtFault(step=step, code=code):
            faults.close_at[step] = code
        case NoAckFault(on=on):
            faults.no_ack = on
        case FirstSeqFault(seq=seq):
            faults.first_seq = seq
        case PingSilentFault(on=on):
            faults.ping_silent = on
        case DiscoverySilentFault(on=on):
            faults.discovery_silent = on
        case DiscoveryLoseFirstFault(n=n):
            faults.discovery_lose = n
        case DiscoveryWrongFault(response=response, n=n):
            faults.discovery_wrong = [response] * n
        case ModesFault(modes=modes):
            faults.modes = modes
        case ReadyFault(ip=ip):
            faults.ready_ip = ip
        case SeveredFault(told=told):
            faults.severed_told = told
        case ListingLateFault(ms=ms):
            faults.listing_late_ms = ms
        case ClientsUnlistedFault(on=on):
            faults.clients_unlisted = on
        case SpeakingRelayFault(ms=ms):
            faults.speaking_late_ms = ms
        case RtpFault():
            names = (each.name for each in dataclasses.fields(Bends))
            faults.bends = Bends(**{name: getattr(fault, name) for name in names})
        case ExternalSenderFirstFault(on=on):
            faults.external_sender_first = on
        case CommitTwiceFault():
            faults.commit_twice = True
        case DamageFault(op=op, n=n):
            faults.damage[op] = n
        case ForeignWelcomeFault():
            faults.foreign_welcome = True
        case ExecuteFault(how="lost"):
            faults.execute_lost = True
        case ExecuteFault(how="late", ms=ms):
            faults.execute_late_ms = ms
        case _:
            return False
    return True
