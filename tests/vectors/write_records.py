"""Writes down what a real pool of this version keeps on Redis: `python -m tests.vectors.write_records FILE`.

Run once for each version that is let go, so that later versions can prove that they read what it wrote. The tests of
this folder read the files; nothing of one is changed afterwards.
"""

from __future__ import annotations

import asyncio
import base64
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from tests.e2e.stack import Stack
from tests.media.audio import PROGRAMME

_SEAL_KEY = base64.b64encode(b"records of test vectors, no more").decode()
_OPUS = {"bitrate": 64_000, "vbr": False, "fec": True, "expected_loss": 5}


async def _written(folder: Path, settings: dict[str, str]) -> dict[str, dict[str, dict[str, str]]]:
    """Hashes by kind and key, of a pool in which something of everything has happened."""
    async with Stack(folder, settings=settings) as stack:
        music = stack.media / "programme.ogg"
        music.write_bytes(PROGRAMME.read_bytes())
        # with every field that this version serves
        source = {"url": music.as_uri(), "loop": True, "lead_ms": 5_000}
        await stack.do("broadcast.start", broadcast="radio", source=source, opus=_OPUS)
        await stack.start("missing.ogg", broadcast="stalled")
        await stack.wait_event("broadcast.stalled", broadcast="stalled")
        playing = await stack.join(2, "radio")
        (guild, channel), (mute, elsewhere) = stack.new_guilds(2)
        voice = await stack.voice(guild, channel)
        more = {"on_kick": "rejoin", "speaking": ["microphone", "priority"]}
        await stack.do("guild.join", guild=guild, channel=channel, broadcast="radio", voice=voice, **more)
        await stack.wait_state([*playing, guild], "playing")
        await stack.do("guild.join", guild=mute, channel=elsewhere, broadcast="radio")
        await stack.wait_state([mute], "voice_wanted")
        await stack.submit("guild.leave", guild="123456789012345678")
        await stack.submit("guild.join", guild=guild, channel=channel, broadcast="radio", voice=voice | {"token": 1})
        keys, store = stack.keys, stack.store
        names: dict[str, list[str]] = {"guild": [], "broadcast": [], "worker": [], "want": [], "job": []}
        for name in sorted(await store.command("KEYS", f"{keys.prefix}:*")):
            kind = name.removeprefix(f"{keys.prefix}:").split(":")[0]
            if kind in names and await store.command("TYPE", name) == "hash":
                names[kind].append(name)
        found: dict[str, dict[str, Any]] = {
            kind: {name: await store.command("HGETALL", name) for name in some} for kind, some in names.items()
        }
        found["dead"] = dict(await store.command("XRANGE", keys.jobs_dead, "-", "+"))
        found["event"] = dict(await store.command("XRANGE", keys.events, "-", "+"))
        # where this machine keeps its temporary files is nobody's business
        clean = msgspec.json.encode(found).replace(str(stack.media).encode(), b"/srv/media")
        return msgspec.json.decode(clean, type=dict[str, dict[str, dict[str, str]]])


async def _all_written() -> dict[str, Any]:
    written: dict[str, Any] = {"seal_key": _SEAL_KEY}
    for name, settings in {"clear": {}, "sealed": {"GUILDCAST_SEAL_KEY": _SEAL_KEY}}.items():
        with tempfile.TemporaryDirectory() as folder:
            written[name] = await _written(Path(folder), settings)
    return written


if __name__ == "__main__":
    text = msgspec.json.format(msgspec.json.encode(asyncio.run(_all_written())), indent=1)
    Path(sys.argv[1]).write_bytes(text + b"\n")
