"""Our side of a DAVE group against the local Discord's delivery service, with members on two MLS implementations."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ErrorCode, ProtocolError, VoiceError
from tests.emulator.dave.external_sender import ExternalSender, append_body
from tests.emulator.dave.group import DaveOp, Outgoing
from tests.emulator.dave.member import DaveyMember
from tests.libdave_member import LibdaveMember
from tests.product_member import ProductMember
from tests.unit.test_dave_group import CHANNEL, FRAME, Call
from worker.voice.dave import EXECUTED_WITHIN_S

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
    """Nothing leaves in the clear; the session ends with a code of its own."""
    member = ProductMember(US, CHANNEL, required=True)
    member.start()
    member.hear(21, {"transition_id": 9, "protocol_version": 0})
    with pytest.raises(VoiceError) as refused:
        member.hear(22, {"transition_id": 9})
    assert refused.value.code == ErrorCode.E2EE_DOWNGRADED
    assert not member.ready


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
    for _ in range(6):
        assert [op for op, _ in member.hear(30, b"\x00\x05" + os.urandom(50))] == [31, 26]
    with pytest.raises(VoiceError) as ended:
        member.hear(30, b"\x00\x05" + os.urandom(50))
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


def test_whoever_is_in_a_group_after_a_resume_stays_in_it() -> None:
    """Another key package would look like a new beginning."""
    call = Call()
    member = us(call)
    call.join(OTHER)
    call.settle()
    assert member.resume() == []
    assert member.heartbeat() == []
    call.assert_whole()


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
