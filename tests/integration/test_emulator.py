"""Rules of the local Discord, seen by a tiny client that shares no code with it nor with the product."""

import asyncio
import json
import signal
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Self

import aiohttp
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_encrypt

from tests.emulator import analysis
from tests.emulator.client import EmulatorClient, EmulatorError, EmulatorProcess
from tests.emulator.local import LocalDiscord
from tests.emulator.records import Report, SessionReport, Voice

AES = "aead_aes256_gcm_rtpsize"
XCHACHA = "aead_xchacha20_poly1305_rtpsize"
SILENCE = b"\xf8\xff\xfe"
ANSWER_S = 5.0


def strict_tls(ca_file: str) -> ssl.SSLContext:
    """TLS as Python 3.13 and later check it by default."""
    context = ssl.create_default_context(cafile=ca_file)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


class VoiceClient:
    """Just enough of a voice client; every step can be taken alone and wrongly."""

    def __init__(self, http: aiohttp.ClientSession, tls: ssl.SSLContext, voice: Voice) -> None:
        self.http, self.tls, self.voice = http, tls, voice
        self.ws: aiohttp.ClientWebSocketResponse
        self.opened: list[aiohttp.ClientWebSocketResponse] = []
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.udp.setblocking(False)
        self.ready: dict[str, Any] = {}
        self.key = b""
        self.mode = ""
        self.told: tuple[str, int] = ("", 0)
        self.seqs: list[int] = []

    async def connect(self, version: int = 8) -> Self:
        """Open the WebSocket and read Hello."""
        self.ws = await self.http.ws_connect(f"wss://{self.voice.endpoint}/?v={version}", ssl=self.tls)
        self.opened.append(self.ws)
        hello = await self.hear(8)
        assert hello["v"] == version
        return self

    async def say(self, op: int, data: object) -> None:
        """Send one message."""
        await self.ws.send_str(json.dumps({"op": op, "d": data}))

    async def hear(self, op: int) -> Any:
        """The `d` of the next message with this opcode; sequence numbers on the way are noted."""
        while True:
            message = json.loads(await self.ws.receive_str(timeout=ANSWER_S))
            if "seq" in message:
                self.seqs.append(message["seq"])
            if message["op"] == op:
                return message["d"]

    async def closed(self) -> int:
        """The code the server closes with."""
        while True:
            message = await self.ws.receive(timeout=ANSWER_S)
            if message.type is aiohttp.WSMsgType.CLOSE:
                return int(message.data)
            assert message.type is aiohttp.WSMsgType.TEXT, message

    async def broken(self) -> bool:
        """Whether the connection went away without a close frame."""
        while True:
            message = await self.ws.receive(timeout=ANSWER_S)
            if message.type is not aiohttp.WSMsgType.TEXT:
                return message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)

    async def identify(self, **changes: object) -> None:
        """Send op 0."""
        own = {name: getattr(self.voice, name) for name in ("user_id", "session_id", "token")}
        await self.say(0, {"server_id": self.voice.guild, **own, "max_dave_protocol_version": 0, **changes})

    async def resume(self, seq_ack: int) -> None:
        """Send op 7."""
        own = {name: getattr(self.voice, name) for name in ("session_id", "token")}
        await self.say(7, {"server_id": self.voice.guild, **own, "seq_ack": seq_ack})

    async def heartbeat(self, nonce: int = 1) -> None:
        """Send op 3 and wait for its echo: what was said before is then done."""
        await self.say(3, {"t": nonce, "seq_ack": self.seqs[-1] if self.seqs else -1})
        assert await self.hear(6) == {"t": nonce}

    async def authenticate(self) -> None:
        """Identify and read Ready, and all that comes at the start."""
        await self.identify()
        self.ready = await self.hear(2)
        await self.hear(20)

    def ask_discovery(self) -> None:
        """Send one IP discovery request."""
        request = struct.pack(">HHI", 1, 70, self.ready["ssrc"]) + bytes(66)
        self.udp.sendto(request, (self.ready["ip"], self.ready["port"]))

    async def discover(self) -> None:
        """IP discovery."""
        self.ask_discovery()
        answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.udp, 100), ANSWER_S)
        assert struct.unpack(">HHI", answer[:8]) == (2, 70, self.ready["ssrc"])
        self.told = (answer[8:72].rstrip(b"\0").decode(), int.from_bytes(answer[72:], "big"))

    async def ping(self, counter: int, within_s: float = ANSWER_S) -> bytes:
        """Send a ping; what answers it, whatever else comes."""
        self.udp.sendto(struct.pack(">II", 0x1337CAFE, counter), (self.ready["ip"], self.ready["port"]))
        async with asyncio.timeout(within_s):
            while len(answer := await asyncio.get_running_loop().sock_recv(self.udp, 100)) != 8:
                pass
        return answer

    async def select(self, mode: str = AES, protocol: str = "udp", **changes: object) -> None:
        """Send op 1."""
        data = {"address": self.told[0], "port": self.told[1], "mode": mode, **changes}
        await self.say(1, {"protocol": protocol, "data": data})

    async def join(self, mode: str = AES) -> Self:
        """The whole handshake up to the key."""
        await self.connect()
        await self.authenticate()
        await self.discover()
        await self.select(mode)
        description = await self.hear(4)
        assert description["dave_protocol_version"] == 0
        self.mode, self.key = description["mode"], bytes(description["secret_key"])
        return self

    async def speak(self) -> Self:
        """Announce the ssrc."""
        await self.say(5, {"speaking": 1, "delay": 0, "ssrc": self.ready["ssrc"]})
        await self.heartbeat()
        return self

    def send(self, sequence: int, timestamp: int, nonce: int, frame: bytes, **header: int) -> None:
        """Send one sealed RTP packet."""
        first, kind = header.get("first", 0x80), header.get("kind", 120)
        head = struct.pack(">BBHII", first, kind, sequence % 2**16, timestamp % 2**32, self.ready["ssrc"])
        suffix = struct.pack(">I", nonce % 2**32)
        if self.mode == AES:
            sealed = AESGCM(self.key).encrypt(suffix + bytes(8), frame, head)
        else:
            sealed = crypto_aead_xchacha20poly1305_ietf_encrypt(frame, head, suffix + bytes(20), self.key)
        self.udp.sendto(head + sealed + suffix, (self.ready["ip"], self.ready["port"]))

    def play(self, frames: Sequence[bytes], *, sequence: int = 0, tick: int = 0, nonce: int = 0) -> None:
        """Send frames one after the other."""
        for index, frame in enumerate(frames):
            self.send(sequence + index, (tick + index) * 960, nonce + index, frame)

    async def close(self) -> None:
        """Close all that was opened."""
        self.udp.close()
        for ws in self.opened:
            await ws.close()


def audio(count: int, start: int = 0) -> list[bytes]:
    """Frames that are all different."""
    return [b"\x78" + struct.pack(">I", start + index) * 4 for index in range(count)]


class Bench:
    """A local Discord in this process, its control client, and voice clients that are closed at the end."""

    def __init__(self, emulator: EmulatorClient, http: aiohttp.ClientSession, tls: ssl.SSLContext) -> None:
        self.emulator, self.http, self.tls = emulator, http, tls
        self.clients: list[VoiceClient] = []

    def client(self, voice: Voice) -> VoiceClient:
        """A client for these credentials."""
        self.clients.append(VoiceClient(self.http, self.tls, voice))
        return self.clients[-1]

    async def guild(self, name: str = "1") -> VoiceClient:
        """A client with fresh credentials."""
        (voice,) = await self.emulator.issue([(name, "7" + name)])
        return self.client(voice)

    async def listening(self, *, sampled: bool = True) -> VoiceClient:
        """A client that may send; `sampled` tells whether its packets are decrypted."""
        if not sampled:
            await self.emulator.issue([("first", "7")])
        return await (await (await self.guild("2")).join()).speak()

    async def session(self, guild: str = "2") -> SessionReport:
        """The newest session of a guild."""
        report = await self.emulator.report(guilds=True)
        assert report.guild_rows is not None
        return next(row for row in report.guild_rows if row.guild == guild).sessions[-1]


@asynccontextmanager
async def open_bench(**options: Any) -> AsyncIterator[Bench]:
    """A bench with a local Discord that samples one guild."""
    async with LocalDiscord(sample=1, **options) as discord:
        tls = strict_tls(str(discord.ca_file))
        async with aiohttp.ClientSession() as http, EmulatorClient(discord.control_url) as emulator:
            bench = Bench(emulator, http, tls)
            yield bench
            for client in bench.clients:
                await client.close()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A bench with the usual heartbeat interval."""
    async with open_bench() as opened:
        yield opened


def measures(report: Report | SessionReport) -> tuple[int, int, int, int]:
    """Lost, duplicated, out of order, nonce reused."""
    return report.lost, report.duplicated, report.out_of_order, report.nonce_reused


# hearing


@pytest.mark.parametrize("mode", [AES, XCHACHA])
async def test_what_is_sent_is_heard(bench: Bench, mode: str) -> None:
    """After the full handshake every packet is decrypted, counted and kept with its payload."""
    client = await (await (await bench.guild()).join(mode)).speak()
    frames = audio(50)
    client.play(frames, sequence=65_500, tick=2**32 // 960 - 10, nonce=9)
    client.play([SILENCE] * 5, sequence=65_550, tick=2**32 // 960 + 40, nonce=59)
    report = await bench.emulator.report(guilds=True)
    assert (report.guilds, report.connected, report.heard) == (1, 1, 1)
    assert (report.packets, report.audio_packets, report.decrypt_failed) == (55, 50, 0)
    assert measures(report) == (0, 0, 0, 0)
    assert report.lateness_ms.count == 55
    assert report.gap_ms.count == 54
    packets = await bench.emulator.packets("1")
    (recorded,) = packets.sessions
    assert [packets.payloads[number] for number in recorded.payload] == frames + [SILENCE] * 5
    assert recorded.sequence[0] == 65_500
    assert recorded.sequence[-1] == 18
    assert recorded.nonce == list(range(9, 64))
    assert recorded.arrival_ns == sorted(recorded.arrival_ns)
    assert (await bench.session("1")).trailing_silence == 5


async def test_a_guild_that_is_not_sampled_is_heard_by_length(bench: Bench) -> None:
    """Without decryption a packet longer than silence makes a guild heard; its packets cannot be asked for."""
    client = await bench.listening(sampled=False)
    client.play([SILENCE] * 3)
    assert (await bench.emulator.report()).heard == 0
    client.play(audio(1), sequence=3, tick=3, nonce=3)
    report = await bench.emulator.report()
    assert (report.heard, report.packets, report.lateness_ms.count) == (1, 4, 4)
    with pytest.raises(EmulatorError, match="not sampled"):
        await bench.emulator.packets("2")


async def test_of_a_voice_server_that_is_not_listened_to_each_64th_packet_is_heard() -> None:
    """The kernel throws away the others: that is no loss. What is no audio comes through."""
    async with open_bench(endpoint_guilds=1, listen_every=2) as bench:
        client = await bench.listening(sampled=False)
        client.play([SILENCE] * 65)
        assert (await bench.emulator.report()).heard == 0
        await bench.emulator.reset()
        client.play(audio(200))
        client.udp.sendto(bytes(8), (client.ready["ip"], client.ready["port"]))
        report = await bench.emulator.report()
        assert (report.heard, report.packets, report.keepalives) == (1, 4, 1)
        assert (*measures(report), report.kernel_drops, report.gap_ms.count) == (0, 0, 0, 0, 0, 0)
        other = await (await (await bench.guild("3")).join()).speak()
        other.play(audio(200))
        assert (await bench.session("3")).packets == 200


async def test_keepalives_and_rubbish_are_told_apart(bench: Bench) -> None:
    """Eight bytes from a known client are a keepalive, other short datagrams are unreadable."""
    client = await bench.listening()
    for datagram in (bytes(8), bytes(8), b"rubbish"):
        client.udp.sendto(datagram, (client.ready["ip"], client.ready["port"]))
    report = await bench.emulator.report()
    assert (report.keepalives, report.unreadable, report.packets) == (2, 1, 0)


async def test_what_cannot_be_decrypted_is_not_heard(bench: Bench) -> None:
    """A packet under a wrong key counts as failed, and is missing from the sequence."""
    client = await bench.listening()
    client.play(audio(3))
    right, client.key = client.key, bytes(32)
    client.play(audio(1), sequence=3, tick=3, nonce=3)
    client.key = right
    client.play(audio(1, 4), sequence=4, tick=4, nonce=4)
    session = await bench.session()
    assert (session.packets, session.decrypt_failed, session.lost) == (4, 1, 1)


async def test_padding_and_extensions_are_removed(bench: Bench) -> None:
    """Extension elements before and padding after the frame do not belong to it."""
    client = await bench.listening()
    head = struct.pack(">BBHIIHH", 0xB0, 120, 1, 960, client.ready["ssrc"], 0xBEDE, 1)
    sealed = AESGCM(client.key).encrypt(bytes(12), b"\x10\xff\0\0" + b"frame" + b"\0\0\3", head)
    client.udp.sendto(head + sealed + bytes(4), (client.ready["ip"], client.ready["port"]))
    packets = await bench.emulator.packets("2")
    assert packets.payloads[packets.sessions[0].payload[0]] == b"frame"


# counting


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ([0, 1, 2, 3], (0, 0, 0, 0)),
        ([0, 1, 4, 5], (2, 0, 0, 0)),
        ([0, 1, 1, 2], (0, 1, 0, 0)),
        ([0, 2, 1, 3], (0, 0, 1, 0)),
        ([0, 3, 1, 1, 4], (1, 1, 1, 0)),
        ([5, 3, 6], (0, 0, 1, 0)),
        ([0, 200, 1, 201], (199, 0, 1, 0)),
    ],
    ids=["whole", "lost", "duplicated", "swapped", "mixed", "before-the-first", "long-gap"],
)
async def test_sequences_are_judged_also_where_they_wrap(
    bench: Bench, sampled: bool, order: list[int], expected: tuple[int, int, int, int]
) -> None:
    """Gaps are lost, repeats duplicated, late ones out of order and no longer lost; wrapping changes nothing."""
    client = await bench.listening(sampled=sampled)
    frames = audio(256)
    for base in (0, 65_534):
        await bench.emulator.reset()
        for index in order:
            client.send(base + index, 2**32 - 960 + index * 960, 2**32 - 2 + index, frames[index])
        session = await bench.session()
        assert measures(session) == expected
        assert session.wrong_timestamp == 0


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(("silence", "lost"), [(5, 0), (6, 0), (4, 30), (0, 30)])
async def test_a_pause_needs_five_silence_frames(bench: Bench, sampled: bool, silence: int, lost: int) -> None:
    """A timestamp gap after five silence frames is no loss, without them all its ticks are lost; both are silence."""
    client = await bench.listening(sampled=sampled)
    client.play(audio(10) + [SILENCE] * silence)
    sent = 10 + silence
    client.play(audio(10, 10), sequence=sent, tick=sent + 30, nonce=sent)
    session = await bench.session()
    assert (session.lost, session.packets) == (lost, sent + 10)
    assert session.silent_ticks == silence + 30
    assert session.first_sound_ns == session.first_arrival_ns
    assert session.last_sound_ns == session.last_arrival_ns


@pytest.mark.parametrize("sampled", [True, False])
async def test_a_nonce_that_does_not_rise_is_reused(bench: Bench, sampled: bool) -> None:
    """A new sequence under a nonce not above the highest seen counts; a repeated datagram does not."""
    client = await bench.listening(sampled=sampled)
    for sequence, nonce in [(0, 5), (1, 6), (1, 6), (2, 6), (3, 4), (4, 7)]:
        client.send(sequence, sequence * 960, nonce, audio(5)[sequence])
    session = await bench.session()
    assert (session.nonce_reused, session.duplicated, session.lost) == (2, 1, 0)


async def test_headers_and_timestamps_are_checked(bench: Bench) -> None:
    """Another version or payload type is a wrong header, a step other than 960 a wrong timestamp."""
    client = await bench.listening()
    client.send(0, 0, 0, b"frame")
    client.send(1, 960, 1, b"frame", kind=111)
    client.send(1, 960, 2, b"frame", first=0x40)
    client.send(1, 961, 3, b"frame")
    session = await bench.session()
    assert (session.packets, session.wrong_header, session.wrong_timestamp) == (2, 2, 1)


async def test_reset_forgets_measurements_but_not_sessions(bench: Bench) -> None:
    """After a reset the next packet of a session counts as its first."""
    client = await bench.listening()
    client.play(audio(3))
    await bench.emulator.reset()
    assert (await bench.emulator.report()).packets == 0
    client.play(audio(2, 50), sequence=50, tick=50, nonce=50)
    report = await bench.emulator.report()
    assert (report.packets, report.heard, *measures(report)) == (2, 1, 0, 0, 0, 0)


async def test_recordings_are_bounded() -> None:
    """A full recording keeps the newest packets; the counters keep counting."""
    async with open_bench(full_depth=16) as bench:
        client = await bench.listening()
        client.play(audio(40))
        packets = await bench.emulator.packets("2")
        assert packets.sessions[0].sequence == list(range(24, 40))
        assert (await bench.session()).packets == 40


async def test_the_oldest_ended_session_gives_up_its_room() -> None:
    """With more sessions than there is room for, the oldest ended one lives on in the sums only."""
    async with open_bench() as bench:
        client = await bench.guild("2")
        for turn in range(6):
            again = await (await bench.client(client.voice).join()).speak()
            again.play(audio(turn + 1))
        report = await bench.emulator.report(guilds=True)
        assert report.guild_rows is not None
        assert len(report.guild_rows[0].sessions) == 4
        assert report.packets == 21


# closing


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"op":1,"d":{}}', 4003),
        ('{"op":99,"d":{}}', 4003),
        ("{", 4002),
        ("[]", 4002),
        ('{"op":"0","d":{}}', 4002),
        ('{"op":0,"d":{"server_id":1}}', 4002),
        ('{"op":7,"d":{}}', 4002),
        ('{"op":3,"d":7}', 4020),
        ('{"op":3,"d":{"t":"7"}}', 4020),
        ('{"op":3,"d":{"t":true}}', 4020),
        ('{"op":3,"d":{"seq_ack":1}}', 4020),
    ],
)
async def test_before_identify_bad_messages_close(bench: Bench, text: str, code: int) -> None:
    """Each kind of bad first message has its close code."""
    client = await (await bench.guild()).connect()
    await client.ws.send_str(text)
    assert await client.closed() == code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"op":99,"d":{}}', 4001),
        ('{"op":23,"d":{}}', 4001),
        ('{"op":0,"d":{}}', 4005),
        ('{"op":7,"d":{}}', 4005),
        ('{"op":1,"d":{"protocol":"udp"}}', 4002),
        ('{"op":5,"d":{"speaking":true,"ssrc":1}}', 4002),
        ('{"op":5,"d":{"speaking":1,"ssrc":0}}', 4020),
        ('{"op":3,"d":{"t":1,"seq_ack":77}}', 4020),
    ],
)
async def test_after_identify_bad_messages_close(bench: Bench, text: str, code: int) -> None:
    """Each kind of bad later message has its close code."""
    client = await (await bench.guild()).connect()
    await client.authenticate()
    await client.ws.send_str(text)
    assert await client.closed() == code


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"token": "x"}, 4004),
        ({"session_id": "x"}, 4006),
        ({"user_id": "5"}, 4006),
        ({"server_id": "404"}, 4006),
        ({"user_id": 5}, 4002),
    ],
)
async def test_identify_is_checked(bench: Bench, changes: dict[str, object], code: int) -> None:
    """Only the issued credentials are let in."""
    client = await (await bench.guild()).connect()
    await client.identify(**changes)
    assert await client.closed() == code


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"protocol": "webrtc"}, 4012),
        ({"mode": "xsalsa20_poly1305"}, 4016),
        ({"mode": "aead_mode_of_tomorrow_rtpsize"}, 4016),
        ({"port": 9}, 4020),
        ({"address": "127.0.0.9"}, 4020),
    ],
)
async def test_select_protocol_is_checked(bench: Bench, arguments: dict[str, Any], code: int) -> None:
    """The protocol, the mode and the address that discovery told are the only ones accepted."""
    client = await (await bench.guild()).connect()
    await client.authenticate()
    await client.discover()
    await client.select(**arguments)
    assert await client.closed() == code


async def test_the_address_may_come_back_with_the_zeros_that_fill_its_field(bench: Bench) -> None:
    """A client that hands back all 64 bytes of the discovered address gets its key."""
    client = await (await bench.guild()).connect()
    await client.authenticate()
    await client.discover()
    await client.select(address=client.told[0].ljust(64, "\0"))
    assert (await client.hear(4))["mode"] == AES


@pytest.mark.parametrize("version", [4, 7])
async def test_versions_before_8_know_no_numbers(bench: Bench, version: int) -> None:
    """No message has a number, a heartbeat is a bare nonce, and so is its echo."""
    client = await (await bench.guild()).connect(version)
    await client.authenticate()
    await client.say(3, 12)
    assert await client.hear(6) == 12
    assert client.seqs == []


@pytest.mark.parametrize("version", [3, 9])
async def test_other_versions_are_not_served(bench: Bench, version: int) -> None:
    """Those that Discord cut off, and those that it has not told of, get no WebSocket."""
    with pytest.raises(aiohttp.WSServerHandshakeError, match="400"):
        await (await bench.guild()).connect(version)


async def test_binary_json_is_passed_over(bench: Bench) -> None:
    """A JSON message in a binary frame has no effect."""
    client = await (await bench.guild()).connect()
    await client.ws.send_bytes(b'{"op":99}')
    await client.heartbeat()


async def test_missing_heartbeats_close() -> None:
    """Without heartbeats the session times out with 4009."""
    async with open_bench(heartbeat_interval_ms=20) as bench:
        client = await (await bench.guild()).connect()
        assert await client.closed() == 4009


async def test_rtp_before_speaking_closes(bench: Bench) -> None:
    """Audio without a Speaking message is counted and ends the session."""
    client = await (await bench.guild()).join()
    client.play(audio(3))
    assert await client.closed() == 4020
    assert (await bench.emulator.report()).rtp_before_speaking == 3


async def test_speaking_may_be_overtaken_for_a_moment(bench: Bench) -> None:
    """RTP just ahead of the Speaking message is forgiven."""
    client = await (await bench.guild()).join()
    client.play(audio(3))
    await client.speak()
    report = await bench.emulator.report()
    assert (report.rtp_before_speaking, report.packets, report.connected) == (0, 3, 1)


async def test_rtp_from_another_address_is_followed(bench: Bench) -> None:
    """A NAT bound it anew: the session goes on, and pings are answered to where it sends from now."""
    client = await bench.listening()
    client.udp.close()
    client.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    client.udp.bind(("127.0.0.2", 0))
    client.play(audio(1))
    async with asyncio.timeout(ANSWER_S):
        while not (await bench.emulator.report()).packets:  # noqa: ASYNC110 - it is measured, and told to nobody
            await asyncio.sleep(0.01)
    assert await client.ping(7) == bytes.fromhex("1337f00d00000007")
    report = await bench.emulator.report()
    assert (report.rtp_before_speaking, report.packets, report.connected) == (0, 1, 1)


async def test_a_server_may_answer_no_pings(bench: Bench) -> None:
    """As some do; discovery is answered all the same."""
    client = await bench.listening()
    await bench.emulator.fault("2", "ping_silent")
    with pytest.raises(TimeoutError):
        await client.ping(1, within_s=0.1)
    await client.discover()
    await bench.emulator.fault("2", "ping_silent", on=False)
    assert await client.ping(2) == bytes.fromhex("1337f00d00000002")


@pytest.mark.parametrize("how", ["swallow", "refuse"])
async def test_the_way_to_a_media_server_may_be_shut_and_open_again(bench: Bench, how: str) -> None:
    """What is sent vanishes, or comes back as refused; the WebSocket lives, and afterwards all is as before."""
    client = await bench.listening()
    client.udp.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
    await bench.emulator.fault("2", "path", how=how)
    with pytest.raises(TimeoutError if how == "swallow" else ConnectionRefusedError):
        await client.ping(1, within_s=0.1)
    await client.heartbeat()
    await bench.emulator.fault("2", "path", how="open")
    assert await client.ping(2) == bytes.fromhex("1337f00d00000002")
    client.play(audio(3))
    await client.ping(3)
    assert (await bench.emulator.report()).packets == 3


async def test_rtp_from_the_address_of_another_session_closes(bench: Bench) -> None:
    """Two sessions on one 5-tuple are a mistake of the client: it is not recorded and ends the session."""
    one, other = await bench.listening(), await (await (await bench.guild("3")).join()).speak()
    assert one.ready["port"] == other.ready["port"]
    other.udp.close()
    other.udp = one.udp
    other.play(audio(1))
    assert await other.closed() == 4020
    report = await bench.emulator.report()
    assert (report.rtp_before_speaking, report.packets) == (1, 0)


async def test_a_new_identify_closes_the_older_socket(bench: Bench) -> None:
    """Credentials may be used again; the older WebSocket is closed with 4006."""
    older = await bench.listening()
    newer = await bench.client(older.voice).join()
    assert await older.closed() == 4006
    assert newer.ready["ssrc"] != older.ready["ssrc"]
    assert (await bench.emulator.report()).connected == 1


async def test_new_credentials_void_the_older(bench: Bench) -> None:
    """Asking again closes the older socket, and the older credentials let nobody in."""
    older = await bench.listening()
    await bench.guild("2")
    assert await older.closed() == 4006
    again = await bench.client(older.voice).connect()
    await again.identify()
    assert await again.closed() == 4006


async def test_a_leave_is_recorded(bench: Bench) -> None:
    """Silence sent just before the WebSocket closes is heard; the client's code and a clean close are told."""
    client = await bench.listening()
    client.play(audio(3) + [SILENCE] * 5)
    await client.ws.close(code=1000)
    again = await (await bench.guild("9")).connect()
    await again.heartbeat()
    session = await bench.session()
    assert (session.state, session.trailing_silence) == ("ended", 5)
    assert (session.close_code, session.close_by, session.close_clean) == (1000, "client", True)
    assert [flags for _, flags in session.speaking] == [1]


# resuming


@pytest.mark.parametrize("seq_ack", [-1, 1, 3])
async def test_resume_replays_what_was_missed(bench: Bench, seq_ack: int) -> None:
    """A dropped session goes on with its ssrc and key, and messages after seq_ack come again."""
    client = await bench.listening()
    client.play(audio(3))
    await bench.emulator.fault("2", "drop")
    assert await client.broken()
    client.seqs.clear()
    await client.connect()
    await client.resume(seq_ack)
    assert await client.hear(9) is None
    await client.heartbeat()
    assert client.seqs == [seq for seq in (1, 2, 3) if seq > seq_ack]
    client.play(audio(3, 3), sequence=3, tick=3, nonce=3)
    session = await bench.session()
    assert (session.ssrc, session.packets, session.resumed) == (client.ready["ssrc"], 6, 1)
    assert (measures(session), session.close_code, session.close_clean) == ((0, 0, 0, 0), 1006, False)


@pytest.mark.parametrize(("code", "resumable"), [(4015, True), (4014, False), (4006, False), (1000, True)])
async def test_only_some_closes_can_be_resumed(bench: Bench, code: int, resumable: bool) -> None:
    """A crash of the voice server leaves the session alive, a disconnect ends it."""
    client = await bench.listening()
    await bench.emulator.fault("2", "close", code=code)
    assert await client.closed() == code
    await client.connect()
    await client.resume(client.seqs[-1])
    if resumable:
        await client.hear(9)
    else:
        assert await client.closed() == 4006


async def test_resume_with_an_unknown_seq_is_refused(bench: Bench) -> None:
    """A seq_ack that was never sent cannot be resumed from."""
    client = await bench.listening()
    await bench.emulator.fault("2", "drop")
    assert await client.broken()
    await client.connect()
    await client.resume(500)
    assert await client.closed() == 4006


# faults


async def test_discovery_can_be_lost_and_silent(bench: Bench) -> None:
    """The first requests, or all of them, stay unanswered."""
    client = await (await bench.guild()).connect()
    await client.authenticate()
    await bench.emulator.fault("1", "discovery_lose_first", n=1)
    client.ask_discovery()
    await client.discover()
    await bench.emulator.fault("1", "discovery_silent")
    client.ask_discovery()
    await bench.emulator.report()
    with pytest.raises(BlockingIOError):
        client.udp.recv(100)


async def test_modes_and_rejection_apply_to_the_next_identify(bench: Bench) -> None:
    """Both faults are used up by one Identify."""
    first = await (await bench.guild()).connect()
    await bench.emulator.fault("1", "reject", code=4014)
    await first.identify()
    assert await first.closed() == 4014
    await bench.emulator.fault("1", "modes", modes=[XCHACHA])
    second = await bench.client(first.voice).connect()
    await second.authenticate()
    assert second.ready["modes"] == [XCHACHA]
    third = await bench.client(first.voice).connect()
    await third.authenticate()
    assert third.ready["modes"][:2] == [AES, XCHACHA]


async def test_anything_can_be_said(bench: Bench) -> None:
    """Text as it stands, and numbered bytes, so often."""
    client = await (await bench.guild()).connect()
    await client.authenticate()
    await client.heartbeat()
    await bench.emulator.fault("1", "say", text="{no JSON", n=2)
    await bench.emulator.fault("1", "say", data=b"\x63rubbish")
    assert [await client.ws.receive_str(timeout=ANSWER_S) for _ in range(2)] == ["{no JSON"] * 2
    told = await client.ws.receive_bytes(timeout=ANSWER_S)
    assert told == (client.seqs[-1] + 1).to_bytes(2, "big") + b"\x63rubbish"


async def test_heartbeats_can_stay_unanswered(bench: Bench) -> None:
    """With no_ack nothing comes back, and turning it off ends that."""
    client = await (await bench.guild()).connect()
    await client.authenticate()
    await bench.emulator.fault("1", "no_ack")
    await client.say(3, {"t": 5, "seq_ack": -1})
    await client.say(16, {})
    message = json.loads(await client.ws.receive_str(timeout=ANSWER_S))
    assert message["op"] == 16
    await bench.emulator.fault("1", "no_ack", on=False)
    await client.heartbeat(6)


@pytest.mark.parametrize(
    ("guild", "kind", "fields", "message"),
    [
        ("1", "flood", {}, "400.*flood"),
        ("1", "close", {}, "400.*code"),
        ("1", "close", {"code": "x"}, "400.*code"),
        ("1", "close", {"code": 12}, "400.*close code"),
        ("1", "drop", {"code": 1}, "400.*code"),
        ("1", "discovery_lose_first", {"n": -1}, r"400.*\$\.n"),
        ("404", "drop", {}, "404.*404"),
        ("1", "drop", {}, "409.*no open WebSocket"),
    ],
)
async def test_wrong_faults_are_refused(
    bench: Bench, guild: str, kind: str, fields: dict[str, object], message: str
) -> None:
    """A wrong kind or field, an unknown guild, or a guild without a connection is told so."""
    await bench.guild()
    with pytest.raises(EmulatorError, match=message):
        await bench.emulator.fault(guild, kind, **fields)


# the process


async def test_it_runs_as_a_process() -> None:
    """It tells its addresses when ready, spreads guilds over endpoints, and SIGTERM ends it with 0, clients or not."""
    async with EmulatorProcess("--endpoint-guilds", "2", "--sample", "1") as process:
        tls = strict_tls(str(process.ca_file))
        async with aiohttp.ClientSession() as http, EmulatorClient(process.control_url) as emulator:
            bench = Bench(emulator, http, tls)
            voices = await emulator.issue((str(number), "7") for number in range(5))
            assert [voice.endpoint.split(":")[0] for voice in voices] == [
                f"127.10.0.{number}" for number in (1, 1, 2, 2, 3)
            ]
            client = await (await bench.client(voices[4]).join()).speak()
            client.play(audio(5))
            assert (await emulator.report()).packets == 5
            assert await process.stop(signal.SIGTERM) == 0
            assert await client.closed() == 1001
            await client.close()


async def test_control_stays_on_loopback() -> None:
    """The control interface refuses to be bound to anything else."""
    with pytest.raises(ValueError, match="loopback"):
        LocalDiscord(control=("0.0.0.0", 0))


# analysis


def arrivals(late_ms: Iterable[float], start_ns: int = 10**18) -> tuple[Any, Any]:
    """Timestamps that wrap, and arrivals on a 20 ms grid plus what each is late."""
    late = np.array(list(late_ms))
    ticks = np.arange(len(late))
    timestamp = ((2**32 - 4_800 + ticks * 960) % 2**32).astype(np.uint32)
    return timestamp, start_ns + (ticks * 20_000_000 + late * 1e6).astype(np.int64)


def test_lateness_is_measured_from_the_earliest_arrivals() -> None:
    """A constant delay is no lateness; what comes on top of it is, also where timestamps wrap."""
    timestamp, arrival_ns = arrivals([7, 7, 9.5, 7, 7, 27, 7, 7])
    assert analysis.lateness_ms(timestamp, arrival_ns) == pytest.approx([0, 0, 2.5, 0, 0, 20, 0, 0], abs=1e-3)


def test_lateness_follows_a_drifting_clock() -> None:
    """Each window has its own offset, so 50 ppm of drift make no more than half a millisecond."""
    timestamp, arrival_ns = arrivals(tick * 20 * 50e-6 for tick in range(6_000))
    late = analysis.lateness_ms(timestamp, arrival_ns)
    assert late.min() == 0
    assert late.max() < 0.5 + 1e-3


def test_a_short_last_window_is_judged_by_the_one_before() -> None:
    """The end of a recording is not its own measure."""
    timestamp, arrival_ns = arrivals([0.0] * 500 + [30.0] * 5)
    assert analysis.lateness_ms(timestamp, arrival_ns)[-5:] == pytest.approx([30] * 5, abs=1e-3)


def test_lateness_stands_a_different_order() -> None:
    """Records in the order of arrival need not be in the order of timestamps."""
    timestamp, arrival_ns = arrivals([0, 25, 0, 0])
    order = [0, 2, 1, 3]
    late = analysis.lateness_ms(timestamp[order], arrival_ns[order])
    assert late == pytest.approx([0, 0, 25, 0], abs=1e-3)


def test_a_missing_tick_makes_a_gap_and_a_pause_does_not() -> None:
    """A hole is heard as one; what five silence frames announced is none. Timestamps may wrap."""
    timestamp, arrival_ns = arrivals([0, 0, 0, 0, 15, 0, 40])
    kept = [0, 1, 3, 4, 5, 6]
    played_on, paused = np.zeros(6, np.bool_), np.arange(6) == 2
    gaps = partial(analysis.gaps_ms, timestamp[kept], arrival_ns[kept])
    assert gaps(played_on) == pytest.approx([20, 40, 35, 5, 60], abs=1e-3)
    assert gaps(paused) == pytest.approx([20, 35, 5, 60], abs=1e-3)


def heard(*pairs: tuple[int, float]) -> tuple[Any, Any]:
    """Payload ids and arrivals given in milliseconds."""
    ids = np.array([number for number, _ in pairs], np.int32)
    return ids, np.array([10**18 + int(at * 1e6) for _, at in pairs], np.int64)


def test_skew_compares_the_same_payload_over_all_pairs() -> None:
    """Every pair of listeners counts; the spread is that of the widest pair."""
    table = analysis.arrivals_ms([heard((1, 0), (2, 20)), heard((1, 3), (2, 21)), heard((1, 7))])
    assert sorted(analysis.skew_ms(table)) == pytest.approx([1, 3, 4, 7])
    assert sorted(analysis.spread_ms(table)) == pytest.approx([1, 7])
    found = analysis.skew_percentiles(table)
    assert found.count == 4
    assert found.max == pytest.approx(7)


def test_silence_and_repeats_are_no_skew() -> None:
    """Silence, a payload one listener heard twice, and one that only one heard are left out."""
    table = analysis.arrivals_ms([heard((0, 0), (5, 1), (6, 2), (5, 3)), heard((0, 9), (5, 9), (7, 9))])
    assert len(analysis.skew_ms(table)) == 0
    assert analysis.skew_percentiles(table).max is None


def test_slots_can_be_subtracted() -> None:
    """With its slot taken off, a listener that is later by its slot has no skew."""
    listeners = [heard((1, 0), (2, 20)), heard((1, 6), (2, 27))]
    assert analysis.skew_ms(analysis.arrivals_ms(listeners, slot_ms=[0, 6])) == pytest.approx([0, 1])


def test_many_payloads_are_sampled_but_the_largest_skew_is_kept() -> None:
    """Chosen payloads stand for all in the percentiles, not in the largest value."""
    left = heard(*((number, number * 20.0) for number in range(1, 101)))
    right = heard(*((number, number * 20.0 + (50 if number == 38 else 1)) for number in range(1, 101)))
    table = analysis.arrivals_ms([left, right])
    found = analysis.skew_percentiles(table, max_pairs=10)
    assert found.count == 10
    assert [found.p50, found.max] == pytest.approx([1, 50])


def test_nothing_measured_is_told_as_nothing() -> None:
    """Without arrivals there is no zero that could be taken for a good result."""
    empty = np.zeros(0, np.int64)
    table = analysis.arrivals_ms([(empty, empty), (empty, empty)])
    assert analysis.skew_percentiles(table).p50 is None
    assert analysis.percentiles(analysis.lateness_ms(empty, empty)).count == 0
    assert analysis.percentiles(analysis.gaps_ms(empty, empty, empty)).count == 0
