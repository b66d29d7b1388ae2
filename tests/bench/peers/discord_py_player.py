"""discord.py's player in many guilds at once: one `VoiceClient` per guild, all of them with the same Opus frames.

    python discord_py_player.py FRAMES TOKEN API

FRAMES is a file of Opus frames of 20 ms, each after its length (u16, big endian). Voice credentials come as one line of
JSON on standard input; the program ends when that does. Runs in the environment of `tests/interop/requirements.lock`,
with nothing of this repository.
"""

import asyncio
import itertools
import json
import os
import ssl
import sys
from pathlib import Path

import aiohttp
import discord
from discord.http import Route

JOINS_AT_ONCE = 8
JOIN_WITHIN_S = 20.0
ANSWER_S = 0.01
"""What comes over a network takes a moment: discord.py misses an answer that is there before it waits for one."""


class Loop(discord.AudioSource):
    """The frames that all guilds share, over and over."""

    def __init__(self, frames: list[bytes]) -> None:
        self._frames = itertools.cycle(frames)

    def read(self) -> bytes:
        """The next frame."""
        return next(self._frames)

    def is_opus(self) -> bool:
        """No encoder is needed."""
        return True


class Guild:
    """Stands for guild and channel, and for the main gateway: asked to join, it hands out the credentials."""

    def __init__(self, client: discord.Client, credentials: dict[str, str]) -> None:
        self._credentials = credentials
        self.id = int(credentials["channel"])
        self.guild = self
        self.voice_client = discord.VoiceClient(client, self)

    def _get_voice_client_key(self) -> tuple[int, str]:
        return int(self._credentials["guild"]), "guild_id"

    async def change_voice_state(self, **_: object) -> None:
        """What op 4 would bring about, after it was sent."""
        self._answer = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        await asyncio.sleep(ANSWER_S)
        told = self._credentials
        await self.voice_client.on_voice_state_update({"channel_id": told["channel"], "session_id": told["session_id"]})
        await self.voice_client.on_voice_server_update(
            {"token": told["token"], "guild_id": told["guild"], "endpoint": told["endpoint"]}
        )


def read_frames(path: str) -> list[bytes]:
    """All frames of the file."""
    rest, frames = Path(path).read_bytes(), []
    while rest:
        end = 2 + int.from_bytes(rest[:2], "big")
        frames.append(rest[2:end])
        rest = rest[end:]
    return frames


async def main(path: str, token: str, api: str) -> None:
    """Log in, join, play until the input ends."""
    frames = read_frames(path)
    Route.BASE = api
    trust = ssl.create_default_context()  # finds the CA in SSL_CERT_FILE
    client = discord.Client(intents=discord.Intents.none(), connector=aiohttp.TCPConnector(ssl=trust, limit=0))
    await client.login(token)
    calls = json.loads(await asyncio.to_thread(sys.stdin.readline))
    turns = asyncio.Semaphore(JOINS_AT_ONCE)

    async def play(credentials: dict[str, str]) -> None:
        async with turns:
            voice = Guild(client, credentials).voice_client
            await voice.connect(reconnect=False, timeout=JOIN_WITHIN_S, self_deaf=True)
            voice.play(Loop(frames))

    await asyncio.gather(*map(play, calls))
    print("playing", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # without a farewell to every server


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
