"""A source behind a password, in a whole pool: it is heard, and what lets one in is nowhere to be read."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from tests.e2e.stack import Process, Stack, descendants
from tests.media.audio import PROGRAMME
from tests.media.web import served

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = "SECRET"


@asynccontextmanager
async def locked() -> AsyncIterator[str]:
    """A server that lets in who says name, password, token and cookie; its address."""
    let_in = "Basic " + base64.b64encode(f"us:{SECRET}".encode()).decode()

    async def handler(request: web.Request) -> web.StreamResponse:
        said = (request.headers.get("Authorization"), request.query.get("token"), request.headers.get("Cookie"))
        if said != (let_in, SECRET, f"a={SECRET}"):
            return web.Response(status=401)
        return web.FileResponse(PROGRAMME)

    async with served(("/music.ogg", handler)) as base:
        yield f"us:{SECRET}@{base.removeprefix('http://')}/music.ogg?token={SECRET}"


async def everything(stack: Stack) -> list[str]:
    """All that stands on Redis but sound."""
    read = []
    for key in await stack.store.command("KEYS", "*"):
        if ":frames:" in key:
            continue
        kind = await stack.store.command("TYPE", key)
        command = {
            "hash": ("HGETALL", key),
            "string": ("GET", key),
            "set": ("SMEMBERS", key),
            "zset": ("ZRANGE", key, 0, -1),
            "stream": ("XRANGE", key, "-", "+"),
        }[kind]
        read.append(f"{key} {await stack.store.command(*command)}")
    return read


def told_by(process: Process) -> list[str]:
    """Its command line and its environment."""
    return [Path(f"/proc/{process.pid}/{name}").read_text(errors="replace") for name in ("cmdline", "environ")]


async def test_credentials_of_a_source_are_nowhere_to_be_read(tmp_path: Path) -> None:
    """Not on Redis, in no log, in no command line, in no environment of a child; also where the station is away."""
    key = base64.b64encode(bytes(range(32))).decode()
    async with Stack(tmp_path, settings={"GUILDCAST_SEAL_KEY": key}) as stack, locked() as url:
        headers = {"Cookie": f"a={SECRET}"}
        broadcast = await stack.start(f"http://{url}", loop=True, headers=headers)
        guilds = await stack.join(1, broadcast)
        await stack.hear_more(guilds, 50)
        away = await stack.start(f"http://us:{SECRET}@127.0.0.1:9/a?{SECRET}", headers=headers)
        await stack.wait_event("broadcast.stalled", broadcast=away)
        refused = await stack.submit("broadcast.start", broadcast=away, source={"url": f"http://{url}"})
        assert refused.state == "failed"
        children = [one for process in stack.pool.processes.values() for one in descendants(process.pid)]
        read = await everything(stack)
        assert len(read) > 5
        read += [text for one in children for text in told_by(one)]
        read += [log.read_text() for log in stack.logs.glob("*.log")]
        assert [text for text in read if SECRET in text] == []
