"""From datagrams to frames of users, in order and on time. Pure: bytes and times in, frames out.

Source: voice protocol reference, sections 3.3 and 4.5.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from shared.clock import NS_PER_MS, NS_PER_S
from shared.errors import MalformedPacket
from shared.protocol.opus import SILENCE_FRAME, check_frame
from shared.protocol.rtp import Kind, classify, parse_header
from worker.voice.receive.drops import Drop, Drops
from worker.voice.receive.jitter import JitterBuffer
from worker.voice.receive.replay import ReplayWindow
from worker.voice.receive.transport import Open, new_opener

IDLE_NS = 100 * NS_PER_MS
CLOSING_SILENCES = 5
"""So many silence frames end a talk; without them `IDLE_NS` without a frame does (section 5)."""
UNCLAIMED_NS = NS_PER_S
UNCLAIMED_PACKETS = 50
UNCLAIMED_SSRCS = 32
"""Audio may overtake the message that says whose it is: so much of it waits."""
MAX_USERS = 1_000
"""More than can speak in one channel; beyond it whoever was announced first makes room."""

Decrypt = Callable[[int, bytes], bytes | None]
"""User id and end-to-end encrypted frame in, Opus frame out; None: not decrypted. Raises nothing."""


class Frame(msgspec.Struct, frozen=True):
    """20 ms of one user.

    Attributes:
        timestamp_samples: 48 kHz; only grows for a user, by at least 960.
        opus: one Opus packet of 20 ms; None when it was lost.
    """

    user_id: int
    timestamp_samples: int
    opus: bytes | None

    @property
    def lost(self) -> bool:
        return self.opus is None


class Stopped(msgspec.Struct, frozen=True):
    """The user fell silent; the next frame begins a new talk."""

    user_id: int


Event = Frame | Stopped

_DROP_OF_KIND = {
    Kind.DISCOVERY: Drop.CONTROL,
    Kind.CONTROL: Drop.CONTROL,
    Kind.RTCP: Drop.RTCP,
    Kind.OTHER_RTP: Drop.OTHER_PAYLOAD,
    Kind.UNKNOWN: Drop.GARBAGE,
}


class _Packet(NamedTuple):
    packet_index: int
    timestamp: int
    payload: bytes
    arrival_ns: int


class _Unclaimed:
    """An SSRC of which nobody has said whose it is."""

    def __init__(self) -> None:
        self.window = ReplayWindow()
        self.packets: deque[_Packet] = deque()


class _Talker:
    """A user and the SSRC he sends with."""

    def __init__(self, user_id: int, ssrc: int) -> None:
        self.user_id = user_id
        self.ssrc = ssrc
        self.window = ReplayWindow()
        self.jitter = JitterBuffer()
        self.heard_ns = 0
        """Arrival of the last frame."""
        self.silences = 0
        self.talking = False

    @property
    def due_ns(self) -> int:
        due_ns = self.jitter.due_ns
        return self.heard_ns + IDLE_NS if due_ns is None else due_ns


class Pipeline:
    """Everything that is received in one guild.

    Times are of one monotonic clock and never go back. Whatever is received, nothing is raised.

    Args:
        drops: counts what is not heard.
    """

    def __init__(self, drops: Drops) -> None:
        self._drops = drops
        self._open: Open | None = None
        self._decrypt: Decrypt = lambda _user_id, _frame: None
        self._sources: dict[int, _Talker | _Unclaimed] = {}
        self._unclaimed: dict[int, _Unclaimed] = {}
        self._talkers: dict[int, _Talker] = {}
        self._active: dict[int, _Talker] = {}
        """Those of whom something is due."""
        self._lost_of_gone = 0

    @property
    def lost(self) -> int:
        """Packets of all users whose turn passed without them."""
        return self._lost_of_gone + sum(talker.jitter.lost for talker in self._talkers.values())

    @property
    def user_ids(self) -> list[int]:
        """Users whose SSRC is known."""
        return list(self._talkers)

    def begin_session(self, decrypt: Decrypt) -> list[Event]:
        """Start over on a voice server that knows nothing of the one before: keys, SSRCs and buffers go."""
        events = [event for user_id in self.user_ids for event in self.user_left(user_id)]
        for ssrc in list(self._unclaimed):
            self._give_up(ssrc)
        self._open = None
        self._decrypt = decrypt
        return events

    def rekey(self, mode: str, key: bytes) -> None:
        """Open packets with this key from now on.

        Raises: VoiceError, ValueError: as `new_opener`.
        """
        self._open = new_opener(mode, key)

    def speaking(self, user_id: int, ssrc: int) -> list[Event]:
        """A user sends with this SSRC: what waited for its user is taken in.

        An SSRC has one user and a user one SSRC: what stood before is forgotten.
        """
        talker = self._talkers.get(user_id)
        if talker is not None and talker.ssrc == ssrc:
            return []
        events: list[Event] = []
        source = self._sources.get(ssrc)
        if isinstance(source, _Talker):
            events += self.user_left(source.user_id)
        if talker is None:
            if len(self._talkers) >= MAX_USERS:
                events += self.user_left(next(iter(self._talkers)))
            talker = self._talkers[user_id] = _Talker(user_id, ssrc)
        else:
            events += self._stop(talker)
            del self._sources[talker.ssrc]
            self._active.pop(user_id, None)
            talker.ssrc = ssrc
            talker.window = ReplayWindow()
            talker.jitter.restart()
        self._sources[ssrc] = talker
        waiting = self._unclaimed.pop(ssrc, None)
        if waiting is not None:
            talker.window = waiting.window
            for packet in waiting.packets:
                self._take(talker, packet)
        return events

    def user_left(self, user_id: int) -> list[Event]:
        """Forget a user, his SSRC and what is held of him."""
        talker = self._talkers.pop(user_id, None)
        if talker is None:
            return []
        del self._sources[talker.ssrc]
        self._active.pop(user_id, None)
        self._lost_of_gone += talker.jitter.lost
        return self._stop(talker)

    def datagram(self, datagram: bytes, now_ns: int) -> None:
        """Take in whatever came from the voice server's address."""
        kind = classify(datagram)
        if kind is not Kind.AUDIO:
            self._drops.add(_DROP_OF_KIND[kind])
            return
        if self._open is None:
            self._drops.add(Drop.NO_KEY)
            return
        try:
            header = parse_header(datagram)
            source = self._sources.get(header.ssrc)
            if source is not None and source.window.seen(header.sequence):
                self._drops.add(Drop.DUPLICATE)
                return
            payload = self._open(datagram, header)
        except MalformedPacket:
            self._drops.add(Drop.MALFORMED)
            return
        if payload is None:
            self._drops.add(Drop.FORGED)
            return
        if source is None:
            if len(self._unclaimed) >= UNCLAIMED_SSRCS:
                self._drops.add(Drop.UNKNOWN_SSRC)
                return
            source = self._sources[header.ssrc] = self._unclaimed[header.ssrc] = _Unclaimed()
        index = source.window.accept(header.sequence)
        if index is None:
            self._drops.add(Drop.OLD)
            return
        packet = _Packet(index, header.timestamp, payload, now_ns)
        if isinstance(source, _Talker):
            self._take(source, packet)
            return
        if len(source.packets) >= UNCLAIMED_PACKETS:
            source.packets.popleft()
            self._drops.add(Drop.UNKNOWN_SSRC)
        source.packets.append(packet)

    def _take(self, talker: _Talker, packet: _Packet) -> None:
        """An authentic packet of a known user: decrypt end to end, put into the buffer."""
        frame: bytes | None = packet.payload
        if not frame:
            self._drops.add(Drop.PADDING_ONLY)
        elif frame != SILENCE_FRAME:
            frame = self._decrypt(talker.user_id, frame)
            if frame is None:
                self._drops.add(Drop.E2EE_FAILED)
                return
            try:
                check_frame(frame)
            except MalformedPacket:
                self._drops.add(Drop.NOT_OPUS)
                return
        assert frame is not None
        drop = talker.jitter.push(packet.packet_index, packet.timestamp, frame, packet.arrival_ns)
        if drop is not None:
            self._drops.add(drop)
            return
        if frame:
            talker.heard_ns = packet.arrival_ns
        self._active[talker.user_id] = talker

    @property
    def due_ns(self) -> int | None:
        """When `advance` has something to do; None: not before the next datagram."""
        if not self._active and not self._unclaimed:
            return None
        due = [talker.due_ns for talker in self._active.values()]
        due += [waiting.packets[0].arrival_ns + UNCLAIMED_NS for waiting in self._unclaimed.values()]
        return min(due)

    def advance(self, now_ns: int) -> list[Event]:
        """Give out what is due, in order for each user."""
        events: list[Event] = []
        for talker in list(self._active.values()):
            if talker.due_ns > now_ns:
                continue
            for timestamp_samples, frame in talker.jitter.pop(now_ns):
                self._say(talker, timestamp_samples, frame, events)
            if now_ns >= talker.heard_ns + IDLE_NS:  # longer than anything is held
                talker.jitter.rebase()
                del self._active[talker.user_id]
                events += self._stop(talker)
        for ssrc, waiting in list(self._unclaimed.items()):
            while waiting.packets and waiting.packets[0].arrival_ns + UNCLAIMED_NS <= now_ns:
                waiting.packets.popleft()
                self._drops.add(Drop.UNKNOWN_SSRC)
            if not waiting.packets:
                self._give_up(ssrc)
        return events

    def _say(self, talker: _Talker, timestamp_samples: int, frame: bytes | None, events: list[Event]) -> None:
        """Give out a slot; silence and holes outside of a talk are nothing to hear."""
        if frame == SILENCE_FRAME:
            talker.silences += 1
        elif frame is not None:
            talker.silences = 0
            talker.talking = True
        if talker.talking:
            events.append(Frame(talker.user_id, timestamp_samples, frame))
            if talker.silences >= CLOSING_SILENCES:
                events += self._stop(talker)

    def _stop(self, talker: _Talker) -> list[Event]:
        was_talking, talker.talking, talker.silences = talker.talking, False, 0
        return [Stopped(talker.user_id)] if was_talking else []

    def _give_up(self, ssrc: int) -> None:
        left = len(self._unclaimed.pop(ssrc).packets)
        del self._sources[ssrc]
        if left:
            self._drops.add(Drop.UNKNOWN_SSRC, left)
