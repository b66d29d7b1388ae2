"""A whole voice connection against the local Discord: real TLS, real UDP, real groups, and somebody who speaks.

Members are on another MLS implementation than the product. What they say comes out as they said it, through whatever
the network and a voice server may do to it; what must not be heard is not, and is counted by its kind.

Source: voice protocol reference, sections 4.5, 6.9 (fault injection list) and 8 (right column).
"""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from shared.cli.pool import LOOPBACK
from shared.errors import ErrorCode, VoiceClosed, VoiceError
from shared.protocol import packet_seal
from shared.protocol.opus import SILENCE_FRAME
from shared.protocol.voice_gateway import Credentials
from shared.voice_servers import VoiceServers
from tests.emulator.client import EmulatorClient
from tests.emulator.local import LocalDiscord
from tests.emulator.records import ChannelKind, SessionReport
from tests.emulator.tone import second_of_tone
from tests.garbage import look_minutes_later, own_collections_off
from tests.integration.test_receive import FRAMES, Song, sound_of, until_stopped
from tests.media.audio import FRAME_SAMPLES, align
from tests.media.web import served
from worker.fanout.build import Builder
from worker.fanout.rows import RowTable
from worker.fanout.sockets import SocketPool
from worker.voice import connection, path
from worker.voice.commons import VoiceShared, voice_http
from worker.voice.connection import Media, VoiceConnection
from worker.voice.dave import Dave
from worker.voice.receive.pipeline import Frame, Stopped
from worker.voice.receive.receiver import Receiver, Sound, Stream
from worker.voice.turns import Turns

BOUND_S = 10.0
AES, XCHACHA = "aead_aes256_gcm_rtpsize", "aead_xchacha20_poly1305_rtpsize"
GUILD, CHANNEL = "300000000000000001", "400000000000000001"
CLOSING = [SILENCE_FRAME] * 5
"""What members end their speeches with."""
UNREADABLE_TEXTS = {
    "{": "message",
    "null": "message",
    '{"op":"8"}': "message",
    '{"op":5,"d":{},"seq":-1}': "message",
    '{"op":2,"d":{"ssrc":1,"ip":"127.0.0.1","port":9,"modes":[]}}': "op 2 ready",
    '{"op":4,"d":{"mode":"' + AES + '","secret_key":[66,66,66],"dave_protocol_version":1}}': "op 4 session_description",
    '{"op":5,"d":null}': "op 5 speaking",
    '{"op":5,"d":{"user_id":"x","ssrc":1,"speaking":1}}': "op 5 speaking",
    '{"op":6,"d":{"t":"now"}}': "op 6 heartbeat_ack",
    '{"op":8,"d":{"heartbeat_interval":-5}}': "op 8 hello",
    '{"op":9,"d":null}': "op 9 resumed",
    '{"op":11,"d":{"user_ids":[17]}}': "op 11 clients_connect",
    '{"op":13,"d":{}}': "op 13 client_disconnect",
    '{"op":21,"d":{"transition_id":70000,"protocol_version":0}}': "op 21 dave_prepare_transition",
    '{"op":22,"d":{"transition_id":"0"}}': "op 22 dave_execute_transition",
    '{"op":24,"d":{"epoch":1}}': "op 24 dave_prepare_epoch",
    '{"op":30,"d":{}}': "op 30 mls_welcome",
}
"""With the kind under which each is logged."""
UNREADABLE_BYTES = {
    b"": "binary message",
    bytes([5, 1]): "op 5 speaking",
    bytes([29]): "op 29 mls_announce_commit_transition",
}
HARMLESS_TEXTS = ('{"op":99,"d":{}}', '{"op":-1}', '{"op":18,"d":17}', '{"op":12,"d":{"audio_ssrc":"x"}}')
HARMLESS_BYTES = (b'{"op":5,"d":{}}', bytes([99]) * 50)


async def until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(BOUND_S):
            while not condition():  # noqa: ASYNC110 - what is waited for sets no event
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not within {BOUND_S:g} s: {what}") from None


class Line:
    """A connection with somebody who listens, its owner, and the members of its channel."""

    def __init__(self, discord: EmulatorClient, shared: VoiceShared, sockets: SocketPool) -> None:
        self.discord = discord
        self.shared = shared
        self.sockets = sockets
        self.receiver = Receiver(GUILD)
        self.media_told: list[Media] = []
        self.links: list[bool] = []
        self.paths: list[ErrorCode | None] = []
        self.members: list[str] = []
        self.connection: VoiceConnection
        self._running: asyncio.Task[None]

    # told by the connection

    def media(self, media: Media) -> None:
        self.media_told.append(media)

    def link(self, up: bool) -> None:
        self.links.append(up)

    def path(self, lost: VoiceError | None) -> None:
        self.paths.append(None if lost is None else lost.code)

    def changed(self) -> None:
        """Asked for whenever it is needed here."""

    # what a test does

    @asynccontextmanager
    async def open(
        self,
        fault: str = "",
        fields: Mapping[str, object] | None = None,
        *,
        kind: ChannelKind = "voice",
        members: int = 1,
        receiving: bool = True,
    ) -> AsyncIterator[None]:
        """Be connected, with everybody in one group; a fault may befall the join."""
        (voice,) = await self.discord.issue([(GUILD, CHANNEL)], kind=kind, members=members)
        if fault:
            await self.fault(fault, **(fields or {}))
        (channel,) = await self.discord.listen(GUILD)
        self.members = [member.user for member in channel.members]
        self.connection = VoiceConnection(
            Credentials(GUILD, CHANNEL, voice.user_id, voice.session_id, voice.token),
            voice.endpoint,
            shared=self.shared,
            lease_port=self.sockets.lease,
            may_open=lambda: asyncio.sleep(0),
            owner=self,
            speaking=1,
            receiver=self.receiver if receiving else None,
        )
        self._running = asyncio.create_task(self.connection.run())
        try:
            await self.until(lambda: bool(self.media_told) and self.connection.dave.ready, "an established session")
            yield
            await self.connection.close()
            async with asyncio.timeout(BOUND_S):
                await self._running
        finally:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self.receiver.close()

    def forget(self) -> None:
        """Let go of the session."""
        del self.connection, self._running

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something, as long as the session lives."""
        await until(lambda: condition() or self._running.done(), what)
        if self._running.done():
            await self._running

    async def fault(self, kind: str, **fields: object) -> None:
        await self.discord.fault(GUILD, kind, **fields)

    async def pinged(self) -> None:
        """Wait until the server answered a ping."""
        way = self.connection._path
        way._pings_are_answered = False
        await self.until(lambda: way._pings_are_answered, "an answer to a ping")

    async def speak(self, frames: Sequence[bytes], user: str = "") -> None:
        """Let a member say frames, one each 20 ms; does not wait."""
        await self.discord.members.speak(GUILD, user or self.members[0], frames)

    async def join_member(self) -> str:
        """Another member, in the group with us."""
        user = (await self.discord.members.join(GUILD)).user
        epoch = self.connection.dave.mls_epoch
        code = self.connection.dave.privacy_code
        await self.until(lambda: self.connection.dave.privacy_code != code, f"another epoch than {epoch}")
        return user

    async def keys_of_members(self) -> None:
        """Wait until each member has keys in force: it gets there by itself, before us or after."""
        async with asyncio.timeout(BOUND_S):
            while any(  # noqa: ASYNC110 - a report wakes nobody
                member.since_ns is None for member in (await self.discord.listen(GUILD))[0].members
            ):
                await asyncio.sleep(0.005)

    async def session(self) -> SessionReport:
        report = await self.discord.report(guilds=True)
        return (report.guild_rows or [])[0].sessions[0]

    @property
    def drops(self) -> dict[str, int]:
        return self.receiver.drops.as_dict()


@pytest.fixture
async def line() -> AsyncIterator[Line]:
    async with AsyncExitStack() as stack:
        discord = await stack.enter_async_context(LocalDiscord())
        client = await stack.enter_async_context(EmulatorClient(discord.control_url))
        tls = ssl.create_default_context(cafile=str(discord.ca_file))
        http = await stack.enter_async_context(voice_http())
        sockets = SocketPool("127.0.0.1", range(0), per_guild=False, on_new=lambda _: None)
        stack.callback(sockets.close)
        yield Line(client, VoiceShared(http, tls, VoiceServers(LOOPBACK, LOOPBACK), Turns(None)), sockets)


@pytest.fixture(scope="module")
def song() -> Song:
    return Song()


@pytest.fixture(scope="module")
def words(song: Song) -> list[bytes]:
    """Half a second of it, for where frames are enough."""
    return song.opus[: FRAMES // 2]


def opus_of(heard: Sequence[Frame | Sound]) -> list[bytes | None]:
    return [one.opus for one in heard if isinstance(one, Frame)]


async def first_frame(stream: Stream[Frame]) -> Frame:
    """What begins a talk."""
    async with asyncio.timeout(BOUND_S):
        event = await anext(stream)
    assert not isinstance(event, Stopped)
    return event


def in_force(dave: Dave, version: int) -> bool:
    return dave.version == version and dave.ready


async def both(relayed: Stream[Frame], decoded: Stream[Sound]) -> tuple[list[bytes | None], list[Frame | Sound]]:
    """Frames and sound of one speech."""
    return opus_of(await until_stopped(relayed)), await until_stopped(decoded)


# heard as it was said


@pytest.mark.parametrize("kind", ["voice", "stage"])
@pytest.mark.parametrize("mode", [AES, XCHACHA])
async def test_what_a_member_says_is_heard(line: Line, song: Song, kind: ChannelKind, mode: str) -> None:
    """Frame by frame, and as sound; end-to-end encrypted in a voice channel, as it is on a stage."""
    async with (
        line.open("modes", {"modes": [mode]}, kind=kind),
        line.receiver.opus() as relayed,
        line.receiver.pcm() as decoded,
    ):
        assert line.connection.dave.version == (1 if kind == "voice" else 0)
        assert line.media_told[0].mode == mode
        await line.speak(song.opus)
        frames, sounds = await both(relayed, decoded)
    assert frames == [*song.opus, *CLOSING]
    offset, likeness = align(song.pcm, sound_of(sounds)[: FRAMES * FRAME_SAMPLES])
    assert (offset, line.drops, line.receiver.lost) == (-song.delay_samples, {}, 0)
    assert likeness > 0.98


async def test_a_mode_that_seals_wrongly_here_is_passed_over(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server offers another one as well, and agrees."""
    monkeypatch.setitem(packet_seal._FUNCTIONS, AES, packet_seal._FUNCTIONS[XCHACHA])
    with closing(RowTable(1)) as table:
        line.shared.modes = Builder(table).modes
    async with line.open():
        assert [media.mode for media in line.media_told] == [XCHACHA]


async def test_a_worker_without_a_mode_joins_nobody(line: Line) -> None:
    """It is told with the code of a server that offers none."""
    line.shared.modes = ()
    assert (await _refusal(line)).code == ErrorCode.VOICE_MODE_UNSUPPORTED


async def test_members_are_heard_apart(line: Line, words: list[bytes]) -> None:
    """Two speak at once, under keys of their own."""
    other = words[::-1]
    async with line.open(members=2):
        first, second = (line.receiver.opus(int(user)) for user in line.members)
        await line.speak(words, line.members[0])
        await line.speak(other, line.members[1])
        assert opus_of(await until_stopped(first)) == [*words, *CLOSING]
        assert opus_of(await until_stopped(second)) == [*other, *CLOSING]
    assert line.drops == {}


async def test_a_newcomer_is_heard_and_who_left_is_not(line: Line, words: list[bytes]) -> None:
    """A talk ends with its member's leaving; under the keys of the next epoch the next one is heard."""
    async with line.open(members=2), line.receiver.opus() as stream:
        newcomer = await line.join_member()
        await line.speak(words, newcomer)
        assert opus_of(await until_stopped(stream)) == [*words, *CLOSING]
        await line.speak(words * 10, newcomer)
        assert not (await first_frame(stream)).lost
        await line.discord.members.leave(GUILD, newcomer)
        assert len(await until_stopped(stream)) < 10 * len(words)
        await line.speak(words)
        assert opus_of(await until_stopped(stream)) == [*words, *CLOSING]


# what networks and servers do to packets


@pytest.mark.parametrize(
    "bends",
    [
        {"extension": True},
        {"padding": 1},
        {"padding": 255},
        {"csrc": 15},
        {"extension": True, "padding": 7, "csrc": 3},
    ],
    ids=str,
)
async def test_headers_of_every_shape_are_understood(line: Line, words: list[bytes], bends: dict[str, object]) -> None:
    """Padding is cut off before the frame is decrypted: left on, it would hide that it is encrypted."""
    async with line.open("rtp", bends), line.receiver.opus() as stream:
        await line.speak(words)
        assert opus_of(await until_stopped(stream)) == [*words, *CLOSING]
    assert line.drops == {}


async def test_what_is_lost_is_marked_in_its_place(line: Line, words: list[bytes]) -> None:
    """Every fifth packet never comes: the others are where they were said."""
    async with line.open("rtp", {"lose_every": 5}), line.receiver.opus() as stream:
        await line.speak(words)
        heard = opus_of(await until_stopped(stream))
    said = [*words, *CLOSING]
    assert heard == [None if number % 5 == 4 else frame for number, frame in enumerate(said[:-1])]
    assert (line.receiver.lost, line.drops) == (len(words) // 5, {})


async def test_packets_that_overtake_each_other_are_put_in_order(line: Line, words: list[bytes]) -> None:
    """Every fourth packet comes after the next."""
    async with line.open("rtp", {"swap_every": 4}), line.receiver.opus() as stream:
        await line.speak(words)
        assert opus_of(await until_stopped(stream)) == [*words, *CLOSING]
    assert line.drops == {}


async def test_packets_that_come_twice_are_heard_once(line: Line, words: list[bytes]) -> None:
    """Every second packet is doubled."""
    async with line.open("rtp", {"repeat_every": 2}), line.receiver.opus() as stream:
        await line.speak(words)
        assert opus_of(await until_stopped(stream)) == [*words, *CLOSING]
        await line.until(lambda: line.drops == {"duplicate": (len(words) + len(CLOSING)) // 2}, "all that was sent")


async def test_strays_are_counted_by_kind(line: Line, words: list[bytes]) -> None:
    """Video, retransmissions and receiver reports are no audio."""
    async with line.open(), line.receiver.opus() as stream:
        await line.fault("stray", what="payload_type", n=4)
        await line.fault("stray", what="rtcp", n=3)
        await line.until(lambda: line.drops == {"other_payload": 4, "rtcp": 3}, "all strays")
        await line.speak(words)
        assert opus_of(await until_stopped(stream)) == [*words, *CLOSING]


async def test_another_key_is_followed_in_the_middle_of_a_talk(line: Line, words: list[bytes]) -> None:
    """From op 4 on what the new key seals is heard, and nothing else."""
    async with line.open(), line.receiver.opus() as stream:
        await line.speak(words * 2)
        assert not (await first_frame(stream)).lost
        await line.fault("new_key")
        heard = opus_of(await until_stopped(stream))
        assert heard[-len(CLOSING) - len(words) :] == [*words, *CLOSING]
    assert set(line.drops) <= {"forged"}
    first, second = line.media_told
    assert first.secret_key != second.secret_key


# who speaks


async def test_nobody_is_heard_of_whom_nobody_says_who_it_is(line: Line, words: list[bytes]) -> None:
    """Without op 5 an SSRC is nobody's: its packets wait for a second, and are dropped."""
    async with line.open("speaking_relay"), line.receiver.opus() as stream:
        await line.speak(words)
        await line.until(lambda: line.drops == {"unknown_ssrc": len(words) + len(CLOSING)}, "all that was said")
        assert stream.missed == 0
    assert [event async for event in stream] == []


async def test_audio_may_come_before_the_word_whose_it_is(line: Line, words: list[bytes]) -> None:
    """Op 5 is late by a fifth of a second: what waited is heard, in order."""
    async with line.open("speaking_relay", {"ms": 200}), line.receiver.opus() as stream:
        await line.speak(words)
        heard = opus_of(await until_stopped(stream))
    assert heard[-len(CLOSING) - 10 :] == [*words[-10:], *CLOSING]
    assert len(heard) + sum(line.drops.values()) == len(words) + len(CLOSING)


# the group


async def test_plain_frames_are_refused_while_encryption_is_in_force(line: Line, words: list[bytes]) -> None:
    """Whoever drops the encryption is not heard, be it the server; who keeps it is."""
    async with line.open(), line.receiver.opus() as stream:
        await line.fault("said", user=line.members[0], how="plain", n=10)
        await line.until(lambda: line.drops == {"e2ee_failed": 10}, "all that was said")
        await line.speak(words)
        assert opus_of(await until_stopped(stream)) == [*words, *CLOSING]


async def test_silence_made_by_the_server_passes(line: Line, words: list[bytes]) -> None:
    """The one plain frame that is allowed, in the middle of a talk."""
    async with line.open(), line.receiver.opus() as stream:
        await line.speak(words)
        first = await first_frame(stream)
        await line.fault("said", user=line.members[0], how="silence", n=3)
        heard = [first, *await until_stopped(stream)]
    said = opus_of(heard)
    at = said.index(SILENCE_FRAME)
    assert said == [*words[:at], *[SILENCE_FRAME] * 3, *words[at:], *CLOSING]
    assert 0 < at < len(words)
    assert line.drops == {}


async def test_frames_of_the_epoch_before_are_heard(line: Line, words: list[bytes]) -> None:
    """What was encrypted before somebody joined, and comes after it, is decrypted with the keys before."""
    async with line.open(members=2), line.receiver.opus() as stream:
        await line.keys_of_members()
        await line.fault("said", user=line.members[0], how="stale", n=10)
        await line.join_member()
        await line.speak(words)
        tone = second_of_tone(440)
        assert opus_of(await until_stopped(stream)) == [*tone[:10], *words, *CLOSING]
    assert line.drops == {}


async def test_in_the_clear_only_after_a_downgrade(line: Line, words: list[bytes]) -> None:
    """Version 0, and back: each time the members are heard."""
    async with line.open(members=2), line.receiver.opus() as stream:
        dave = line.connection.dave
        for version, fault in ((0, "downgrade"), (1, "upgrade")):
            await line.fault(fault)
            await line.until(partial(in_force, dave, version), fault)
            await line.speak(words)
            assert opus_of(await until_stopped(stream)) == [*words, *CLOSING]


async def test_new_keys_are_a_new_function(line: Line) -> None:
    """Whoever builds ahead sees by it that what is built under the keys before can be built again."""
    async with line.open():
        before = line.connection.dave.protect
        assert line.connection.dave.protect is before
        epoch = line.connection.dave.mls_epoch
        await line.join_member()
        await line.until(lambda: line.connection.dave.protect is not before, f"keys of another epoch than {epoch}")


@pytest.mark.parametrize("resumed", [False, True])
async def test_an_ended_session_is_freed_though_it_was_frozen(line: Line, resumed: bool) -> None:
    """Whether it left a cycle behind depends on Python's version; nobody holds it, so the worker's look frees it."""
    with own_collections_off():
        async with line.open(receiving=False):
            group, gateway = weakref.ref(line.connection.dave), weakref.ref(line.connection._gateway)
            gc.freeze()
            if resumed:
                await line.fault("drop")
                await line.until(lambda: line.links == [False, True], "a resume")
        line.forget()
        gc.freeze()
        look_minutes_later()
        assert (group(), gateway()) == (None, None)


# resuming


async def test_a_talk_goes_on_while_the_websocket_is_away(line: Line, words: list[bytes]) -> None:
    """UDP does not depend on it, and the key stays."""
    async with line.open(), line.receiver.opus() as stream:
        await line.speak(words)
        assert not (await first_frame(stream)).lost
        await line.fault("drop")
        heard = await until_stopped(stream)
        await line.until(lambda: line.links == [False, True], "a resume")
    assert len(heard) == len(words) + len(CLOSING) - 1
    assert line.drops == {}


async def test_somebody_who_came_while_the_websocket_was_away_is_heard(line: Line, words: list[bytes]) -> None:
    """What was missed is replayed: who it is, the commit, the keys, the SSRC."""
    async with line.open(members=2), line.receiver.opus() as stream:
        await line.fault("hello_late", ms=500)
        await line.fault("drop")
        newcomer = await line.join_member()
        assert line.links == [False, True]
        await line.speak(words, newcomer)
        assert opus_of(await until_stopped(stream)) == [*words, *CLOSING]


async def test_a_message_larger_than_any_honest_one_costs_a_websocket(line: Line, words: list[bytes]) -> None:
    """Closed with 1009 by us, resumed, and heard as before."""
    async with line.open(), line.receiver.opus() as stream:
        await line.fault("say", text='{"op":5,"d":"' + "x" * (1 << 20) + '"}')
        await line.until(lambda: line.links == [False, True], "a resume")
        await line.speak(words)
        assert opus_of(await until_stopped(stream)) == [*words, *CLOSING]
        session = await line.session()
    assert (session.close_code, session.close_by, session.resumed) == (1009, "client", 1)


async def test_a_server_that_ends_every_session_is_named_as_the_cause(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the tries to resume are used up, the last close is what is told."""
    monkeypatch.setattr(connection, "RESUME_TRIES", 3)

    async def be_closed() -> None:
        async with line.open():
            for _ in range(3):
                line.links.clear()
                await line.fault("close", code=4015)
                await line.until(lambda: line.links == [False, True], "a resume")
            await line.until(lambda: False, "the end")

    with pytest.raises(VoiceClosed) as closed:
        await be_closed()
    assert (closed.value.code, closed.value.close_code) == (ErrorCode.VOICE_CLOSED, 4015)
    assert line.connection.resumes == 2


# a server that is away


@pytest.mark.parametrize("how", ["503", "refused"])
async def test_a_session_outlives_an_absence(line: Line, words: list[bytes], how: str) -> None:
    """It is resumed as soon as somebody answers, however often nobody did; what is said then is heard."""
    async with line.open(), line.receiver.opus() as stream:
        await line.fault("away", ms=4_000, how=how)
        await line.fault("drop")
        await line.until(lambda: line.links == [False], "a loss")
        await line.until(lambda: line.links == [False, True], "a resume")
        assert line.connection.resumes == 1
        await line.speak(words)
        assert opus_of(await until_stopped(stream)) == [*words, *CLOSING]


async def test_a_session_is_given_up_when_no_server_keeps_it_any_more(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later than that a resume would be refused; that nobody was there is told as what it is."""
    monkeypatch.setattr(connection, "RESUME_WITHIN_S", 1.0)

    async def be_away() -> None:
        async with line.open():
            await line.fault("away", ms=60_000)
            await line.fault("drop")
            await line.until(lambda: False, "the end")

    with pytest.raises(VoiceError) as gone:
        await be_away()
    assert gone.value.code == ErrorCode.VOICE_UNREACHABLE


async def test_a_join_waits_for_a_server_that_is_away_for_a_moment(line: Line) -> None:
    """As long as a restart of an edge takes, and not for ever."""
    async with line.open("away", {"ms": 1_500}):
        assert line.connection.resumes == 0


async def test_a_server_that_never_answers_is_told_with_a_reason(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time-out has no text of its own, and a message that ends with a colon helps nobody."""
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(connection, "JOIN_WITHIN_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, and nobody speaks TLS
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        one = VoiceConnection(
            Credentials(GUILD, CHANNEL, "1", "session", "token"),
            endpoint,
            shared=line.shared,
            lease_port=line.sockets.lease,
            may_open=lambda: asyncio.sleep(0),
            owner=line,
            speaking=1,
        )
        with pytest.raises(VoiceError) as caught:
            await one.run()
    assert caught.value.code == ErrorCode.VOICE_UNREACHABLE
    assert caught.value.message == f"wss://{endpoint}/?v=8: timeout error"


async def test_a_server_that_comes_back_with_another_word_is_believed(line: Line) -> None:
    """The session was not kept: the close says so, and no time is lost with more tries."""

    async def be_refused() -> None:
        async with line.open():
            await line.fault("away", ms=1_000)
            await line.fault("close_at", step="resume", code=4006)
            await line.fault("drop")
            await line.until(lambda: False, "the end")

    with pytest.raises(VoiceClosed) as closed:
        await be_refused()
    assert closed.value.close_code == 4006


# the way of sound


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings come each fifth of a second, and so on."""
    monkeypatch.setattr(connection, "PING_EVERY_S", 0.2)
    monkeypatch.setattr(connection, "ASK_EVERY_S", 0.1)
    monkeypatch.setattr(path, "_ANSWER_WITHIN_S", 0.1)
    monkeypatch.setattr(path, "_SILENT_FOR_S", 0.3)
    monkeypatch.setattr(path, "_REFUSED_FOR_S", 0.2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("how", "code"), [("swallow", ErrorCode.UDP_LOST), ("refuse", ErrorCode.UDP_REFUSED)])
async def test_a_path_that_dies_is_told_and_so_is_its_return(line: Line, how: str, code: ErrorCode) -> None:
    """On the same session, whatever the WebSocket says all the while."""
    async with line.open():
        await line.pinged()
        await line.fault("path", how=how)
        await line.until(lambda: line.paths == [code], "a loss that is told")
        await line.fault("path", how="open")
        await line.until(lambda: line.paths == [code, None], "a return that is told")
        await line.pinged()


@pytest.mark.usefixtures("impatient")
async def test_a_path_that_stays_dead_ends_the_session(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may find another way: the 5-tuple is left alone for a while."""
    monkeypatch.setattr(path, "OVER_AFTER_S", 0.3)

    async def lose_it() -> None:
        async with line.open():
            await line.pinged()
            await line.fault("path", how="swallow")
            await line.until(lambda: False, "the end")

    with pytest.raises(VoiceError) as lost:
        await lose_it()
    assert lost.value.code == ErrorCode.UDP_LOST
    assert line.paths == [ErrorCode.UDP_LOST]
    assert [len(shared.shunned) for shared in line.sockets._sockets] == [1]


@pytest.mark.usefixtures("impatient")
async def test_a_server_that_answers_no_pings_is_believed(line: Line) -> None:
    """Nothing was ever answered, so nothing is missing."""
    async with line.open("ping_silent"):
        await asyncio.sleep(2)
        assert line.paths == []


# strangers


async def _refusal(line: Line, fault: str = "", **fields: object) -> VoiceError:
    """What a join ends with."""
    with pytest.raises(VoiceError) as caught:
        async with line.open(fault, fields):
            pass
    return caught.value


async def test_credentials_follow_no_redirect(line: Line) -> None:
    """Identify would go there, in the clear even: the server that was named is the only one that sees a token."""
    asked: list[str] = []

    async def stranger(request: web.Request) -> web.WebSocketResponse:
        asked.append(request.path)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        asked.append(str((await socket.receive()).data))
        return socket

    with capture_logs() as logs:
        async with served(("/", stranger)) as url, line.open("redirect", {"to": f"{url}/"}):
            assert [line["event"] for line in logs if "voice_server" in line["event"]] == [
                *("voice_server.unreachable", "voice_server.returned")
            ]
    assert asked == []


async def test_credentials_go_to_allowed_servers_alone(line: Line) -> None:
    """Nothing is opened to another one."""
    line.shared.servers = VoiceServers()
    error = await _refusal(line)
    assert error.code == ErrorCode.VOICE_SERVER_REFUSED
    assert "GUILDCAST_VOICE_HOSTS" in error.message
    rows = (await line.discord.report(guilds=True)).guild_rows
    assert [row.sessions for row in rows or ()] == [[]]


@pytest.mark.parametrize("ip", ["10.1.2.3", "169.254.169.254", "224.0.0.1", "255.255.255.255"])
async def test_no_server_has_sound_sent_to_a_machine_inside(line: Line, ip: str) -> None:
    """Not a datagram goes to an address that is neither public nor allowed."""
    error = await _refusal(line, "ready", ip=ip)
    assert error.code == ErrorCode.VOICE_SERVER_REFUSED
    assert ip in error.message
    assert line.sockets._sockets == []


@pytest.mark.parametrize("ip", ["2606:4700::6812:1", "rtc-1.discord.media", "", "1.2.3", "1.2.3.4.5"])
async def test_a_ready_that_names_no_address_fails_at_once(line: Line, ip: str) -> None:
    """It does not come twice: to wait for the end of the handshake would be to wait for nothing."""
    error = await _refusal(line, "ready", ip=ip)
    assert error.code == ErrorCode.MALFORMED_MESSAGE
    assert error.message.startswith("op 2 ready")
    assert "$.ip" in error.message


# messages


async def test_unreadable_messages_are_counted_and_logged_once_of_each_kind(line: Line, words: list[bytes]) -> None:
    """And cost nothing else: neither sequence, group nor key suffer, and no value is in the log."""
    kinds = [*UNREADABLE_TEXTS.values(), *UNREADABLE_BYTES.values()]
    async with line.open(), line.receiver.opus() as stream:
        with capture_logs() as logs:
            for text in (*UNREADABLE_TEXTS, *HARMLESS_TEXTS):
                await line.fault("say", text=text, n=3)
            for data in (*UNREADABLE_BYTES, *HARMLESS_BYTES):
                await line.fault("say", data=data, n=3)
            counters = line.shared.counters
            await line.until(lambda: counters.malformed_messages == 3 * len(kinds), "all that was said")
        await line.fault("drop")
        await line.until(lambda: line.links == [False, True], "a resume")
        await line.speak(words)
        assert opus_of(await until_stopped(stream)) == [*words, *CLOSING]
    told = [line for line in logs if line["event"] == "message.malformed"]
    assert sorted(one["error"].partition(":")[0] for one in told) == sorted(set(kinds))
    assert {one["guild"] for one in told} == {GUILD}
    assert "66" not in str(told)


async def test_a_connection_that_ends_leaves_nothing_behind(line: Line) -> None:
    """The server ends it: `run` raises, the 5-tuple is free again, and no timer or task is left."""

    async def be_closed() -> None:
        async with line.open():
            await line.fault("close", code=4006)
            await line.until(lambda: False, "the end")

    with pytest.raises(VoiceClosed) as closed:
        await be_closed()
    assert closed.value.close_code == 4006
    assert [shared.receivers for shared in line.sockets._sockets] == [{}]
