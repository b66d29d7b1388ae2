"""Receiving over real UDP: real Opus, real transport encryption, real end-to-end encryption, heard as it was played."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from structlog.testing import capture_logs

from shared.clock import NS_PER_S
from shared.protocol.opus import SILENCE_FRAME
from shared.protocol.rtp import pack_header
from shared.protocol.transport_crypto import AES_GCM, KEY_BYTES, XCHACHA, seal_packet
from shared.schema.job import OpusOptions
from tests.emulator.dave.external_sender import ExternalSender
from tests.emulator.dave.group import DaveGroup, DaveOp, Outgoing
from tests.emulator.dave.member import DaveyMember
from tests.libdave_member import LibdaveMember
from tests.media.audio import FRAME_SAMPLES, RATE, Pcm, align
from worker.encode.opus import OpusEncoder
from worker.fanout.sockets import SocketPool
from worker.voice.receive.decode import OpusDecoder
from worker.voice.receive.pipeline import Decrypt, Frame, Stopped
from worker.voice.receive.receiver import Receiver, Sound, Stream

BOUND_S = 10.0
KEY = bytes(range(KEY_BYTES))
LISTENER, ALICE, BOB = 100, 200, 300
ALICE_SSRC, BOB_SSRC = 11, 22
CHANNEL = 927310423890473011
FRAMES = 50
TICK_NS = 20_000_000

Member = DaveyMember | LibdaveMember


def plain(_: int, frame: bytes) -> bytes:
    """A stage: no end-to-end encryption."""
    return frame


def sweep(begin_hz: float, end_hz: float) -> Pcm:
    """A second of a tone that rises on the left and falls on the right: it fits itself at one place only."""
    time_s = np.arange(FRAMES * FRAME_SAMPLES) / RATE
    rate_hz_s = (end_hz - begin_hz) / time_s[-1]
    left = np.sin(2 * np.pi * (begin_hz * time_s + rate_hz_s / 2 * time_s**2))
    right = np.sin(2 * np.pi * (end_hz * time_s - rate_hz_s / 2 * time_s**2))
    return (0.5 * np.stack([left, right], axis=1)).astype(np.float32)


class Song:
    """A sweep with its Opus frames."""

    def __init__(self, begin_hz: float = 300, end_hz: float = 3_000) -> None:
        self.pcm = sweep(begin_hz, end_hz)
        encoder = OpusEncoder(OpusOptions(bitrate=128_000))
        self.delay_samples = encoder.delay_samples
        self.opus = [encoder.encode(block) for block in self.pcm.reshape(FRAMES, FRAME_SAMPLES, 2)]
        encoder.flush()


class Server:
    """The UDP side of a voice server, and those who speak there."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.remote: tuple[str, int] = self.socket.getsockname()
        self.client: tuple[str, int] = ("", 0)
        self.sent = 0
        self.delivered = 0
        self.all_delivered = asyncio.Event()
        self._counter = 0

    def packet(
        self,
        number: int,
        payload: bytes,
        ssrc: int = ALICE_SSRC,
        *,
        csrcs: int = 0,
        words: int | None = None,
        pad: int = 0,
    ) -> bytes:
        """A packet with so many CSRCs, words of extension elements, bytes of padding; its numbers wrap early."""
        self._counter += 1
        header = bytearray(pack_header(65_530 + number, 2**32 - 5 * FRAME_SAMPLES + number * FRAME_SAMPLES, ssrc))
        header[0] |= csrcs | (0x10 if words is not None else 0) | (0x20 if pad else 0)
        header += bytes(range(4 * csrcs))
        if words is not None:
            header += b"\xbe\xde" + words.to_bytes(2, "big")
            payload = b"\x10\xff\x00\x00" * words + payload
        if pad:
            payload += bytes(pad - 1) + bytes([pad])
        return seal_packet(self.mode, KEY, bytes(header), payload, self._counter)

    def send(self, *packets: bytes) -> None:
        for packet in packets:
            self.socket.sendto(packet, self.client)
            self.sent += 1

    async def until_delivered(self) -> None:
        """All that was sent was received."""
        async with asyncio.timeout(BOUND_S):
            while self.delivered < self.sent:
                self.all_delivered.clear()
                await self.all_delivered.wait()


class Rig:
    """A worker's sockets with receivers on them, and the voice servers they listen to."""

    def __init__(self) -> None:
        self.pool = SocketPool("127.0.0.1", range(0), per_guild=False, on_new=lambda _: None)
        self.servers: list[Server] = []
        self.receivers: list[Receiver] = []

    def connect(
        self, mode: str = AES_GCM, decrypt: Decrypt = plain, now_ns: Callable[[], int] = time.monotonic_ns
    ) -> tuple[Server, Receiver]:
        """A guild, on a voice server of its own."""
        server, receiver = Server(mode), Receiver(str(len(self.servers)), now_ns=now_ns)
        self.servers.append(server)
        self.receivers.append(receiver)

        def on_datagram(datagram: bytes) -> None:
            receiver.datagram(datagram)
            server.delivered += 1
            server.all_delivered.set()

        port = self.pool.lease(server.remote, on_datagram)
        server.client = self.pool.sockets[port.number].getsockname()
        receiver.begin_session(decrypt)
        receiver.rekey(mode, KEY)
        return server, receiver

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.close()
        for server in self.servers:
            server.socket.close()
        self.pool.close()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    yield made
    made.close()


@pytest.fixture(scope="module")
def song() -> Song:
    return Song()


async def until_stopped(stream: Stream[Frame] | Stream[Sound]) -> list[Frame | Sound]:
    """What is heard until the first talk ends."""
    heard: list[Frame | Sound] = []
    async with asyncio.timeout(BOUND_S):
        async for event in stream:
            if isinstance(event, Stopped):
                return heard
            heard.append(event)
    raise AssertionError("the stream ended before the talk")


async def next_frame(stream: Stream[Sound]) -> Sound:
    """The next thing heard; a machine that stalls may end a talk and begin another."""
    while isinstance(event := await anext(stream), Stopped):
        pass
    return event


def sound_of(heard: list[Frame | Sound]) -> Pcm:
    parts = [one.pcm for one in heard if isinstance(one, Sound)]
    assert all(part.shape == (FRAME_SAMPLES, 2) and part.dtype == np.int16 for part in parts)
    return np.concatenate(parts).astype(np.float32) / np.float32(32_768)


def in_one_group(kind: type[Member]) -> tuple[Member, LibdaveMember]:
    """Alice and the listener in an MLS group of two, as the gateway brings them together."""
    group = DaveGroup(CHANNEL, ExternalSender(), lambda: 0.0)
    members: dict[str, Member] = {}
    queue: deque[tuple[bool, str, int, bytes | dict[str, int]]] = deque()

    def post(outgoing: list[Outgoing]) -> None:
        queue.extend((False, one.user, one.op, one.body) for one in outgoing)

    for user, made in ((str(ALICE), kind), (str(LISTENER), LibdaveMember)):
        member = members[user] = made(user, CHANNEL)
        member.connected([str(ALICE), str(LISTENER)])
        queue.extend((True, user, op, body) for op, body in member.start())
        post(group.join(user))
    while queue:
        to_gateway, user, op, body = queue.popleft()
        if not to_gateway:
            queue.extend((True, user, op, body) for op, body in members[user].hear(DaveOp(op), body))
        elif isinstance(body, dict):
            post(group.transition_ready(user, body["transition_id"]))
        elif op == DaveOp.KEY_PACKAGE:
            post(group.key_package(user, body))
        else:
            post(group.commit_welcome(user, body))
    sender, listener = members[str(ALICE)], members[str(LISTENER)]
    assert isinstance(listener, LibdaveMember)
    assert sender.ready
    assert sender.privacy_code == listener.privacy_code
    return sender, listener


@pytest.mark.parametrize("mode", [AES_GCM, XCHACHA])
@pytest.mark.parametrize("kind", [DaveyMember, LibdaveMember])
async def test_an_end_to_end_encrypted_talk_is_heard_as_it_was_played(
    rig: Rig, song: Song, mode: str, kind: type[Member]
) -> None:
    """Through headers of every shape, with packets swapped and doubled: the sound of the source."""
    sender, listener = in_one_group(kind)
    now_ns = time.monotonic_ns()
    server, receiver = rig.connect(mode, lambda user_id, frame: listener.decrypt(str(user_id), frame), lambda: now_ns)
    receiver.speaking(ALICE, ALICE_SSRC)
    packets = [
        server.packet(
            number,
            sender.encrypt(frame),
            csrcs=number % 3,
            words=[None, 0, 1, 5][number % 4],
            pad=[0, 0, 1, 4, 255][number % 5],
        )
        for number, frame in enumerate(song.opus)
    ]
    packets += [server.packet(FRAMES + number, SILENCE_FRAME) for number in range(5)]
    ticks_late = {10: 1.5, 11: 0.5, 30: 2.5, 31: 1}
    doubled = set(range(0, len(packets), 7))
    arrivals = sorted((number + ticks_late.get(number, 0), number) for number in range(len(packets)))
    begin_ns = now_ns
    async with receiver.opus(ALICE) as relayed, receiver.pcm() as stream:
        for ticks, number in arrivals:
            now_ns = begin_ns + int(ticks * TICK_NS)
            server.send(*[packets[number]] * (2 if number in doubled else 1))
            await server.until_delivered()
        now_ns += NS_PER_S
        heard = await until_stopped(stream)
        frames = await until_stopped(relayed)
    assert [one.opus for one in frames if isinstance(one, Frame)] == [*song.opus, *[SILENCE_FRAME] * 5]
    assert set(np.diff([one.timestamp_samples for one in heard])) == {FRAME_SAMPLES}
    assert [one.timestamp_samples for one in heard] == [one.timestamp_samples for one in frames]
    offset, likeness = align(song.pcm, sound_of(heard)[: FRAMES * FRAME_SAMPLES])
    assert likeness > 0.98
    assert offset == -song.delay_samples
    assert receiver.drops.as_dict() == {"duplicate": len(doubled)}
    assert receiver.lost == 0


async def test_a_talk_is_heard_at_its_pace(rig: Rig, song: Song) -> None:
    """On the real clock, sent every 20 ms: heard while it goes on, whole, with its end behind it."""
    server, receiver = rig.connect()
    receiver.speaking(ALICE, ALICE_SSRC)
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    heard: list[Frame | Sound] = []
    async with receiver.pcm() as stream, asyncio.timeout(BOUND_S):
        for number, frame in enumerate(song.opus):
            if number == FRAMES // 2:
                heard.append(await next_frame(stream))
            await asyncio.sleep(begin_s + number * TICK_NS / NS_PER_S - loop.time())
            server.send(server.packet(number, frame))
        while len(heard) < FRAMES:
            heard.append(await next_frame(stream))
        assert await anext(stream) == Stopped(ALICE)
    _, likeness = align(song.pcm, sound_of(heard))
    assert likeness > 0.98


async def test_without_the_group_nothing_is_heard(rig: Rig, song: Song) -> None:
    """Whoever sends under another group's keys, or plain, or another user's frames, is not heard."""
    sender, listener = in_one_group(DaveyMember)
    stranger, _ = in_one_group(DaveyMember)
    server, receiver = rig.connect(decrypt=lambda user_id, frame: listener.decrypt(str(user_id), frame))
    receiver.speaking(ALICE, ALICE_SSRC)
    receiver.speaking(BOB, BOB_SSRC)
    async with receiver.opus() as stream:
        server.send(server.packet(0, stranger.encrypt(song.opus[0])))
        server.send(server.packet(1, song.opus[1]))
        server.send(server.packet(2, sender.encrypt(song.opus[2]), BOB_SSRC))
        server.send(server.packet(3, sender.encrypt(song.opus[3])))
        heard = await until_stopped(stream)
    assert [(one.user_id, one.opus) for one in heard if isinstance(one, Frame)] == [(ALICE, song.opus[3])]
    assert receiver.drops.as_dict() == {"e2ee_failed": 3}


async def test_what_is_lost_is_silence_of_its_length(rig: Rig, song: Song) -> None:
    """The sound behind a hole is in its place, and the hole is marked."""
    server, receiver = rig.connect()
    receiver.speaking(ALICE, ALICE_SSRC)
    lost = {10, 11, 25}
    async with receiver.pcm() as stream:
        server.send(*(server.packet(number, frame) for number, frame in enumerate(song.opus) if number not in lost))
        heard = await until_stopped(stream)
    sounds = [one for one in heard if isinstance(one, Sound)]
    assert {number for number, one in enumerate(sounds) if one.lost} == lost
    assert not any(sounds[number].pcm.any() for number in lost)
    assert receiver.lost == 3
    offset, likeness = align(song.pcm, sound_of(heard))
    assert offset == -song.delay_samples
    assert likeness > 0.9


async def test_guilds_on_one_socket_hear_their_own(rig: Rig) -> None:
    """Two voice servers send to one port: each guild hears its own users, the same SSRC notwithstanding."""
    songs = [Song(300, 3_000), Song(5_000, 800)]
    connected = [rig.connect(), rig.connect(XCHACHA)]
    assert len(rig.pool.sockets) == 1
    streams = [receiver.pcm() for _, receiver in connected]
    for number in range(FRAMES):
        for song, (server, receiver) in zip(songs, connected, strict=True):
            server.send(server.packet(number, song.opus[number]))
            if number == 3:
                receiver.speaking(ALICE, ALICE_SSRC)
    for song, stream in zip(songs, streams, strict=True):
        heard = await until_stopped(stream)
        _, likeness = align(song.pcm, sound_of(heard))
        assert likeness > 0.98
        assert len(heard) == FRAMES
    for _, receiver in connected:
        assert receiver.drops.as_dict() == {}


async def test_who_speaks_at_the_same_time_is_decoded_apart(rig: Rig) -> None:
    """Each user has a decoder of his own; a stream of one user has nothing of the other."""
    songs = {ALICE: Song(300, 3_000), BOB: Song(5_000, 800)}
    server, receiver = rig.connect()
    receiver.speaking(ALICE, ALICE_SSRC)
    receiver.speaking(BOB, BOB_SSRC)
    streams = {user_id: receiver.pcm(user_id) for user_id in songs}
    for number in range(FRAMES):
        server.send(server.packet(number, songs[ALICE].opus[number], ALICE_SSRC))
        server.send(server.packet(number, songs[BOB].opus[number], BOB_SSRC))
    for user_id, stream in streams.items():
        heard = await until_stopped(stream)
        assert {one.user_id for one in heard} == {user_id}
        _, likeness = align(songs[user_id].pcm, sound_of(heard))
        assert likeness > 0.98


async def test_who_left_is_not_heard_and_may_come_back(rig: Rig, song: Song) -> None:
    """Op 13 ends the talk at once; under a new SSRC the user is heard as at first: nothing is left of the decoder."""
    server, receiver = rig.connect()
    receiver.speaking(ALICE, ALICE_SSRC)
    async with receiver.pcm() as stream:
        server.send(*(server.packet(number, frame) for number, frame in enumerate(song.opus)))
        async with asyncio.timeout(BOUND_S):
            before = [await next_frame(stream)]
            while len(before) < FRAMES - 3:
                before.append(await next_frame(stream))
        receiver.user_left(ALICE)
        await until_stopped(stream)
        receiver.speaking(ALICE, BOB_SSRC)
        server.send(*(server.packet(number, frame, BOB_SSRC) for number, frame in enumerate(song.opus)))
        heard = await until_stopped(stream)
    assert len(heard) == FRAMES
    assert np.array_equal(sound_of(heard)[: len(before) * FRAME_SAMPLES], sound_of([*before]))


async def test_sound_is_decoded_only_while_somebody_listens(rig: Rig, song: Song) -> None:
    """A reader that comes after the last one went hears what the first one heard: the decoder began anew."""
    server, receiver = rig.connect()
    receiver.speaking(ALICE, ALICE_SSRC)
    heard: list[list[Frame | Sound]] = []
    for talk in range(2):
        async with receiver.pcm() as stream:
            first = talk * FRAMES
            server.send(*(server.packet(first + number, frame) for number, frame in enumerate(song.opus)))
            heard.append(await until_stopped(stream))
    assert np.array_equal(sound_of(heard[0]), sound_of(heard[1]))


async def test_nobody_waits_for_audio_whose_user_is_unknown(rig: Rig, song: Song) -> None:
    """What waits for its user holds up nobody else's frames."""
    server, receiver = rig.connect()
    receiver.speaking(ALICE, ALICE_SSRC)
    async with receiver.opus() as stream, asyncio.timeout(BOUND_S):
        server.send(server.packet(0, song.opus[0], BOB_SSRC))
        await server.until_delivered()
        server.send(server.packet(0, song.opus[0]))
        assert isinstance(await anext(stream), Frame)
        assert receiver.drops.as_dict() == {}
        assert await anext(stream) == Stopped(ALICE)


async def test_a_kind_of_garbage_is_told_once(rig: Rig, song: Song) -> None:
    """A log line for the first of its kind with the guild, a summary at the end, and no key in any of them."""
    with capture_logs() as logs:
        server, receiver = rig.connect()
        receiver.speaking(ALICE, ALICE_SSRC)
        async with receiver.opus() as stream:
            for number in range(20):
                server.send(bytes(40), b"\x80\x65" + bytes(40), b"\x80\x78" + bytes(40))
                server.send(packet := server.packet(number, song.opus[number]), packet)
            heard = await until_stopped(stream)
        receiver.close()
        receiver.datagram(b"after the end")
    assert len(heard) == 20
    told = [(line["event"], line["reason"], line["guild"]) for line in logs if line["event"] == "packet.dropped"]
    kinds = ["garbage", "other_payload", "forged", "duplicate"]
    assert told == [("packet.dropped", kind, "0") for kind in kinds]
    [summary] = [line for line in logs if line["event"] == "receiver.closed"]
    assert {kind: summary[kind] for kind in kinds} == dict.fromkeys(kinds, 20)
    assert KEY.hex() not in str(logs)
    assert str(KEY) not in str(logs)


async def test_a_slow_reader_misses_the_oldest(rig: Rig, song: Song) -> None:
    """Its queue has a bound, what it misses is counted, and another reader misses nothing."""
    server, receiver = rig.connect()
    receiver.speaking(ALICE, ALICE_SSRC)
    slow, quick = receiver.opus(queue_events=10), receiver.opus()
    server.send(*(server.packet(number, frame) for number, frame in enumerate(song.opus)))
    all_heard = await until_stopped(quick)
    assert len(all_heard) == FRAMES
    assert await until_stopped(slow) == all_heard[-9:]
    assert slow.missed == FRAMES - 9
    assert receiver.drops.as_dict() == {"queue_full": FRAMES - 9}


async def test_a_reader_ends_with_its_stream_and_with_the_receiver(rig: Rig, song: Song) -> None:
    """What is queued is read to the end; a stream that was closed gets nothing more; nobody waits forever."""
    server, receiver = rig.connect()
    receiver.speaking(ALICE, ALICE_SSRC)
    closed, waiting = receiver.opus(), receiver.pcm()
    closed.close()
    server.send(server.packet(0, song.opus[0]))
    reader = asyncio.create_task(until_stopped(waiting))
    assert len(await reader) == 1
    reader = asyncio.create_task(until_stopped(waiting))
    await asyncio.sleep(0)
    receiver.close()
    with pytest.raises(AssertionError, match="ended before"):
        await reader
    late = receiver.opus()
    async with asyncio.timeout(BOUND_S):
        assert [event async for event in closed] == []
        assert [event async for event in late] == []


def test_what_is_no_frame_of_20_ms_is_not_decoded() -> None:
    """The decoder refuses it, and goes on with the next one."""
    decoder = OpusDecoder()
    assert decoder.decode(b"\xff") is None
    assert decoder.decode(b"\xf0" + bytes(20)) is None
    decoded = decoder.decode(SILENCE_FRAME)
    assert decoded is not None
    assert decoded.shape == (FRAME_SAMPLES, 2)


def test_relaying_needs_no_ffmpeg() -> None:
    """A worker that passes Opus on does not load the decoder."""
    script = "import sys, worker.voice.receive.receiver; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
