"""The worker's handle on the child that decodes and encodes one source.

worker ──order (JSON)──▶ child ──records──▶ pipe ──▶ read() ──▶ EncodedFrame
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import site
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from shared.errors import ErrorCode, MalformedPacket, SourceError
from shared.life import Life, Watch
from shared.logs import get_logger
from shared.protocol.opus import check_frame
from shared.tasks import begin, to_its_end
from shared.text import in_words
from worker.encode.records import (
    BEAT_EVERY_S,
    HEADER_BYTES,
    LIFE_AT_BYTES,
    NEXT_ORDER,
    SILENT_DB,
    ChildOrder,
    Header,
    Kind,
    Looks,
    unpack_error,
    unpack_header,
    unpack_looks,
    write_order,
    write_rate,
)

FRAME_TIMEOUT_S = 35.0
"""How long `read` waits for one record; above the child's own time-outs, which tell more."""
CHILD_ARGUMENTS = ("-P", "-m", "worker.encode.child")
"""How the interpreter is called; the worker's process id follows."""

_PAUSES, _PAUSE_MORE_S = 2, 5.0
"""Where a pause may be longer than that, so many of them are waited for, as the child does, and a moment more."""
_MOST_ORDERS = 100
"""Carried out by one process: what libraries leave behind goes with it."""
_EXIT_TIMEOUT_S = 2.0
"""How long a child that closed its pipe may take to end before it is killed."""
_REAP_TIMEOUT_S = 30.0
"""How long a killed process may take to vanish: only a device that hangs can hold it."""
_LOOKS_WITHOUT_LIFE = 4
"""One a beat: a child that stands still is killed after 1 to 1.5 s."""
_BUFFER_BYTES = 16 * 1024
"""Read-ahead on this side of the pipe; reading pauses at twice that, and the pipe then paces the child."""
_NOT_RETRYABLE = frozenset({ErrorCode.SOURCE_FORBIDDEN, ErrorCode.CONFIG_INVALID})


@dataclass(frozen=True, slots=True)
class EncodedFrame:
    """20 ms of Opus.

    Attributes:
        packet: one Opus packet, accepted by `check_frame`.
        item: place in the playlist, from 0.
        position_samples: of the first sample encoded, within the item, at 48 kHz. Heard, it is later by the
            encoder's delay of a few milliseconds.
        rendition: of which the packet is, from 0.
        level_db: peak, in dB of full scale; -128: nothing but zeros.
    """

    packet: bytes
    item: int
    position_samples: int
    rendition: int = 0
    level_db: int = SILENT_DB


class Title(NamedTuple):
    """What is on air from here on, as the source says."""

    text: str


class Place(NamedTuple):
    """Where in live input this is."""

    number: int


Told = EncodedFrame | Looks | Title | Place


class SourceChild:
    """One running child. Read it until None or an error, then close it; also an async context manager.

    Attributes:
        complete: the end that was read is one for certain: of a file that is there to its last byte.
        waits: it has said its end or its failure, and is ready for another order.

    One task reads at a time. Nothing is tried again here.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        transport: asyncio.ReadTransport,
        pipe_closed: asyncio.Event,
        order_file: BinaryIO,
        frame_timeout_s: float,
        first_frame_timeout_s: float,
    ) -> None:
        self._process = process
        self._reader = reader
        self._transport = transport
        self._pipe_closed = pipe_closed
        self._order_file = order_file
        self._rate_ppm = 0
        self._frame_timeout_s = self._usual_timeout_s = frame_timeout_s
        self._left_s = first_frame_timeout_s
        """How long the next frame may still be waited for, whatever else is said before it."""
        self._header: Header | None = None
        self._failure: SourceError | None = None
        self._ended = False
        self._closing = False
        self._stood_still = False
        self._watching = begin(self._watch(), f"watch of child {process.pid}")
        self._orders = 1
        self.complete = self.waits = False

    @classmethod
    async def start(
        cls,
        order: ChildOrder,
        *,
        frame_timeout_s: float = FRAME_TIMEOUT_S,
        first_frame_timeout_s: float | None = None,
    ) -> Self:
        """Start a child on `order`; errors of the source itself are told by `read`.

        Args:
            order: what to encode; its URL is already checked (`worker.encode.resolve`).
            frame_timeout_s: how long one `read` may wait.
            first_frame_timeout_s: the same until the first frame, where it takes longer to get there.
        Raises: OSError: no process or pipe to be had.
        """
        starting = asyncio.ensure_future(cls._start(order, frame_timeout_s, first_frame_timeout_s or frame_timeout_s))
        try:
            return await to_its_end(starting)
        except asyncio.CancelledError:
            if not starting.exception():
                await starting.result().close()
            raise

    @classmethod
    async def _start(cls, order: ChildOrder, frame_timeout_s: float, first_frame_timeout_s: float) -> Self:
        reader = asyncio.StreamReader(limit=_BUFFER_BYTES)
        pipe_closed = asyncio.Event()
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        with os.fdopen(write_fd, "wb", buffering=0) as childs_end:
            transport = await _connect(read_fd, _PipeProtocol(reader, pipe_closed))
            order_file = _order_file(order)
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *CHILD_ARGUMENTS,
                    str(os.getpid()),
                    stdin=order_file,
                    stdout=childs_end,
                    env=child_environment(),
                    cwd="/",
                    start_new_session=True,  # a Ctrl-C at the terminal is for the worker to handle
                )
            except BaseException:
                order_file.close()
                transport.close()
                await pipe_closed.wait()
                raise
        return cls(process, reader, transport, pipe_closed, order_file, frame_timeout_s, first_frame_timeout_s)

    def again(self, order: ChildOrder, *, first_frame_timeout_s: float | None = None) -> None:
        """Have a child that waits carry out another order.

        Args: order, first_frame_timeout_s: as of `start`.
        Raises: OSError: it is dead.
        """
        assert self.waits
        self.waits = False
        write_order(self._order_file.fileno(), order)
        self._process.send_signal(NEXT_ORDER)
        self._orders += 1
        self._rate_ppm = 0
        self._frame_timeout_s = self._usual_timeout_s
        self._left_s = first_frame_timeout_s or self._frame_timeout_s
        self._failure = None
        self._ended = self.complete = False

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def set_rate(self, rate_ppm: int) -> None:
        """Have live input played by so much faster."""
        if rate_ppm != self._rate_ppm and not self._closing:
            self._rate_ppm = rate_ppm
            write_rate(self._order_file.fileno(), rate_ppm)

    async def read(self) -> Told | None:
        """Wait for the next frame, or for something said about those that follow; None once the source has ended.

        A read that is cancelled or timed out loses nothing: the next one goes on where it stopped.

        Raises: SourceError: with the child's own code; SOURCE_BROKEN when it died without a word or wrote what is no
            record or no frame; SOURCE_STALLED when nothing came in time. The first two stand for good.
        """
        if self._failure is not None:
            raise self._failure
        if self._ended:
            return None
        since_ns = time.monotonic_ns()
        try:
            async with asyncio.timeout(self._left_s):
                header, body = await self._record()
        except TimeoutError as error:
            raise SourceError("the encoding process sends no sound", code=ErrorCode.SOURCE_STALLED) from error
        except (asyncio.IncompleteReadError, OSError) as error:
            raise self._failed(await self._last_words()) from error
        except MalformedPacket as error:
            raise self._failed(f"the encoding process wrote what is no record: {error.message}") from error
        if header.kind is Kind.FRAME:
            self._left_s = self._frame_timeout_s
        else:
            self._left_s = max(0.0, self._left_s - (time.monotonic_ns() - since_ns) / 1e9)
        match header.kind:
            case Kind.END:
                self._ended, self.complete, self.waits = True, bool(body), self._orders < _MOST_ORDERS
                return None
            case Kind.ERROR:
                raise self._told(body)
            case _:
                try:
                    told = _read(header, body)
                    if isinstance(told, Looks) and told.chunk_ms:
                        pause_s = told.chunk_ms / 1_000
                        self._frame_timeout_s = max(self._frame_timeout_s, pause_s * _PAUSES + _PAUSE_MORE_S)
                    return told
                except (MalformedPacket, ValueError) as error:
                    raise self._failed(f"the encoding process wrote what is no frame: {in_words(error)}") from error

    async def close(self) -> None:
        """Kill the child, reap it, close the pipe; may be called again, at any time. Cancelled, it reaps all the same.

        Raises: TimeoutError: the kernel did not let a killed process go.
        """
        self._closing = True
        self._watching.cancel()
        self._order_file.close()
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            self._process.kill()
        self._transport.close()
        await to_its_end(self._reap())

    async def _watch(self) -> None:
        """Kill a child that stands still: to wait until its frames are missed would be to wait until they are heard."""
        life, looks = Life(self._order_file.fileno(), LIFE_AT_BYTES), Watch(_LOOKS_WITHOUT_LIFE)
        while self.waits or not looks.stands_still(life.beats):  # noqa: ASYNC110 - as above
            await asyncio.sleep(BEAT_EVERY_S)
        get_logger().error("encoder.stood_still", pid=self.pid)
        self._stood_still = True
        self._process.kill()

    async def _reap(self) -> None:
        await asyncio.gather(self._watching, return_exceptions=True)
        async with asyncio.timeout(_REAP_TIMEOUT_S):
            await self._pipe_closed.wait()
            await self._process.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _record(self) -> tuple[Header, bytes]:
        if self._header is None:
            self._header = unpack_header(await self._reader.readexactly(HEADER_BYTES))
        body = await self._reader.readexactly(self._header.length_bytes)
        header, self._header = self._header, None
        return header, body

    async def _last_words(self) -> str:
        """Why the pipe ended early: waits a moment for the exit status."""
        if self._closing:
            return "the source was closed while it was read"
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT_S):
                status = await self._process.wait()
        except TimeoutError:
            return "the encoding process closed its pipe and went on without it"
        if self._stood_still:
            return "the encoding process stood still and was killed"
        if status >= 0:
            return f"the encoding process ended without a word, exit status {status}"
        return f"the encoding process was killed by {signal.Signals(-status).name}"

    def _failed(self, message: str) -> SourceError:
        self._failure = SourceError(message, code=ErrorCode.SOURCE_BROKEN)
        return self._failure

    def _told(self, body: bytes) -> SourceError:
        """The error that the child reported."""
        try:
            told = unpack_error(body)
            code = ErrorCode(told.code)
        except (MalformedPacket, ValueError):
            return self._failed("the encoding process failed and did not say why in words known here")
        self._failure = SourceError(told.message, code=code, retryable=code not in _NOT_RETRYABLE)
        self.waits = self._orders < _MOST_ORDERS
        return self._failure


def _read(header: Header, body: bytes) -> Told:
    """One record that is no end.

    Raises: MalformedPacket, ValueError: its body is not what it should be.
    """
    match header.kind:
        case Kind.OPENED:
            return unpack_looks(body)
        case Kind.TITLE:
            return Title(body.decode())
        case Kind.PLACE:
            return Place(int(body))
        case _:
            check_frame(body)
            return EncodedFrame(body, header.item, header.position_samples, header.rendition, header.level_db)


class _PipeProtocol(asyncio.StreamReaderProtocol):
    """Feeds a reader and tells when the pipe is closed for good."""

    def __init__(self, reader: asyncio.StreamReader, closed: asyncio.Event) -> None:
        super().__init__(reader)
        self._pipe_closed = closed

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._pipe_closed.set()


async def _connect(read_fd: int, protocol: _PipeProtocol) -> asyncio.ReadTransport:
    pipe = os.fdopen(read_fd, "rb", buffering=0)
    try:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
    except BaseException:
        pipe.close()
        raise
    return transport


def child_environment() -> dict[str, str]:
    """All that a child sees of the environment: nothing of ours, no proxy, no secret."""
    environment = {
        name: value for name, value in os.environ.items() if name in ("PATH", "LANG") or name.startswith("LC_")
    }
    root = str(Path(__file__).resolve().parents[2])
    if root not in site.getsitepackages():
        environment["PYTHONPATH"] = root  # run from a checkout
    environment["OPENBLAS_NUM_THREADS"] = "1"  # numpy would map a stack and a buffer for every core
    return environment


def _order_file(order: ChildOrder) -> BinaryIO:
    """The order as a file in memory: the child reads it when it is ready, and nobody waits for that."""
    file = os.fdopen(os.memfd_create("order"), "w+b", buffering=0)
    write_order(file.fileno(), order)
    return file
