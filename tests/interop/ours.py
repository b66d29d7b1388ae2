"""Our own worker and a client of others in one encrypted channel: each hears the other.

The pool broadcasts to the channel. It has nobody who asks for what others say, so a voice connection of the worker's
own, with the worker's own receiver, sits beside it and listens.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from shared.cli.pool import LOOPBACK
from shared.errors import VoiceError
from shared.protocol.voice_gateway import Credentials
from shared.voice_servers import VoiceServers
from tests.e2e.stack import Stack
from tests.emulator.main.records import ChannelPlan, GuildPlan
from tests.emulator.records import Voice
from tests.interop.led import Kind, LedClient
from tests.interop.scenes import Failed, Outcome, Place, Scene, opus_packets
from tests.media.audio import PROGRAMME
from worker.fanout.sockets import SocketPool
from worker.voice.commons import VoiceShared, voice_http
from worker.voice.connection import Media, VoiceConnection
from worker.voice.receive.pipeline import Frame
from worker.voice.receive.receiver import Receiver
from worker.voice.turns import Turns

_SILENCE = b"\xf8\xff\xfe"
_EAR_USER = "1200000000000000001"
_HEARD_FRAMES = 150
_PLAYED_S = 3


class _Quiet:
    """Owner of a connection that sends nothing."""

    def media(self, media: Media) -> None:
        """See `Owner`."""

    def link(self, up: bool) -> None:
        """See `Owner`."""

    def path(self, lost: VoiceError | None) -> None:
        """See `Owner`."""

    def changed(self) -> None:
        """See `Owner`."""


class Ear:
    """A voice connection of the worker's that keeps what one user says."""

    def __init__(self, connection: VoiceConnection) -> None:
        self._connection = connection
        self.frames: list[bytes] = []
        self.lost = 0

    @property
    def privacy_code(self) -> str:
        """Of its DAVE group."""
        return self._connection.dave.privacy_code

    def take(self, frame: Frame) -> None:
        """Keep a frame."""
        if frame.opus is None:
            self.lost += 1
        elif frame.opus != _SILENCE:
            self.frames.append(frame.opus)


@asynccontextmanager
async def listening(voice: Voice, user_id: str, ca_file: Path) -> AsyncIterator[Ear]:
    """An ear in a call, open for one user. Raises what ended its connection before its time."""
    tls = ssl.create_default_context(cafile=str(ca_file))
    sockets = SocketPool("127.0.0.1", range(0), per_guild=False, on_new=lambda _: None)
    receiver = Receiver(voice.guild)

    async def cleared() -> None:
        """Nobody else is at it."""

    async with voice_http() as http:
        connection = VoiceConnection(
            Credentials(voice.guild, voice.channel, voice.user_id, voice.session_id, voice.token),
            voice.endpoint,
            shared=VoiceShared(http, tls, VoiceServers(LOOPBACK, LOOPBACK), Turns(None)),
            lease_port=sockets.lease,
            may_open=cleared,
            owner=_Quiet(),
            speaking=0,
            receiver=receiver,
        )
        ear = Ear(connection)

        async def take_all() -> None:
            async with receiver.opus(int(user_id)) as stream:
                async for event in stream:
                    if isinstance(event, Frame):
                        ear.take(event)

        tasks = [asyncio.create_task(connection.run()), asyncio.create_task(take_all())]
        try:
            yield ear
        finally:
            await connection.close()
            receiver.close()
            await asyncio.gather(*tasks)
            sockets.close()


async def hear_each_other(kind: Kind, folder: Path, log: Path) -> Outcome:
    """The pool plays, the client joins, all have one privacy code, and each hears the other."""
    pool = folder / f"pool-{log.stem}"
    pool.mkdir()
    clip = pool / "clip.ogg"
    said = opus_packets(PROGRAMME, clip, _PLAYED_S)
    async with Stack(pool) as stack:
        music = stack.media / PROGRAMME.name
        music.write_bytes(PROGRAMME.read_bytes())
        radio = await stack.start(music, loop=True)
        run = await stack.run_of(radio)
        (guild,) = await stack.join(1, radio, members=1)
        (channel,) = await stack.discord.listen(guild)
        bot = await stack.discord.bot([GuildPlan(guild, [ChannelPlan(channel.channel, "voice")])])
        place = Place(guild=guild, channel=channel.channel, other_channel="", bot=bot)
        (voice,) = await stack.discord.issue([(guild, channel.channel)], user=_EAR_USER)
        async with (
            LedClient(kind, bot, stack.ca_file, log) as client,
            listening(voice, bot.user_id, stack.ca_file) as ear,
        ):
            scene = Scene(stack.discord, client, place)
            await scene.join()
            await client.do("listen", "listening")
            await scene.until(lambda: _one_code(stack, scene, ear), "one privacy code for our worker, too")
            await client.do("play", "playing", file=str(clip))
            await client.hear("played")

            async def all_said() -> bool:
                return bool(ear.frames) and ear.frames[-1] == said[-1]

            await scene.until(all_said, "the last frame that the client said")
            ours = await _our_user(stack, scene)
            heard = await scene.until(lambda: _heard_by_client(scene, ours), "our sound at the client")
            published = {packet for entry in await stack.published(run) for packet in entry.packets}
            await client.do("leave", "left")
        if ear.frames != said or ear.lost:
            raise Failed(f"our receiver got {len(ear.frames)} frames of {len(said)}, and lost {ear.lost}")
        foreign = sum(frame not in published for frame in heard)
        if foreign:
            raise Failed(f"{foreign} of {len(heard)} frames that the client heard of us were never published")
        before = await _heard_by_member(scene, ours)
        await scene.until(lambda: _more_by_member(scene, ours, before), "our sound at a member, when the client left")
    return Outcome(f"client heard {len(heard)} frames of us, our receiver all {len(said)} of the client")


async def _one_code(stack: Stack, scene: Scene, ear: Ear) -> bool:
    code = await scene.privacy_code()
    _, status = await stack.guild(scene.place.guild)
    return bool(code) and status is not None and code == status.privacy_code == ear.privacy_code


async def _our_user(stack: Stack, scene: Scene) -> str:
    """Who the pool is in this guild."""
    users = {session.user for session in await stack.sessions(scene.place.guild)}
    (ours,) = users - {scene.place.bot.user_id, _EAR_USER}
    return ours


async def _heard_by_client(scene: Scene, user: str) -> list[bytes]:
    heard = await scene.heard_by_client(user)
    return heard if len(heard) >= _HEARD_FRAMES else []


async def _heard_by_member(scene: Scene, user: str) -> int:
    (member,) = (await scene.channel()).members
    return member.hearing[user].decrypted


async def _more_by_member(scene: Scene, user: str, before: int) -> bool:
    return await _heard_by_member(scene, user) >= before + _HEARD_FRAMES
