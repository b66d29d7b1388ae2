"""The child that decodes and encodes one source: `python -m worker.encode.child <pid of the worker>`.

An order comes in as one line of JSON on stdin, records go out on stdout (`worker.encode.records`). The pipe paces it:
it encodes as fast as records are taken. It knows no Redis and holds no secret but its source's own, because what it
decodes is untrusted. After END or ERROR it waits for the next order: to start anew costs a third of a second of CPU,
and a station that is away is opened each second.

Exit status: 0 when nobody reads any more; anything else is a death without a word.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import av.logging
import msgspec

from shared.errors import ErrorCode, GuildcastError
from shared.life import Life
from shared.text import in_words
from worker.encode.decode import Hooks, decode
from worker.encode.opus import OpusEncoder
from worker.encode.pcm import FRAME_SAMPLES, peak_db
from worker.encode.records import (
    BEAT_EVERY_S,
    LIFE_AT_BYTES,
    NEXT_ORDER,
    ChildOrder,
    Kind,
    Looks,
    pack,
    pack_error,
    read_order,
    read_rate,
)

MEMORY_LIMIT_BYTES = 1024**3
"""Limit of the address space: see `confine`."""
PREROLL_FRAMES = 4
"""Encoded and dropped before a start within a source: a fresh encoder begins with silence of its own, which listeners
would hear as a click where it goes on for another one. After four frames the seam is like any other place."""

_PR_SET_PDEATHSIG = 1


_LONGEST_TITLE = 500


class ReaderGone(Exception):
    """Nobody reads the pipe any more: there is nothing left to do."""


def confine(parent_pid: int) -> None:
    """Take from this process what decoding does not need.

    It dies with its parent, leaves no core, and its address space is limited. Interpreter, FFmpeg and numpy at work
    map about 250 MB, 60 of them resident, whatever the source is; the limit is four times that, for cover art, large
    indices and the frames of a film that FFmpeg looks at while opening. A file that asks for absurd amounts fails.

    Raises: SystemExit: the parent is gone already; it died before it could take this process with it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        raise SystemExit("the worker that started this process is gone")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))


class RecordWriter:
    """Writes records to a pipe, whole and at once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, record: bytes) -> None:
        """Block until all of `record` is in the pipe.

        Raises: ReaderGone: the reader closed its end.
        """
        left = memoryview(record)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except BrokenPipeError as error:
            raise ReaderGone from error


class Reporting(Hooks):
    """Writes what decoding finds out as records."""

    def __init__(self, writer: RecordWriter, order_fd: int) -> None:
        self._writer = writer
        self._order_fd = order_fd
        self.complete = False

    def opened(self, looks: Looks) -> None:
        self._writer.write(pack(Kind.OPENED, msgspec.json.encode(looks)))

    def titled(self, title: str) -> None:
        self._writer.write(pack(Kind.TITLE, title[:_LONGEST_TITLE].encode("utf-8", "replace")))

    def placed(self, number: int) -> None:
        self._writer.write(pack(Kind.PLACE, str(number).encode()))

    def ended(self, *, complete: bool) -> None:
        self.complete = complete

    def rate_ppm(self) -> int:
        return read_rate(self._order_fd)


def run(order: ChildOrder, writer: RecordWriter, hooks: Reporting) -> None:
    """Carry out one order, to its END or its ERROR record.

    Raises: ReaderGone.
    """
    position = order.start_samples
    preroll_frames = min(PREROLL_FRAMES, order.start_samples // FRAME_SAMPLES)
    begin_samples = order.start_samples - preroll_frames * FRAME_SAMPLES
    try:
        encoder = OpusEncoder(order.opus)
        blocks = decode(
            order.url,
            folder=Path(order.folder) if order.folder else None,
            kind=order.kind,
            loop=order.loop,
            start_samples=begin_samples,
            place=order.place,
            headers=order.headers,
            hooks=hooks,
        )
        for number, block in enumerate(blocks):
            packet = encoder.encode(block.pcm)
            if number < preroll_frames:
                continue
            writer.write(pack(Kind.FRAME, packet, level_db=peak_db(block.pcm), position_samples=block.position_samples))
            position = block.position_samples + FRAME_SAMPLES
        for packet in encoder.flush():
            writer.write(pack(Kind.FRAME, packet, position_samples=position))
            position += FRAME_SAMPLES
    except GuildcastError as error:
        writer.write(pack_error(error.code, error.message))
        return
    except ReaderGone:
        raise
    except Exception as error:  # noqa: BLE001 - a defect of this side, or of a library: told, and tried again
        writer.write(pack_error(ErrorCode.SOURCE_FAILED, f"internal error: {type(error).__name__}"))
        return
    writer.write(pack(Kind.END, b"\x01" if hooks.complete else b"", position_samples=position))


def live(order_fd: int) -> None:
    """Say again and again that this process runs: one that was stopped looks like a source that has nothing to say."""
    life = Life(order_fd, LIFE_AT_BYTES)
    while True:
        life.beat()
        time.sleep(BEAT_EVERY_S)


def main() -> int:
    """Read an order and carry it out, until it is killed."""
    confine(parent_pid=int(sys.argv[1]))
    av.logging.set_level(None)
    # Whatever a library prints must not get among the records.
    writer = RecordWriter(os.dup(sys.stdout.fileno()))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    order_fd = sys.stdin.fileno()
    signal.pthread_sigmask(signal.SIG_BLOCK, {NEXT_ORDER})
    threading.Thread(target=live, args=(order_fd,), daemon=True).start()
    try:
        while True:
            try:
                order = read_order(order_fd)
            except msgspec.MsgspecError as error:
                writer.write(pack_error(ErrorCode.CONFIG_INVALID, f"unreadable order: {in_words(error)}"))
            else:
                run(order, writer, Reporting(writer, order_fd))
            signal.sigwait({NEXT_ORDER})
    except ReaderGone:
        return 0


if __name__ == "__main__":
    sys.exit(main())
