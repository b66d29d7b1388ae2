"""One channel of a guild: who is in it, its DAVE group, and who hears whom."""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from tests.emulator.dave.external_sender import ExternalSender, append_body
from tests.emulator.dave.group import DaveGroup, DaveOp, Outgoing
from tests.emulator.dave.member import DaveyMember, Reply
from tests.emulator.downlink import Source
from tests.emulator.members import GhostPool, Member, Utterance
from tests.emulator.records import ChannelKind
from tests.emulator.wire import Op

if TYPE_CHECKING:
    from tests.emulator.recorder import Recorder
    from tests.emulator.session import Guild, VoiceSession

_TICK_S = 0.02
_SPEAKING_AHEAD_S = 0.1
"""A member's op 5 has so long to arrive before its first packet."""
_PLAIN_AFTER_UPGRADE_NS = 250_000_000
"""What was built in the clear before an upgrade's op 22 may still arrive."""
_MEMBERS_REMEMBERED = 256
_MOST_TO_SAY = 1 << 18
_AUDIO = 1


class NoSuchMemberError(LookupError):
    """No member of this name is in the channel."""


class TakenError(RuntimeError):
    """Somebody of this name is in the channel, or it is of another kind."""


class Channel:
    """Participants: clients with a session, members inside this process, ghosts with nobody behind them."""

    def __init__(
        self,
        guild: "Guild",
        channel: str,
        kind: ChannelKind,
        sender: ExternalSender,
        ghost_pool: GhostPool,
        recorder: "Recorder",
    ) -> None:
        self.guild = guild
        self.channel = channel
        self.kind = kind
        loop = asyncio.get_running_loop()
        self.group = DaveGroup(int(channel), sender, loop.time) if kind == "voice" else None
        self.present: dict[str, VoiceSession] = {}
        self.members: dict[str, Member] = {}
        self.gone: deque[Member] = deque(maxlen=_MEMBERS_REMEMBERED)
        """Members that left, the last ones."""
        self.ghosts: list[str] = []
        self._ghost_pool = ghost_pool
        self._recorder = recorder
        self._loop = loop
        self._deadline: asyncio.TimerHandle | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._inbox: dict[str, deque[Outgoing | Reply]] = {}
        self._talks: dict[str, asyncio.Task[None]] = {}

    # who is there

    @property
    def users(self) -> list[str]:
        """Everybody in the channel."""
        return [*self.ghosts, *self.members, *self.present]

    def enter(self, session: "VoiceSession") -> None:
        """A client is let in: tell it of the others, and them of it."""
        others = [user for user in self.users if user != session.user]
        self._tell_arrivals([session], others)
        for other in self.present.values():
            if other.spoke:
                self._relay_speaking(session, other.user, other.ssrc)
        for member in self.members.values():
            if member.spoke:
                self._relay_speaking(session, member.user, member.ssrc)
        self._arrived([session.user])
        self.present[session.user] = session
        self._refresh()

    def exit(self, session: "VoiceSession") -> None:
        """A session ended."""
        if self.present.get(session.user) is not session:
            return
        del self.present[session.user]
        self._departed(session.user)
        if self.group is not None and session.told is not None:
            self.dispatch(self.group.leave(session.user))
        self._refresh()

    def sever(self, session: "VoiceSession") -> None:
        """A session lost its WebSocket: where that is wished for, its client is taken out of the group."""
        faults = session.seat.faults
        told, faults.severed_told = faults.severed_told, None
        if told is not None and self.group is not None and session.told is not None:
            faults.untold = not told
            self.dispatch(self.group.sever(session.user))

    def join_member(self, user: str, ssrc: int, delay_s: float) -> Member:
        """A member comes. Raises: TakenError."""
        if user in self.users:
            raise TakenError(f"user {user!r} is in channel {self.channel!r} already")
        dave = DaveyMember(user, int(self.channel)) if self.group is not None else None
        member = Member(user, ssrc, dave, delay_s)
        if dave is not None:
            dave.connected(self.users)
        self._arrived([user])
        self.members[user] = member
        if self.group is not None and dave is not None:
            self.dispatch(self.group.join(user))
            if self.group.version:
                self._queue(member, dave.start())
        self._refresh()
        return member

    async def leave_member(self, user: str) -> None:
        """A member goes. Raises: NoSuchMemberError."""
        member = self.member(user)
        del self.members[user]
        self._inbox.pop(user, None)
        self.gone.append(member)
        talk = self._talks.pop(user, None)
        if talk is not None:
            await _ended(talk)
        self._departed(user)
        if self.group is not None:
            self.dispatch(self.group.leave(user))
        self._refresh()

    def member(self, user: str) -> Member:
        """Raises: NoSuchMemberError."""
        try:
            return self.members[user]
        except KeyError as error:
            raise NoSuchMemberError(f"no member {user!r} in channel {self.channel!r}") from error

    def set_ghosts(self, count: int) -> None:
        """Let so many ghosts be there."""
        new = [self._ghost_pool.user(number) for number in range(len(self.ghosts), count)]
        if new:
            self._arrived(new)
            self.ghosts += new
            if self.group is not None:
                self.dispatch(self.group.add_ghosts((user, self._ghost_pool.key_package(user)) for user in new))
        while len(self.ghosts) > count:
            user = self.ghosts.pop()
            self._departed(user)
            if self.group is not None:
                self.dispatch(self.group.leave(user))

    async def close(self) -> None:
        """Let nothing of this channel go on. Raises what made a member's speech end before its time."""
        for timer in (self._deadline, *self._timers):
            if timer is not None:
                timer.cancel()
        self._inbox.clear()
        for talk in self._talks.values():
            await _ended(talk)

    def forget(self) -> None:
        """Drop all measurements."""
        self.gone.clear()
        for member in self.members.values():
            member.hearing.clear()
            member.said = 0

    def _arrived(self, users: list[str]) -> None:
        """Tell everybody who is there of newcomers."""
        self._tell_arrivals(self.present.values(), users)
        for member in self.members.values():
            if member.dave is not None:
                member.dave.connected(users)

    def _departed(self, user: str) -> None:
        for session in self.present.values():
            session.send(Op.CLIENT_DISCONNECT, {"user_id": user})
        for member in self.members.values():
            if member.dave is not None:
                member.dave.disconnected(user)

    @staticmethod
    def _tell_arrivals(sessions: "Iterable[VoiceSession]", users: list[str]) -> None:
        for session in sessions:
            late_s = session.seat.faults.listing_late_ms / 1000
            if late_s:
                tell = partial(_unless_ended, session, Op.CLIENTS_CONNECT, {"user_ids": users})
                asyncio.get_running_loop().call_later(late_s, tell)
            elif not session.seat.faults.clients_unlisted:
                session.send(Op.CLIENTS_CONNECT, {"user_ids": users})
            for user in users:
                session.send(Op.CLIENT_FLAGS, {"user_id": user, "flags": 0})
                session.send(Op.CLIENT_PLATFORM, {"user_id": user, "platform": 0})

    # end-to-end encryption

    @property
    def dave_version(self) -> int:
        """The protocol version in force."""
        return 0 if self.group is None else self.group.version

    def join_group(self, session: "VoiceSession") -> list[Outgoing]:
        """The session is told of op 4: take it in, once. Gives what to `dispatch`; op 25 comes first."""
        if self.group is None or session.told is not None:
            return []
        out = self.group.join(session.user)
        session.told = self.group.told(session.user)
        self._note_version(session, self.group.version)
        self._refresh()
        return out

    def hear_dave(self, session: "VoiceSession", op: int, body: bytes | int) -> None:
        """A message of DAVE from a client: bytes, or a transition id. Raises: MlsFormatError."""
        if self.group is None or session.told is None or self.present.get(session.user) is not session:
            return
        self.dispatch(self._to_group(session.user, op, body))

    def _to_group(self, user: str, op: int, body: bytes | int) -> list[Outgoing]:
        if self.group is None or user not in self.group:
            return []
        if isinstance(body, bytes):
            if op == DaveOp.KEY_PACKAGE:
                return self.group.key_package(user, body)
            return self.group.commit_welcome(user, body)
        if op == DaveOp.TRANSITION_READY:
            return self.group.transition_ready(user, body)
        return self.group.invalid(user)

    def dispatch(self, messages: Iterable[Outgoing]) -> None:
        """Send what the group has to say, and see when it has more."""
        for message in messages:
            session = self.present.get(message.user)
            if session is not None:
                self._send(session, message)
            elif message.user in self.members:
                self._queue(self.members[message.user], [message])
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        deadline_s = None if self.group is None else self.group.deadline_s
        if deadline_s is not None:
            self._deadline = self._loop.call_at(max(deadline_s, self._loop.time() + 0.001), self._tick)

    def _tick(self) -> None:
        self._deadline = None
        if self.group is not None:
            self.dispatch(self.group.tick())

    def _send(self, session: "VoiceSession", message: Outgoing) -> None:
        faults, op, body = session.seat.faults, message.op, message.body
        if faults.untold:
            return
        if isinstance(body, bytes):
            for bent in faults.bend(op, body):
                session.send_binary(op, bent)
            return
        self._note_message(session, op, body)
        if op is DaveOp.EXECUTE_TRANSITION:
            if faults.execute_lost:
                faults.execute_lost = False
                return
            late_ms, faults.execute_late_ms = faults.execute_late_ms, None
            if late_ms:
                self._later(late_ms / 1000, session, op, body)
                return
        session.send(op, body)

    def _note_message(self, session: "VoiceSession", op: DaveOp, body: dict[str, int]) -> None:
        """From when to when frames have to be encrypted."""
        if op is DaveOp.PREPARE_TRANSITION and body["protocol_version"] == 0:
            session.encrypted_from_ns = None
        elif op is DaveOp.PREPARE_EPOCH:
            session.dave_version = body["protocol_version"]
            self._refresh()
        elif op is DaveOp.EXECUTE_TRANSITION and self.dave_version and session.encrypted_from_ns is None:
            session.encrypted_from_ns = time.time_ns() + _PLAIN_AFTER_UPGRADE_NS

    @staticmethod
    def _note_version(session: "VoiceSession", version: int) -> None:
        session.dave_version = version
        session.encrypted_from_ns = time.time_ns() if version else None

    def _queue(self, member: Member, messages: Iterable[Outgoing | Reply]) -> None:
        """A member hears the gateway, and is heard by it, a moment later and in order."""
        inbox = self._inbox.setdefault(member.user, deque())
        for message in messages:
            inbox.append(message)
            self._call_later(member.delay_s, partial(self._next_of, member))

    def _next_of(self, member: Member) -> None:
        inbox = self._inbox.get(member.user)
        if not inbox or self.members.get(member.user) is not member:
            return
        message = inbox.popleft()
        replies = [message] if isinstance(message, Reply) else member.hear_gateway(message.op, message.body)
        for reply in replies:
            body = reply.body if isinstance(reply.body, bytes) else reply.body["transition_id"]
            self.dispatch(self._to_group(member.user, reply.op, body))

    def _later(self, delay_s: float, session: "VoiceSession", op: int, data: object) -> None:
        self._call_later(delay_s, partial(_unless_ended, session, op, data))

    def _call_later(self, delay_s: float, what: Callable[[], None]) -> None:
        def run() -> None:
            self._timers.discard(timer)
            what()

        timer = self._loop.call_later(delay_s, run)
        self._timers.add(timer)

    # faults of the group

    def propose_wrongly(self, session: "VoiceSession", *, unknown_user: bool) -> None:
        """Send an Add that leads nowhere: of a user nobody was told of, or for another epoch."""
        if self.group is None:
            return
        number = len(self.ghosts) + (secrets.randbelow(1000) + 1 if unknown_user else 0)
        user = self._ghost_pool.user(number)
        epoch = self.group.mls_epoch or 0
        package = self._ghost_pool.key_package(user)
        proposal = self.group.sender.add(int(self.channel), epoch if unknown_user else epoch + 7, package)
        session.send_binary(DaveOp.PROPOSALS, append_body([proposal]))

    # audio

    def hear(
        self, session: "VoiceSession", sequence: int, timestamp: int, frame: bytes, arrival_ns: int
    ) -> bytes | None:
        """A client sent a frame: let members listen and other clients have it. Gives its Opus frame, if known."""
        opus = self._listen(session.user, frame, arrival_ns)
        if opus is not None and not session.audible_ns:
            session.audible_ns = arrival_ns
        if len(self.present) > 1:
            self._forward(session.user, Source(session.ssrc, sequence, timestamp, frame))
        return opus

    def _listen(self, sender: str, frame: bytes, arrival_ns: int) -> bytes | None:
        opus = None
        if self.guild.sampled:
            for member in self.members.values():
                if member.user != sender:
                    opus = member.hear_frame(sender, frame, arrival_ns) or opus
        return opus

    def _forward(self, sender: str, packet: Source) -> None:
        for user, session in self.present.items():
            if user != sender and session.downlink is not None:
                session.downlink.send(packet, session.seat.faults.bends)

    def speaking(self, session: "VoiceSession") -> None:
        """A client announced its ssrc; the others are told once."""
        if not session.spoke:
            session.spoke = True
            self._relay_to_others(session.user, session.ssrc)

    def _relay_to_others(self, user: str, ssrc: int) -> None:
        for other in self.present.values():
            if other.user != user:
                self._relay_speaking(other, user, ssrc)

    def _relay_speaking(self, session: "VoiceSession", user: str, ssrc: int) -> None:
        late_ms = session.seat.faults.speaking_late_ms
        if late_ms is None:
            return
        body = {"speaking": _AUDIO, "ssrc": ssrc, "user_id": user}
        if late_ms:
            self._later(late_ms / 1000, session, Op.SPEAKING, body)
        else:
            session.send(Op.SPEAKING, body)

    def say(self, member: Member, utterances: Iterable[Utterance], *, first: bool = False) -> None:
        """Let a member say something: after all else, or before it. Raises: TakenError: it has too much to say."""
        new = list(utterances)
        if len(member.to_say) + len(new) > _MOST_TO_SAY:
            raise TakenError(f"member {member.user!r} has too much to say")
        if first:
            member.to_say.extendleft(reversed(new))
        else:
            member.to_say.extend(new)
        talk = self._talks.get(member.user)
        if talk is None or talk.done():
            self._talks[member.user] = self._loop.create_task(self._talk(member))

    async def _talk(self, member: Member) -> None:
        """One packet each 20 ms on an absolute schedule, while there is something to say."""
        due_s = self._loop.time()
        while member.to_say:
            if member.may_speak:
                if not member.spoke:
                    member.spoke = True
                    self._relay_to_others(member.user, member.ssrc)
                    await asyncio.sleep(_SPEAKING_AHEAD_S)
                    due_s = self._loop.time()
                packet = member.next_packet()
                self._listen(member.user, packet.frame, time.time_ns())
                self._forward(member.user, packet)
            due_s += _TICK_S
            await asyncio.sleep(max(due_s - self._loop.time(), 0))

    def _refresh(self) -> None:
        """Tell the recorder what to look at: nothing more than is of use."""
        listened = self.guild.sampled and bool(self.members)
        for session in self.present.values():
            self._recorder.watch_session(session, channel_hears=listened or len(self.present) > 1)


def _unless_ended(session: "VoiceSession", op: int, data: object) -> None:
    if not session.ended:
        session.send(op, data)


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end. Raises what ended it before."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()
