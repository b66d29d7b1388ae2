"""Participants that live inside the local Discord: they follow the group, listen to everybody, and speak on command."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tests.emulator.dave.frame import is_protocol_frame
from tests.emulator.dave.ghosts import make_key_package
from tests.emulator.dave.group import DaveOp
from tests.emulator.dave.member import DaveyMember, Reply
from tests.emulator.downlink import Source
from tests.emulator.wire import SAMPLES_PER_TICK

_GHOST_ID_BASE = 2_000_000_000_000_000_000


class GhostPool:
    """Ghosts that sit in every channel that wants some; the first always come first."""

    def __init__(self) -> None:
        self._key_packages: dict[str, bytes] = {}

    @staticmethod
    def user(number: int) -> str:
        """User id of a ghost."""
        return str(_GHOST_ID_BASE + number)

    def key_package(self, user: str) -> bytes:
        """A ghost's key package, made when it is first wanted."""
        if user not in self._key_packages:
            self._key_packages[user] = make_key_package(int(user))
        return self._key_packages[user]


@dataclass(slots=True)
class Hearing:
    """What one member got of one sender. Frames that came before the member's op 22 are in `early` only.

    `failed_at_start` are those of `failed` that came before the first one decrypted since that op 22: what was under
    way when the keys changed.
    """

    received: int = 0
    decrypted: int = 0
    failed: int = 0
    failed_at_start: int = 0
    early: int = 0
    first_decrypted_ns: int = 0
    last_decrypted_ns: int = 0
    last_failed_ns: int = 0
    longest_gap_ns: int = 0


class Utterance(NamedTuple):
    """A frame to say: `sealed` is already encrypted, `plain` shall not be."""

    frame: bytes
    sealed: bool = False
    plain: bool = False


class Member:
    """One virtual participant. `dave` is None in a channel without end-to-end encryption.

    Args:
        delay_s: how long it takes to answer the gateway; with 0 its commits come before those of any client.
    """

    def __init__(self, user: str, ssrc: int, dave: DaveyMember | None, delay_s: float) -> None:
        self.user = user
        self.ssrc = ssrc
        self.dave = dave
        self.delay_s = delay_s
        self.since_ns: int | None = time.time_ns() if dave is None else None
        """Since when it is in a group that is in force."""
        self.executed_ns = 0
        """When its last transition came into force."""
        self.hearing: dict[str, Hearing] = {}
        self.to_say: deque[Utterance] = deque()
        self.said = 0
        self.spoke = False
        self._sequence = 0
        self._timestamp = 0
        self._stale: list[bytes] = []
        self._stale_executed = 0

    # the group

    def hear_gateway(self, op: DaveOp, body: bytes | dict[str, int]) -> list[Reply]:
        """Answer one message of the gateway."""
        if self.dave is None:
            return []
        executed = self.dave.executed
        replies = self.dave.hear(op, body)
        now_ns = time.time_ns()
        if self.dave.executed != executed:
            self.executed_ns = now_ns
        if not self.dave.version:
            self.since_ns = None
        elif self.since_ns is None:
            self.since_ns = now_ns
        return replies

    # listening

    def hear_frame(self, sender: str, frame: bytes, arrival_ns: int) -> bytes | None:
        """The Opus frame inside what a sender sent, None where this member cannot tell."""
        hearing = self.hearing.get(sender)
        if hearing is None:
            hearing = self.hearing[sender] = Hearing()
        opus: bytes | None = frame
        if self.dave is not None and self.dave.downgraded:
            # what was encrypted before op 22 is still under way
            opus = self.dave.decrypt(sender, frame) if is_protocol_frame(frame) else frame
        elif self.dave is not None:
            opus = self.dave.decrypt(sender, frame) if self.dave.version else None
        since_ns = self.since_ns
        if since_ns is None or arrival_ns < since_ns:
            hearing.early += 1
            return opus
        hearing.received += 1
        if opus is None:
            hearing.failed += 1
            hearing.failed_at_start += hearing.last_decrypted_ns < since_ns
            hearing.last_failed_ns = arrival_ns
            return None
        hearing.decrypted += 1
        if not hearing.first_decrypted_ns:
            hearing.first_decrypted_ns = arrival_ns
        else:
            hearing.longest_gap_ns = max(hearing.longest_gap_ns, arrival_ns - hearing.last_decrypted_ns)
        hearing.last_decrypted_ns = arrival_ns
        return opus

    # speaking

    @property
    def may_speak(self) -> bool:
        """Whether its keys are in force, or none are needed."""
        return self.dave is None or self.dave.ready or self.dave.downgraded

    def stash(self, frames: Iterable[bytes]) -> None:
        """Encrypt frames now, to send them when another transition has come into force.

        Raises: RuntimeError: it has no keys in force.
        """
        if self.dave is None or not self.dave.ready:
            raise RuntimeError("this member is in no group")
        self._stale = [self.dave.encrypt(frame) for frame in frames]
        self._stale_executed = self.dave.executed

    def next_packet(self) -> Source:
        """The next thing it has to say. Raises: IndexError: nothing is left."""
        utterance = self.to_say.popleft()
        if self._stale and self.dave is not None and self.dave.executed > self._stale_executed:
            self.to_say.appendleft(utterance)
            utterance = Utterance(self._stale.pop(0), sealed=True)
        frame = utterance.frame
        plain = utterance.sealed or utterance.plain or self.dave is None or self.dave.downgraded
        if self.dave is not None and not plain:
            frame = self.dave.encrypt(frame)
        packet = Source(self.ssrc, self._sequence, self._timestamp, frame)
        self._sequence = (self._sequence + 1) % 2**16
        self._timestamp = (self._timestamp + SAMPLES_PER_TICK) % 2**32
        self.said += 1
        return packet
