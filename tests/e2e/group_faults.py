"""Faults of those who are in a channel and of their encrypted group, each a story on a guild of its own.

Source: voice protocol reference, sections 6.9 (fault injection list) and 8 (right column).
"""

from __future__ import annotations

from tests.e2e.fault_room import BUILT_AHEAD, SECOND, Due, Room, case, decrypted, sound_heard
from tests.emulator.records import GuildReport

# who is there


@case(Due.NOTHING, kind="stage")
async def a_stage(room: Room) -> None:
    row = await room.play()
    assert row.sessions[-1].dave_version == 0


@case(Due.NOTHING, kind="stage")
async def nobody_listed(room: Room) -> None:
    """Without op 11 nobody knows whether the channel is empty: it is played to."""
    await room.fault("clients_unlisted")
    await room.play()
    status = await room.status()
    assert status is not None
    assert status.listeners is None
    await room.fault("clients_unlisted", on=False)


@case(Due.FAILED, code="e2ee_failed")
async def nobody_listed_in_an_encrypted_call(room: Room) -> None:
    """Without op 11 everybody in the group is a stranger, and with strangers there is no group."""
    await room.fault("clients_unlisted")
    await room.ask_to_join()


@case(Due.PAUSED, kind="stage")
async def everybody_leaves_a_stage(room: Room) -> None:
    """Played to for ten seconds more, then not."""
    row = await room.play()
    await room.empty_and_refill("idle")
    assert sound_heard(await room.look()) > sound_heard(row) + 9 * SECOND


@case(Due.PAUSED)
async def everybody_leaves_an_encrypted_call(room: Room) -> None:
    """Without a group there is nobody to encrypt for: silent at once."""
    await room.play()
    await room.empty_and_refill("alone")


@case(Due.NOTHING, ghosts=100)
async def a_hundred_others(room: Room) -> None:
    row = await room.play(2 * SECOND)
    assert len(row.channels[-1].group) == 102


@case(Due.NOTHING)
async def members_come_and_go(room: Room) -> None:
    await room.play()
    for _ in range(3):
        first, second = await room.join_member(), await room.join_member()
        await room.heard_by(second)
        await room.leave_member(first)
        third = await room.join_member()
        await room.leave_member(second)
        await room.heard_by(third)
        await room.leave_member(third)


# the group


@case(Due.NOTHING)
async def external_sender_before_op_4(room: Room) -> None:
    await room.fault("external_sender_first")
    await room.play()


@case(Due.NOTHING)
async def external_sender_after_op_4(room: Room) -> None:
    await room.play()


@case(Due.NOTHING)
async def proposal_of_an_unknown_user(room: Room) -> None:
    await room.play()
    before = await room.look()
    await room.fault("proposal", wrong="user")
    await room.hear_more()
    after = await room.look()
    assert commits(after) == commits(before), "nobody unknown may be let in"


@case(Due.NOTHING)
async def proposal_for_another_epoch(room: Room) -> None:
    await room.play()
    await room.fault("proposal", wrong="epoch")
    await room.hear_more()


@case(Due.NOTHING)
async def two_proposals_in_one_epoch(room: Room) -> None:
    await room.play()
    await room.fault("two_proposals")
    await room.until(lambda row: len(row.channels[-1].group) == 4, "a group with two ghosts")
    await room.hear_more()


@case(Due.NOTHING)
async def proposals_that_come_late_and_together(room: Room) -> None:
    """Who comes, comes and goes, and goes within half a second is one commit."""
    await room.play()
    first = await room.join_member()
    await room.heard_by(first)
    await room.fault("batch", ms=500)
    second, passing = await room.join_member(), await room.join_member()
    await room.leave_member(first)
    await room.leave_member(passing)
    await room.heard_by(second)


@case(Due.NOTHING)
async def commit_announced_twice(room: Room) -> None:
    await room.play()
    await room.fault("commit_twice")
    await room.heard_by(await room.join_member())


@case(Due.RECOVERED)
async def commit_damaged(room: Room) -> None:
    await room.play()
    await room.fault("damage", op=29)
    newcomer = await room.join_member()
    await room.recovered()
    await room.heard_by(newcomer)


@case(Due.RECOVERED, members=2)
async def welcome_damaged(room: Room) -> None:
    await room.fault("damage", op=30)
    await room.play()
    await room.recovered()


@case(Due.RECOVERED, members=2)
async def welcome_damaged_twice(room: Room) -> None:
    await room.fault("damage", op=30, n=2)
    await room.play()
    await room.recovered()


@case(Due.FAILED, members=2, code="e2ee_failed")
async def every_welcome_damaged(room: Room) -> None:
    """Whoever cannot enter a group six times within a minute leaves it to others when to try again."""
    await room.fault("damage", op=30, n=1_000)
    await room.ask_to_join()


@case(Due.RECOVERED, members=2)
async def welcome_for_an_old_key_package(room: Room) -> None:
    await room.fault("foreign_welcome")
    await room.play()
    await room.recovered()


@case(Due.NOTHING)
async def unknown_transition_executed(room: Room) -> None:
    await room.play()
    await room.fault("execute", how="unknown")
    await room.hear_more()


@case(Due.NOTHING)
async def transition_never_executed(room: Room) -> None:
    """Op 22 is lost: whoever came would wait in vain for the keys that everybody has."""
    await room.play()
    await room.fault("execute", how="lost")
    await room.heard_by(await room.join_member())


@case(Due.NOTHING)
async def transition_executed_late(room: Room) -> None:
    await room.play()
    await room.fault("execute", how="late", ms=2_000)
    await room.heard_by(await room.join_member())


@case(Due.RECOVERED, voided=BUILT_AHEAD)
async def downgrade_and_upgrade(room: Room) -> None:
    """Frames leave in the clear between op 22 of the one and op 21 of the other, and at no other time."""
    await room.play()
    await room.fault("downgrade")
    await room.until(lambda row: row.channels[-1].dave_version == 0, "a downgrade")
    await room.hear_more()
    status = await room.status()
    assert status is not None
    assert (status.dave_protocol_version, status.privacy_code) == (0, "")
    await room.fault("upgrade")
    await room.until(lambda row: row.channels[-1].dave_version == 1, "an upgrade")
    await room.hear_more()
    await room.stack.wait_event("guild.dave_downgraded", guild=room.guild)


@case(Due.RECOVERED, members=2)
async def group_begun_anew(room: Room) -> None:
    """Op 24 of epoch 1 in the middle of it: the others forget their keys at once."""
    await room.play()
    await room.fault("epoch_restart")
    await room.until(lambda row: one_key_package_more(row), "another key package")
    await room.hear_more()


@case(Due.RESUMED, members=2)
async def commit_missed_and_replayed(room: Room) -> None:
    """Somebody joins while the WebSocket is away: the resume brings op 11, 27, 29."""
    await room.play()
    await room.fault("hello_late", ms=1_500)
    await room.fault("drop")
    newcomer = await room.join_member()
    await room.resumed()
    await room.heard_by(newcomer)


async def _cut_off(room: Room, *, told: bool) -> None:
    """Our leaf is removed while the WebSocket is away."""
    await room.play()
    await room.fault("severed", told=told)
    await room.fault("hello_late", ms=1_000)
    await room.fault("drop")
    await room.resumed()
    for user in room.stayed:
        await room.heard_by(user, decrypted(await room.look(), user) + SECOND)


@case(Due.RESUMED_ANEW)
async def cut_off_and_told(room: Room) -> None:
    await _cut_off(room, told=True)


@case(Due.RESUMED_ANEW)
async def cut_off_and_not_told(room: Room) -> None:
    await _cut_off(room, told=False)


@case(Due.RESUMED_ANEW, members=3)
async def cut_off_from_many_and_not_told(room: Room) -> None:
    await _cut_off(room, told=False)


@case(Due.NOTHING, members=2)
async def newcomer_listed_late(room: Room) -> None:
    """Op 11 comes after the commit that takes the newcomer in."""
    await room.play()
    await room.fault("listing_late", ms=1_000)
    await room.heard_by(await room.join_member())
    await room.fault("listing_late", ms=0)


@case(Due.NOTHING)
async def garbage_for_an_external_sender(room: Room) -> None:
    await room.play()
    await room.fault("garbage", op=25)
    await room.hear_more()


@case(Due.NOTHING)
async def garbage_for_proposals(room: Room) -> None:
    await room.play()
    await room.fault("garbage", op=27)
    await room.hear_more()


@case(Due.RECOVERED)
async def garbage_for_a_commit(room: Room) -> None:
    await room.play()
    await room.fault("garbage", op=29)
    await room.recovered()


@case(Due.RECOVERED)
async def garbage_for_a_welcome(room: Room) -> None:
    await room.play()
    await room.fault("garbage", op=30)
    await room.recovered()


def commits(row: GuildReport) -> int:
    told = row.sessions[-1].told
    return 0 if told is None else told.commits


def one_key_package_more(row: GuildReport) -> bool:
    told = row.sessions[-1].told
    return told is not None and told.key_packages > 1
