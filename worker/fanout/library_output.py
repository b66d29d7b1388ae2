"""What libraries written in C print to standard error becomes counted, rate-limited log events.

libdave tells each message it cannot use on file descriptor 2 and has no switch for it: a stream of bad messages would
else fill a disk. Our own log keeps the descriptor it had. Source: voice protocol reference, section 6.10.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import time

from shared.logs import get_logger

_LINES_PER_PERIOD = 5
_PERIOD_S = 60.0
_READ_BYTES = 65_536
_LONGEST_LINE = 300


class LibraryOutput:
    """Takes over file descriptor 2; must be made before logging is set up and before other threads run."""

    def __init__(self) -> None:
        # Our own lines, and the interpreter's tracebacks, go where they went before.
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        self._read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.fcntl(self._read_fd, fcntl.F_SETPIPE_SZ, _READ_BYTES)
        # Nobody reads while a library prints: a full pipe must drop lines, not stop the process.
        os.dup2(write_fd, 2)
        os.close(write_fd)
        self._period_began_s = time.monotonic()
        self._logged = 0
        self.lines = 0
        self.unlogged = 0

    def follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """Log from now on what is printed."""
        loop.add_reader(self._read_fd, self._drain)

    def unfollow(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self._read_fd)
        self._drain()

    def _drain(self) -> None:
        try:
            text = os.read(self._read_fd, _READ_BYTES).decode(errors="backslashreplace")
        except BlockingIOError:
            return
        for line in text.splitlines():
            self._take(line.strip())

    def _take(self, line: str) -> None:
        if not line:
            return
        self.lines += 1
        now_s = time.monotonic()
        if now_s - self._period_began_s > _PERIOD_S:
            self._period_began_s, self._logged = now_s, 0
        if self._logged >= _LINES_PER_PERIOD:
            self.unlogged += 1
            return
        self._logged += 1
        get_logger().warning("library.printed", line=line[:_LONGEST_LINE], unlogged=self.unlogged)
