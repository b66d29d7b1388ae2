"""What a client of others goes through in the local Discord, and what must come of it."""

from __future__ import annotations

import asyncio
import base64
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import av

from tests.emulator.client import EmulatorClient
from tests.emulator.main.records import Bot, ChannelPlan, GuildPlan
from tests.emulator.records import ChannelReport, SessionReport
from tests.interop.led import LedClient
from tests.media.audio import PROGRAMME

_SILENCE = b"\xf8\xff\xfe"
_FRAMES_PER_SECOND = 50
_PLAYED_S = 3
_WORD_S = 0.2
_MEMBERS = 2
_HEARD_AGAIN_FRAMES = 50
_MAY_MISS_FRAMES = 5
"""Of a member's speech, at its start, until the client listens to that member."""
_PATIENCE_S = 45.0
_POLL_S = 0.02
_NULL_MS = 1_000

_numbers = itertools.count(1)
_T = TypeVar("_T")


class Failed(Exception):
    """What must have come of a scene did not."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A guild with two voice channels, members in both, and a bot that is in none."""

    guild: str
    channel: str
    other_channel: str
    bot: Bot


class Outcome(NamedTuple):
    """What a scene showed: a remark, and the longest silence that listeners heard, if that was the point."""

    remark: str
    silence_ms: float | None = None


class Heard(NamedTuple):
    """What the members of the client's channel heard of it, at the worst of them."""

    frames: int
    failed: int
    first_ns: int
    last_ns: int
    longest_gap_ms: float


class Scene:
    """One client in one place; each scene has its own of both."""

    def __init__(self, emulator: EmulatorClient, client: LedClient, place: Place) -> None:
        self.emulator = emulator
        self.client = client
        self.place = place

    # the client's doing

    async def join(self) -> None:
        """Join, and wait until the client and all members are in one DAVE group."""
        await self.client.do("join", "joined", guild=self.place.guild, channel=self.place.channel)
        await self.until(self.in_one_group, "one privacy code for all")

    async def tickle(self) -> None:
        """Let a member speak for a moment, as somebody always does: discord.py's reader then sleeps in no `select`."""
        member = (await self.channel()).members[0].user
        await self.emulator.members.speak(self.place.guild, member, seconds=_WORD_S)

    async def in_one_group(self) -> bool:
        """Whether the client and all members have one privacy code, and no transition is under way."""
        channel = await self.channel()
        code = await self.privacy_code()
        codes = {member.privacy_code for member in channel.members if not member.gone}
        return self.place.bot.user_id in channel.group and not channel.in_transition and codes == {code}

    async def privacy_code(self) -> str | None:
        """The client's own."""
        code: str | None = (await self.client.do("heard", "heard"))["code"]
        return code

    async def heard_by_client(self, user: str) -> list[bytes]:
        """Opus frames of one member that the client received and decrypted, without silence."""
        frames = (await self.client.do("heard", "heard"))["frames"].get(user, [])
        return [frame for frame in map(base64.b64decode, frames) if frame != _SILENCE]

    # what the local Discord knows

    async def channel(self, name: str | None = None) -> ChannelReport:
        """One of the channels, the first if not named."""
        channels = await self.emulator.listen(self.place.guild)
        return next(one for one in channels if one.channel == (name or self.place.channel))

    async def sessions(self) -> list[SessionReport]:
        """The client's voice sessions, oldest first."""
        rows = (await self.emulator.report(guilds=True)).guild_rows or []
        row = next(row for row in rows if row.guild == self.place.guild)
        return [session for session in row.sessions if session.user == self.place.bot.user_id]

    async def hearing(self, channel: str | None = None) -> Heard | None:
        """What the members of a channel hear of the client; None while one of them hears nothing."""
        members = (await self.channel(channel)).members
        present = [member.hearing.get(self.place.bot.user_id) for member in members if not member.gone]
        hearing = [each for each in present if each is not None and each.decrypted]
        if len(hearing) < len(present):
            return None
        return Heard(
            min(each.decrypted for each in hearing),
            max(each.failed for each in hearing),
            max(_known(each.first_decrypted_ns) for each in hearing),
            min(_known(each.last_decrypted_ns) for each in hearing),
            max(each.longest_gap_ms for each in hearing),
        )

    async def hear_more(self, frames: int, channel: str | None = None) -> Heard:
        """Wait until all members decrypted so many more frames of the client."""
        before = await self.hearing(channel)
        wanted = frames + (before.frames if before is not None else 0)

        async def enough() -> Heard | None:
            now = await self.hearing(channel)
            return now if now is not None and now.frames >= wanted else None

        return await self.until(enough, f"{frames} more frames at all members")

    async def until(self, condition: Callable[[], Awaitable[_T | None]], what: str) -> _T:
        """Ask until the answer is truthy, and give it. Raises: Failed."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while not (found := await condition()):  # noqa: ASYNC110 - other processes set no event of ours
                    await asyncio.sleep(_POLL_S)
                return found
        except TimeoutError:
            raise Failed(f"not within {_PATIENCE_S:g} s: {what}") from None

    # faults

    async def strike(self, kind: str, **fields: object) -> None:
        """A fault of the client's voice connection."""
        await self.emulator.fault(self.place.guild, kind, user=self.place.bot.user_id, **fields)

    async def strike_main(self, kind: str, **fields: object) -> None:
        """A fault that reaches the client through the main gateway."""
        await self.emulator.main_fault(kind, guild=self.place.guild, **fields)


def _known(moment_ns: int | None) -> int:
    return moment_ns or 0


def opus_packets(path: Path, clip: Path | None = None, seconds: int | None = None) -> list[bytes]:
    """The Opus packets of an Ogg file, or of its first seconds; with `clip` they are written to a file of their own."""
    most = None if seconds is None else seconds * _FRAMES_PER_SECOND
    with av.open(str(path)) as source:
        packets = [packet for packet in source.demux(source.streams.audio[0]) if packet.size][:most]
        frames = [bytes(packet) for packet in packets]
        if clip is not None:
            with av.open(str(clip), "w", format="ogg") as target:
                stream = target.add_stream_from_template(source.streams.audio[0])
                for packet in packets:
                    packet.stream = stream
                    target.mux(packet)
    return frames


async def new_place(emulator: EmulatorClient) -> Place:
    """A place where nobody was before."""
    number = next(_numbers)
    guild, channel, other = (str(base * 10**17 + number * 10**6 + base) for base in (3, 4, 5))
    channels = [ChannelPlan(name, "voice", members=_MEMBERS) for name in (channel, other)]
    bot = await emulator.bot([GuildPlan(guild, channels)])
    return Place(guild=guild, channel=channel, other_channel=other, bot=bot)


# scenes


async def talk(scene: Scene, folder: Path) -> Outcome:
    """Join, play and be heard, hear a member, leave."""
    clip = folder / f"clip-{scene.place.guild}.ogg"
    frames = opus_packets(PROGRAMME, clip, _PLAYED_S)
    await scene.join()
    await scene.client.do("listen", "listening")
    await scene.client.do("play", "playing", file=str(clip))
    await scene.client.hear("played")
    heard = await scene.hear_more(0)
    await _expect_whole(scene, frames, heard)
    share = await _speech_of_member(scene, opus_packets(PROGRAMME)[500:650])
    await scene.client.do("leave", "left")
    await scene.until(lambda: _is_gone(scene), "a clean leave")
    return Outcome(f"heard all {len(frames)} frames; client heard {share}")


async def _expect_whole(scene: Scene, frames: list[bytes], heard: Heard) -> None:
    """Raises: Failed: the members did not get what was played, as it was played."""
    packets = await scene.emulator.packets(scene.place.guild)
    recorded = packets.sessions[-1].payload
    played = [frame for frame in (packets.payloads.get(number, b"") for number in recorded) if frame != _SILENCE]
    if played != frames:
        raise Failed(f"{len(played)} frames came of {len(frames)} that were played, or other ones")
    if heard.failed or heard.frames < len(frames):
        raise Failed(f"members decrypted {heard.frames} frames of {len(frames)}, and failed at {heard.failed}")
    (session,) = await scene.sessions()
    if session.lost or session.in_the_clear or session.wrong_timestamp or session.nonce_reused:
        raise Failed(f"packets were not as they must be: {session}")


async def _speech_of_member(scene: Scene, said: list[bytes]) -> str:
    """Let a member speak; gives how much of it the client heard. Raises: Failed."""
    member = (await scene.channel()).members[0].user
    await scene.emulator.members.speak(scene.place.guild, member, said)

    async def last_heard() -> list[bytes]:
        heard = await scene.heard_by_client(member)
        return heard if heard and heard[-1] == said[-1] else []

    heard = await scene.until(last_heard, "the last frame that a member said")
    if heard != said[len(said) - len(heard) :] or len(heard) < len(said) - _MAY_MISS_FRAMES:
        raise Failed(f"the client heard {len(heard)} frames of {len(said)} that a member said, or other ones")
    return f"{len(heard)} of {len(said)}"


async def _is_gone(scene: Scene) -> bool:
    """The bot's voice session and voice state are gone, by its own will."""
    (session,) = await scene.sessions()
    return session.close_by == "client" and session.close_clean is True and await _has_left(scene)


async def _has_left(scene: Scene) -> bool:
    """The bot is in no call any more."""
    states = (await scene.emulator.main_report()).voice_states
    inside = any(state.user_id == scene.place.bot.user_id for state in states)
    return not inside and all(session.state == "ended" for session in await scene.sessions())


async def another_session(scene: Scene) -> bool:
    """The client is there by a newer session than at first."""
    sessions = await scene.sessions()
    return len(sessions) > 1 and sessions[-1].state == "live"


async def back(scene: Scene) -> bool:
    """The client is there again: it resumed, or has a newer session."""
    sessions = await scene.sessions()
    return await another_session(scene) or (sessions[-1].resumed > 0 and sessions[-1].state == "live")


async def said_invalid(scene: Scene) -> bool:
    """The client refused a commit, and is in the group again."""
    told = (await scene.sessions())[-1].told
    return told is not None and told.invalid > 0 and await scene.in_one_group()


class Fault(NamedTuple):
    """A fault: how it is made, when the client has dealt with it, and in which channel it is heard then."""

    strike: Callable[[Scene], Awaitable[None]]
    dealt_with: Callable[[Scene], Awaitable[bool]]
    moved: bool = False


async def _damage_commit(scene: Scene) -> None:
    await scene.strike("damage", op=29)
    await scene.emulator.members.join(scene.place.guild, channel=scene.place.channel)


async def _restart_epoch(scene: Scene) -> None:
    code = await scene.privacy_code()
    await scene.strike("epoch_restart")

    async def other_code() -> bool:
        return await scene.privacy_code() not in (None, code)

    await scene.until(other_code, "another privacy code")


FAULTS = {
    "region change": Fault(lambda scene: scene.strike_main("server"), another_session),
    "move": Fault(lambda scene: scene.strike_main("move", channel=scene.place.other_channel), another_session, True),
    "close 4006": Fault(lambda scene: scene.strike("close", code=4006), another_session),
    "close 1006": Fault(lambda scene: scene.strike("drop"), back),
    "close 4015": Fault(lambda scene: scene.strike("close", code=4015), back),
    "null endpoint 1 s": Fault(lambda scene: scene.strike_main("server", null_ms=_NULL_MS), another_session),
    "damaged commit": Fault(_damage_commit, said_invalid),
    "epoch reset": Fault(_restart_epoch, Scene.in_one_group),
}


async def suffer(scene: Scene, fault: Fault, *, gives_up: bool) -> Outcome:
    """Play, be struck by a fault, and be heard again; or leave, where this client is known to give up."""
    await scene.join()
    await scene.tickle()
    await scene.client.do("play", "playing", file=str(PROGRAMME))
    await scene.hear_more(25)
    await scene.emulator.reset()
    await scene.hear_more(10)
    struck_ns = time.time_ns()
    await fault.strike(scene)
    if gives_up:
        await scene.until(lambda: _has_left(scene), "a leave")
        return Outcome(f"left {(time.time_ns() - struck_ns) / 1e9:.1f} s after it, as this client does")
    await scene.until(lambda: fault.dealt_with(scene), "what a client does about it")
    channel = scene.place.other_channel if fault.moved else scene.place.channel
    before = await scene.hearing(scene.place.channel)
    after = await scene.hear_more(_HEARD_AGAIN_FRAMES, channel)
    await scene.client.do("leave", "left")
    again_s = (after.last_ns - struck_ns) / 1e9
    if not fault.moved:
        return Outcome(f"heard again, {again_s:.1f} s after it", after.longest_gap_ms)
    if before is None:
        raise Failed("not heard before the fault")
    return Outcome(f"heard again, {again_s:.1f} s after it", (after.first_ns - before.last_ns) / 1e6)
