"""Each fault of a voice server and of its encrypted groups, on a guild of its own: what becomes of the sound.

All guilds meet their fate at once, and the tests look at what became of them. At the end somebody joins every channel
that is still played to, and must hear us: a fault that is survived, but spoils the group, is found there.

Source: voice protocol reference, sections 6.9 (fault injection list) and 8 (right column).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

import pytest
import pytest_asyncio

from shared.schema.event import Event
from shared.schema.records import GuildStatus
from tests.e2e.outside_bot import outside_bot
from tests.e2e.stack import Stack
from tests.emulator.payloads import SILENCE_ID
from tests.emulator.records import ChannelKind, GuildPackets, GuildReport, HearingReport, MemberReport, SessionReport
from tests.media.make_programme import PROGRAMME
from worker.fanout.app import FAR_TICKS
from worker.fanout.build import SILENCE_FRAMES
from worker.fanout.scratch import BLOCK_TICKS

pytestmark = pytest.mark.asyncio(loop_scope="module")

AES, XCHACHA = "aead_aes256_gcm_rtpsize", "aead_xchacha20_poly1305_rtpsize"
SETTLED_WITHIN_S = 40.0
LOOK_EVERY_S = 0.25
SECOND = 50
"""Packets."""
UNREADABLE_TEXTS = (
    "{",
    "",
    "null",
    "[]",
    '{"d":{}}',
    '{"op":"8","d":{}}',
    '{"op":99,"d":{}}',
    '{"op":-1,"d":{}}',
    '{"op":5,"d":null}',
    '{"op":5,"d":{"user_id":"x","ssrc":1,"speaking":1}}',
    '{"op":8,"d":{"heartbeat_interval":-5}}',
    '{"op":4,"d":{"mode":"' + AES + '","secret_key":[1,2,3],"dave_protocol_version":1}}',
    '{"op":11,"d":{"user_ids":[17]}}',
    '{"op":13,"d":{}}',
    '{"op":21,"d":{"transition_id":70000,"protocol_version":0}}',
    '{"op":22,"d":{"transition_id":"0"}}',
    '{"op":24,"d":{"epoch":1}}',
    '{"op":29,"d":{}}',
    '{"op":2,"d":{"ssrc":1,"ip":"127.0.0.1","port":9,"modes":[]}}',
    '{"op":9,"d":null}',
    "[" * 10_000,
)
UNREADABLE_BYTES = (b"", b'{"op":5,"d":{}}', bytes([5]), bytes([25]), bytes([27]), bytes([99]) * 50)
BUILT_AHEAD = FAR_TICKS + BLOCK_TICKS
"""Packets of a guild that are built and not sent yet, at most: of the tick under way, and those ahead."""
CROWD = 600
"""Arrivals that are more messages than a server keeps for a resume."""


class Due(Enum):
    """What the fault is to cost."""

    NOTHING = "nothing heard of it"
    RESUMED = "resumed"
    RECOVERED = "the group was entered anew"
    AGAIN = "identified again, with the same credentials"
    ASKED = "the bot was asked for credentials"
    PAUSED = "nothing is sent while nobody is there"
    FAILED = "given up"


class Watch:
    """Looks at all guilds now and then, for everybody who waits for something."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._rows: dict[str, GuildReport] = {}
        self._looked = asyncio.Condition()

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        while True:
            report = await self._stack.discord.report(guilds=True)
            self._rows = {row.guild: row for row in report.guild_rows or ()}
            async with self._looked:
                self._looked.notify_all()
            await asyncio.sleep(LOOK_EVERY_S)

    async def until(self, guild: str, condition: Callable[[GuildReport], bool], what: str) -> GuildReport:
        """What was seen when the condition held, at the next look or a later one."""
        try:
            async with asyncio.timeout(SETTLED_WITHIN_S), self._looked:
                while True:
                    await self._looked.wait()
                    row = self._rows.get(guild)
                    if row is not None and condition(row):
                        return row
        except TimeoutError:
            raise AssertionError(f"not within {SETTLED_WITHIN_S:g} s: {what}") from None


class Room:
    """One guild to which something happens."""

    def __init__(self, stack: Stack, watch: Watch, radio: str, guild: str, channel: str, kind: ChannelKind) -> None:
        self.stack = stack
        self.guild = guild
        self._watch = watch
        self._radio = radio
        self._channel = channel
        self._kind = kind
        self.stayed: list[str] = []
        """Members who are there from the start to the end."""
        self.joined_ns = 0
        self.back_s = 0.0
        """From somebody's coming into an empty channel to what he heard first."""

    async def fault(self, kind: str, **fields: object) -> None:
        await self.stack.discord.fault(self.guild, kind, **fields)

    async def ask_to_join(self) -> None:
        self.joined_ns = time.time_ns()
        await self.stack.join_these([(self.guild, self._channel)], self._radio, kind=self._kind)

    async def play(self, packets: int = SECOND // 2) -> GuildReport:
        """Join, and wait until somebody hears it."""
        await self.ask_to_join()
        return await self.until(lambda row: sound_heard(row) >= packets, "sound at the start")

    async def until(self, condition: Callable[[GuildReport], bool], what: str) -> GuildReport:
        return await self._watch.until(self.guild, condition, f"{what} ({self.guild})")

    async def look(self) -> GuildReport:
        return await self.until(lambda _: True, "a look")

    async def hear_more(self, packets: int = SECOND) -> None:
        before = await self.look()
        await self.until(
            lambda row: (
                sound_heard(row) >= packets
                if row.sessions[-1].ssrc != before.sessions[-1].ssrc
                else sound_heard(row) >= sound_heard(before) + packets
            ),
            f"{packets} packets more",
        )

    async def resumed(self, times: int = 1) -> None:
        await self.until(lambda row: row.sessions[-1].resumed >= times and live(row), "a resume")

    async def renewed(self) -> None:
        await self.until(lambda row: len(row.sessions) > 1 and sound_heard(row) > SECOND // 2, "a new session")

    async def recovered(self) -> None:
        """A message of the group was refused, and the group entered again."""

        def entered(row: GuildReport) -> bool:
            told, channel = row.sessions[-1].told, row.channels[-1]
            in_it = row.sessions[-1].user in channel.group and not channel.in_transition
            return told is not None and told.invalid > 0 and told.key_packages > 1 and in_it

        await self.until(entered, "a group that was entered anew")
        await self.hear_more()

    async def join_member(self) -> str:
        return (await self.stack.discord.members.join(self.guild)).user

    async def leave_member(self, user: str) -> None:
        await self.stack.discord.members.leave(self.guild, user)

    async def empty_and_refill(self, state: str) -> None:
        """Let everybody leave, wait until nothing is sent any more, and let somebody come."""
        for user in self.stayed:
            await self.leave_member(user)
        self.stayed.clear()
        await self.stack.wait_state([self.guild], state, SETTLED_WITHIN_S)
        await self.until(lambda row: row.sessions[-1].trailing_silence == SILENCE_FRAMES, "closing silence")
        before = await self.look()
        await self.until(lambda row: row.sessions[-1].keepalives > before.sessions[-1].keepalives, "a keepalive")
        after = await self.look()
        assert after.sessions[-1].packets == before.sessions[-1].packets
        came_ns = time.time_ns()
        newcomer = await self.join_member()
        await self.heard_by(newcomer)
        heard = hearing_of(member_of(await self.look(), newcomer))
        assert heard is not None
        assert heard.first_decrypted_ns is not None
        self.back_s = (heard.first_decrypted_ns - came_ns) / 1e9

    async def heard_by(self, user: str, frames: int = SECOND // 2) -> None:
        await self.until(lambda row: decrypted(row, user) >= frames, f"member {user} hears {frames} frames")

    async def status(self) -> GuildStatus | None:
        return (await self.stack.guild(self.guild))[1]


Story = Callable[[Room], Awaitable[None]]


@dataclass(frozen=True)
class Case:
    """A fault, on whom it falls, and what it is to cost."""

    due: Due
    story: Story
    kind: ChannelKind
    members: int
    ghosts: int | None
    code: str
    voided: int


CASES: dict[str, Case] = {}


def case(
    due: Due,
    *,
    kind: ChannelKind = "voice",
    members: int = 1,
    ghosts: int | None = None,
    code: str = "",
    voided: int = 0,
) -> Callable[[Story], Story]:
    """Note a story under its name.

    Args:
        members, ghosts: in the channel before us.
        code: of the status in the end.
        voided: packets that were built ahead and must not leave any more.
    """

    def note(story: Story) -> Story:
        CASES[story.__name__] = Case(due, story, kind, members, ghosts, code, voided)
        return story

    return note


def of(due: Due) -> list[str]:
    return [name for name, one in CASES.items() if one.due is due]


def sound_heard(row: GuildReport) -> int:
    """Packets of sound in the newest session."""
    return row.sessions[-1].audio_packets if row.sessions else 0


def live(row: GuildReport) -> bool:
    return row.sessions[-1].state == "live"


def hearing_of(member: MemberReport) -> HearingReport | None:
    """What a member got of us: nobody else speaks here."""
    return next(iter(member.hearing.values()), None)


def member_of(row: GuildReport, user: str) -> MemberReport:
    return next(one for channel in row.channels for one in channel.members if one.user == user)


def decrypted(row: GuildReport, user: str) -> int:
    """Frames that a member could decrypt; none before it was seen."""
    found = [hearing_of(one) for channel in row.channels for one in channel.members if one.user == user]
    return sum(one.decrypted for one in found if one is not None)


# the WebSocket


@case(Due.NOTHING)
async def hello_late(room: Room) -> None:
    """Identify does not wait for Hello; a server that reads late answers late."""
    await room.fault("hello_late", ms=3_000)
    await room.play(SECOND)


@case(Due.NOTHING)
async def hello_with_a_tiny_interval(room: Room) -> None:
    await room.fault("hello_interval", ms=1)
    await room.play(2 * SECOND)


@case(Due.ASKED)
async def closed_at_connect(room: Room) -> None:
    await room.fault("close_on_connect", code=4006)
    await room.play()


@case(Due.AGAIN)
async def closed_at_connect_by_a_crash(room: Room) -> None:
    await room.fault("close_on_connect", code=4015)
    await room.play()


@case(Due.ASKED)
async def closed_at_identify(room: Room) -> None:
    await room.fault("reject", code=4006)
    await room.play()


@case(Due.AGAIN)
async def closed_at_identify_by_a_crash(room: Room) -> None:
    await room.fault("reject", code=4015)
    await room.play()


@case(Due.ASKED)
async def closed_after_ready(room: Room) -> None:
    await room.fault("close_at", step="ready", code=4006)
    await room.ask_to_join()
    await room.renewed()


@case(Due.AGAIN)
async def closed_after_ready_by_a_crash(room: Room) -> None:
    await room.fault("close_at", step="ready", code=4015)
    await room.ask_to_join()
    await room.renewed()


@case(Due.RESUMED)
async def closed_after_the_key_by_a_crash(room: Room) -> None:
    """Op 26 goes down with the WebSocket."""
    await room.fault("close_at", step="description", code=4015)
    await room.play()
    await room.resumed()


@case(Due.ASKED)
async def closed_at_select(room: Room) -> None:
    await room.fault("close_at", step="select", code=4006)
    await room.ask_to_join()
    await room.renewed()


@case(Due.AGAIN)
async def closed_at_select_by_a_crash(room: Room) -> None:
    await room.fault("close_at", step="select", code=4015)
    await room.ask_to_join()
    await room.renewed()


@case(Due.ASKED)
async def closed_at_speaking(room: Room) -> None:
    await room.fault("close_at", step="speaking", code=4006)
    await room.ask_to_join()
    await room.renewed()


@case(Due.RESUMED)
async def closed_at_speaking_by_a_crash(room: Room) -> None:
    await room.fault("close_at", step="speaking", code=4015)
    await room.play()
    await room.resumed()


@case(Due.RESUMED)
async def closed_at_heartbeat_by_a_crash(room: Room) -> None:
    await room.fault("close_at", step="heartbeat", code=4015)
    await room.play()
    await room.resumed()


@case(Due.ASKED)
async def closed_at_resume(room: Room) -> None:
    await room.play()
    await room.fault("close_at", step="resume", code=4006)
    await room.fault("drop")
    await room.renewed()


@case(Due.ASKED, kind="stage")
async def resumed_too_late_for_what_was_missed(room: Room) -> None:
    """The server keeps a thousand messages; more came while we were away."""
    await room.play()
    await room.fault("hello_late", ms=1_500)
    await room.fault("drop")
    await room.stack.discord.ghosts(room.guild, CROWD)
    await room.renewed()


@case(Due.RESUMED)
async def numbers_wrap_around_a_resume(room: Room) -> None:
    """Messages are numbered 65535, 0, 1 ..; some before, some while we are away, some after."""
    await room.fault("first_seq", seq=65_520)
    await room.play()
    await room.heard_by(await room.join_member())
    await room.fault("hello_late", ms=1_500)
    await room.fault("drop")
    newcomer = await room.join_member()
    await room.resumed()
    await room.heard_by(newcomer)


@case(Due.RESUMED)
async def heartbeats_without_an_answer(room: Room) -> None:
    """A dead server is noticed by its silence; the interval is short here, so that it takes seconds."""
    await room.fault("hello_interval", ms=1_000)
    await room.play()
    await room.fault("no_ack")
    await room.until(lambda row: row.sessions[-1].resumed > 0, "a resume")
    await room.fault("no_ack", on=False)
    await room.hear_more()


@case(Due.NOTHING)
async def heartbeat_of_the_server(room: Room) -> None:
    await room.play()
    before = await room.look()
    await room.fault("server_heartbeat")
    await room.until(lambda row: row.sessions[-1].heartbeats > before.sessions[-1].heartbeats, "an answer at once")


@case(Due.ASKED)
async def kicked_and_asked_back(room: Room) -> None:
    """4014 with void credentials; the bot says where it is."""
    await room.play()
    await room.fault("kick", code=4014)
    await room.renewed()


@case(Due.ASKED)
async def call_terminated_and_begun_again(room: Room) -> None:
    await room.play()
    await room.fault("kick", code=4022)
    await room.renewed()


@case(Due.FAILED, code="kicked")
async def kicked_for_good(room: Room) -> None:
    """4014, and the bot does not answer: that is for `guild.join` to undo."""
    await room.play()
    await room.fault("kick", code=4014)


@case(Due.NOTHING)
async def messages_that_cannot_be_read(room: Room) -> None:
    """What makes no sense is passed over, and counted, and neither sequence nor group suffer."""
    await room.play()
    for text in UNREADABLE_TEXTS:
        await room.fault("say", text=text, n=10)
    for data in UNREADABLE_BYTES:
        await room.fault("say", data=data, n=10)
    await room.hear_more()


@case(Due.NOTHING)
async def a_flood_of_garbage(room: Room) -> None:
    await room.play()
    for _ in range(5):
        await room.fault("say", text=UNREADABLE_TEXTS[0], n=1_000)
        await room.fault("say", data=UNREADABLE_BYTES[0], n=100)
        await room.hear_more(SECOND // 5)


@case(Due.RESUMED)
async def a_message_of_a_megabyte(room: Room) -> None:
    """Larger than any honest one: the WebSocket is closed with 1009, the session goes on."""
    await room.play()
    await room.fault("say", text='{"op":5,"d":"' + "x" * (1 << 20) + '"}')
    await room.resumed()


# the handshake


@case(Due.FAILED, code="udp_blocked")
async def discovery_unanswered(room: Room) -> None:
    await room.fault("discovery_silent")
    await room.ask_to_join()


@case(Due.NOTHING)
async def discovery_answered_at_the_third_time(room: Room) -> None:
    await room.fault("discovery_lose_first", n=2)
    await room.play()


@case(Due.NOTHING)
async def discovery_answered_with_another_type(room: Room) -> None:
    await room.fault("discovery_wrong", response="type")
    await room.play()


@case(Due.NOTHING)
async def discovery_answered_for_a_foreign_ssrc(room: Room) -> None:
    await room.fault("discovery_wrong", response="ssrc")
    await room.play()


@case(Due.NOTHING)
async def discovery_answered_in_70_bytes(room: Room) -> None:
    await room.fault("discovery_wrong", response="legacy")
    await room.play()


@case(Due.NOTHING)
async def discovery_tells_another_port(room: Room) -> None:
    """A NAT in between: what was told is selected, and not the local port."""
    await room.fault("discovery_wrong", response="port")
    await room.play()


@case(Due.NOTHING)
async def only_xchacha_offered(room: Room) -> None:
    await room.fault("modes", modes=[XCHACHA])
    row = await room.play()
    assert row.sessions[-1].mode == XCHACHA


@case(Due.NOTHING)
async def unknown_modes_offered_first(room: Room) -> None:
    await room.fault("modes", modes=["aead_tomorrow", "", XCHACHA, AES])
    row = await room.play()
    assert row.sessions[-1].mode == AES


@case(Due.FAILED, code="voice_mode_unsupported")
async def no_known_mode_offered(room: Room) -> None:
    await room.fault("modes", modes=["aead_tomorrow", "aead_next_week"])
    await room.ask_to_join()


@case(Due.FAILED, code="voice_mode_unsupported")
async def no_mode_offered(room: Room) -> None:
    await room.fault("modes", modes=[])
    await room.ask_to_join()


@case(Due.FAILED, code="voice_closed")
async def only_a_discontinued_mode_offered(room: Room) -> None:
    """It is chosen, for want of a better one, and refused: no server speaks it any more, this one included."""
    await room.fault("modes", modes=["xsalsa20_poly1305_lite"])
    await room.ask_to_join()
    await room.stack.wait_event("guild.failed", guild=room.guild, close_code=4016, final=True)


@case(Due.NOTHING, voided=2 * BUILT_AHEAD)
async def a_new_key(room: Room) -> None:
    """Op 4 again: the counter begins anew, under a key of its own."""
    await room.play()
    await room.fault("new_key")
    await room.hear_more()
    await room.fault("new_key")
    await room.hear_more()


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


@dataclass
class Fate:
    """What became of one guild."""

    error: str = ""
    sessions: list[SessionReport] = field(default_factory=list)
    stayed: list[HearingReport] = field(default_factory=list)
    """What those who were there from the start got."""
    newcomer: HearingReport | None = None
    codes_equal: bool | None = None
    wanted: list[Event] = field(default_factory=list)
    status: GuildStatus | None = None
    frames: set[bytes] = field(default_factory=set)
    """All that members could decrypt, silence left out."""
    joined_s: float = 0.0
    silence_s: float = 0.0
    back_s: float = 0.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Each guild has a voice server of its own: some faults befall whoever connects there next."""
    async with Stack(tmp_path_factory.mktemp("pool"), emulator=("--endpoint-guilds", "1")) as stack:
        yield stack


@dataclass
class Told:
    """What became of all guilds: of those that were struck, by their stories, and of those that were not."""

    fates: dict[str, Fate]
    published: set[bytes]
    bystanders: list[GuildReport]
    workers: int
    """Those that hold bystanders."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def told(running: Stack) -> AsyncIterator[Told]:
    """Let every story happen, all at once; then let somebody join wherever we still play."""
    stack = running
    (stack.media / PROGRAMME.name).write_bytes(await asyncio.to_thread(PROGRAMME.read_bytes))
    radio = await stack.start(stack.media / PROGRAMME.name, loop=True)
    watch = Watch(stack)
    rooms: dict[str, Room] = {}
    for (name, one), (guild, channel) in zip(CASES.items(), stack.new_guilds(len(CASES)), strict=True):
        await stack.discord.issue([(guild, channel)], kind=one.kind, members=one.members, ghosts=one.ghosts)
        rooms[name] = Room(stack, watch, radio, guild, channel, one.kind)
        (there,) = await stack.discord.listen(guild)
        rooms[name].stayed = [member.user for member in there.members]
    fates = {name: Fate() for name in CASES}
    bystanders = await stack.join(4, radio)
    await stack.hear_more(bystanders, SECOND // 2)
    async with watch.looking(), outside_bot(stack, {rooms["kicked_for_good"].guild}):
        await asyncio.gather(*(_live(fates[name], rooms[name], CASES[name]) for name in CASES))
        entries = await stack.published(await stack.run_of(radio))
        yield Told(
            fates,
            published={packet for entry in entries for packet in entry.packets},
            bystanders=list((await stack.heard(bystanders)).values()),
            workers=len(await stack.by_worker(bystanders)),
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fates(told: Told) -> dict[str, Fate]:
    return told.fates


async def _live(fate: Fate, room: Room, one: Case) -> None:
    """One story to its end; that it went wrong is told by its test."""
    try:
        await one.story(room)
        if one.due is Due.FAILED:
            await _given_up(room, one.code)
        else:
            newcomer = await room.join_member()
            await room.heard_by(newcomer)
            row = await room.look()
            members = [member for channel in row.channels for member in channel.members]
            stayed = [hearing_of(member) for member in members if member.user in room.stayed]
            fate.stayed = [hearing for hearing in stayed if hearing is not None]
            fate.newcomer = hearing_of(member_of(row, newcomer))
            fate.back_s = room.back_s
            fate.codes_equal = row.channels[-1].codes_equal
            heard = await room.stack.packets(room.guild)
            fate.joined_s, fate.silence_s = _silences_s(heard, room.joined_ns)
            fate.frames = {frame for name, frame in heard.payloads.items() if name > SILENCE_ID}
        row = await room.look()
        fate.sessions = row.sessions
    except Exception as error:  # noqa: BLE001 - one guild's fault must not spoil the others' tests
        fate.error = f"{type(error).__name__}: {error}"
    fate.status = await room.status()
    fate.wanted = await room.stack.events("guild.voice_wanted", guild=room.guild)


async def _given_up(room: Room, code: str) -> None:
    """Wait until the guild's status says that, and why."""
    try:
        async with asyncio.timeout(SETTLED_WITHIN_S):
            while (status := await room.status()) is None or status.code != code:  # noqa: ASYNC110 - set by others
                await asyncio.sleep(LOOK_EVERY_S)
    except TimeoutError:
        raise AssertionError(f"not within {SETTLED_WITHIN_S:g} s: {code}, but {status}") from None


def _silences_s(heard: GuildPackets, joined_ns: int) -> tuple[float, float]:
    """From the job to the first sound, and the longest silence after that: of what members could decrypt."""
    arrivals = sorted(
        at
        for session in heard.sessions
        for at, payload in zip(session.arrival_ns, session.payload, strict=True)
        if payload > SILENCE_ID
    )
    longest_ns = max((after - before for before, after in pairwise(arrivals)), default=0)
    return (arrivals[0] - joined_ns) / 1e9, longest_ns / 1e9


def tell(name: str, fate: Fate, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        code = f", {fate.status.code}" if fate.status is not None and fate.status.code else ""
        sound = f"; heard {fate.joined_s:.2f} s after the job, longest silence {fate.silence_s:.2f} s"
        back = f", audible {fate.back_s:.2f} s after somebody came" if fate.back_s else ""
        print(f"\n  {name}: {CASES[name].due.value}{code}{sound if fate.joined_s else ''}{back}", end=" ")


async def assert_heard(stack: Stack, fate: Fate, voided: int = 0) -> None:
    """Played to at the end, by a session without a fault, encrypted where it must be; the newcomer missed nothing."""
    assert not fate.error, fate.error
    assert fate.status is not None
    assert fate.status.state == "playing"
    newest = fate.sessions[-1]
    assert newest.state == "live"
    for session in fate.sessions:
        found = await stack.faults(session)
        assert found.pop("lost", 0) <= voided
        assert not found
        assert session.in_the_clear == 0
    if newest.dave_version:
        assert fate.codes_equal
    assert fate.newcomer is not None
    assert fate.newcomer.failed == fate.newcomer.failed_at_start


def assert_missed_nothing(fate: Fate) -> None:
    """Whoever was there from the start could decrypt every frame."""
    assert fate.stayed
    for hearing in fate.stayed:
        assert (hearing.failed, hearing.decrypted) == (0, hearing.received)


@pytest.mark.parametrize("name", of(Due.NOTHING))
async def test_nothing_is_heard_of(
    running: Stack, fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same session, nothing lost, nobody asked, and every member decrypts every frame."""
    fate = fates[name]
    tell(name, fate, capsys)
    await assert_heard(running, fate, CASES[name].voided)
    (session,) = fate.sessions
    assert session.resumed == 0
    assert session.told is None or session.told.invalid == 0
    assert fate.wanted == []
    assert_missed_nothing(fate)


@pytest.mark.parametrize("name", of(Due.RESUMED))
async def test_is_resumed(
    running: Stack, fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same session over another WebSocket: nothing lost, nobody asked, the group unharmed."""
    fate = fates[name]
    tell(name, fate, capsys)
    await assert_heard(running, fate, CASES[name].voided)
    (session,) = fate.sessions
    assert session.resumed >= 1
    assert session.told is None or session.told.invalid == 0
    assert fate.wanted == []
    assert_missed_nothing(fate)


@pytest.mark.parametrize("name", of(Due.RECOVERED))
async def test_the_group_is_entered_anew(
    running: Stack, fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Op 31 and another key package, on the same session."""
    fate = fates[name]
    tell(name, fate, capsys)
    await assert_heard(running, fate, CASES[name].voided)
    (session,) = fate.sessions
    assert session.resumed == 0
    assert fate.wanted == []


@pytest.mark.parametrize("name", of(Due.AGAIN))
async def test_is_identified_again(
    running: Stack, fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A handshake that the server broke off says nothing against the credentials: nobody is asked."""
    fate = fates[name]
    tell(name, fate, capsys)
    await assert_heard(running, fate, CASES[name].voided)
    assert fate.wanted == []


@pytest.mark.parametrize("name", of(Due.ASKED))
async def test_the_bot_is_asked(
    running: Stack, fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, and its answer is heard."""
    fate = fates[name]
    tell(name, fate, capsys)
    await assert_heard(running, fate, CASES[name].voided)
    assert len(fate.wanted) == 1
    assert fate.wanted[0].close_code in (4006, 4014, 4022)


@pytest.mark.parametrize("name", of(Due.PAUSED))
async def test_nobody_is_played_to(
    running: Stack, fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silence at the end, then no packets; on the same session, sound again for whoever comes."""
    fate = fates[name]
    tell(name, fate, capsys)
    await assert_heard(running, fate, CASES[name].voided)
    (session,) = fate.sessions
    assert session.resumed == 0
    assert fate.wanted == []


@pytest.mark.parametrize("name", of(Due.FAILED))
async def test_is_given_up(fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The status says why, in a word that is stable and in a sentence."""
    fate = fates[name]
    tell(name, fate, capsys)
    assert not fate.error, fate.error
    assert fate.status is not None
    assert fate.status.code == CASES[name].code
    assert fate.status.message
    assert fate.status.state in ("failed", "stopped")


async def test_what_is_heard_is_what_was_published(told: Told) -> None:
    """In every guild, encrypted or in the clear, before its fault and after it: these frames and no others."""
    heard = {name: fate for name, fate in told.fates.items() if CASES[name].due is not Due.FAILED}
    assert {name for name, fate in heard.items() if not fate.frames or fate.frames - told.published} == set()


async def test_guilds_that_were_not_struck_hear_nothing_of_all_that(
    running: Stack, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the same workers as those that were: one session, no packet lost, every frame decrypted."""
    assert told.workers == 2
    longest_ms = 0.0
    for row in told.bystanders:
        (session,) = row.sessions
        assert not await running.faults(session)
        assert (session.state, session.resumed, session.in_the_clear) == ("live", 0, 0)
        (hearing,) = (hearing_of(member) for channel in row.channels for member in channel.members)
        assert hearing is not None
        assert (hearing.failed, hearing.decrypted) == (0, hearing.received)
        longest_ms = max(longest_ms, hearing.longest_gap_ms)
    with capsys.disabled():
        print(f"\n  {len(told.bystanders)} others: longest silence {longest_ms / 1_000:.2f} s", end=" ")


async def test_unreadable_messages_are_counted_all_and_logged_once_of_each_kind(running: Stack, told: Told) -> None:
    """A flood of them does not become a flood of log lines."""
    assert not told.fates["messages_that_cannot_be_read"].error
    stats = await running.worker_stats()
    assert sum(one.messages_malformed for one in stats) > 5_000
    assert 10 < running.logged("message.malformed") < 64
