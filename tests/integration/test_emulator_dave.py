"""Rules of the local Discord's encrypted channels, seen by a small client on libdave that shares no code with it."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, Self

import aiohttp
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.emulator.client import EmulatorClient, EmulatorError
from tests.emulator.local import LocalDiscord
from tests.emulator.records import ChannelReport, MemberReport, SessionReport, Voice
from tests.libdave_member import JSON_OPS, LibdaveMember

AES = "aead_aes256_gcm_rtpsize"
SILENCE = b"\xf8\xff\xfe"
PATIENCE_S = 10.0
TICK_S = 0.02


async def until(what: Callable[[], object] | Callable[[], Awaitable[object]], why: str) -> None:
    """Wait until something is true."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = what()
                if isinstance(found, Awaitable):
                    found = await found
                if found:
                    return
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never: {why}") from None


def numbered(number: int) -> bytes:
    """A frame that is like no other."""
    return b"\x78" + struct.pack(">I", number) * 20


class Client:
    """A voice client with end-to-end encryption: follows the gateway by itself, sends when told to."""

    def __init__(self, http: aiohttp.ClientSession, tls: ssl.SSLContext, voice: Voice) -> None:
        self.http, self.tls, self.voice = http, tls, voice
        self.ws: aiohttp.ClientWebSocketResponse
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.udp.bind(("127.0.0.1", 0))
        self.member: LibdaveMember | None = None
        self.early: list[bytes] = []
        self.max_dave = 1
        self.users: set[str] = set()
        self.speakers: dict[int, str] = {}
        self.said_by: list[tuple[str, int]] = []
        self.heard: dict[str, list[bytes]] = {}
        self.undecryptable: dict[str, int] = {}
        self.stray: list[int] = []
        self.sequences: list[int] = []
        self.ops: list[int] = []
        self.seqs: list[int] = []
        self.ready: dict[str, Any] = {}
        self.keys: list[AESGCM] = []
        self.dave_version: int | None = None
        self.interval_ms = 0
        self.code: int | None = None
        self.sent = 0
        self._nonce = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._told: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()

    async def join(self) -> Self:
        """The whole handshake up to op 5."""
        await self.connect()
        own = {name: getattr(self.voice, name) for name in ("user_id", "session_id", "token")}
        await self.say(0, {"server_id": self.voice.guild, **own, "max_dave_protocol_version": self.max_dave})
        await until(lambda: self.ready or self.code, "ready")
        assert self.ready, self.code
        await self.discover()
        await until(lambda: self.keys or self.code, "session description")
        await self.say(5, {"speaking": 1, "delay": 0, "ssrc": self.ready["ssrc"]})
        return self

    async def connect(self) -> None:
        """Open a WebSocket, and follow what comes over it."""
        self.code = None
        self.ws = await self.http.ws_connect(f"wss://{self.voice.endpoint}/?v=8", ssl=self.tls)
        self._tasks.append(asyncio.create_task(self._read()))

    async def discover(self) -> None:
        """IP discovery and op 1."""
        self._tasks.append(asyncio.create_task(self._listen()))
        request = struct.pack(">HHI", 1, 70, self.ready["ssrc"]) + bytes(66)
        self.udp.sendto(request, (self.ready["ip"], self.ready["port"]))
        await until(lambda: self._told.done() or self.code, "IP discovery")
        assert self._told.done(), self.code
        address, port = self._told.result()
        await self.say(1, {"protocol": "udp", "data": {"address": address, "port": port, "mode": AES}})

    async def resume(self) -> None:
        """Go on after the connection broke."""
        await self.connect()
        own = {name: getattr(self.voice, name) for name in ("session_id", "token")}
        await self.say(7, {"server_id": self.voice.guild, **own, "seq_ack": self.seqs[-1]})
        await until(lambda: 9 in self.ops or self.code, "resumed")

    async def say(self, op: int, data: object) -> None:
        """Send a JSON message."""
        await self.ws.send_str(json.dumps({"op": op, "d": data}))

    async def heartbeat(self) -> None:
        """Send op 3 and wait for its echo: what was said before is then done."""
        before = self.ops.count(6)
        await self.say(3, {"t": 1, "seq_ack": self.seqs[-1] if self.seqs else -1})
        await until(lambda: self.ops.count(6) > before or self.code, "heartbeat acknowledged")

    async def _read(self) -> None:
        async for message in self.ws:
            if message.type is aiohttp.WSMsgType.TEXT:
                await self._hear_text(json.loads(message.data))
            elif message.type is aiohttp.WSMsgType.BINARY:
                self.seqs.append(int.from_bytes(message.data[:2], "big"))
                self.ops.append(message.data[2])
                if self.member is None:
                    self.early.append(message.data)
                else:
                    await self._answer(self.member.hear(message.data[2], message.data[3:]))
        self.code = self.ws.close_code

    async def _hear_text(self, message: dict[str, Any]) -> None:
        op, data = message["op"], message["d"]
        self.ops.append(op)
        if "seq" in message:
            self.seqs.append(message["seq"])
        if op == 8:
            self.interval_ms = data["heartbeat_interval"]
        elif op == 2:
            self.ready = data
        elif op == 3:
            await self.say(3, {"t": 1, "seq_ack": self.seqs[-1]})
        elif op == 4:
            await self._describe(data)
        elif op == 5:
            self.speakers[data["ssrc"]] = data["user_id"]
            self.said_by.append((data["user_id"], data["ssrc"]))
        elif op == 11:
            self.users |= set(data["user_ids"])
            if self.member:
                self.member.connected(data["user_ids"])
        elif op == 13:
            self.users.discard(data["user_id"])
            if self.member:
                self.member.disconnected(data["user_id"])
        elif op in JSON_OPS:
            if self.member is None:
                self.member = LibdaveMember(self.voice.user_id, int(self.voice.channel), self.ready["ssrc"])
                self.member.connected(self.users)
            await self._answer(self.member.hear(op, data))

    async def _describe(self, data: dict[str, Any]) -> None:
        self.keys.append(AESGCM(bytes(data["secret_key"])))
        self.dave_version = data["dave_protocol_version"]
        if self.dave_version and self.member is None:
            self.member = LibdaveMember(self.voice.user_id, int(self.voice.channel), self.ready["ssrc"])
            self.member.connected(self.users)
            await self._answer(self.member.start())
            for message in self.early:
                await self._answer(self.member.hear(message[2], message[3:]))

    async def _answer(self, replies: list[tuple[int, bytes | dict[str, int]]]) -> None:
        for op, body in replies:
            if isinstance(body, dict):
                await self.say(op, body)
            else:
                await self.ws.send_bytes(bytes((op,)) + body)

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            datagram = await loop.sock_recv(self.udp, 2048)
            if datagram[:4] == b"\0\2\0\x46" and len(datagram) == 74:
                if not self._told.done() and datagram[4:8] == struct.pack(">I", self.ready["ssrc"]):
                    self._told.set_result(
                        (datagram[8:72].rstrip(b"\0").decode(), struct.unpack(">H", datagram[72:])[0])
                    )
            elif datagram[0] >> 6 == 2 and datagram[1] & 0x7F == 120:
                self._hear_packet(datagram)
            else:
                self.stray.append(datagram[1])

    def _hear_packet(self, packet: bytes) -> None:
        first, _, sequence, _, ssrc = struct.unpack(">BBHII", packet[:12])
        clear = 12 + 4 * (first & 0x0F) + (4 if first & 0x10 else 0)
        plain = None
        for key in reversed(self.keys):
            try:
                plain = key.decrypt(packet[-4:] + bytes(8), packet[clear:-4], packet[:clear])
            except InvalidTag:
                continue
            break
        assert plain is not None
        if first & 0x10:
            plain = plain[4 * int.from_bytes(packet[clear - 2 : clear], "big") :]
        if first & 0x20:
            plain = plain[: -plain[-1]]
        self.sequences.append(sequence)
        user = self.speakers.get(ssrc, "")
        frame: bytes | None = plain
        if self.member is not None and self.member.version and plain != SILENCE:
            frame = self.member.decrypt(user, plain)
        if frame is None:
            self.undecryptable[user] = self.undecryptable.get(user, 0) + 1
        else:
            self.heard.setdefault(user, []).append(frame)

    def send(self, frame: bytes) -> None:
        """Send one frame as it is, sealed for the transport."""
        head = struct.pack(">BBHII", 0x80, 120, self.sent % 2**16, self.sent * 960 % 2**32, self.ready["ssrc"])
        suffix = struct.pack(">I", self._nonce)
        sealed = self.keys[-1].encrypt(suffix + bytes(8), frame, head)
        self.udp.sendto(head + sealed + suffix, (self.ready["ip"], self.ready["port"]))
        self.sent += 1
        self._nonce += 1

    def new_counter(self) -> None:
        """Begin at nonce 0 again, under a new key."""
        self._nonce = 0

    def play(self) -> None:
        """Send numbered frames from now on, encrypted; nothing while there is no group."""
        self._tasks.append(asyncio.create_task(self._play()))

    async def _play(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        for number in count():
            if self.member is None or not self.member.version:
                if self.dave_version == 0 or (self.member is not None and self.member.executed):
                    self.send(numbered(number))
            elif self.member.ready:
                self.send(self.member.encrypt(numbered(number)))
            due_s += TICK_S
            await asyncio.sleep(max(due_s - loop.time(), 0))

    async def close(self, code: int = 1000) -> None:
        """Close all that was opened."""
        for task in self._tasks[::-1]:
            if task.get_coro().__name__ != "_read":  # type: ignore[union-attr]
                task.cancel()
        if hasattr(self, "ws"):
            await self.ws.close(code=code)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.udp.close()
        for task in self._tasks:
            if not task.cancelled():
                task.result()


class Bench:
    """A local Discord in this process, its control client, and voice clients that are closed at the end."""

    def __init__(self, emulator: EmulatorClient, http: aiohttp.ClientSession, tls: ssl.SSLContext) -> None:
        self.emulator, self.http, self.tls = emulator, http, tls
        self.clients: list[Client] = []

    async def client(self, *, user: str | None = None, guild: str = "1", **more: Any) -> Client:
        """A client with fresh credentials, not connected."""
        more.setdefault("kind", "voice")
        (voice,) = await self.emulator.issue([(guild, "7" + guild)], user=user, **more)
        self.clients.append(Client(self.http, self.tls, voice))
        return self.clients[-1]

    async def joined(self, **more: Any) -> Client:
        """A client in the channel, with a group unless it is alone."""
        client = await (await self.client(**more)).join()
        await until(lambda: client.member and client.member.ready, "a group")
        return client

    async def channel(self, guild: str = "1") -> ChannelReport:
        """The guild's channel."""
        (channel,) = await self.emulator.listen(guild)
        return channel

    async def members(self, guild: str = "1") -> list[MemberReport]:
        """The members of the guild's channel."""
        return (await self.channel(guild)).members

    async def session(self, guild: str = "1") -> SessionReport:
        """The newest session of a guild."""
        report = await self.emulator.report(guilds=True)
        assert report.guild_rows is not None
        return next(row for row in report.guild_rows if row.guild == guild).sessions[-1]

    async def heard(self, client: Client, frames: int = 10) -> None:
        """Wait until every member has decrypted so many more frames of a client."""
        user = client.voice.user_id

        async def counts() -> dict[str, int]:
            members = [each for each in await self.members(client.voice.guild) if not each.gone]
            return {each.user: each.hearing[user].decrypted if user in each.hearing else 0 for each in members}

        before = await counts()

        async def enough() -> bool:
            now = await counts()
            return all(now[name] >= before.get(name, 0) + frames for name in now)

        await until(enough, f"{frames} more frames decrypted by all of {sorted(before)}")

    async def assert_all_heard(self, client: Client) -> None:
        """Every member decrypted all that came since its op 22, all are in one group, and nothing came in the clear."""
        channel = await self.channel(client.voice.guild)
        assert channel.codes_equal
        for member in channel.members:
            hearing = member.hearing[client.voice.user_id]
            assert hearing.received == hearing.decrypted + hearing.failed_at_start > 0, member
            assert hearing.failed == hearing.failed_at_start <= 3, member
        session = await self.session(client.voice.guild)
        assert session.in_the_clear == 0
        assert session.decrypt_failed == 0


@asynccontextmanager
async def open_bench(**options: Any) -> AsyncIterator[Bench]:
    """A bench; one guild is sampled unless told otherwise."""
    async with LocalDiscord(**{"sample": 1, **options}) as discord:
        tls = ssl.create_default_context(cafile=str(discord.ca_file))
        async with aiohttp.ClientSession() as http, EmulatorClient(discord.control_url) as emulator:
            bench = Bench(emulator, http, tls)
            try:
                yield bench
            finally:
                for client in bench.clients:
                    await client.close()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with open_bench() as opened:
        yield opened


# joining and being heard


@pytest.mark.parametrize("delay_ms", [0, 60])
async def test_members_hear_a_client_from_the_first_frame(bench: Bench, delay_ms: int) -> None:
    """Whoever commits first, members decrypt every frame, and the recording holds Opus, not ciphertext."""
    client = await bench.client()
    for _ in range(3):
        await bench.emulator.members.join("1", delay_ms=delay_ms)
    await client.join()
    client.play()
    await bench.heard(client, 20)
    await bench.assert_all_heard(client)
    session = await bench.session()
    assert session.dave_version == 1
    assert session.told is not None
    assert session.told.key_packages == 1
    assert session.audible_after_ms is not None
    packets = await bench.emulator.packets("1")
    payloads = packets.sessions[0].payload
    decrypted = [packets.payloads[payload] for payload in payloads if payload >= 0]
    assert [payload < 0 for payload in payloads] == sorted((payload < 0 for payload in payloads), reverse=True)
    start = struct.unpack(">I", decrypted[0][1:5])[0]
    assert decrypted == [numbered(start + index) for index in range(len(decrypted))]
    assert client.member is not None
    assert {member.privacy_code for member in await bench.members()} == {client.member.privacy_code}


async def test_ghosts_make_a_group_for_one_client(bench: Bench) -> None:
    """With nobody behind them, a client is in a group at once, and its silence is known by length."""
    client = await bench.joined(ghosts=3)
    assert client.member is not None
    for frame in (numbered(1), SILENCE, SILENCE):
        client.send(client.member.encrypt(frame))
    await bench.emulator.ghosts("1", 5)
    await until(lambda: len(client.member.users) == 6, "two more ghosts")
    await bench.emulator.ghosts("1", 1)
    await until(lambda: len(client.member.users) == 2, "four ghosts less")
    session = await bench.session()
    assert (session.packets, session.audio_packets, session.trailing_silence) == (3, 1, 2)
    assert session.in_the_clear == 0
    channel = await bench.channel()
    assert (channel.kind, channel.ghosts, channel.members, channel.codes_equal) == ("voice", 1, [], None)
    assert set(channel.group) == client.member.users


async def test_a_client_without_dave_is_not_let_in(bench: Bench) -> None:
    """In a voice channel max_dave_protocol_version 0 closes with 4017, in a stage it is fine."""
    client = await bench.client()
    client.max_dave = 0
    with pytest.raises(AssertionError):
        await client.join()
    assert client.code == 4017
    stage = await bench.client(guild="2", kind="stage")
    stage.max_dave = 0
    await stage.join()
    assert stage.dave_version == 0


async def test_op_25_may_come_first(bench: Bench) -> None:
    """On demand the external sender comes before the session description."""
    client = await bench.client(members=1)
    await bench.emulator.fault("1", "external_sender_first")
    await client.join()
    client.play()
    await bench.heard(client)
    assert client.ops.index(25) < client.ops.index(4)


async def test_frames_in_the_clear_are_counted(bench: Bench) -> None:
    """What is neither encrypted nor silence counts, and members cannot decrypt it."""
    client = await bench.joined(members=1)
    assert client.member is not None
    (member,) = await bench.members()
    await until(lambda: all_in_force(bench), "the member in force")
    for frame in (SILENCE, client.member.encrypt(SILENCE), client.member.encrypt(numbered(1)), numbered(2), b""):
        client.send(frame)
    session = await bench.session()
    assert session.in_the_clear == 2
    (member,) = await bench.members()
    hearing = member.hearing[client.voice.user_id]
    assert (hearing.received, hearing.decrypted, hearing.failed) == (5, 3, 2)


async def all_in_force(bench: Bench, guild: str = "1") -> bool:
    """Whether all members of a guild are in a group that is in force."""
    return all(member.since_ns is not None for member in await bench.members(guild))


# hearing


async def test_a_client_hears_members(bench: Bench) -> None:
    """Op 5 tells the ssrc once, and every frame said is decrypted, as are the five of silence after it."""
    client = await bench.joined(members=1)
    (member,) = await bench.members()
    frames = [numbered(number) for number in range(30)]
    await bench.emulator.members.speak("1", member.user, frames)
    await until(lambda: len(client.heard.get(member.user, ())) >= 35, "all frames")
    await bench.emulator.members.speak("1", member.user, seconds=0.2)
    await until(lambda: len(client.heard.get(member.user, ())) >= 50, "the tone")
    assert client.heard[member.user][:35] == frames + [SILENCE] * 5
    assert client.undecryptable == {}
    assert client.said_by == [(member.user, member.ssrc)]
    (member,) = await bench.members()
    assert (member.said, member.speaking) == (50, False)


async def test_clients_hear_each_other(bench: Bench) -> None:
    """A client's packets reach the other clients of its channel under their own keys; a newcomer learns the ssrc."""
    first = await bench.joined(ghosts=1)
    second = await bench.joined(user="500")
    await until(lambda: first.users == {"500", *second.users} - {first.voice.user_id}, "both know both")
    first.play()
    second.play()
    for one, other in ((first, second), (second, first)):
        await until(lambda one=one, other=other: len(one.heard.get(other.voice.user_id, ())) > 20, "the other")
    third = await bench.joined(user="600")
    for speaker in (first, second):
        await until(lambda one=speaker: len(third.heard.get(one.voice.user_id, ())) > 20, "those there before")
        assert third.said_by.count((speaker.voice.user_id, speaker.ready["ssrc"])) == 1
    # what came while keys changed hands may be lost, what comes after that is not
    lost = [dict(client.undecryptable) for client in (first, second, third)]
    for one, other in ((first, second), (second, first), (third, first), (third, second)):
        more = len(one.heard[other.voice.user_id]) + 20
        await until(lambda one=one, other=other, n=more: len(one.heard[other.voice.user_id]) > n, "the others go on")
    assert [client.undecryptable for client in (first, second, third)] == lost
    await second.close()
    await until(lambda: "500" not in first.users, "the leave is told")


async def test_members_of_a_stage_are_heard_in_the_clear(bench: Bench) -> None:
    """Without end-to-end encryption the same calls work."""
    client = await (await bench.client(kind="stage", members=1)).join()
    (member,) = await bench.members()
    await bench.emulator.members.speak("1", member.user, [numbered(1)])
    await until(lambda: len(client.heard.get(member.user, ())) == 6, "what was said")
    client.send(numbered(7))
    await bench.heard(client, 0)
    (member,) = await bench.members()
    assert member.hearing[client.voice.user_id].decrypted == 1
    assert (await bench.session()).in_the_clear == 0


async def test_forwarding_needs_no_sampling() -> None:
    """In a guild that is not sampled clients and members are heard by clients, and no member decrypts."""
    async with open_bench(sample=0) as bench:
        first = await bench.joined(members=1)
        second = await bench.joined(user="500")
        (member,) = await bench.members()
        await bench.emulator.members.speak("1", member.user, seconds=0.2)
        first.play()
        await until(lambda: len(second.heard.get(first.voice.user_id, ())) > 10, "the client")
        await until(lambda: len(second.heard.get(member.user, ())) > 10, "the member")
        (member,) = await bench.members()
        assert member.hearing == {}


# churn


async def test_churn_is_heard_through(bench: Bench) -> None:
    """Members come and go while a client plays; who stays misses nothing, who comes misses only what was under way."""
    client = await bench.joined(members=2)
    client.play()
    await bench.heard(client)
    stayers = {member.user for member in await bench.members()}
    await bench.emulator.ghosts("1", 2)
    for _ in range(3):
        newcomer = (await bench.emulator.members.join("1")).user
        await bench.heard(client)
        await bench.emulator.members.leave("1", newcomer)
        await bench.heard(client)
    await bench.assert_all_heard(client)
    members = await bench.members()
    assert sum(member.gone for member in members) == 3
    assert all(member.hearing[client.voice.user_id].failed == 0 for member in members if member.user in stayers)


async def test_an_epoch_restart_is_survived(bench: Bench) -> None:
    """After op 24 everybody is in a new group, and hears on."""
    client = await bench.joined(members=2)
    client.play()
    await bench.heard(client)
    await bench.emulator.fault("1", "epoch_restart")
    await bench.heard(client)
    await bench.assert_all_heard(client)
    assert (await bench.channel()).mls_epoch == 1


async def test_a_client_moves(bench: Bench) -> None:
    """Fresh credentials for another channel end the session in this one; its group goes on without the client."""
    client = await bench.joined(members=2)
    (voice,) = await bench.emulator.issue([("1", "99")], kind="voice", members=1)
    await until(lambda: client.code == 4006, "the older session ended")
    bench.clients.append(await Client(bench.http, bench.tls, voice).join())
    bench.clients[-1].play()

    async def heard_there() -> bool:
        before, after = await bench.emulator.listen("1")
        (member,) = after.members
        hearing = member.hearing.get(voice.user_id)
        return len(before.group) == 2 and hearing is not None and hearing.decrypted > 10

    await until(heard_there, "heard in the other channel")


async def test_a_channel_empties_and_fills(bench: Bench) -> None:
    """Alone the client is reset, and heard again by who comes next."""
    client = await bench.joined(members=1)
    client.play()
    for _ in range(2):
        await bench.heard(client)
        for member in await bench.members():
            if not member.gone:
                await bench.emulator.members.leave("1", member.user)
        await until(lambda: client.ops[-1] == 21, "reset")
        await bench.emulator.members.join("1")
    await bench.heard(client)
    assert (await bench.session()).in_the_clear == 0


async def test_encryption_can_be_turned_off_and_on(bench: Bench) -> None:
    """Downgrade and upgrade while playing: in between frames are in the clear, and that is no fault."""
    client = await bench.joined(members=1)
    client.play()
    await bench.heard(client)
    await bench.emulator.fault("1", "downgrade")
    await until(lambda: client.member and client.member.version == 0, "downgraded")
    (member,) = await bench.members()
    await bench.emulator.members.speak("1", member.user, [numbered(1)])
    await until(lambda: numbered(1) in client.heard.get(member.user, ()), "in the clear")
    await bench.emulator.fault("1", "upgrade")
    await bench.heard(client)
    assert client.member is not None
    assert client.member.version == 1
    assert (await bench.session()).in_the_clear == 0


# faults of the group


@pytest.mark.parametrize(("op", "fault"), [(29, "damage"), (30, "damage"), (30, "foreign_welcome"), (29, "garbage")])
async def test_what_cannot_be_processed_is_recovered_from(bench: Bench, op: int, fault: str) -> None:
    """A damaged commit or Welcome is told with op 31 and a new key package; the client is heard again."""
    client = await bench.client(members=2)
    if op == 29:
        await client.join()
        await until(lambda: client.member and client.member.ready, "a group")
    await until(lambda: all_in_force(bench), "members have a group")
    await bench.emulator.fault("1", fault, **({} if fault == "foreign_welcome" else {"op": op}))
    if op == 30:
        await client.join()
    elif fault == "damage":
        await bench.emulator.members.join("1")
    client.play()

    async def told() -> bool:
        session = await bench.session()
        return session.told is not None and (session.told.invalid, session.told.key_packages) == (1, 2)

    await until(told, "op 31 and a second op 26")
    await bench.heard(client)
    assert (await bench.session()).in_the_clear == 0


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("proposal", {"wrong": "user"}),
        ("proposal", {"wrong": "epoch"}),
        ("two_proposals", {}),
        ("execute", {"how": "unknown"}),
        ("garbage", {"op": 25}),
        ("garbage", {"op": 27}),
    ],
)
async def test_nonsense_of_the_gateway_is_survived(bench: Bench, kind: str, fields: dict[str, Any]) -> None:
    """What leads nowhere leaves the group as it is, and the next change works."""
    client = await bench.joined(members=1)
    client.play()
    await bench.heard(client)
    before = len(client.ops)
    await bench.emulator.fault("1", kind, **fields)
    await until(lambda: len(client.ops) > before, "it was sent")
    await bench.emulator.members.join("1")
    await bench.heard(client)
    await bench.assert_all_heard(client)


async def test_a_commit_can_come_twice(bench: Bench) -> None:
    """The second one cannot be processed; libdave's client begins anew and is back."""
    client = await bench.joined(members=1)
    client.play()
    await bench.emulator.fault("1", "commit_twice")
    before = client.ops.count(29)
    await bench.emulator.members.join("1")
    await until(lambda: client.ops.count(29) >= before + 2, "op 29 twice")
    await bench.heard(client)


@pytest.mark.parametrize("how", ["lost", "late"])
async def test_op_22_can_be_missing(bench: Bench, how: str) -> None:
    """Without op 22 a client goes on with its old keys, which only those who were there before understand."""
    client = await bench.joined(members=1)
    client.play()
    await bench.heard(client)
    await bench.emulator.fault("1", "execute", how=how, ms=600)
    newcomer = (await bench.emulator.members.join("1")).user
    user = client.voice.user_id

    async def failures() -> int:
        hearing = next(each for each in await bench.members() if each.user == newcomer).hearing.get(user)
        return 0 if hearing is None else hearing.failed

    async def many() -> bool:
        return await failures() > 10

    await until(many, "the newcomer cannot decrypt")
    if how == "late":
        await bench.heard(client)


async def test_a_resume_brings_what_was_missed(bench: Bench) -> None:
    """Binary messages are replayed like the others: the commit that came while away is applied."""
    client = await bench.joined(members=2)
    client.play()
    await bench.heard(client)
    await bench.emulator.fault("1", "drop")
    await until(lambda: client.code is not None, "the connection broke")
    before = len(client.ops)
    await bench.emulator.members.join("1")
    await until(lambda: all_in_force(bench), "the group went on")
    await client.resume()
    await until(lambda: 29 in client.ops[before:], "the commit")
    assert client.seqs == sorted(client.seqs)
    await bench.heard(client)
    assert (await bench.session()).resumed == 1


async def test_members_can_speak_wrongly(bench: Bench) -> None:
    """Plain frames and silence made by the server reach the client; frames of the former epoch are decrypted."""
    client = await bench.joined(members=2)
    (member, _) = await bench.members()
    await until(lambda: all_in_force(bench), "members in force")
    await bench.emulator.fault("1", "said", user=member.user, how="silence", n=3)
    await until(lambda: client.heard.get(member.user) == [SILENCE] * 3, "silence")
    await bench.emulator.fault("1", "said", user=member.user, how="plain", n=4)
    await until(lambda: client.undecryptable.get(member.user) == 4, "plain frames refused")
    await bench.emulator.fault("1", "said", user=member.user, how="stale", n=5)
    executed_ns = max(each.executed_ns or 0 for each in await bench.members())
    await bench.emulator.ghosts("1", 1)

    async def executed() -> bool:
        return all((each.executed_ns or 0) > executed_ns for each in await bench.members())

    await until(executed, "another epoch")
    await bench.emulator.members.speak("1", member.user, [numbered(1)])
    await until(lambda: numbered(1) in client.heard[member.user], "all that was said")
    assert client.undecryptable == {member.user: 4}
    assert len(client.heard[member.user]) == 3 + 5 + 1 + client.heard[member.user][9:].count(SILENCE)


# faults of the transport and of the handshake


@pytest.mark.parametrize(
    "bends",
    [{"padding": 7}, {"extension": True}, {"csrc": 2}, {"padding": 3, "extension": True, "csrc": 1}],
    ids=["padding", "extension", "csrc", "all"],
)
async def test_packets_can_be_dressed(bench: Bench, bends: dict[str, Any]) -> None:
    """Padding, extension and CSRC entries lie around the encrypted frame."""
    client = await bench.joined(members=1)
    (member,) = await bench.members()
    await bench.emulator.fault("1", "rtp", **bends)
    await bench.emulator.members.speak("1", member.user, [numbered(number) for number in range(5)])
    await until(lambda: len(client.heard.get(member.user, ())) == 10, "all frames")
    assert client.undecryptable == {}


async def test_packets_can_be_lost_swapped_and_repeated(bench: Bench) -> None:
    """Each fault of the way is seen in the sequence numbers; without fields it goes straight again."""
    client = await bench.joined(members=1)
    (member,) = await bench.members()

    async def said_all() -> bool:
        return not (await bench.members())[0].speaking

    for fields, expected in (
        ({"lose_every": 3}, [0, 1, 3, 4]),
        ({"swap_every": 2}, [6, 8, 7, 10, 9]),
        ({"repeat_every": 5}, [12, 11, 13, 14, 14, 15, 16, 17]),
        ({}, [18, 19, 20, 21, 22, 23]),
    ):
        await bench.emulator.fault("1", "rtp", **fields)
        client.sequences.clear()
        await bench.emulator.fault("1", "said", user=member.user, how="silence", n=6)
        await until(said_all, "all is said")
        await until(lambda wanted=expected: len(client.sequences) == len(wanted), f"packets with {fields}")
        assert client.sequences == expected


async def test_strays_are_sent(bench: Bench) -> None:
    """Packets of another payload type and RTCP come on the same socket."""
    client = await bench.joined()
    await bench.emulator.fault("1", "stray", what="payload_type", n=2)
    await bench.emulator.fault("1", "stray", what="rtcp")
    await until(lambda: client.stray == [111, 111, 201], "strays")


async def test_a_key_can_change(bench: Bench) -> None:
    """Another op 4 brings a new key; what was sent under the old one just before is still heard."""
    client = await bench.joined(members=1)
    assert client.member is not None
    await until(lambda: all_in_force(bench), "members in force")
    client.send(client.member.encrypt(numbered(0)))
    await bench.emulator.fault("1", "new_key")
    await until(lambda: len(client.keys) == 2, "the new key")
    newer = client.keys.pop()
    client.send(client.member.encrypt(numbered(1)))
    client.keys.append(newer)
    client.new_counter()
    client.send(client.member.encrypt(numbered(2)))
    session = await bench.session()
    assert (session.packets, session.decrypt_failed, session.nonce_reused) == (3, 0, 0)
    (member,) = await bench.members()
    assert member.hearing[client.voice.user_id].decrypted == 3
    await bench.emulator.members.speak("1", member.user, [numbered(3)])
    await until(lambda: numbered(3) in client.heard.get(member.user, ()), "heard under the new key")


async def test_speaking_and_clients_can_stay_untold(bench: Bench) -> None:
    """On demand no op 11 comes, and op 5 late or never."""
    client = await bench.client(kind="stage", members=1)
    await bench.emulator.fault("1", "clients_unlisted")
    await bench.emulator.fault("1", "speaking_relay", ms=None)
    await client.join()
    (member,) = await bench.members()
    await bench.emulator.fault("1", "said", user=member.user, how="silence", n=1)
    await until(lambda: client.heard == {"": [SILENCE]}, "RTP of nobody")
    assert client.users == set()
    await bench.emulator.fault("1", "speaking_relay", ms=400)
    newcomer = (await bench.emulator.members.join("1")).user
    await bench.emulator.fault("1", "said", user=newcomer, how="silence", n=1)
    await until(lambda: len(client.heard[""]) == 2 and client.said_by, "RTP first, then op 5")
    assert [user for user, _ in client.said_by] == [newcomer]


@pytest.mark.parametrize("response", ["type", "ssrc", "legacy"])
async def test_wrong_discovery_responses_come_before_the_right_one(bench: Bench, response: str) -> None:
    """A response that is not one is sent so many times, then the right one."""
    client = await bench.client()
    await bench.emulator.fault("1", "discovery_wrong", response=response, n=2)
    await client.connect()
    own = {name: getattr(client.voice, name) for name in ("user_id", "session_id", "token")}
    await client.say(0, {"server_id": "1", **own, "max_dave_protocol_version": 1})
    await until(lambda: client.ready, "ready")
    request = struct.pack(">HHI", 1, 70, client.ready["ssrc"]) + bytes(66)
    answers = []
    for _ in range(3):
        client.udp.sendto(request, (client.ready["ip"], client.ready["port"]))
        answers.append(await asyncio.get_running_loop().sock_recv(client.udp, 100))
    right = struct.pack(">HHI", 2, 70, client.ready["ssrc"])
    assert [answer[:8] == right and len(answer) == 74 for answer in answers] == [False, False, True]


async def test_a_changed_port_is_to_be_selected(bench: Bench) -> None:
    """Behind a NAT the port told is not the client's own; it selects that, and is heard."""
    client = await bench.client(members=1)
    await bench.emulator.fault("1", "discovery_wrong", response="port")
    await client.join()
    client.play()
    await bench.heard(client)
    assert client._told.result()[1] != client.udp.getsockname()[1]


async def test_hello_can_be_late_and_hurried(bench: Bench) -> None:
    """The next WebSocket to the guild's server gets another interval, late, or is closed at once."""
    client = await bench.client()
    await bench.emulator.fault("1", "hello_late", ms=50)
    await bench.emulator.fault("1", "hello_interval", ms=20)
    await client.join()
    assert client.interval_ms == 20
    assert client.ops[0] == 8
    other = await bench.client(user="500")
    await bench.emulator.fault("1", "close_on_connect", code=4015)
    await other.connect()
    await until(lambda: other.code == 4015, "closed")
    assert other.ops == []


@pytest.mark.parametrize("step", ["ready", "select", "description", "speaking", "heartbeat"])
async def test_any_step_can_be_closed(bench: Bench, step: str) -> None:
    """The next op 1, 5 or 3 is answered with a close code, or op 2 or 4 is followed by it; once."""
    client = await bench.client()
    await bench.emulator.fault("1", "close_at", step=step, code=4006)
    try:
        await client.join()
        await client.heartbeat()
    except (AssertionError, ConnectionError):
        pass
    await until(lambda: client.code == 4006, "closed")
    assert (2 in client.ops, 4 in client.ops) == (True, step not in ("ready", "select"))
    again = await (await bench.client()).join()
    await again.heartbeat()
    assert again.code is None


async def test_a_resume_can_be_refused(bench: Bench) -> None:
    """As if the messages missed were no longer there."""
    client = await bench.joined()
    await bench.emulator.fault("1", "drop")
    await until(lambda: client.code is not None, "broken")
    await bench.emulator.fault("1", "close_at", step="resume", code=4006)
    await client.resume()
    await until(lambda: client.code == 4006, "refused")


async def test_the_server_can_ask_for_a_heartbeat(bench: Bench) -> None:
    """Op 3 from the server is answered by one from the client."""
    client = await bench.joined()
    await bench.emulator.fault("1", "server_heartbeat")
    await until(lambda: 6 in client.ops, "the answer was acknowledged")
    assert (await bench.session()).heartbeats == 1


async def test_sequence_numbers_wrap(bench: Bench) -> None:
    """After 65535 comes 0, in JSON and in binary messages, and a resume across it works."""
    client = await bench.client(members=1)
    await bench.emulator.fault("1", "first_seq", seq=65_533)
    await client.join()
    await until(lambda: client.member and client.member.ready, "a group")
    assert client.seqs[:5] == [65_533, 65_534, 65_535, 0, 1]
    await client.heartbeat()
    await bench.emulator.fault("1", "drop")
    await until(lambda: client.code is not None, "broken")
    client.seqs[-1:] = [65_535]
    await client.resume()
    await until(lambda: 1 in client.seqs[-2:] or len(client.seqs) > 6, "replayed")
    assert client.code is None


async def test_a_kick_voids_the_credentials(bench: Bench) -> None:
    """The WebSocket closes with 4014 or 4022, and the same credentials let nobody in again."""
    client = await bench.joined()
    await bench.emulator.fault("1", "kick", code=4022)
    await until(lambda: client.code == 4022, "kicked")
    bench.clients.append(Client(bench.http, bench.tls, client.voice))
    again = bench.clients[-1]
    with pytest.raises(AssertionError):
        await again.join()
    assert again.code == 4006


# what is refused


@pytest.mark.parametrize("message", [b"\x1arubbish", b"\x1crubbish"])
async def test_rubbish_of_a_client_closes(bench: Bench, message: bytes) -> None:
    """A key package or commit that is none is a bad request."""
    client = await bench.joined()
    await client.ws.send_bytes(message)
    await until(lambda: client.code == 4020, "closed")


async def test_control_refuses_what_cannot_be(bench: Bench) -> None:
    """Unknown guilds, members and faults that need what is not there are told so."""
    emulator = bench.emulator
    with pytest.raises(EmulatorError, match="404"):
        await emulator.members.join("404")
    await bench.client(kind="stage")
    with pytest.raises(EmulatorError, match=r"409.*kind"):
        await bench.client(kind="voice")
    member = await emulator.members.join("1", "77")
    assert member.user == "77"
    with pytest.raises(EmulatorError, match=r"409.*already"):
        await emulator.members.join("1", "77")
    with pytest.raises(EmulatorError, match=r"404.*78"):
        await emulator.members.leave("1", "78")
    with pytest.raises(EmulatorError, match=r"409.*no end-to-end"):
        await emulator.fault("1", "epoch_restart")
    with pytest.raises(EmulatorError, match="400"):
        await emulator.fault("1", "damage", op=28)
