"""discord.py with its own voice client, led by lines of JSON: commands on standard input, what happens on the output.

Runs in the environment of `tests/interop/requirements.lock`, with nothing of this repository.
"""

import asyncio
import base64
import contextlib
import json
import logging
import ssl
import sys
from pathlib import Path

import aiohttp
import davey
import discord
import nacl.secret
import yarl
from discord.gateway import DiscordVoiceWebSocket, DiscordWebSocket
from discord.http import Route
from discord.oggparse import OggStream
from discord.voice_state import VoiceConnectionState

RTP_HEADER_BYTES = 12
SPEAKING = 5
JOIN_TIMEOUT_S = 5.0


def tell(event: str, **fields: object) -> None:
    """One line for whoever leads us."""
    print(json.dumps({"event": event, **fields}), flush=True)


class OpusFile(discord.AudioSource):
    """The packets of an Ogg Opus file as they are."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("rb")  # noqa: SIM115 - closed in `cleanup`
        self._packets = OggStream(self._file).iter_packets()
        for _ in range(2):
            next(self._packets)  # identification and comment headers

    def read(self) -> bytes:
        """The next packet, empty at the end."""
        return next(self._packets, b"")

    def is_opus(self) -> bool:
        """No encoder is needed."""
        return True

    def cleanup(self) -> None:
        """Close the file."""
        self._file.close()


class ListeningVoiceClient(discord.VoiceClient):
    """discord.py cannot receive: packets are taken from its socket reader and opened with its own keys."""

    def __init__(self, client: discord.Client, channel: discord.abc.Connectable) -> None:
        self.users: dict[int, int] = {}
        self.frames: dict[int, list[bytes]] = {}
        self.sealed = 0
        super().__init__(client, channel)

    def create_connection_state(self) -> VoiceConnectionState:
        """Hear the voice gateway, too."""
        return VoiceConnectionState(self, hook=self._hear_gateway)

    def listen(self) -> None:
        """Take what comes over the socket. With it a reconnect may hang: the reader waits at the older socket."""
        self._connection.add_socket_listener(self._hear_socket)

    async def _hear_gateway(self, _: DiscordVoiceWebSocket, message: dict[str, object]) -> None:
        if message["op"] == SPEAKING:
            self.users[int(message["d"]["ssrc"])] = int(message["d"]["user_id"])

    def _hear_socket(self, packet: bytes) -> None:
        state = self._connection
        user = self.users.get(int.from_bytes(packet[8:12], "big"))
        if packet[:2] != b"\x80\x78" or user is None:
            return
        self.sealed += 1
        box = nacl.secret.Aead(bytes(state.secret_key))
        nonce = packet[-4:] + bytes(20)
        frame = box.decrypt(packet[RTP_HEADER_BYTES:-4], packet[:RTP_HEADER_BYTES], nonce)
        if state.dave_session is not None and state.dave_session.ready:
            frame = state.dave_session.decrypt(user, davey.MediaType.audio, frame)
        self.frames.setdefault(user, []).append(frame)


class Led(discord.Client):
    """A client that does what it is told."""

    def __init__(self, connector: aiohttp.BaseConnector) -> None:
        intents = discord.Intents.none()
        intents.guilds = intents.voice_states = True
        super().__init__(intents=intents, connector=connector)
        self.voice: ListeningVoiceClient | None = None

    async def on_ready(self) -> None:
        """Logged in, guilds known."""
        tell("ready", user=str(self.user.id))

    async def obey(self, command: dict[str, str]) -> None:
        """Do one thing and tell what came of it."""
        match command:
            case {"do": "join", "channel": channel}:
                target = self.get_channel(int(channel))
                self.voice = await target.connect(timeout=JOIN_TIMEOUT_S, cls=ListeningVoiceClient)
                tell("joined")
            case {"do": "play", "file": file}:
                loop = asyncio.get_running_loop()
                self.voice.play(
                    OpusFile(file),
                    after=lambda _: loop.call_soon_threadsafe(tell, "played"),
                )
                tell("playing")
            case {"do": "listen"}:
                self.voice.listen()
                tell("listening")
            case {"do": "heard"}:
                frames = {
                    str(user): [base64.b64encode(frame).decode() for frame in frames]
                    for user, frames in self.voice.frames.items()
                }
                tell("heard", frames=frames, sealed=self.voice.sealed, code=self.voice.voice_privacy_code)
            case {"do": "leave"}:
                self.voice.stop()
                await self.voice.disconnect()
                tell("left")


async def lines() -> asyncio.StreamReader:
    """Standard input."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def main(token: str, api: str, gateway: str) -> None:
    """Log in, obey until the input ends, log out."""
    Route.BASE = api
    DiscordWebSocket.DEFAULT_GATEWAY = yarl.URL(gateway)
    trust = ssl.create_default_context()  # finds the CA in SSL_CERT_FILE
    async with Led(aiohttp.TCPConnector(ssl=trust)) as client:
        running = asyncio.create_task(client.start(token))
        reader = await lines()
        while line := await reader.readline():
            try:
                await client.obey(json.loads(line))
            except Exception as error:  # noqa: BLE001 - whoever leads us decides
                tell("failed", error=repr(error))
        await client.close()
        with contextlib.suppress(asyncio.CancelledError):
            await running


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(main(*sys.argv[1:]))
