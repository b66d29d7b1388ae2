"""A live source: an endless HTTP stream in real time, with marks at known moments.

A second of it is silence but for a burst of a tone. Its pitch says which second it is, so that a mark that is heard
says when it was made.
"""

from __future__ import annotations

import asyncio
import io
import socket
import struct
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Literal, NamedTuple, Self

import av
import numpy as np
from aiohttp import web
from av.audio.stream import AudioStream
from numpy.typing import NDArray

from shared.clock import NS_PER_S
from tests.media.web import served

RATE = 48_000
BLOCK = 960
_BURST_SAMPLES = RATE // 5
_LOWEST_HZ, _STEP_HZ, _PITCHES = 500, 125, 40
_LEVEL = 0.5
_HEARD_FROM = 0.3
"""Of the burst's level: codecs smear a little of it forwards."""


class Format(NamedTuple):
    """How a radio sends."""

    container: str
    codec: str
    content_type: str
    options: dict[str, str]


FORMATS = {
    "mp3": Format("mp3", "libmp3lame", "audio/mpeg", {"write_xing": "0", "id3v2_version": "0"}),
    "ogg": Format("ogg", "libopus", "audio/ogg", {"page_duration": "20000"}),
}
BITRATE = 128_000

Pcm = NDArray[np.float32]


def marks(first_sample: int, samples: int) -> Pcm:
    """A piece of the programme, shape (n, 2); the first sample of all is number 0."""
    place = np.arange(first_sample, first_sample + samples)
    hertz = _LOWEST_HZ + _STEP_HZ * (place // RATE % _PITCHES)
    tone = _LEVEL * np.sin(2 * np.pi * hertz * (place % RATE) / RATE) * (place % RATE < _BURST_SAMPLES)
    return np.repeat(tone.astype(np.float32)[:, np.newaxis], 2, axis=1)


def find_marks(pcm: Pcm) -> list[tuple[int, int]]:
    """Onsets of the bursts in what was heard: the first sample of each, and which second it marks, modulo 40."""
    loud = np.flatnonzero(np.abs(pcm[:, 0]) > _HEARD_FROM * _LEVEL)
    if not len(loud):
        return []
    onsets = loud[np.flatnonzero(np.diff(loud, prepend=-RATE) > RATE // 4)]
    found = []
    for onset in onsets[onsets > RATE // 4]:  # what is loud from the start began before it
        burst = pcm[onset : onset + _BURST_SAMPLES, 0]
        if len(burst) == _BURST_SAMPLES:
            peak_hz = int(np.argmax(np.abs(np.fft.rfft(burst)))) * RATE / _BURST_SAMPLES
            found.append((int(onset), round((peak_hz - _LOWEST_HZ) / _STEP_HZ) % _PITCHES))
    return found


class _Sink(io.RawIOBase):
    """Takes what a muxer writes, until it is fetched."""

    def __init__(self) -> None:
        self._written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._written += data
        return len(data)

    def fetch(self) -> bytes:
        fetched = bytes(self._written)
        self._written.clear()
        return fetched


HangUp = Literal["reset", "polite"]


class Radio:
    """`async with Radio(...) as radio`: on air from `began_ns` on, whether or not somebody listens.

    Args:
        name: of its format.
        burst_s: so much of what was made already each listener gets at once.
        hang_up: how listeners are left: by a reset, or as if that was all (the last chunk of an answer in chunks).
        away_status: what new listeners are answered while it does not send.
    Attributes:
        began_ns: when sample 0 was made, on the clock of the day.
        listened_from: the first sample that each listener got.
        sending: cleared, listeners are hung up on, and new ones are refused.
        flowing: cleared, listeners get nothing, and all that they missed when it is set again.
        behind_s: by how much later than it was made the latest block was sent; little but on a busy machine.
    """

    def __init__(self, name: str, burst_s: float = 0.0, *, hang_up: HangUp = "reset", away_status: int = 503) -> None:
        self._format = FORMATS[name]
        self._hang_up = hang_up
        self._away_status = away_status
        self._burst_samples = round(burst_s * RATE)
        self.sending = asyncio.Event()
        self.sending.set()
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.began_ns = time.time_ns()
        self._exits = AsyncExitStack()
        self._base = ""
        self.listened_from: list[int] = []
        self.behind_s = 0.0

    async def __aenter__(self) -> Self:
        self._base = await self._exits.enter_async_context(served(("/radio", self._send)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sending.clear()
        self.flowing.set()
        await self._exits.aclose()

    @property
    def url(self) -> str:
        return f"{self._base}/radio"

    def made_ns(self, sample: int) -> int:
        """When a sample was made."""
        return self.began_ns + sample * NS_PER_S // RATE

    def mark_made_ns(self, second: int, heard_ns: int) -> int:
        """When the mark of a second, modulo 40, was made: the last one of its pitch before it was heard."""
        turns = (heard_ns - self.made_ns(second * RATE)) // (_PITCHES * NS_PER_S)
        return self.made_ns((turns * _PITCHES + second) * RATE)

    async def _send(self, request: web.Request) -> web.StreamResponse:
        """Each listener from now or a burst ago on, a block as soon as its last sample was made."""
        if not self.sending.is_set():
            return web.Response(status=self._away_status)
        response = web.StreamResponse(headers={"Content-Type": self._format.content_type})
        await response.prepare(request)
        sink = _Sink()
        options = self._format.options | {"flush_packets": "1"}
        with av.open(sink, "w", format=self._format.container, options=options) as container:
            stream = container.add_stream(self._format.codec, rate=RATE, layout="stereo")
            assert isinstance(stream, AudioStream)
            stream.bit_rate = BITRATE
            resampler = av.AudioResampler(format=stream.format.name, layout="stereo", rate=RATE)
            made_samples = (time.time_ns() - self.began_ns) * RATE // NS_PER_S
            next_sample = (made_samples - self._burst_samples) // BLOCK * BLOCK
            first_sample = next_sample
            self.listened_from.append(first_sample)
            while self.sending.is_set():
                await self.flowing.wait()
                due_ns = self.began_ns + (next_sample + BLOCK) * NS_PER_S // RATE
                await asyncio.sleep((due_ns - time.time_ns()) / NS_PER_S)
                self.behind_s = (time.time_ns() - due_ns) / NS_PER_S
                samples = RATE if self.behind_s > 1.0 else BLOCK  # a burst shall be one on a busy machine, too
                frame = av.AudioFrame.from_ndarray(marks(next_sample, samples).reshape(1, -1), "flt", "stereo")
                frame.sample_rate, frame.pts = RATE, next_sample - first_sample
                for part in resampler.resample(frame):
                    container.mux(stream.encode(part))
                next_sample += samples
                try:
                    await response.write(sink.fetch())
                except ConnectionError:
                    return response
        if self._hang_up == "reset" and request.transport is not None:
            connection = request.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.transport.abort()
        return response
