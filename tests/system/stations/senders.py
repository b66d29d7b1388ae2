"""Stations made of other people's programs: Icecast and ffmpeg, as Debian has them.

Each sends the programme of marks (`tests.media.radio`) in real time; which second it is goes by the clock of the day,
so that a station that was begun anew goes on where it would be.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from aiohttp import ClientSession, web

from tests.media.radio import Radio
from tests.media.web import served

RATE = 48_000
_PASSWORD = "test"
_UP_WITHIN_S = 10.0
_UNPRIVILEGED = "nobody"
_MARKS = "0.5*sin(2*PI*(500+125*mod(floor(t)+{first},40))*mod(t,1))*lt(mod(t,1),0.2)"
"""The same as `tests.media.radio.marks`, in ffmpeg's language."""


class Form(NamedTuple):
    """How a station is encoded.

    Attributes:
        other: its rate and channels after it was begun anew.
    """

    options: tuple[str, ...]
    content_type: str = ""
    other: tuple[int, int] = (44_100, 1)


ICECAST = {
    "mp3": Form(("-c:a", "libmp3lame", "-b:a", "128k", "-f", "mp3"), "audio/mpeg"),
    "opus": Form(("-c:a", "libopus", "-b:a", "96k", "-f", "ogg"), "application/ogg", (RATE, 1)),
    "aac": Form(("-c:a", "aac", "-b:a", "128k", "-f", "adts"), "audio/aac"),
    "flac": Form(("-c:a", "flac", "-f", "ogg"), "application/ogg"),
}


def seconds_of_day() -> int:
    """Which second of the programme it is."""
    return int(time.time()) % 40


class Station(Protocol):
    """Something to listen to."""

    port: int
    path: str

    async def begin_anew(self) -> None:
        """Stop, and send again with other parameters."""


def _program(name: str) -> str:
    path = shutil.which(name)
    assert path, "install the packages of tests/packages.txt"
    return path


@asynccontextmanager
async def _running(*command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class _Encoder:
    """ffmpeg, sending to one place; begun anew it sends in another form."""

    def __init__(self, form: Form, target: str, *more: str) -> None:
        self._form = form
        self._target = target
        self._more = more
        self._exits = AsyncExitStack()

    async def begin(self, rate: int = RATE, channels: int = 2) -> None:
        marks = _MARKS.format(first=seconds_of_day() + 1)
        source = f"aevalsrc=exprs='{marks}|{marks}':s={RATE}" if channels == 2 else f"aevalsrc=exprs='{marks}':s={RATE}"
        # A second of the programme begins with each second of the clock, give or take the program's own start.
        await asyncio.sleep(1 - time.time() % 1)
        await self._exits.enter_async_context(
            _running(
                *(_program("ffmpeg"), "-v", "error", "-re", "-f", "lavfi", "-i", source),
                *("-ar", str(rate), *self._form.options, *self._more, self._target),
            )
        )

    async def begin_anew(self) -> None:
        await self.end()
        await self.begin(*self._form.other)

    async def end(self) -> None:
        await self._exits.aclose()


class IcecastStation:
    """One mount of an Icecast."""

    def __init__(self, encoder: _Encoder, port: int, path: str) -> None:
        self.port, self.path = port, path
        self._encoder = encoder

    async def begin_anew(self) -> None:
        await self._encoder.begin_anew()
        await self.sends()

    async def sends(self) -> None:
        """Wait until a listener is let in."""
        async with asyncio.timeout(_UP_WITHIN_S), ClientSession() as session:
            while True:
                async with session.get(f"http://127.0.0.1:{self.port}{self.path}") as answer:
                    if answer.status == 200:
                        return
                await asyncio.sleep(0.05)


@asynccontextmanager
async def icecast(folder: Path, burst_bytes: int) -> AsyncIterator[int]:
    """A server on a port of its own; each listener gets so much at once. It does not run as root."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    owner = f"<changeowner><user>{_UNPRIVILEGED}</user><group>nogroup</group></changeowner>" if not os.getuid() else ""
    config = folder / "icecast.xml"
    config.write_text(
        f"""<icecast><limits><clients>50</clients><sources>10</sources><queue-size>4194304</queue-size>
        <source-timeout>5</source-timeout><burst-on-connect>1</burst-on-connect><burst-size>{burst_bytes}</burst-size>
        </limits><authentication><source-password>{_PASSWORD}</source-password><relay-password>{_PASSWORD}</relay-password>
        <admin-user>admin</admin-user><admin-password>{_PASSWORD}</admin-password></authentication>
        <hostname>localhost</hostname>
        <listen-socket><port>{port}</port><bind-address>127.0.0.1</bind-address></listen-socket><fileserve>0</fileserve>
        <paths><logdir>/tmp</logdir><webroot>/usr/share/icecast2/web</webroot>
        <adminroot>/usr/share/icecast2/admin</adminroot></paths>
        <logging><accesslog>-</accesslog><errorlog>-</errorlog></logging>
        <security><chroot>0</chroot>{owner}</security></icecast>"""
    )
    async with _running(_program("icecast2"), "-c", str(config)):
        await _listening(port)
        yield port


async def _listening(port: int) -> None:
    async with asyncio.timeout(_UP_WITHIN_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return


@asynccontextmanager
async def icecast_station(name: str, port: int) -> AsyncIterator[Station]:
    """A mount of that Icecast, with ffmpeg sending to it."""
    form = ICECAST[name]
    target = f"icecast://source:{_PASSWORD}@127.0.0.1:{port}/{name}"
    encoder = _Encoder(form, target, "-content_type", form.content_type, "-flush_packets", "1")
    try:
        await encoder.begin()
        station = IcecastStation(encoder, port, f"/{name}")
        await station.sends()
        yield station
    finally:
        await encoder.end()


class HlsStation:
    """A folder that ffmpeg writes HLS to, behind a web server."""

    path = "/live.m3u8"

    def __init__(self, encoder: _Encoder, folder: Path, ending: str, segment_s: int, port: int) -> None:
        self.port = port
        self._encoder = encoder
        self._folder, self._ending, self._segment_s = folder, ending, segment_s

    async def begin_anew(self) -> None:
        """Until the first new segment stands in the folder: it may get its name at its end."""
        before = self._segments()
        await self._encoder.begin_anew()
        async with asyncio.timeout(_UP_WITHIN_S + self._segment_s):
            while self._segments() <= before:  # noqa: ASYNC110 - another program writes
                await asyncio.sleep(0.02)

    def _segments(self) -> set[str]:
        return {path.name for path in self._folder.glob(f"*.{self._ending}")}


@asynccontextmanager
async def hls_station(folder: Path, kind: str, segment_s: int) -> AsyncIterator[Station]:
    """HLS with segments of `mpegts` or `fmp4`."""
    folder.mkdir()  # noqa: ASYNC240 - a test's own folder
    ending = "ts" if kind == "mpegts" else "m4s"
    encoder = _Encoder(
        Form(("-c:a", "aac", "-b:a", "128k", "-f", "hls")),
        str(folder / "live.m3u8"),
        *("-hls_time", str(segment_s), "-hls_list_size", "6", "-hls_segment_type", kind),
        *("-hls_flags", "delete_segments+append_list+omit_endlist"),
        *("-hls_segment_filename", str(folder / f"%d.{ending}")),
    )

    async def serve(request: web.Request) -> web.StreamResponse:
        path = folder / request.match_info["name"]
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    try:
        async with served(("/{name}", serve)) as base:
            await encoder.begin()
            async with asyncio.timeout(_UP_WITHIN_S + 3 * segment_s):
                while len(list(folder.glob(f"*.{ending}"))) < 3:  # noqa: ASYNC110, ASYNC240 - another program writes
                    await asyncio.sleep(0.1)
            yield HlsStation(encoder, folder, ending, segment_s, int(base.rpartition(":")[2]))
    finally:
        await encoder.end()


class RadioStation:
    """A server of the tests' own that sends in chunks, each when it was made."""

    path = "/radio"

    def __init__(self, radio: Radio) -> None:
        self._radio = radio
        self.port = int(radio.url.rpartition(":")[2].partition("/")[0])

    async def begin_anew(self) -> None:
        self._radio.sending.clear()
        await asyncio.sleep(1)
        self._radio.sending.set()


@asynccontextmanager
async def radio_station(name: str) -> AsyncIterator[Station]:
    async with Radio(name, 2.0, hang_up="polite") as radio:
        yield RadioStation(radio)
