"""Our side of a DAVE group against the local Discord's delivery service, with members on two MLS implementations."""

from __future__ import annotations

import asyncio
import os
import random
from collections import deque
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import worker.voice.dave
from shared.errors import ErrorCode, ProtocolError, VoiceError
from tests.emulator.dave.external_sender import ExternalSender, append_body
from tests.emulator.dave.group import TRANSITION_WAIT_S, DaveOp, Outgoing
from tests.emulator.dave.member import DaveyMember
from tests.libdave_member import LibdaveMember
from tests.product_member import ProductMember
from tests.unit.test_dave_group import CHANNEL, FRAME, Call
from worker.voice.dave import EXECUTED_WITHIN_S
from worker.voice.turns import Turns

US, OTHER, THIRD = "11", "22", "33"
kinds = pytest.mark.parametrize("kind", [DaveyMember, LibdaveMember])
Kind = type[DaveyMember] | type[LibdaveMember]


def us(call: Call) -> ProductMember:
    member = call.join(US, ProductMember)  # type: ignore[arg-type]
    assert isinstance(member, ProductMember)
    return member


# the scenarios of reference section 6.5


def test_alone_there_is_nothing_to_send_with() -> None:
    """Alone in a call a key package is offered, and no frame may leave."""
    call = Call()
    member = us(call)
    call.settle()
    assert not member.ready
    assert (member.dave.version, member.privacy_code) == (1, "")
    assert [op for _, op in call.said] == [26]


@kinds
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("creation_id_zero", [True, False])
def test_a_group_of_two_is_made(kind: Kind, first: bool, creation_id_zero: bool) -> None:
    """Whoever comes first and whoever commits, each hears the other and the privacy codes are equal."""
    call = Call(creation_id_zero=creation_id_zero)
    if first:
        us(call)
        call.join(OTHER, kind)
    else:
        call.join(OTHER, kind)
        us(call)
    call.settle().assert_whole()


@kinds
def test_we_join_a_group_that_is_there(kind: Kind) -> None:
    """A Welcome lets us in; we speak from op 22 on and not before."""
    call = Call()
    call.join(OTHER, kind)
    call.join(THIRD, kind)
    call.settle()
    call.deaf.add((US, DaveOp.EXECUTE_TRANSITION))
    member = us(call)
    call.settle()
    assert not member.ready
    call.deaf.clear()
    call.now_s += 5
    (transition_id,) = member.dave._pending
    member.hear(22, {"transition_id": transition_id})
    assert member.ready
    call.settle().assert_whole()


@kinds
def test_members_come_and_go(kind: Kind) -> None:
    """After each change everybody hears us, and those who left do not."""
    call = Call()
    member = us(call)
    call.join(OTHER, kind)
    call.settle()
    for number in range(33, 38):
        call.join(str(number), kind)
        call.settle().assert_whole()
    gone = call.members["35"]
    for user in ("35", "22", "37"):
        call.leave(user)
        call.settle().assert_whole()
    assert gone.decrypt(US, member.encrypt(FRAME)) is None
    assert member.counters.failures == 0


@kinds
def test_a_channel_that_empties_and_refills_is_heard_again_each_time(kind: Kind) -> None:
    """The group ends with its last other member, and a new one begins with the next."""
    call = Call()
    member = us(call)
    for number in range(20):
        user = str(100 + number)
        call.join(user, kind)
        call.settle().assert_whole()
        call.leave(user)
        call.settle()
        assert not member.ready
        assert member.privacy_code == ""
    assert member.counters.failures == 0


def test_a_hundred_members_are_one_group() -> None:
    """Groups may have a hundred members; most of them never commit."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    ghosts = [str(1_000 + number) for number in range(98)]
    call.ghosts(*ghosts)
    call.settle()
    assert member.ready
    assert len(call.group.members) == 100
    assert call.members[OTHER].decrypt(US, member.encrypt(FRAME)) == FRAME


def test_what_was_encrypted_before_a_transition_is_heard_after_it() -> None:
    """Frames that were built ahead under the keys before are decrypted all the same."""
    call = Call()
    member = us(call)
    other = call.join(OTHER)
    call.settle()
    early = member.encrypt(FRAME)
    call.join(THIRD)
    call.settle()
    assert other.decrypt(US, early) == FRAME


# versions


def test_without_encryption_frames_leave_as_they_are() -> None:
    """Version 0, as in a stage channel: ready at once, no group, no key package."""
    member = ProductMember(US, CHANNEL)
    assert member.start(0) == []
    assert member.ready
    assert member.encrypt(FRAME) == FRAME


def test_a_downgrade_comes_into_force_with_its_execution_and_is_counted() -> None:
    """Until op 22 frames stay encrypted."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    assert member.hear(21, {"transition_id": 9, "protocol_version": 0}) == [(23, {"transition_id": 9})]
    assert member.encrypt(FRAME) != FRAME
    member.hear(22, {"transition_id": 9})
    assert member.encrypt(FRAME) == FRAME
    assert (member.version, member.counters.downgrades) == (0, 1)


def test_a_downgrade_is_refused_where_encryption_is_required() -> None:
    """Nothing leaves until the server has returned to encryption; it is counted all the same."""
    member = ProductMember(US, CHANNEL, required=True)
    member.connected([OTHER])
    member.start()
    member.hear(21, {"transition_id": 9, "protocol_version": 0})
    member.hear(22, {"transition_id": 9})
    assert not member.ready
    assert member.dave.refused
    assert member.counters.downgrades == 1
    member.hear(24, {"epoch": 1, "protocol_version": 1})
    member.hear(21, {"transition_id": 10, "protocol_version": 1})
    member.hear(22, {"transition_id": 10})
    assert not member.dave.refused


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("comes_back", [True, False])
def test_alone_a_downgrade_is_no_alarm_until_somebody_hears_it(required: bool, comes_back: bool) -> None:
    """A call of one may go on without encryption; it is upgraded when somebody comes, or it is told then."""
    member = ProductMember(US, CHANNEL, required=required)
    member.start()
    member.hear(21, {"transition_id": 9, "protocol_version": 0})
    member.hear(22, {"transition_id": 9})
    assert (member.dave.refused, member.counters.downgrades) == (required, 0)
    member.connected([OTHER])
    if comes_back:
        member.hear(24, {"epoch": 1, "protocol_version": 1})
        member.hear(21, {"transition_id": 10, "protocol_version": 1})
        member.hear(22, {"transition_id": 10})
    member.wait()
    assert (member.dave.refused, member.counters.downgrades) == (required and not comes_back, int(not comes_back))
    member.wait()
    assert member.counters.downgrades == int(not comes_back)


def test_a_session_that_begins_without_encryption_is_no_downgrade() -> None:
    """A stage has none, whatever is required."""
    member = ProductMember(US, CHANNEL, required=True)
    member.start(0)
    assert member.ready
    assert member.counters.downgrades == 0


def test_an_upgrade_begins_a_group_and_switches_at_its_execution() -> None:
    """Frames leave as they are until then: nobody could decrypt anything else."""
    call = Call(creation_id_zero=False)
    member = us(call)
    call.join(OTHER)
    call.settle()
    member.hear(21, {"transition_id": 9, "protocol_version": 0})
    member.hear(22, {"transition_id": 9})
    (package,) = member.hear(24, {"epoch": 1, "protocol_version": 1})
    assert package[0] == 26
    assert member.encrypt(FRAME) == FRAME
    member.hear(21, {"transition_id": 10, "protocol_version": 1})
    member.hear(22, {"transition_id": 10})
    assert not member.ready


def test_a_version_that_nobody_knows_ends_the_session() -> None:
    """Not retryable: it needs a newer guildcast."""
    member = ProductMember(US, CHANNEL)
    with pytest.raises(VoiceError) as refused:
        member.start(2)
    assert refused.value.code == ErrorCode.E2EE_REQUIRED
    assert not refused.value.retryable


def test_another_key_of_the_transport_leaves_the_group_alone() -> None:
    """A second op 4 of the same version does not restart the group, and no frame leaks meanwhile."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    assert member.start() == []
    call.assert_whole()


@pytest.mark.parametrize(
    "orders",
    [
        [(21, {"transition_id": 0, "protocol_version": 1})],
        [(24, {"epoch": 1, "protocol_version": 1})],
        [(21, {"transition_id": 9, "protocol_version": 0}), (22, {"transition_id": 9})],
    ],
)
def test_op_4_begins_the_group_whatever_came_before_it(orders: list[tuple[int, dict[str, int]]]) -> None:
    """An order that overtook it says nothing that it does not say; no frame leaves in the clear afterwards."""
    call = Call()
    member = ProductMember(US, CHANNEL)
    for op, body in orders:
        assert member.hear(op, body) == []
    assert not member.ready
    call.join(OTHER)
    call.members[US] = member  # type: ignore[assignment]
    member.connected([OTHER])
    call.members[OTHER].connected([US])
    call.say(US, member.start())
    call.post(call.group.join(US))
    call.settle().assert_whole()


def test_encryption_that_op_4_turns_off_and_on_again_is_on() -> None:
    """Each op 4 says what is in force: from the second change on a group is made anew and nothing leaves meanwhile."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    assert member.start(0) == []
    assert member.encrypt(FRAME) == FRAME
    assert [op for op, _ in member.start(1)] == [26]
    assert not member.ready
    assert member.dave.protect is not None


@pytest.mark.parametrize(
    ("op", "body"),
    [
        (21, {"transition_id": 0, "protocol_version": 2}),
        (21, {"transition_id": 9, "protocol_version": 2}),
        (24, {"epoch": 1, "protocol_version": 2}),
        (24, {"epoch": 5, "protocol_version": 2}),
    ],
)
def test_an_order_to_a_version_that_nobody_knows_ends_the_session(op: int, body: dict[str, int]) -> None:
    """The group would speak what we do not."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    with pytest.raises(VoiceError) as refused:
        member.hear(op, body)
    assert refused.value.code == ErrorCode.E2EE_REQUIRED
    with pytest.raises(VoiceError):
        member.start(2)


def test_frames_on_their_way_are_heard_around_a_downgrade() -> None:
    """Some switch before us and some after us: frames in the clear and encrypted ones are both heard."""
    call = Call()
    member = us(call)
    other = call.join(OTHER)
    call.settle()
    sealed = [other.encrypt(FRAME), other.encrypt(FRAME)]
    assert member.decrypt(OTHER, FRAME) is None
    member.hear(21, {"transition_id": 9, "protocol_version": 0})
    call.deaf.add((US, DaveOp.EXECUTE_TRANSITION))
    third = call.join(THIRD)
    call.settle()
    assert [member.decrypt(user, FRAME) for user in (OTHER, THIRD)] == [FRAME, FRAME]
    assert member.decrypt(OTHER, sealed[0]) == FRAME
    member.hear(22, {"transition_id": 9})
    assert [member.decrypt(user, FRAME) for user in (OTHER, THIRD, "44")] == [FRAME, FRAME, FRAME]
    assert member.decrypt(OTHER, sealed[1]) == FRAME
    assert member.decrypt(THIRD, third.encrypt(FRAME)) == FRAME


def test_privacy_code_and_epoch_are_told_while_encryption_is_in_force() -> None:
    """They belong to a group that nobody uses after a downgrade."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    call.join(THIRD)
    call.settle()
    before = (member.privacy_code, member.dave.mls_epoch)
    assert before == (call.members[OTHER].privacy_code, call.group.mls_epoch)
    member.hear(21, {"transition_id": 0, "protocol_version": 0})
    assert (member.privacy_code, member.dave.mls_epoch) == ("", None)


# who is there


@pytest.mark.parametrize("lost", [DaveOp.PREPARE_TRANSITION, None])
def test_the_last_one_has_nobody_to_send_to(lost: DaveOp | None) -> None:
    """With the group and everybody in it gone there are no keys, whichever of the server's two orders comes."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    if lost is not None:
        call.deaf.add((US, lost))
    call.leave(OTHER)
    call.settle()
    assert not member.ready


def test_the_last_one_has_nobody_to_send_to_in_any_order() -> None:
    """Op 21 before op 24, or the news that the other left behind both."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    member.hear(21, {"transition_id": 0, "protocol_version": 1})
    member.hear(24, {"epoch": 1, "protocol_version": 1})
    assert member.ready
    member.disconnected(OTHER)
    assert not member.ready


def test_a_restart_among_others_is_sent_through() -> None:
    """Until the new group is in force everybody has the keys of the one before."""
    call = Call()
    member = us(call)
    other = call.join(OTHER)
    call.settle()
    member.hear(24, {"epoch": 1, "protocol_version": 1})
    assert other.decrypt(US, member.encrypt(FRAME)) == FRAME


def test_waiting_is_measured_only_while_somebody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who came and went before there was a group does not make the next one's wait longer."""
    now_s = 100.0
    monkeypatch.setattr(
        worker.voice.dave, "time", SimpleNamespace(monotonic=lambda: now_s, monotonic_ns=lambda: int(now_s * 1e9))
    )
    call = Call()
    member = us(call)
    member.connected([OTHER])
    now_s += 2
    member.disconnected(OTHER)
    now_s += 3_600
    call.join(OTHER)
    now_s += 0.5
    call.settle().assert_whole()
    assert member.counters.ready_ms_max == 500


# what goes wrong


def test_a_commit_that_is_told_twice_is_no_failure() -> None:
    """libdave calls the second one failed; the group is as it was."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    announced = [m for m in call.sent if m.user == US and m.op is DaveOp.ANNOUNCE_COMMIT]
    if not announced:  # the other one committed
        call.join(THIRD)
        call.settle()
        announced = [m for m in call.sent if m.user == US and m.op is DaveOp.ANNOUNCE_COMMIT]
    assert member.hear(29, announced[-1].body) == []
    assert member.counters.failures == 0
    call.assert_whole()


def test_what_a_resume_tells_again_is_no_failure() -> None:
    """Welcome, proposals and commits that were taken already leave the group as it is."""
    call = Call()
    call.join(OTHER)
    call.join(THIRD)
    call.settle()
    member = us(call)
    call.settle()
    for user in ("44", "55"):
        call.join(user)
        call.settle()
    told = [m for m in call.sent if m.user == US and m.op in (25, 27, 29, 30)]
    assert [m.op for m in told] == [25, 30, 27, 29, 27, 29]
    member.resume()
    for message in told:
        assert member.hear(message.op, message.body) == []
    assert member.counters.failures == 0
    call.assert_whole()


def test_proposals_that_are_told_twice_are_committed_once() -> None:
    """The others were told once, and their commit is followed."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    call.join(THIRD)
    again: set[int] = set()
    while call.queue:
        upwards, user, op, body = call.queue.popleft()
        if upwards:
            call.post(call._to_gateway(user, op, body))
            continue
        if (user, op) == (US, DaveOp.PROPOSALS) and not again:
            again.add(op)
            member.hear(op, body)
        call.say(user, call.members[user].hear(DaveOp(op), body))
    assert again
    call.settle().assert_whole()


def test_older_keys_never_come_back_into_force() -> None:
    """A transition that is executed behind a later one changes nothing: nobody keeps keys for long."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    call.deaf.add((US, DaveOp.EXECUTE_TRANSITION))
    call.join(THIRD)
    call.settle()
    newest = call.join("44")
    call.settle()
    first, second = member.dave._pending
    member.hear(22, {"transition_id": second})
    member.hear(22, {"transition_id": first})
    assert newest.decrypt(US, member.encrypt(FRAME)) == FRAME


def test_out_of_the_group_there_is_no_privacy_code() -> None:
    """The one of the group we fell out of would be compared with codes that others no longer have."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    assert member.privacy_code
    member.hear(29, b"\x00\x63" + os.urandom(50))
    assert (member.privacy_code, member.dave.mls_epoch) == ("", None)


def test_the_epoch_is_known_from_the_first_proposals_on() -> None:
    """A Welcome does not tell it; proposals do."""
    call = Call()
    call.join(OTHER)
    call.join(THIRD)
    call.settle()
    member = us(call)
    call.settle()
    assert member.dave.mls_epoch is None
    call.deaf.add((US, DaveOp.ANNOUNCE_COMMIT))
    call.join("44")
    call.settle()
    assert call.group.mls_epoch is not None
    assert member.dave.mls_epoch == call.group.mls_epoch - 1


async def test_what_waits_for_its_turn_outlives_the_websocket() -> None:
    """It was received, so a resume does not bring it again."""
    turns = Turns(1)
    turns.spent(5)
    member = ProductMember(US, CHANNEL, turns=turns)
    (described,) = member.gateway.receive_text(member.description())
    waiting = asyncio.create_task(member.dave.take(described))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    for _ in range(5):
        turns.passed()
    assert [op for op, _ in member.resume()] == [26]
    assert member.heartbeat() == []


def test_long_work_is_announced_by_what_it_is_expected_to_take() -> None:
    """To enter a large group takes long, and so do many who join one at once; a change to one of 40 does not."""
    announced: list[int] = []
    call = Call()
    call.join(OTHER)
    member = ProductMember(US, CHANNEL, turns=Turns(None, announced.append))
    call.join(US, lambda *_: member)  # type: ignore[arg-type]
    crowd = {OTHER, *map(str, range(100, 139))}
    member.dave.members(crowd)
    call.settle()
    assert member.ready
    assert announced
    announced.clear()
    member.hear(27, b"change")
    assert announced == []
    for newcomers in (9, 40):  # expected to take 75 ms, and 168
        member.dave.members(crowd | set(map(str, range(200, 200 + newcomers))))
        member.hear(27, b"change")
        assert announced
        announced.clear()


def test_a_new_external_sender_signs_for_the_next_group() -> None:
    """The group that is there cannot change its own; what comes meanwhile counts from op 24 on."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    sender = ExternalSender()
    member.hear(25, sender.package)
    call.join(THIRD)
    call.settle().assert_whole()
    member.hear(24, {"epoch": 1, "protocol_version": 1})
    key_package = DaveyMember(OTHER, CHANNEL).start()[0].body
    assert isinstance(key_package, bytes)
    assert [op for op, _ in member.hear(27, append_body([sender.add(CHANNEL, 0, key_package)]))] == [28]


@pytest.mark.parametrize("op", [DaveOp.ANNOUNCE_COMMIT, DaveOp.WELCOME])
def test_a_damaged_message_takes_us_out_and_in_again(op: DaveOp) -> None:
    """Op 31 and a new key package; the others take us in under a new epoch, and we are heard."""
    call = Call()
    damaged = 0

    def damage(message: Outgoing) -> Outgoing:
        nonlocal damaged
        if message.user != US or message.op is not op or damaged:
            return message
        damaged += 1
        assert isinstance(message.body, bytes)
        return message._replace(body=message.body[:-20] + os.urandom(20))

    call.join(OTHER)
    call.join(THIRD)
    call.settle()
    if op is DaveOp.WELCOME:
        call.change = damage
        member = us(call)
    else:
        member = us(call)
        call.settle()
        call.change = damage
        call.join("44")
    call.settle()
    call.now_s += 5
    call.post(call.group.tick())
    call.settle().assert_whole()
    assert damaged == 1
    assert member.counters.failures == 1


def test_a_welcome_for_an_old_key_package_is_refused() -> None:
    """It says so with op 31 and offers a new one."""
    call = Call()
    call.join(OTHER)
    call.join(THIRD)
    call.settle()
    member = us(call)
    call.settle()
    (welcome,) = [m for m in call.sent if m.user == US and m.op is DaveOp.WELCOME]
    fresh = ProductMember(US, CHANNEL)
    fresh.connected([OTHER, THIRD])
    fresh.start()
    assert fresh.hear(30, welcome.body)[0][0] == 31
    assert member.ready


def test_a_group_that_can_never_be_entered_ends_the_session() -> None:
    """After six attempts within a minute somebody else decides when to try again."""
    member = ProductMember(US, CHANNEL)
    member.start()
    member.hear(25, ExternalSender().package)
    for number in range(6):
        said = member.hear(30, b"\x00\x05" + os.urandom(50))
        if number:  # the next in a row may name somebody of whom op 11 will tell
            assert said == []
            said = member.wait()
        assert [op for op, _ in said] == [31, 26]
    member.hear(30, b"\x00\x05" + os.urandom(50))
    with pytest.raises(VoiceError) as ended:
        member.wait()
    assert ended.value.code == ErrorCode.E2EE_FAILED


def test_proposals_for_somebody_who_is_not_there_are_not_committed() -> None:
    """Only users that op 11 named may be added."""
    call = Call()
    member = us(call)
    call.settle()
    call.join(OTHER)
    member.dave.members(set())
    call.deaf.add((US, DaveOp.WELCOME))
    call.settle()
    assert (US, DaveOp.COMMIT_WELCOME) not in call.said


def test_an_execution_of_an_unknown_transition_changes_nothing() -> None:
    """Nor does one that is told twice."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    assert member.hear(22, {"transition_id": 77}) == []
    call.assert_whole()


def test_an_execution_that_never_comes_is_made_up_for() -> None:
    """Everybody has our next keys, and those before are forgotten soon: a newcomer hears us although op 22 was lost."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    call.deaf.add((US, DaveOp.EXECUTE_TRANSITION))
    newcomer = call.join(THIRD)
    call.settle()
    assert newcomer.decrypt(US, member.encrypt(FRAME)) is None
    (alarm,) = (one for one in member.alarms if not one.cancelled)
    assert alarm.after_s == EXECUTED_WITHIN_S
    member.wait()
    assert member.counters.failures == 1
    call.assert_whole()


async def test_nothing_leaves_in_the_clear_while_op_4_waits_for_its_turn() -> None:
    """A session without encryption is told to have it: from that moment on nothing leaves until there are keys."""
    turns = Turns(1_000_000)
    member = ProductMember(US, CHANNEL, turns=turns)
    member.start(0)
    assert member.ready
    turns.spent(100_000_000)
    with pytest.raises(AssertionError, match="waits"):
        member.start(1)
    assert not member.ready


def test_an_order_to_go_on_in_the_clear_that_never_comes_is_forgotten() -> None:
    """Receivers take frames in the clear for a while, and then no more."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    member.hear(21, {"transition_id": 9, "protocol_version": 0})
    assert member.decrypt(OTHER, FRAME) == FRAME
    member.wait()
    assert member.decrypt(OTHER, FRAME) is None
    assert member.encrypt(FRAME) != FRAME


def test_a_group_that_is_never_formed_is_asked_for_again_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With others in the channel, silence for good is a failure that somebody must hear of."""
    now_s = 1_000.0
    monkeypatch.setattr("worker.voice.dave.time.monotonic", lambda: now_s)
    member = ProductMember(US, CHANNEL)
    (offered,) = member.start()
    member.connected([OTHER])
    assert member.check() == []
    now_s += 15
    assert member.check() == [offered]
    now_s += 30
    with pytest.raises(VoiceError) as ended:
        member.check()
    assert ended.value.code == ErrorCode.E2EE_FAILED


def test_alone_a_group_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long: there is nobody to encrypt for."""
    now_s = 1_000.0
    monkeypatch.setattr("worker.voice.dave.time.monotonic", lambda: now_s)
    member = ProductMember(US, CHANNEL)
    member.start()
    now_s += 10_000
    assert member.check() == []


def test_a_downgrade_is_never_guessed() -> None:
    """Its op 22 does not come: frames stay encrypted."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    member.hear(21, {"transition_id": 9, "protocol_version": 0})
    member.wait()
    assert member.encrypt(FRAME) != FRAME
    assert (member.version, member.counters.downgrades) == (1, 0)


@pytest.mark.parametrize("transition_id", [0, 9])
def test_nothing_is_guessed_once_a_later_transition_is_in_force(transition_id: int) -> None:
    """Op 22 of the one before was lost, and then encryption was turned off: it stays so."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    call.deaf.add((US, DaveOp.EXECUTE_TRANSITION))
    call.join(THIRD)
    call.settle()
    member.hear(21, {"transition_id": transition_id, "protocol_version": 0})
    member.hear(22, {"transition_id": transition_id})
    member.wait()
    assert member.version == 0


def test_an_execution_never_leads_back() -> None:
    """Op 22 of a transition that was prepared before the one in force comes too late to change anything."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    member.hear(21, {"transition_id": 9, "protocol_version": 0})
    member.hear(21, {"transition_id": 10, "protocol_version": 1})
    member.hear(22, {"transition_id": 10})
    member.hear(22, {"transition_id": 9})
    member.wait()
    call.assert_whole()


def test_nothing_is_executed_after_the_end() -> None:
    """A session that is closed leaves no timer."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    call.deaf.add((US, DaveOp.EXECUTE_TRANSITION))
    call.join(THIRD)
    call.settle()
    member.dave.close()
    assert all(alarm.cancelled for alarm in member.alarms)


def test_whoever_is_in_no_group_after_a_resume_offers_its_key_package_again() -> None:
    """The first one may have gone down with the WebSocket; what was missed is heard first, and it is offered once."""
    call = Call()
    member = us(call)
    lost = next(message for message in call.queue if message[0])
    call.queue.remove(lost)
    assert lost[2] == DaveOp.KEY_PACKAGE
    call.join(OTHER)
    call.settle()
    assert not member.ready
    assert member.resume() == []
    call.say(US, member.heartbeat())
    call.settle().assert_whole()
    assert member.heartbeat() == []


def come_back(call: Call, member: ProductMember, missed: list[Outgoing]) -> None:
    """A resume: what was missed is told, then the heartbeat behind it is answered."""
    call.say(US, member.resume())
    call.post(missed)
    call.settle()
    call.say(US, member.heartbeat())
    call.settle()
    call.now_s += TRANSITION_WAIT_S
    call.post(call.group.tick())
    call.settle()


def miss(call: Call, missed: list[Outgoing]) -> None:
    """From now on what is said to us is put aside."""

    def put_aside(message: Outgoing) -> Outgoing | None:
        if message.user != US:
            return message
        missed.append(message)
        return None

    call.change = put_aside


def test_whoever_may_have_been_taken_out_of_the_group_asks_to_be_taken_in() -> None:
    """Nobody says so after a resume; who was in the group all the while is heard all the while."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.join(THIRD)
    call.settle()
    assert member.resume() == []
    asked = member.heartbeat()
    assert [op for op, _ in asked] == [DaveOp.KEY_PACKAGE]
    assert member.ready
    call.assert_heard(member)  # type: ignore[arg-type]
    call.say(US, asked)
    call.settle().assert_whole()
    assert member.heartbeat() == []
    assert member.counters.failures == 0


@pytest.mark.parametrize("others", [[], [OTHER], [OTHER, THIRD]])
@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_whoever_was_taken_out_of_the_group_is_taken_in_again(others: list[str], told: bool) -> None:
    """The gateway removes who is cut off; the replay may hold that, or nothing."""
    call = Call()
    member = us(call)
    for other in others:
        call.join(other)
    call.settle()
    missed: list[Outgoing] = []
    miss(call, missed)
    call.post(call.group.sever(US))
    call.settle()
    assert US not in call.group.members.values()
    call.change = None
    come_back(call, member, missed if told else [])
    if not others:
        call.join(OTHER)
        call.settle()
    call.assert_whole()


def test_a_welcome_for_the_key_package_before_is_used_and_so_is_the_next_one() -> None:
    """It was under way when a resume had us offer another one: no group is lost, and nothing begins anew."""
    call = Call()
    call.join(OTHER)
    call.join(THIRD)
    call.settle()
    missed: list[Outgoing] = []
    miss(call, missed)
    member = us(call)
    call.settle()
    assert missed[-1].op is DaveOp.WELCOME
    call.change = None
    call.say(US, member.resume())
    call.say(US, member.heartbeat())
    call.post(missed)
    call.settle()
    call.now_s += TRANSITION_WAIT_S
    call.post(call.group.tick())
    call.settle().assert_whole()
    assert (US, DaveOp.INVALID_COMMIT_WELCOME) not in call.said


@pytest.mark.parametrize("seed", range(40))
def test_whoever_is_cut_off_again_and_again_is_heard_in_the_end(seed: int) -> None:
    """Whatever is lost on its way up, replayed or not, and whoever comes and goes meanwhile."""
    dice = random.Random(seed)
    call = Call(creation_id_zero=dice.random() < 0.5)
    member = us(call)
    users = [str(number) for number in range(20, 26)]
    for user in users[:2]:
        call.join(user)
    deliver(call, dice.randrange(40))
    for _ in range(dice.randrange(1, 5)):
        missed: list[Outgoing] = [
            Outgoing(user, DaveOp(op), body) for up, user, op, body in call.queue if user == US and not up
        ]
        call.queue = deque(message for message in call.queue if message[1] != US)
        miss(call, missed)
        if severed := dice.random() < 0.5:
            call.post(call.group.sever(US))
        user = dice.choice(users)
        if user in call.members and len(call.members) > 2:
            call.leave(user)
        elif user not in call.members:
            call.join(user)
        deliver(call, dice.randrange(60))
        call.change = None
        call.say(US, member.resume())
        told = not severed or dice.random() < 0.5
        call.post(message for message in missed if told or message.op is DaveOp.EXTERNAL_SENDER)
        deliver(call, dice.randrange(20))
        call.say(US, member.heartbeat())
        deliver(call, dice.randrange(60))
    for _ in range(3):
        call.settle()
        call.say(US, member.wait())
        call.settle()
        call.now_s += TRANSITION_WAIT_S
        call.post(call.group.tick())
    call.settle().assert_whole()


def deliver(call: Call, messages: int) -> None:
    """Let so many messages arrive."""
    for _ in range(messages):
        call.step()


# newcomers of whom op 11 tells late


def newcomer_unlisted(call: Call) -> ProductMember:
    """Somebody joins, and what names him reaches us before op 11."""
    member = us(call)
    call.join(OTHER)
    call.settle()
    call.join(THIRD)
    member.dave.members({OTHER})
    call.settle()
    return member


def test_what_names_somebody_unlisted_is_kept_until_he_is_listed() -> None:
    """An Add that was refused, and the commit that holds it: nothing is lost, and nobody is bothered."""
    call = Call()
    member = newcomer_unlisted(call)
    member.dave.members({OTHER, THIRD})
    call.say(US, member.hear_text('{"op":11,"d":{"user_ids":["' + THIRD + '"]}}'))
    call.settle().assert_whole()
    assert (US, DaveOp.INVALID_COMMIT_WELCOME) not in call.said


def test_whoever_is_never_listed_costs_one_recovery() -> None:
    """The commit is given up after a while, and we are heard by those who are there all the while."""
    call = Call()
    member = newcomer_unlisted(call)
    assert member.ready
    assert [op for op, _ in member.wait()][-2:] == [DaveOp.INVALID_COMMIT_WELCOME, DaveOp.KEY_PACKAGE]


def test_whoever_is_not_listed_while_the_websocket_is_away_costs_a_recovery_after_it() -> None:
    """Time that passes while nobody can be told anything does not let the commit be forgotten."""
    call = Call()
    member = newcomer_unlisted(call)
    member.gateway.disconnected(None)
    assert member.wait() == []
    assert member.resume() == []
    assert [op for op, _ in member.wait()][-2:] == [DaveOp.INVALID_COMMIT_WELCOME, DaveOp.KEY_PACKAGE]


def test_a_group_that_is_lost_meanwhile_is_executed_all_the_same() -> None:
    """A commit is prepared, the next one is damaged, then op 22 of the first: we are heard under its keys."""
    call = Call()
    member = us(call)
    other = call.join(OTHER)
    call.settle()
    call.deaf.add((US, DaveOp.EXECUTE_TRANSITION))
    call.join(THIRD)
    call.settle()
    (transition_id,) = member.dave._pending
    assert [op for op, _ in member.hear(29, b"\x00\x63" + os.urandom(50))] == [31, 26]
    member.hear(22, {"transition_id": transition_id})
    assert member.ready
    assert other.decrypt(US, member.encrypt(FRAME)) == FRAME


def test_an_external_sender_may_come_before_op_4() -> None:
    """Its order is not guaranteed: it waits."""
    sender = ExternalSender()
    member = ProductMember(US, CHANNEL)
    assert member.hear(25, sender.package) == []
    assert [op for op, _ in member.start()] == [26]
    key_package = DaveyMember(OTHER, CHANNEL).start()[0].body
    assert isinstance(key_package, bytes)
    member.connected([OTHER])
    add = sender.add(CHANNEL, 0, key_package)
    assert [op for op, _ in member.hear(27, append_body([add]))] == [28]


def test_an_empty_external_sender_is_counted_and_nothing_else() -> None:
    """libdave reads beyond an empty one and the process would die of it."""
    member = ProductMember(US, CHANNEL)
    member.start()
    assert member.hear(25, b"") == []
    assert member.counters.failures == 1


_ops = st.sampled_from([25, 27, 29, 30])


@settings(max_examples=60)
@given(st.lists(st.tuples(_ops, st.binary(max_size=200)), max_size=5))
def test_garbage_is_counted_and_survived(messages: list[tuple[int, bytes]]) -> None:
    """Whatever comes, nothing is raised but the end of the session, and nothing may leave."""
    member = ProductMember(US, CHANNEL)
    member.start()
    for op, body in messages:
        with suppress(ProtocolError):
            member.hear(op, b"\x00\x01" + body if op in (29, 30) else body)
    assert not member.ready
