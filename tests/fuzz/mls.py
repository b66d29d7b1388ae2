"""Messages of the encrypted group, real ones and spoilt, as a member of ours hears them.

An input is a list of steps: kind u8 | size u16 | payload. The keys of a group are new each time, so what answers a
member's own key (a Welcome, the commit of another member) is made while the input runs, and the input says only how it
is spoilt: edits of 4 bytes, kind u8 | place u16 | value u8. A member that is left alone with its own commits makes a
group, too: then it hears them back, among members with nobody behind them.

libdave is C++, so these run in a process of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from random import Random

from cryptography.hazmat.primitives.asymmetric import ec

from shared.errors import ErrorCode, ProtocolError, VoiceError
from tests.emulator.dave.commit import split
from tests.emulator.dave.external_sender import ExternalSender, Proposal, append_body, revoke_body
from tests.emulator.dave.ghosts import make_key_package
from tests.emulator.dave.group import DaveOp
from tests.emulator.dave.member import DaveyMember, Reply
from tests.fuzz import mutate
from tests.fuzz.target import Target
from tests.product_member import ProductMember
from tests.unit.test_dave_group import CHANNEL, FRAME, Call

US, PEER = "11", "22"
_GHOSTS = ("501", "502", "503", "504")
_ENDS = {ErrorCode.E2EE_FAILED, ErrorCode.E2EE_REQUIRED, ErrorCode.E2EE_DOWNGRADED}
"""What may end a session."""
_EPOCHS = 4
_EDIT_BYTES = 4
_SENDER_KEY = 7
"""Always the same, so that an input that was found signs as it did then."""
_JSON_OPS = (4, 21, 22, 24)


class Step(IntEnum):
    """What happens next; see `_Room`."""

    HEAR = 0
    ECHO = 1
    WELCOME = 2
    PEER = 3
    FRAME = 4
    USERS = 5


# what runs an input


@dataclass
class _Room:
    """One member of ours, fresh, and one of another implementation if the input asks for it."""

    member: ProductMember = field(default_factory=lambda: ProductMember(US, CHANNEL))
    commit: bytes = b""
    """What our member committed last."""
    key_package: bytes = b""
    peer: DaveyMember | None = None
    peer_epoch: int = 0

    def take(self, kind: int, payload: bytes) -> None:
        """Raises: ProtocolError, VoiceError."""
        match kind % len(Step):
            case Step.HEAR if payload:
                self._hear(payload[0], payload[1:])
            case Step.ECHO if self.commit:
                self._hear(DaveOp.ANNOUNCE_COMMIT, _edited(payload[:2].rjust(2, b"\0") + self.commit, payload[2:]))
            case Step.WELCOME if self.key_package and self.peer is None:
                self._be_welcomed(payload)
            case Step.PEER if self.peer is not None:
                self._follow(self.peer, payload)
            case Step.FRAME:
                sealed = self.peer.encrypt(FRAME) if self.peer is not None and self.peer.ready else FRAME
                self.member.decrypt(PEER, _edited(sealed, payload))
            case Step.USERS:
                self.member.dave.members({str(number) for number in payload})
        self._assert_nothing_leaks()

    def _hear(self, op: int, body: bytes) -> None:
        if op in _JSON_OPS:
            replies = self.member.hear_text(f'{{"op":{op},"d":{body.decode(errors="replace")}}}')
        else:
            replies = self.member.hear(op, body)
        for answer, said in replies:
            if answer == DaveOp.COMMIT_WELCOME and isinstance(said, bytes):
                self.commit = split(said).commit
            elif answer == DaveOp.KEY_PACKAGE and isinstance(said, bytes):
                self.key_package = said

    def _be_welcomed(self, edits: bytes) -> None:
        """The other one makes a group and takes us in."""
        peer = DaveyMember(PEER, CHANNEL)
        peer.connected([US, *_GHOSTS])
        peer.start()
        peer.hear(DaveOp.EXTERNAL_SENDER, _sender().package)
        made = peer.hear(DaveOp.PROPOSALS, append_body([_sender().add(CHANNEL, 0, self.key_package)]))
        offered = split(_only(made))
        self.peer, self.peer_epoch = peer, 1
        peer.hear(DaveOp.ANNOUNCE_COMMIT, bytes(2) + offered.commit)
        self._hear(DaveOp.WELCOME, _edited(b"\0\5" + offered.welcome, edits))

    def _follow(self, peer: DaveyMember, edits: bytes) -> None:
        """The other one takes in a ghost, and we hear of it."""
        proposals = append_body([_sender().add(CHANNEL, self.peer_epoch, _ghost(self.peer_epoch))])
        made = peer.hear(DaveOp.PROPOSALS, proposals)
        if not made:
            return
        self.peer_epoch += 1
        commit = split(_only(made)).commit
        peer.hear(DaveOp.ANNOUNCE_COMMIT, bytes(2) + commit)
        self._hear(DaveOp.PROPOSALS, proposals)
        self._hear(DaveOp.ANNOUNCE_COMMIT, _edited(b"\0\6" + commit, edits))

    def _assert_nothing_leaks(self) -> None:
        dave = self.member.dave
        if dave.ready and dave.version:
            assert dave.protect is not None
            assert dave.protect(FRAME) not in (None, FRAME)


def _only(replies: list[Reply]) -> bytes:
    ((_, body),) = replies
    assert isinstance(body, bytes)
    return body


def _edited(message: bytes, edits: bytes) -> bytes:
    data = bytearray(message)
    for start in range(0, len(edits) - _EDIT_BYTES + 1, _EDIT_BYTES):
        kind, value = edits[start], edits[start + 3]
        at = int.from_bytes(edits[start + 1 : start + 3], "big") % (len(data) + 1)
        match kind % 5:
            case 0 if at < len(data):
                data[at] ^= value or 1
            case 1:
                del data[at:]
            case 2:
                del data[at : at + value]
            case 3:
                data[at:at] = data[at : at + value]
            case _:
                data[at:at] = bytes([value])
    return bytes(data)


def take(data: bytes) -> None:
    """Run an input from its first step to its last, or to the end of the session."""
    room = _Room()
    room.member.connected([PEER, *_GHOSTS])
    for kind, payload in _steps(data):
        try:
            room.take(kind, payload)
        except ProtocolError:
            continue
        except VoiceError as end:
            if end.code not in _ENDS:
                raise
            return


def _steps(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 3 <= len(data):
        end = at + 3 + int.from_bytes(data[at + 1 : at + 3], "big")
        yield data[at], data[at + 3 : end]
        at = end


# what draws an input


@dataclass(frozen=True)
class _Pool:
    """Real messages by opcode, each after its opcode."""

    senders: list[bytes]
    proposals: list[list[bytes]]
    """By epoch, of the sender that our member follows."""
    foreign: list[bytes]
    """What another member heard in another group: proposals, commits, Welcomes."""


@cache
def _sender() -> ExternalSender:
    return ExternalSender(ec.derive_private_key(_SENDER_KEY, ec.SECP256R1()))


@cache
def _ghost(number: int) -> bytes:
    return make_key_package(int(_GHOSTS[number % len(_GHOSTS)]))


@cache
def _pool() -> _Pool:
    sender = _sender()
    proposals: list[list[bytes]] = []
    for mls_epoch in range(_EPOCHS):
        adds = [sender.add(CHANNEL, mls_epoch, _ghost(number)) for number in range(len(_GHOSTS))]
        removes = [sender.remove(CHANNEL, mls_epoch, leaf) for leaf in (0, 1, 2, 9)]
        singles: list[list[Proposal]] = [[each] for each in (*adds, *removes)]
        rounds = [*singles, adds[:2], adds, [removes[1], adds[0]], [adds[0], adds[0]], []]
        revoked = (adds[:1], adds[:2], removes[1:2])
        bodies = [*map(append_body, rounds), *(revoke_body(each.reference for each in some) for some in revoked)]
        proposals.append([bytes([DaveOp.PROPOSALS]) + body for body in bodies])
    foreign = [bytes([op]) + body for call in _calls() for op, body in _heard_by(call)]
    senders = [sender.package, ExternalSender().package]
    return _Pool(
        [bytes([DaveOp.EXTERNAL_SENDER]) + each for each in senders],
        proposals,
        [*foreign, *(bytes([DaveOp.EXTERNAL_SENDER]) + call.group.sender.package for call in _calls())],
    )


@cache
def _calls() -> tuple[Call, ...]:
    """Calls that went well: members come, go, and begin anew."""
    calls = []
    for first in (True, False):
        call = Call(creation_id_zero=first)
        for user in (US, PEER, "33") if first else (PEER, "33", US):
            call.join(user, ProductMember if user == US else DaveyMember)  # type: ignore[arg-type]
            call.settle()
        call.leave("33")
        call.settle()
        call.post(call.group.restart())
        calls.append(call.settle())
    return tuple(calls)


def _heard_by(call: Call) -> Iterator[tuple[int, bytes]]:
    for message in call.sent:
        if message.user == US and isinstance(message.body, bytes):
            yield message.op, message.body


def _text(op: int, **data: int) -> bytes:
    return bytes([op]) + json.dumps(data, separators=(",", ":")).encode()


_DESCRIPTION = {"mode": "aead_aes256_gcm_rtpsize", "secret_key": [0] * 32}
_STARTS = [bytes([4]) + json.dumps({**_DESCRIPTION, "dave_protocol_version": v}).encode() for v in (1, 1, 1, 0, 2)]
_ORDERS = [
    *(_text(21, transition_id=tid, protocol_version=v) for tid in (0, 5, 6) for v in (0, 1, 1, 2)),
    *(_text(22, transition_id=tid) for tid in (0, 5, 5, 6, 6, 7)),
    *(_text(24, epoch=mls_epoch, protocol_version=v) for mls_epoch in (1, 1, 1, 2) for v in (1, 1, 0, 2)),
]


def make(random: Random) -> bytes:
    """A conversation as it might be, with something spoilt, out of order, told twice or left out."""
    pool = _pool()
    steps: list[tuple[int, bytes]] = [(Step.HEAR, _STARTS[0]), (Step.HEAR, pool.senders[0])]
    if random.random() < 0.1:
        steps.reverse()
    steps += _joining(random) if random.random() < 0.5 else _founding(random, pool)
    for _ in range(random.choice([0, 1, 1, 2, 3])):
        steps.insert(random.randint(0, len(steps)), _disturbance(random, pool, steps))
    for _ in range(random.choice([0, 0, 1])):
        del steps[random.randrange(len(steps))]
    data = b"".join(bytes([kind]) + len(payload).to_bytes(2, "big") + payload for kind, payload in steps)
    return mutate.bytes_of(random, [data]) if random.random() < 0.05 else data


def _founding(random: Random, pool: _Pool) -> list[tuple[int, bytes]]:
    """Our member commits, epoch after epoch, and hears its own commits."""
    steps: list[tuple[int, bytes]] = []
    for mls_epoch in range(random.randint(1, _EPOCHS)):
        here = pool.proposals[mls_epoch]
        proposals = random.choice(here[:4] if random.random() < 0.5 else here)
        steps.append((Step.HEAR, _maybe_spoilt(random, proposals, here)))
        transition_id = random.choice([0, 5, 6])
        steps.append((Step.ECHO, bytes([0, transition_id]) + _edits(random)))
        steps.append((Step.HEAR, _text(22, transition_id=transition_id)))
    return steps


def _joining(random: Random) -> list[tuple[int, bytes]]:
    """Our member is taken in by the other one, and follows."""
    steps: list[tuple[int, bytes]] = [(Step.WELCOME, _edits(random)), (Step.HEAR, _text(22, transition_id=5))]
    for _ in range(random.randint(0, 4)):
        steps += [(Step.PEER, _edits(random)), (Step.HEAR, _text(22, transition_id=6)), (Step.FRAME, _edits(random))]
    return steps


def _disturbance(random: Random, pool: _Pool, steps: list[tuple[int, bytes]]) -> tuple[int, bytes]:
    match random.randrange(8):
        case 0 | 1:
            return Step.HEAR, random.choice(_ORDERS)
        case 2 | 3:
            return Step.HEAR, _maybe_spoilt(random, random.choice(pool.foreign), pool.foreign)
        case 4:
            return Step.HEAR, _maybe_spoilt(random, random.choice(pool.senders), pool.senders)
        case 5:
            return Step.HEAR, random.choice(_STARTS)
        case 6:
            return Step.USERS, bytes(random.sample(range(256), 3))
        case _:
            return random.choice(steps)


def _maybe_spoilt(random: Random, message: bytes, others: list[bytes]) -> bytes:
    if random.random() < 0.8:
        return message
    return message[:1] + mutate.bytes_of(random, [message[1:], random.choice(others)[1:]])


def _edits(random: Random) -> bytes:
    """Most messages stay as they are."""
    if random.random() < 0.7:
        return b""
    return b"".join(
        bytes([random.randrange(5)]) + random.randrange(600).to_bytes(2, "big") + random.randbytes(1)
        for _ in range(random.randint(1, 3))
    )


GROUP = Target("mls group", make, take, where="tests.fuzz.mls:GROUP")
