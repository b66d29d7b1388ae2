"""HLS as FFmpeg's own muxer makes it, and a server that gives it out whole, or as a live stream would grow."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from aiohttp import web
from av.audio.stream import AudioStream

from tests.media.radio import RATE, marks
from tests.media.web import served

KEY = bytes(range(16))
_IV = "0x000102030405060708090a0b0c0d0e0f"


def write_hls(folder: Path, seconds: int, segment_s: int, kind: str, *, key: bool = False) -> list[str]:
    """Write a programme of marks as HLS; returns the lines of its playlist.

    Args: kind: `mpegts` or `fmp4`.
    """
    folder.mkdir(exist_ok=True)
    options = {
        "hls_time": str(segment_s),
        "hls_list_size": "0",
        "hls_segment_type": kind,
        "hls_segment_filename": str(folder / ("seg%d.ts" if kind == "mpegts" else "seg%d.m4s")),
        "hls_playlist_type": "vod",
    }
    if key:
        (folder / "key").write_bytes(KEY)
        (folder / "key.info").write_text(f"key\n{folder / 'key'}\n{_IV.removeprefix('0x')}\n")
        options["hls_key_info_file"] = str(folder / "key.info")
    with av.open(str(folder / "all.m3u8"), "w", format="hls", options=options) as out:
        stream = out.add_stream("aac", rate=RATE, layout="stereo")
        assert isinstance(stream, AudioStream)
        stream.bit_rate = 96_000
        resampler = av.AudioResampler(stream.format.name, "stereo", RATE)
        for second in range(seconds):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(marks(second * RATE, RATE)).reshape(1, -1), "flt", "stereo"
            )
            frame.sample_rate, frame.pts = RATE, second * RATE
            for part in resampler.resample(frame):
                out.mux(stream.encode(part))
        for last in (*resampler.resample(None), None):
            out.mux(stream.encode(last))
    return (folder / "all.m3u8").read_text().splitlines()


class HlsServer:
    """`async with HlsServer(folder, lines) as server`: what was written, at `server.url`.

    Args:
        lines: of the playlist.
        live_window: so many segments at a time, one more each `segment_s`; 0: all of them, and their end.
        segment_s: how fast a live stream grows.
    Attributes:
        asked: what was asked for, in order.
        missing: names that are answered with 404.
        rename: what segments are called in the playlist, and a query behind it.
        frozen: the playlist stays as it is.
        seams: a discontinuity stands before each segment.
    """

    def __init__(self, folder: Path, lines: list[str], *, live_window: int = 0, segment_s: float = 1.0) -> None:
        self._folder = folder
        self._head = [line for line in lines if line.startswith("#") and not line.startswith(("#EXTINF", "#EXT-X-END"))]
        self._segments = [(before, name) for before, name in pairwise(lines) if before.startswith("#EXTINF")]
        self._window = live_window
        self._segment_s = segment_s
        self._began_s = time.monotonic()
        self._shown: str | None = None
        self._exits = AsyncExitStack()
        self._base = ""
        self.asked: list[str] = []
        self.missing: set[str] = set()
        self.rename: Callable[[str], str] = lambda name: name
        self.frozen = False
        self.seams = False
        self.ended = False

    async def __aenter__(self) -> Self:
        self._base = await self._exits.enter_async_context(served(("/{name:.*}", self._answer)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    @property
    def url(self) -> str:
        return f"{self._base}/list.m3u8"

    def newest(self) -> int:
        """Number of the segment that was finished last."""
        if not self._window:
            return len(self._segments) - 1
        grown = int((time.monotonic() - self._began_s) / self._segment_s)
        return min(self._window - 1 + grown, len(self._segments) - 1)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.asked.append(name)
        if name in self.missing:
            return web.Response(status=404)
        if name.endswith(".m3u8"):
            if self._shown is None or not self.frozen:
                self._shown = self._playlist()
            return web.Response(text=self._shown, content_type="application/vnd.apple.mpegurl")
        for _, real in self._segments:
            if self.rename(real).partition("?")[0] == name:
                return web.FileResponse(self._folder / real)
        return web.FileResponse(self._folder / name) if (self._folder / name).is_file() else web.Response(status=404)

    def _playlist(self) -> str:
        last = self.newest()
        first = max(0, last - self._window + 1) if self._window else 0
        lines = [line for line in self._head if self._window == 0 or "PLAYLIST-TYPE" not in line]
        lines = [f"#EXT-X-MEDIA-SEQUENCE:{first}" if "MEDIA-SEQUENCE" in line else line for line in lines]
        for duration, name in self._segments[first : last + 1]:
            lines += ["#EXT-X-DISCONTINUITY"] if self.seams else []
            lines += [duration, self.rename(name)]
        if self.ended or not self._window:
            lines.append("#EXT-X-ENDLIST")
        return "\n".join(lines) + "\n"
