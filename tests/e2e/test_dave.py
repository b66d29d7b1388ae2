"""End-to-end encryption on the air: who is in the call decrypts everything, whoever comes and goes, and nothing leaves
in the clear. The members are on another MLS implementation than the product."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from tests.e2e.stack import Stack, until
from tests.emulator.records import ChannelReport, HearingReport, MemberReport

pytestmark = pytest.mark.asyncio(loop_scope="module")

GUILDS, MEMBERS = 50, 3
REFILLS = 20
CHANGES_PER_S = 5
HEARD_WITHIN_S = 10.0


async def channel_of(stack: Stack, guild: str) -> ChannelReport:
    (channel,) = await stack.discord.listen(guild)
    return channel


def heard_by(member: MemberReport) -> HearingReport | None:
    """What a member got of us; nobody else speaks in these tests."""
    return next(iter(member.hearing.values()), None)


async def member_decrypts(stack: Stack, guild: str, user: str, frames: int = 5) -> HearingReport | None:
    for member in (await channel_of(stack, guild)).members:
        hearing = heard_by(member)
        if member.user == user and hearing is not None and hearing.decrypted >= frames:
            return hearing
    return None


async def assert_nothing_in_the_clear(stack: Stack, guilds: list[str]) -> None:
    for guild, row in (await stack.heard(guilds)).items():
        for session in row.sessions:
            assert session.in_the_clear == 0, guild
            assert session.dave_version == 1, guild


async def test_every_member_decrypts_every_frame(stack: Stack, music: Path) -> None:
    """50 calls of three members and us: from op 22 of its own transition on no member misses a frame."""
    radio = await stack.start(music, loop=True)
    guilds = await stack.join(GUILDS, radio, members=MEMBERS)
    await stack.hear_more(guilds, 3 * 50)
    await assert_nothing_in_the_clear(stack, guilds)
    for guild in guilds:
        channel = await channel_of(stack, guild)
        assert channel.codes_equal, guild
        assert len(channel.members) == MEMBERS
        _, status = await stack.guild(guild)
        assert status is not None
        assert {member.privacy_code for member in channel.members} == {status.privacy_code}
        assert (status.dave_protocol_version, status.listeners) == (1, MEMBERS)
        for member in channel.members:
            hearing = heard_by(member)
            assert hearing is not None, (guild, member.user)
            assert (hearing.failed, hearing.early) == (0, 0), (guild, member)
            assert hearing.decrypted == hearing.received > 100, (guild, member)
    for session in [row.sessions[-1] for row in (await stack.heard(guilds)).values()]:
        assert not await stack.faults(session)


async def test_a_channel_that_empties_and_refills_is_heard_each_time(
    stack: Stack, music: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last one leaves, somebody comes: twenty times over, the newcomer hears us."""
    radio = await stack.start(music, loop=True)
    (guild,) = await stack.join(1, radio, members=1)
    audible_ms: list[float] = []
    for _ in range(REFILLS):
        (present,) = [member for member in (await channel_of(stack, guild)).members if not member.gone]
        await stack.discord.members.leave(guild, present.user)
        await stack.wait_state([guild], "alone")
        came_ns = time.time_ns()
        user = (await stack.discord.members.join(guild)).user

        async def heard(user: str = user) -> HearingReport | None:
            return await member_decrypts(stack, guild, user)

        hearing = await until(heard, f"member {user} hears us", HEARD_WITHIN_S)
        assert hearing is not None
        assert hearing.first_decrypted_ns is not None
        audible_ms.append((hearing.first_decrypted_ns - came_ns) / 1e6)
    (session,) = await stack.sessions(guild)
    assert (session.in_the_clear, session.state) == (0, "live")
    with capsys.disabled():
        print(f"\n  refilled {REFILLS} times: audible after {min(audible_ms):.0f} to {max(audible_ms):.0f} ms", end=" ")


async def test_who_is_in_the_call_loses_nothing_while_others_come_and_go(
    stack: Stack, music: Path, churn_s: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five joins and leaves a second across fifty calls: those who stay decrypt every frame."""
    radio = await stack.start(music, loop=True)
    guilds = await stack.join(GUILDS, radio, members=1)
    await stack.hear_more(guilds, 25)
    stayed = {guild: (await channel_of(stack, guild)).members[0].user for guild in guilds}
    guests: list[tuple[str, str]] = []
    changes, began_s = 0, time.monotonic()
    while (now_s := time.monotonic() - began_s) < churn_s:
        if len(guests) < GUILDS and (not guests or random.random() < 0.5):
            guild = random.choice(guilds)
            guests.append((guild, (await stack.discord.members.join(guild)).user))
        else:
            await stack.discord.members.leave(*guests.pop(random.randrange(len(guests))))
        changes += 1
        await asyncio.sleep(max(0.0, changes / CHANGES_PER_S - now_s))  # the pace of the churn
    await stack.hear_more(guilds, 25)
    await assert_nothing_in_the_clear(stack, guilds)
    longest_ms = 0.0
    for guild, row in (await stack.heard(guilds)).items():
        (session,) = row.sessions
        assert not await stack.faults(session), guild
        (member,) = [one for one in row.channels[0].members if one.user == stayed[guild]]
        hearing = heard_by(member)
        assert hearing is not None
        assert (hearing.failed, hearing.decrypted) == (0, hearing.received), (guild, hearing)
        longest_ms = max(longest_ms, hearing.longest_gap_ms)
    with capsys.disabled():
        print(f"\n  {changes} joins and leaves in {churn_s:g} s, longest gap {longest_ms:.0f} ms", end=" ")


async def test_a_resumed_session_keeps_its_group_and_takes_in_what_it_missed(stack: Stack, music: Path) -> None:
    """The WebSocket is cut while somebody joins: same ssrc, no packet lost, and the newcomer hears us."""
    radio = await stack.start(music, loop=True)
    (guild,) = await stack.join(1, radio, members=2)
    before = (await stack.sessions(guild))[-1]
    stayed = [member.user for member in (await channel_of(stack, guild)).members]
    await stack.discord.fault(guild, "drop")
    newcomer = (await stack.discord.members.join(guild)).user

    async def heard() -> HearingReport | None:
        return await member_decrypts(stack, guild, newcomer, 25)

    await until(heard, "the newcomer hears us")
    (after,) = await stack.sessions(guild)
    assert (after.ssrc, after.resumed) == (before.ssrc, 1)
    assert not await stack.faults(after)
    for member in (await channel_of(stack, guild)).members:
        hearing = heard_by(member)
        assert hearing is not None
        if member.user in stayed:
            assert (hearing.failed, hearing.decrypted) == (0, hearing.received)


async def test_a_stage_has_no_encryption_and_is_heard(stack: Stack, music: Path) -> None:
    """Version 0: frames leave as they are, and the status says so."""
    radio = await stack.start(music, loop=True)
    (guild,) = await stack.join(1, radio, kind="stage", members=0)
    await stack.hear_more([guild], 50)
    (session,) = await stack.sessions(guild)
    assert not await stack.faults(session)
    _, status = await stack.guild(guild)
    assert status is not None
    assert (status.dave_protocol_version, status.privacy_code) == (0, "")
