"""The local Discord's delivery service for DAVE, driven by members on two independent MLS implementations."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import pytest

from tests.emulator.dave.codec import MlsFormatError, Reader, vector
from tests.emulator.dave.commit import split
from tests.emulator.dave.external_sender import ExternalSender
from tests.emulator.dave.ghosts import make_key_package
from tests.emulator.dave.group import REPEAT_WAIT_S, TRANSITION_WAIT_S, DaveGroup, DaveOp, Outgoing
from tests.emulator.dave.key_package import check_key_package
from tests.emulator.dave.member import DaveyMember
from tests.libdave_member import LibdaveMember

CHANNEL = 927310423890473011
_MOST_MESSAGES = 5_000
FRAME = b"\x78" + bytes(range(100))
Member = DaveyMember | LibdaveMember
Change = Callable[[Outgoing], Outgoing | None]

davey_or_libdave = pytest.mark.parametrize("kind", [DaveyMember, LibdaveMember])


class Call:
    """A channel with members of both kinds; messages are delivered one at a time, in order."""

    def __init__(self, *, creation_id_zero: bool = True) -> None:
        self.now_s = 100.0
        self.group = DaveGroup(CHANNEL, ExternalSender(), lambda: self.now_s, creation_id_zero=creation_id_zero)
        self.members: dict[str, Member] = {}
        self.queue: deque[tuple[bool, str, int, bytes | dict[str, int]]] = deque()
        self.sent: list[Outgoing] = []
        self.said: list[tuple[str, int]] = []
        self.change: Change | None = None
        self.deaf: set[tuple[str, int]] = set()
        """Users and opcodes that are lost on the way."""

    def join(self, user: str, kind: type[Member] = DaveyMember) -> Member:
        """Connect; nothing is delivered yet."""
        member = self.members[user] = kind(user, CHANNEL)
        for other in self.members.values():
            other.connected(self.members)
        self.say(user, member.start())
        self.post(self.group.join(user))
        return member

    def ghosts(self, *users: str) -> None:
        """Add members with nobody behind them."""
        for member in self.members.values():
            member.connected(users)
        self.post(self.group.add_ghosts((user, make_key_package(int(user))) for user in users))

    def leave(self, user: str) -> None:
        """Disconnect."""
        self.members.pop(user, None)
        for other in self.members.values():
            other.disconnected(user)
        self.post(self.group.leave(user))

    def post(self, messages: Iterable[Outgoing]) -> None:
        """Queue what the gateway sends."""
        for message in messages:
            changed = self.change(message) if self.change else message
            if changed is not None:
                self.sent.append(changed)
                self.queue.append((False, changed.user, changed.op, changed.body))

    def say(self, user: str, replies: Iterable[tuple[int, bytes | dict[str, int]]]) -> None:
        """Queue what a member sends."""
        self.queue.extend((True, user, op, body) for op, body in replies)

    def settle(self) -> Call:
        """Deliver until nobody has anything to say."""
        for _ in range(_MOST_MESSAGES):
            if not self.queue:
                return self
            self.step()
        raise AssertionError("they never come to an end")

    def step(self) -> None:
        """Deliver the next message, if there is one."""
        if not self.queue:
            return
        upwards, user, op, body = self.queue.popleft()
        if upwards:
            self.said.append((user, op))
            self.post(self._to_gateway(user, op, body))
        elif user in self.members and (user, op) not in self.deaf:
            self.say(user, self.members[user].hear(DaveOp(op), body))

    def _to_gateway(self, user: str, op: int, body: bytes | dict[str, int]) -> list[Outgoing]:
        if user not in self.group:
            return []
        if isinstance(body, dict):
            return (
                self.group.transition_ready(user, body["transition_id"])
                if op == DaveOp.TRANSITION_READY
                else self.group.invalid(user)
            )
        return self.group.key_package(user, body) if op == DaveOp.KEY_PACKAGE else self.group.commit_welcome(user, body)

    def ops(self, user: str) -> list[int]:
        """What was sent to a user, in order."""
        return [message.op for message in self.sent if message.user == user]

    def assert_whole(self, *ghosts: str) -> None:
        """All are in one group and everybody hears everybody."""
        everybody = {*self.members, *ghosts}
        assert set(self.group.members.values()) == everybody
        assert not self.group.in_transition
        assert len({member.privacy_code for member in self.members.values()}) == 1
        for member in self.members.values():
            assert member.ready
            assert member.users == everybody
            self.assert_heard(member)

    def assert_heard(self, speaker: Member) -> None:
        """Every other member decrypts what this one sends."""
        sealed = speaker.encrypt(FRAME)
        assert sealed != FRAME
        for other in self.members.values():
            if other is not speaker:
                assert other.decrypt(speaker.user, sealed) == FRAME, (other.user, speaker.user)


def both_kinds(call: Call, *users: str) -> None:
    """Join users that alternate between the implementations."""
    for number, user in enumerate(users):
        call.join(user, (DaveyMember, LibdaveMember)[number % 2])


# creation and growth


@davey_or_libdave
@pytest.mark.parametrize("other", [DaveyMember, LibdaveMember])
@pytest.mark.parametrize("at_once", [False, True])
def test_two_members_make_a_group(kind: type[Member], other: type[Member], at_once: bool) -> None:
    """The first commit that fits is announced to its author, the other gets a Welcome, and id 0 needs no op 22."""
    call = Call()
    call.join("11", kind)
    if not at_once:
        call.settle()
    call.join("22", other)
    call.settle().assert_whole()
    assert call.group.mls_epoch == 1
    assert sorted(call.ops("11") + call.ops("22")) == [25, 25, 27, 27, 29, 30]


@davey_or_libdave
def test_a_group_may_be_created_under_an_id_of_its_own(kind: type[Member]) -> None:
    """With an announced creation both say op 23 and nothing is in force before op 22."""
    call = Call(creation_id_zero=False)
    call.join("11", kind)
    call.join("22")
    call.settle().assert_whole()
    assert [op for _, op in call.said if op == 23] == [23, 23]
    assert call.ops("11")[-1] == call.ops("22")[-1] == 22


def test_alone_there_is_no_group() -> None:
    """A sole participant gets op 25 and nothing else."""
    call = Call()
    call.join("11")
    call.settle()
    assert call.ops("11") == [25]
    assert call.group.mls_epoch is None


def test_newcomers_join_one_by_one() -> None:
    """Every member hears every other after each join; who is pending is sent no proposal of another epoch."""
    call = Call()
    for number, user in enumerate(["11", "22", "33", "44", "55", "66", "77"]):
        call.join(user, (LibdaveMember, DaveyMember)[number % 2])
        call.settle()
        if number:
            call.assert_whole()
    assert call.group.mls_epoch == 6
    assert call.ops("77") == [25, 30, 22]


def test_all_at_once_are_one_epoch() -> None:
    """Participants that are there before the first commit are all in the first group."""
    call = Call()
    both_kinds(call, "11", "22", "33", "44", "55")
    call.settle().assert_whole()


def test_rounds_wait_for_the_transition_before() -> None:
    """Nothing is proposed between an announcement and its op 22; what came meanwhile makes one round."""
    call = Call()
    both_kinds(call, "11", "22")
    call.settle()
    call.deaf = {("33", 30)}
    call.join("33")
    call.settle()
    assert call.group.in_transition
    call.join("44", LibdaveMember)
    call.join("55")
    call.settle()
    assert set(call.group.members.values()) == {"11", "22", "33"}
    call.deaf.clear()
    call.now_s += TRANSITION_WAIT_S
    call.say("33", call.members["33"].hear(DaveOp.WELCOME, welcome_of(call, "33")))
    call.post(call.group.tick())
    call.settle()
    assert call.group.mls_epoch == 3
    assert set(call.group.members.values()) == {"11", "22", "33", "44", "55"}


def welcome_of(call: Call, user: str) -> bytes:
    """The last Welcome sent to a user."""
    bodies = [each.body for each in call.sent if each.user == user and each.op == DaveOp.WELCOME]
    assert isinstance(bodies[-1], bytes)
    return bodies[-1]


def test_a_silent_member_is_waited_for_two_seconds() -> None:
    """Op 22 goes out when all op 23 are in, or when its time has come."""
    call = Call()
    both_kinds(call, "11", "22", "33")
    call.settle()
    call.deaf = {("22", 29)}
    call.join("44")
    call.settle()
    assert call.group.deadline_s == call.now_s + TRANSITION_WAIT_S
    assert 22 not in call.ops("44")
    call.now_s += TRANSITION_WAIT_S - 0.01
    assert call.group.tick() == []
    call.now_s += 0.01
    executed = call.group.tick()
    assert {(each.user, int(each.op)) for each in executed} == {(user, 22) for user in ("11", "22", "33", "44")}
    assert call.group.deadline_s is None


# leaving


@davey_or_libdave
def test_members_leave_and_come_back(kind: type[Member]) -> None:
    """A leaver is removed by a commit, its leaf is free for the next."""
    call = Call()
    both_kinds(call, "11", "22")
    call.join("33", kind)
    call.join("44")
    call.settle()
    for leaver in ("33", "11"):
        call.leave(leaver)
        call.settle().assert_whole()
    for comer in ("11", "33"):
        call.join(comer, kind)
        call.settle().assert_whole()
    assert call.group.mls_epoch == 5


def test_a_leaver_and_a_newcomer_share_an_epoch() -> None:
    """Remove and Add of one round are committed together."""
    call = Call()
    both_kinds(call, "11", "22", "33")
    call.settle()
    call.deaf = {("11", 29)}
    call.join("44")
    call.settle()
    call.leave("33")
    call.join("55", LibdaveMember)
    call.settle()
    call.deaf.clear()
    call.leave("11")
    call.settle().assert_whole()
    assert call.group.mls_epoch == 3


def test_a_quick_return_replaces_the_leaf() -> None:
    """Somebody who comes back before its Remove was committed is removed and added in one epoch."""
    call = Call()
    both_kinds(call, "11", "22", "33")
    call.settle()
    epoch = call.group.mls_epoch
    call.join("33", LibdaveMember)
    call.settle().assert_whole()
    assert epoch is not None
    assert call.group.mls_epoch in (epoch + 1, epoch + 2)


@davey_or_libdave
def test_a_join_can_be_revoked(kind: type[Member]) -> None:
    """Who goes before its Add is committed is taken back; the commit for it is void, an empty one is never taken."""
    call = Call()
    call.join("11", kind)
    call.join("22", kind)
    call.settle()
    call.change = lambda message: message if message.op != DaveOp.ANNOUNCE_COMMIT else None
    epoch = call.group.mls_epoch
    call.join("33")
    call.queue = deque(each for each in call.queue if each[1] == "33")  # the members hear of it only later
    upwards = call.queue.popleft()
    assert upwards[2] == DaveOp.KEY_PACKAGE
    assert isinstance(upwards[3], bytes)
    call.post(call.group.key_package("33", upwards[3]))
    call.leave("33")
    call.settle().assert_whole()
    assert call.group.mls_epoch == epoch
    assert call.ops("11")[-2:] == [27, 27]


@davey_or_libdave
def test_the_last_one_begins_anew(kind: type[Member]) -> None:
    """When all others leave, the last one is reset at once, and the next one to come makes a group with it."""
    call = Call()
    call.join("11", kind)
    call.join("22")
    call.settle()
    for _ in range(3):
        call.leave("22")
        call.settle()
        assert call.group.mls_epoch is None
        assert call.ops("11")[-2:] == [24, 21]
        call.join("22")
        call.settle().assert_whole()
        assert call.group.mls_epoch == 1


# recovery


def damaged(message: Outgoing) -> Outgoing:
    """The message with one bit of its last quarter turned."""
    assert isinstance(message.body, bytes)
    at = len(message.body) - 40
    body = message.body[:at] + bytes((message.body[at] ^ 1,)) + message.body[at + 1 :]
    return message._replace(body=body)


@davey_or_libdave
@pytest.mark.parametrize("op", [DaveOp.ANNOUNCE_COMMIT, DaveOp.WELCOME])
def test_damage_is_recovered_from(kind: type[Member], op: DaveOp) -> None:
    """Who cannot read a commit or Welcome says op 31 and op 26, and is back in one epoch; the others go on."""
    call = Call()
    both_kinds(call, "11", "22")
    call.join("33", kind)
    call.settle()
    victim = "33" if op is DaveOp.ANNOUNCE_COMMIT else "44"
    hits = iter([True])
    call.change = lambda message: (
        damaged(message) if (message.user, message.op) == (victim, op) and next(hits, False) else message
    )
    call.join("44", kind)
    call.settle().assert_whole()
    assert call.group.told(victim).invalid == 1
    assert call.group.told(victim).key_packages == 2
    assert call.group.mls_epoch == 3


@davey_or_libdave
def test_a_pair_recovers(kind: type[Member]) -> None:
    """Also of two members the damaged one comes back."""
    call = Call()
    call.join("11", kind)
    call.settle()
    hits = iter([True])
    call.change = lambda message: damaged(message) if message.op == DaveOp.WELCOME and next(hits, False) else message
    call.join("22", kind)
    call.settle().assert_whole()


def test_all_broken_is_a_new_group() -> None:
    """When nobody is left to commit, the group begins at epoch 0 again."""
    call = Call()
    both_kinds(call, "11", "22")
    call.settle()
    hits = iter([True, True])
    call.change = lambda message: (
        damaged(message) if message.op == DaveOp.ANNOUNCE_COMMIT and next(hits, False) else message
    )
    call.join("33")
    call.settle()
    call.now_s += TRANSITION_WAIT_S
    call.post(call.group.tick())
    call.settle().assert_whole()


def test_a_broken_member_that_says_no_more_is_removed() -> None:
    """Its key package is waited for only so long."""
    call = Call()
    both_kinds(call, "11", "22", "33")
    call.settle()
    call.post(call.group.invalid("33"))
    call.settle()
    assert "33" in call.group.members.values()
    call.now_s += TRANSITION_WAIT_S
    call.post(call.group.tick())
    call.settle()
    assert set(call.group.members.values()) == {"11", "22"}


def test_who_fails_again_and_again_is_not_hurried() -> None:
    """A second op 31 in short order puts the next Add off, so that a client and the gateway do not run in circles."""
    call = Call()
    both_kinds(call, "11", "22")
    call.settle()
    hits = iter([True] * 2)
    call.change = lambda message: damaged(message) if message.op == DaveOp.WELCOME and next(hits, False) else message
    call.join("33")
    call.settle()
    assert call.group.told("33").invalid == 2
    assert "33" in call.group.members.values()
    assert call.group.deadline_s == call.now_s + REPEAT_WAIT_S
    call.now_s += REPEAT_WAIT_S
    call.post(call.group.tick())
    call.settle().assert_whole()


# decisions of the gateway


@davey_or_libdave
def test_an_epoch_restart_makes_a_new_group(kind: type[Member]) -> None:
    """After op 24 everybody sends a new key package and is in a group again."""
    call = Call()
    call.join("11", kind)
    both_kinds(call, "22", "33")
    call.settle()
    call.post(call.group.restart())
    call.settle().assert_whole()
    assert call.group.mls_epoch == 1


@davey_or_libdave
def test_encryption_is_turned_off_and_on(kind: type[Member]) -> None:
    """Op 21 and 22 end encryption; op 24 brings it back, in force with its own op 22; who came between is in."""
    call = Call()
    call.join("11", kind)
    call.join("22")
    call.settle()
    call.post(call.group.downgrade())
    call.settle()
    assert call.group.version == 0
    assert {member.version for member in call.members.values()} == {0}
    call.members["33"] = kind("33", CHANNEL)
    for member in call.members.values():
        member.connected(call.members)
    call.post(call.group.join("33"))
    call.settle()
    assert call.ops("33") == []
    call.post(call.group.upgrade())
    call.settle().assert_whole()
    assert call.ops("33")[:2] == [25, 24]
    assert call.ops("33")[-1] == 22


# ghosts


@davey_or_libdave
def test_ghosts_are_members_that_nobody_waits_for(kind: type[Member]) -> None:
    """A client alone with ghosts has a group; ghosts come and go, and nothing is ever sent to them."""
    call = Call()
    call.ghosts("501", "502", "503")
    client = call.join("11", kind)
    client.connected(["501", "502", "503"])
    call.settle()
    assert set(call.group.members.values()) == {"11", "501", "502", "503"}
    call.ghosts("504")
    call.settle()
    call.leave("502")
    call.settle()
    call.assert_whole("501", "503", "504")
    assert {message.user for message in call.sent} == {"11"}
    again = call.join("11", kind)
    again.connected(["501", "503", "504"])
    call.settle().assert_whole("501", "503", "504")
    assert call.group.mls_epoch == 1


@davey_or_libdave
def test_alone_with_ghosts_damage_begins_a_new_group(kind: type[Member]) -> None:
    """With nobody else who could commit, the recovery is a new group."""
    call = Call()
    call.ghosts("501")
    call.join("11", kind).connected(["501"])
    call.settle()
    hits = iter([True])
    call.change = lambda message: (
        damaged(message) if message.op == DaveOp.ANNOUNCE_COMMIT and next(hits, False) else message
    )
    call.ghosts("502")
    call.settle().assert_whole("501", "502")
    assert call.group.told("11").invalid == 1


def test_a_hundred_members() -> None:
    """A large group is made, grows and shrinks as a small one does."""
    call = Call()
    ghosts = [str(1000 + number) for number in range(96)]
    call.ghosts(*ghosts)
    for number, user in enumerate(["11", "22", "33"]):
        call.join(user, (LibdaveMember, DaveyMember)[number % 2]).connected(ghosts)
    call.settle().assert_whole(*ghosts)
    call.join("44", LibdaveMember).connected(ghosts)
    call.settle().assert_whole(*ghosts)
    call.leave(ghosts[50])
    call.settle().assert_whole(*(ghost for ghost in ghosts if ghost != ghosts[50]))


# what is refused


def commit_for(call: Call) -> tuple[str, bytes]:
    """A commit that would be accepted, not delivered."""
    for upwards, user, op, body in call.queue:
        if upwards and op == DaveOp.COMMIT_WELCOME:
            assert isinstance(body, bytes)
            return user, body
    raise AssertionError("nobody committed")


def test_only_the_first_fitting_commit_counts() -> None:
    """The same commit a second time, one of another author, and one for an older epoch are dropped."""
    call = Call()
    both_kinds(call, "11", "22", "33")
    call.settle()
    dropped = call.group.commits_dropped
    commits: list[tuple[str, bytes]] = []
    call.join("44")
    while call.queue:
        upwards, user, op, body = call.queue.popleft()
        if upwards and op == DaveOp.COMMIT_WELCOME:
            assert isinstance(body, bytes)
            commits.append((user, body))
        elif upwards:
            call.post(call._to_gateway(user, op, body))
        else:
            call.say(user, call.members[user].hear(DaveOp(op), body))
    assert {user for user, _ in commits} == {"11", "22", "33"}
    (first, right), (second, other), _ = commits
    assert call.group.commit_welcome(second, right) == []
    call.post(call.group.commit_welcome(first, right))
    assert call.group.commit_welcome(second, other) == []
    assert call.group.commit_welcome(first, right) == []
    call.settle().assert_whole()
    assert call.group.commits_dropped == dropped + 3


def test_a_commit_without_its_welcome_is_dropped() -> None:
    """Who adds somebody must bring a secret for it."""
    call = Call()
    call.join("11")
    call.join("22")
    while not any(each[0] and each[2] == DaveOp.COMMIT_WELCOME for each in call.queue):
        upwards, user, op, body = call.queue.popleft()
        if upwards:
            call.post(call._to_gateway(user, op, body))
        else:
            call.say(user, call.members[user].hear(DaveOp(op), body))
    author, body = commit_for(call)
    assert call.group.commit_welcome(author, split(body).commit) == []
    assert call.group.mls_epoch is None
    assert call.group.commit_welcome(author, body) != []


@davey_or_libdave
def test_key_packages_are_checked(kind: type[Member]) -> None:
    """Somebody else's, a damaged one and rubbish are refused."""
    (_, body), *_ = kind("11", CHANNEL).start()
    assert isinstance(body, bytes)
    check_key_package(body, 11)
    group = DaveGroup(CHANNEL, ExternalSender(), lambda: 0.0)
    group.join("11")
    group.join("22")
    with pytest.raises(MlsFormatError, match="somebody else"):
        group.key_package("22", body)
    for wrong in (body[:-1], body + b"\0", body[:20] + bytes((body[20] ^ 1,)) + body[21:], b"", b"\0\1\0\5" + body):
        with pytest.raises(MlsFormatError):
            group.key_package("11", wrong)


@pytest.mark.parametrize("body", [b"", b"\0\1\0\1", b"rubbish", bytes(200)])
def test_rubbish_is_no_commit(body: bytes) -> None:
    """Op 28 that is no commit is refused, not passed over."""
    group = DaveGroup(CHANNEL, ExternalSender(), lambda: 0.0)
    group.join("11")
    with pytest.raises(MlsFormatError):
        group.commit_welcome("11", body)


# encodings


@pytest.mark.parametrize("size", [0, 1, 63, 64, 16383, 16384, 100_000])
def test_vectors_are_read_as_written(size: int) -> None:
    """Lengths take one, two or four bytes."""
    reader = Reader(vector(bytes(size)) + b"rest")
    assert reader.vector() == bytes(size)
    assert reader.rest == b"rest"


@pytest.mark.parametrize("data", [b"", b"\1", b"\x40", b"\x40\x01x", b"\x80\0\0\x02xx", b"\xc0", b"\x7f\xff"])
def test_wrong_vectors_are_refused(data: bytes) -> None:
    """Lengths that end too soon, are too long, or are not in their shortest form."""
    with pytest.raises(MlsFormatError):
        Reader(data).vector()
