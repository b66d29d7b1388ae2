"""What a story of a fault is told with: the guild that it befalls, and what it is to cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import Enum

from shared.schema.records import GuildStatus
from tests.e2e.stack import Stack, until
from tests.emulator.records import ChannelKind, GuildReport, HearingReport, MemberReport
from worker.fanout.app import FAR_TICKS
from worker.fanout.build import SILENCE_FRAMES
from worker.fanout.scratch import BLOCK_TICKS

SETTLED_WITHIN_S = 40.0
LOOK_EVERY_S = 0.25
_STATUS_EVERY_S = 0.1
SECOND = 50
"""Packets."""
BUILT_AHEAD = FAR_TICKS + BLOCK_TICKS
"""Packets of a guild that are built and not sent yet, at most: of the tick under way, and those ahead."""


class Due(Enum):
    """What the fault is to cost."""

    NOTHING = "nothing heard of it"
    RESUMED = "resumed"
    RECOVERED = "the group was entered anew"
    RESUMED_ANEW = "resumed, and the group entered anew"
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

    async def told(self, state: str, code: str, within_s: float = SETTLED_WITHIN_S) -> None:
        """Wait until the status says so. All events of all guilds would be much to read again and again."""

        async def said() -> bool:
            status = await self.status()
            return status is not None and (status.state, status.code) == (state, code)

        await until(said, f"{state} {code} of {self.guild}", within_s, _STATUS_EVERY_S)

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


def case(
    due: Due,
    *,
    kind: ChannelKind = "voice",
    members: int = 1,
    ghosts: int | None = None,
    code: str = "",
    voided: int = 0,
) -> Callable[[Story], Case]:
    """Make a case of a story.

    Args:
        members, ghosts: in the channel before us.
        code: of the status in the end.
        voided: packets that were built ahead and must not leave any more.
    """
    return lambda story: Case(due, story, kind, members, ghosts, code, voided)


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
