"""Who is in the MLS group of a channel, who comes and goes, and whose commit counts. Pure.

Source: reference sections 6.4 (what a gateway sends) and 6.9 (book-keeping rules 1 to 13).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from tests.emulator.dave.codec import u16, u64
from tests.emulator.dave.commit import CommitWelcome, Welcome, read_welcome, split
from tests.emulator.dave.external_sender import ExternalSender, Proposal, append_body, revoke_body
from tests.emulator.dave.key_package import check_key_package, key_package_reference

PROTOCOL_VERSION = 1
TRANSITION_WAIT_S = 2.0
"""How long the gateway waits for op 23, and for the key package that follows an op 31."""
REPEAT_WAIT_S = 1.0
"""Who says op 31 again within this time is added again only after it, so that no two run in circles."""
_LAST_TRANSITION_ID = 2**16 - 1
_NEW_GROUP_EPOCH = 1


class DaveOp(IntEnum):
    """Opcodes of DAVE. 25 to 30 are binary, the others JSON."""

    PREPARE_TRANSITION = 21
    EXECUTE_TRANSITION = 22
    TRANSITION_READY = 23
    PREPARE_EPOCH = 24
    EXTERNAL_SENDER = 25
    KEY_PACKAGE = 26
    PROPOSALS = 27
    COMMIT_WELCOME = 28
    ANNOUNCE_COMMIT = 29
    WELCOME = 30
    INVALID_COMMIT_WELCOME = 31


class Outgoing(NamedTuple):
    """A message for one participant: bytes that follow the opcode, or the `d` of a JSON message."""

    user: str
    op: DaveOp
    body: bytes | dict[str, int]


@dataclass(slots=True)
class Told:
    """What a participant told the gateway, counted."""

    key_packages: int = 0
    commits: int = 0
    commits_announced: int = 0
    ready: int = 0
    invalid: int = 0


@dataclass(slots=True, eq=False)
class _Participant:
    """Somebody in the channel. One with a `ghost` key package is passive: never told, asked or waited for."""

    user: str
    ghost: bytes | None = None
    key_package: bytes | None = None
    """What it can be added with."""
    leaf: int | None = None
    broken: bool = False
    """Its leaf stands for a state it has lost."""
    hold_until_s: float | None = None
    """So long nothing is proposed about it: its new key package is awaited, or it fails again and again."""
    invalid_s: float = -math.inf
    """When it last said op 31."""
    repeats: bool = False
    """Whether it said so twice in short order."""
    has_sender: bool = False
    told: Told = field(default_factory=Told)

    @property
    def active(self) -> bool:
        return self.ghost is None


@dataclass(slots=True, eq=False)
class _Outstanding:
    """A proposal that is neither committed nor revoked. `leaf` is None for an Add."""

    proposal: Proposal
    who: _Participant
    leaf: int | None
    key_package: bytes
    recipients: set[_Participant]


@dataclass(slots=True, eq=False)
class _Transition:
    transition_id: int
    version: int
    recipients: list[_Participant]
    waiting: set[_Participant]
    deadline_s: float


class DaveGroup:
    """The delivery service of one channel.

    Every method gives the messages to send, in order. `tick` must be called when `deadline_s` has come.

    Args:
        channel_id: the group's id.
        sender: signs the proposals.
        clock: monotonic seconds.
        creation_id_zero: a new group takes effect with its announcement (transition id 0); else it is announced
            under an id of its own and waits for op 22.
    """

    def __init__(
        self,
        channel_id: int,
        sender: ExternalSender,
        clock: Callable[[], float],
        *,
        creation_id_zero: bool = True,
    ) -> None:
        self.channel_id = channel_id
        self.sender = sender
        self.version = PROTOCOL_VERSION
        self.mls_epoch: int | None = None
        self.commits_dropped = 0
        self.batch_s = 0.0
        """Changes of so long a time are proposed together."""
        self._clock = clock
        self._creation_id_zero = creation_id_zero
        self._upgrading = False
        self._participants: dict[str, _Participant] = {}
        self._leaves: dict[int, _Participant] = {}
        self._outstanding: dict[bytes, _Outstanding] = {}
        self._transition: _Transition | None = None
        self._last_transition_id = 0
        self._gathers_until_s: float | None = None

    # what is

    @property
    def members(self) -> dict[int, str]:
        """Users of the group by leaf."""
        return {leaf: who.user for leaf, who in sorted(self._leaves.items())}

    @property
    def in_transition(self) -> bool:
        """Whether an announced transition waits for its execution."""
        return self._transition is not None

    @property
    def deadline_s(self) -> float | None:
        """When `tick` has something to do."""
        if self._transition is not None:
            return self._transition.deadline_s
        holds = [who.hold_until_s for who in self._participants.values() if who.hold_until_s is not None]
        if self._gathers_until_s is not None:
            holds.append(self._gathers_until_s)
        return min(holds, default=None)

    def told(self, user: str) -> Told:
        """What a participant said so far. Raises: KeyError."""
        return self._participants[user].told

    def __contains__(self, user: str) -> bool:
        return user in self._participants

    # what participants do

    def join(self, user: str) -> list[Outgoing]:
        """Somebody connected who speaks DAVE. Was it here before, that was another session."""
        out = self.leave(user) if user in self._participants else []
        who = self._participants[user] = _Participant(user)
        if not self.version:
            return out
        in_flight = list(self._outstanding.values()) if self.mls_epoch is None else []
        for each in in_flight:
            each.recipients.add(who)
        return [*out, self._sender_for(who), *self._advance({who: in_flight} if in_flight else {})]

    def add_ghosts(self, ghosts: Iterable[tuple[str, bytes]]) -> list[Outgoing]:
        """Passive participants: users and their key packages."""
        for user, key_package in ghosts:
            self._participants[user] = _Participant(user, ghost=key_package, key_package=key_package)
        return self._advance()

    def leave(self, user: str) -> list[Outgoing]:
        """Somebody is gone. Raises: KeyError."""
        who = self._participants.pop(user)
        out = self._revoke_add(who)
        if self._transition is not None:
            self._transition.waiting.discard(who)
        return out + self._end_transition() + self._advance()

    def sever(self, user: str) -> list[Outgoing]:
        """A client's WebSocket is gone: its leaf is removed, and it needs a new key package. Raises: KeyError."""
        who = self._participants[user]
        out = self._revoke_add(who)
        who.key_package = None
        who.broken = who.leaf is not None
        if self._transition is not None:
            self._transition.waiting.discard(who)
        return out + self._end_transition() + self._advance()

    def key_package(self, user: str, body: bytes) -> list[Outgoing]:
        """Op 26. Raises: KeyError, MlsFormatError."""
        who = self._participants[user]
        check_key_package(body, int(user))
        who.told.key_packages += 1
        out = self._revoke_add(who)
        who.broken = who.leaf is not None  # a member that sends another one began anew
        who.hold_until_s = who.invalid_s + REPEAT_WAIT_S if who.repeats else None
        who.key_package = body
        return out + self._advance()

    def commit_welcome(self, user: str, body: bytes) -> list[Outgoing]:
        """Op 28: the first one that fits is announced, others are dropped. Raises: KeyError, MlsFormatError."""
        author = self._participants[user]
        author.told.commits += 1
        offered = split(body)
        welcome = read_welcome(offered.welcome) if offered.welcome else None
        if not self._fits(author, offered, welcome):
            self.commits_dropped += 1
            return []
        author.told.commits_announced += 1
        return self._announce(author, offered, welcome)

    def transition_ready(self, user: str, transition_id: int) -> list[Outgoing]:
        """Op 23. Raises: KeyError."""
        who = self._participants[user]
        who.told.ready += 1
        if self._transition is None or self._transition.transition_id != transition_id:
            return []
        self._transition.waiting.discard(who)
        return self._end_transition()

    def invalid(self, user: str) -> list[Outgoing]:
        """Op 31, whatever transition it names: its sender lost the group and follows with a new key package.

        Raises: KeyError.
        """
        who = self._participants[user]
        who.told.invalid += 1
        out = self._revoke_add(who)
        who.key_package = None
        now_s = self._clock()
        who.repeats = now_s < who.invalid_s + REPEAT_WAIT_S
        who.invalid_s = now_s
        if who.leaf is not None:
            who.broken = True
            who.hold_until_s = now_s + TRANSITION_WAIT_S
        if self._transition is not None:
            self._transition.waiting.discard(who)
        return out + self._end_transition() + self._advance()

    def tick(self) -> list[Outgoing]:
        """Do what its time has come for."""
        out: list[Outgoing] = []
        if self._transition is not None and self._clock() >= self._transition.deadline_s:
            self._transition.waiting.clear()
            out += self._end_transition()
        return out + self._advance()

    # what the gateway decides

    def restart(self) -> list[Outgoing]:
        """Begin the group anew: op 24 with epoch 1 to everybody, who then send new key packages."""
        self._disband()
        body = {"epoch": _NEW_GROUP_EPOCH, "protocol_version": self.version}
        for who in self._active():
            who.key_package = None
        return [Outgoing(who.user, DaveOp.PREPARE_EPOCH, body) for who in self._active()]

    def downgrade(self) -> list[Outgoing]:
        """Turn end-to-end encryption off, by a transition to version 0."""
        out = self._execute(self._transition) if self._transition is not None else []
        self._outstanding.clear()
        recipients = self._active()
        transition_id = self._begin_transition(recipients, version=0)
        body = {"transition_id": transition_id, "protocol_version": 0}
        out += [Outgoing(who.user, DaveOp.PREPARE_TRANSITION, body) for who in recipients]
        return out + self._end_transition()

    def upgrade(self) -> list[Outgoing]:
        """Turn end-to-end encryption on again: a new group that takes effect by op 22."""
        self.version = PROTOCOL_VERSION
        self._upgrading = True
        return [self._sender_for(who) for who in self._active() if not who.has_sender] + self.restart()

    # rounds of proposals

    def _advance(self, due: dict[_Participant, list[_Outstanding]] | None = None) -> list[Outgoing]:
        """Send the proposals that are due, unless a transition must end first (rule 12)."""
        due = due or {}
        if self.version and self._transition is None:
            if self.mls_epoch is not None:
                if not self._members():
                    self._disband()
                elif len(self._participants) == 1 and len(self._leaves) > 1:
                    return self._reset_sole_member()
            new = self._new_proposals()
            for each in [] if self._gathers(new) else new:
                self._outstanding[each.proposal.reference] = each
                for who in each.recipients:
                    due.setdefault(who, []).append(each)
        return [_append(who, due[who]) for who in self._active() if who in due]

    def _gathers(self, new: list[_Outstanding]) -> bool:
        """Whether proposals wait for those that may come to them (reference section 11, 2)."""
        if not self.batch_s or not new:
            return False
        if self._gathers_until_s is None:
            self._gathers_until_s = self._clock() + self.batch_s
        elif self._clock() >= self._gathers_until_s:
            self._gathers_until_s = None
        return self._gathers_until_s is not None

    def _new_proposals(self) -> list[_Outstanding]:
        """Removes first: an Add of the same user comes after them in any order of commit."""
        proposed = {(each.who, each.leaf) for each in self._outstanding.values()}
        everybody = set(self._active() if self.mls_epoch is None else self._members())
        epoch = self.mls_epoch or 0
        new: list[_Outstanding] = []
        for leaf, who in sorted(self._leaves.items()):
            if self._stale(who) and (who, leaf) not in proposed and not self._held(who):
                proposal = self.sender.remove(self.channel_id, epoch, leaf)
                new.append(_Outstanding(proposal, who, leaf, b"", set(everybody)))
        for who in self._participants.values():
            recipients = everybody - {who}
            if who.key_package is not None and (who, None) not in proposed and recipients and not self._held(who):
                proposal = self.sender.add(self.channel_id, epoch, who.key_package)
                new.append(_Outstanding(proposal, who, None, who.key_package, recipients))
        return new

    def _held(self, who: _Participant) -> bool:
        if who.hold_until_s is not None and self._clock() < who.hold_until_s:
            return self._participants.get(who.user) is who
        who.hold_until_s = None
        return False

    def _revoke_add(self, who: _Participant) -> list[Outgoing]:
        """Take back the Add of somebody whose key package is void."""
        name, each = next(
            ((name, each) for name, each in self._outstanding.items() if each.who is who and each.leaf is None),
            (b"", None),
        )
        if each is None:
            return []
        del self._outstanding[name]
        body = revoke_body([name])
        told = (recipient for recipient in self._active() if recipient in each.recipients)
        return [Outgoing(recipient.user, DaveOp.PROPOSALS, body) for recipient in told]

    # commits

    def _fits(self, author: _Participant, offered: CommitWelcome, welcome: Welcome | None) -> bool:
        """Rules 5 and 6: exactly what this author was told, in this epoch, with a secret for everybody added."""
        creating = self.mls_epoch is None
        if offered.group_id != u64(self.channel_id) or offered.mls_epoch != (self.mls_epoch or 0):
            return False
        if creating:
            may_commit, leaf = author.key_package is not None, 0
        else:
            may_commit, leaf = not self._stale(author), author.leaf if author.leaf is not None else -1
        told = {name for name, each in self._outstanding.items() if author in each.recipients}
        names = offered.references
        if not may_commit or offered.leaf != leaf or not names or len(names) != len(told) or set(names) != told:
            return False
        added = {key_package_reference(each.key_package) for each in self._committed(offered) if each.leaf is None}
        if welcome is None:
            return not added
        return bool(added) and added <= welcome.secrets.keys()

    def _committed(self, offered: CommitWelcome) -> list[_Outstanding]:
        return [self._outstanding[name] for name in offered.references]

    def _announce(self, author: _Participant, offered: CommitWelcome, welcome: Welcome | None) -> list[Outgoing]:
        committed = self._committed(offered)
        creating = self.mls_epoch is None
        if creating:
            self._take_leaf(author)
        staying = self._members()
        for each in committed:
            if each.leaf is not None:
                del self._leaves[each.leaf]
                each.who.leaf, each.who.broken = None, False
        added = [each for each in committed if each.leaf is None]
        for each in added:
            self._take_leaf(each.who)
        self._outstanding.clear()
        self.mls_epoch = (self.mls_epoch or 0) + 1
        recipients = staying + [each.who for each in added if each.who.active]
        transition_id = 0
        if not creating or self._upgrading or not self._creation_id_zero:
            transition_id = self._begin_transition(recipients, self.version)
        self._upgrading = False
        prefix = u16(transition_id)
        out = [Outgoing(who.user, DaveOp.ANNOUNCE_COMMIT, prefix + offered.commit) for who in staying]
        for each in added:
            if each.who.active and welcome is not None:
                own = welcome.for_one(key_package_reference(each.key_package))
                out.append(Outgoing(each.who.user, DaveOp.WELCOME, prefix + own))
        return out + self._advance()

    def _take_leaf(self, who: _Participant) -> None:
        """The lowest free leaf, as both MLS libraries choose (rule 7)."""
        who.leaf = next(leaf for leaf in range(len(self._leaves) + 1) if leaf not in self._leaves)
        self._leaves[who.leaf] = who
        who.key_package = None

    # transitions

    def _begin_transition(self, recipients: list[_Participant], version: int) -> int:
        self._last_transition_id = self._last_transition_id % _LAST_TRANSITION_ID + 1
        deadline_s = self._clock() + TRANSITION_WAIT_S
        self._transition = _Transition(self._last_transition_id, version, recipients, set(recipients), deadline_s)
        return self._last_transition_id

    def _end_transition(self) -> list[Outgoing]:
        """Execute the transition when nobody is waited for any more, and go on with the next round."""
        if self._transition is None or self._transition.waiting:
            return []
        return self._execute(self._transition) + self._advance()

    def _execute(self, transition: _Transition) -> list[Outgoing]:
        self._transition = None
        self.version = transition.version
        if not self.version:
            self._disband()
        body = {"transition_id": transition.transition_id}
        here = (who for who in transition.recipients if self._participants.get(who.user) is who)
        return [Outgoing(who.user, DaveOp.EXECUTE_TRANSITION, body) for who in here]

    # the group as a whole

    def _active(self) -> list[_Participant]:
        return [who for who in self._participants.values() if who.active]

    def _members(self) -> list[_Participant]:
        """Active members that follow the group, by leaf."""
        return [who for _, who in sorted(self._leaves.items()) if who.active and not self._stale(who)]

    def _stale(self, who: _Participant) -> bool:
        return who.broken or self._participants.get(who.user) is not who

    def _disband(self) -> None:
        """There is no group any more; whoever has a key package can be added to the next one."""
        self.mls_epoch = self._transition = None
        self._leaves.clear()
        self._outstanding.clear()
        for who in self._participants.values():
            who.leaf = who.hold_until_s = None
            who.broken = False
            who.key_package = who.ghost or who.key_package

    def _reset_sole_member(self) -> list[Outgoing]:
        """Rule 10: the last one in the channel begins anew, at once."""
        out = self.restart()
        body = {"transition_id": 0, "protocol_version": self.version}
        return out + [Outgoing(who.user, DaveOp.PREPARE_TRANSITION, body) for who in self._active()]

    def _sender_for(self, who: _Participant) -> Outgoing:
        who.has_sender = True
        return Outgoing(who.user, DaveOp.EXTERNAL_SENDER, self.sender.package)


def _append(who: _Participant, proposals: Iterable[_Outstanding]) -> Outgoing:
    return Outgoing(who.user, DaveOp.PROPOSALS, append_body(each.proposal for each in proposals))
