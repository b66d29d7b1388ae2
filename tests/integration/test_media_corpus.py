"""Spoilt media, each played by a child as in production: every one ends in sound or in an error with a name, within
bounds of time and memory, and the worker's side goes on."""

from __future__ import annotations

import asyncio
import contextlib
import wave
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from shared.errors import ErrorCode, SourceError
from tests.media.spoilt import spoilt_answers, spoilt_files, whole_answers, whole_files
from worker.encode.records import ChildOrder
from worker.encode.source import EncodedFrame, SourceChild

EACH_FILE, EACH_ANSWER = 13, 8
AT_ONCE = 3
MOST_FRAMES = 1_000
"""Twenty seconds: of one second of sound, spoilt, nothing makes more but a time stamp that tells of a hole."""
PATIENCE_S = 60.0
MOST_BYTES = 512 * 1024 * 1024
OUR_DEFECTS = {ErrorCode.SOURCE_FAILED, ErrorCode.CONFIG_INVALID}


def _peak_bytes(pid: int) -> int:
    """What a process had resident at most; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1_024 for line in lines if line.startswith("VmHWM")), 0)


def _forget_peak(pid: int) -> None:
    """From here on, the peak is another one. Source: proc(5), /proc/pid/clear_refs."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class Outcome(NamedTuple):
    """Attributes: code: of its error, or `played`."""

    code: str
    message: str
    peak_bytes: int

    @property
    def is_ours(self) -> bool:
        """It is a defect of this side, or out of bounds."""
        return self.code in OUR_DEFECTS or "killed by" in self.message or self.peak_bytes > MOST_BYTES


class Player:
    """A child that plays one after the other, as where a source is opened again; a new one where it does not wait."""

    def __init__(self) -> None:
        self._child: SourceChild | None = None

    async def play(self, url: str) -> Outcome:
        """Raises: TimeoutError: it comes to no end."""
        async with asyncio.timeout(PATIENCE_S):
            child = await self._ready(ChildOrder(url=url))
            code, message, frames = "played", "", 0
            try:
                while frames < MOST_FRAMES and (told := await child.read()) is not None:
                    frames += isinstance(told, EncodedFrame)
            except SourceError as error:
                code, message = error.code, error.message
            return Outcome(code, message, _peak_bytes(child.pid))

    async def _ready(self, order: ChildOrder) -> SourceChild:
        if self._child is not None and self._child.waits:
            _forget_peak(self._child.pid)
            self._child.again(order)
            return self._child
        await self.aclose()
        self._child = await SourceChild.start(order)
        return self._child

    async def aclose(self) -> None:
        if self._child is not None:
            await self._child.close()


async def outcomes(urls: Iterable[tuple[str, str]]) -> dict[str, Outcome]:
    named = iter(dict(urls).items())
    found: dict[str, Outcome] = {}

    async def some() -> None:
        async with aclosing(Player()) as player:
            for name, url in named:  # who is ready takes the next
                found[name] = await player.play(url)

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    assert {name: one for name, one in found.items() if one.is_ours} == {}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return whole_files(tmp_path_factory.mktemp("whole"))


async def test_a_spoilt_file_is_played_or_refused_by_name(whole: dict[str, bytes], tmp_path: Path) -> None:
    """Sizes that lie, bits that flipped, one format within another: none hangs, and none costs the worker."""

    def files() -> Iterable[tuple[str, str]]:
        for name, data in [*whole.items(), *spoilt_files(whole, EACH_FILE)]:
            (tmp_path / name).write_bytes(data)
            yield name, str(tmp_path / name)

    found = await outcomes(files())
    assert {found[name].code for name in whole} == {"played"}
    assert len(found) == len(whole) * (EACH_FILE + 1)
    codes = Counter(one.code for one in found.values())
    assert codes["played"] > len(found) / 2, "a scratch is no ruin"
    assert len(codes) >= 3, "some are ruins"


@asynccontextmanager
async def saying(answers: Callable[[str], dict[str, bytes]]) -> AsyncIterator[str]:
    """A server that says to each path what stands for it, byte for byte, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        writer.write(known.get(request.split()[1].decode().strip("/"), b""))
        with contextlib.suppress(ConnectionError):  # it has heard enough
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    known = answers(base)
    async with server:
        yield base


async def test_a_spoilt_answer_is_played_or_refused_by_name(whole: dict[str, bytes]) -> None:
    """Whatever stands in a head, between chunks, or in a list."""
    answers = whole_answers(whole)
    spoilt = dict(spoilt_answers(answers, EACH_ANSWER))

    def said(base: str) -> dict[str, bytes]:
        return {name: data.replace(b"BASE", base.encode()) for name, data in [*answers.items(), *spoilt.items()]}

    async with saying(said) as base:
        found = await outcomes((name, f"{base}/{name}") for name in [*answers, *spoilt])
    assert {name: found[name].code for name in answers} == dict.fromkeys(answers, "played")
    assert len(found) == len(answers) * (EACH_ANSWER + 1)
    assert len(Counter(one.code for one in found.values())) >= 4


def _tag_of_250_mb(folder: Path, whole: dict[str, bytes]) -> Path:
    path, size = folder / "tag.mp3", 250_000_000
    with path.open("wb") as file:
        file.write(b"ID3\x04\0\0" + bytes((size >> shift) & 127 for shift in (21, 14, 7, 0)))
        file.seek(size + 10)
        file.write(whole["mp3-libmp3lame"])
    return path


def _sixty_four_channels(folder: Path, _: dict[str, bytes]) -> Path:
    path = folder / "wide.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(64)
        file.setsampwidth(2)
        file.setframerate(48_000)
        file.writeframes(bytes(64 * 2 * 48_000))
    return path


def _many_segments(folder: Path, _: dict[str, bytes]) -> Path:
    path = folder / "long.m3u8"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n" + "#EXTINF:1,\na\n" * 400_000 + "#EXT-X-ENDLIST\n")
    return path


def _packed_zeros(head: bytes) -> bytes:
    """A gigabyte of them, in a megabyte: packed once, said again and again. The checksum behind them nobody gets to."""
    packer = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)
    begin = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    zeros = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    body = begin + 1_024 * zeros + packer.flush()
    return b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nContent-Encoding: gzip\r\n\r\n" + body


FILE_BOMBS = {_tag_of_250_mb: "played", _sixty_four_channels: "source_not_audio", _many_segments: "source_too_large"}


async def test_a_bomb_has_a_name_and_bounds(whole: dict[str, bytes], tmp_path: Path) -> None:
    """What is far larger than it looks, or says that it is."""
    made = {make(tmp_path, whole): code for make, code in FILE_BOMBS.items()}
    found = await outcomes((path.name, str(path)) for path in made)
    assert {name: one.code for name, one in found.items()} == {path.name: code for path, code in made.items()}
    packed = {"zeros": _packed_zeros(b""), "list": _packed_zeros(b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n")}
    async with saying(lambda _: packed) as base:
        found = await outcomes((name, f"{base}/{name}") for name in packed)
    assert {name: one.code for name, one in found.items()} == {"zeros": "source_not_audio", "list": "source_too_large"}
