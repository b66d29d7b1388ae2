"""A standard error that nobody waits for.

It may be a pipe that nobody reads, and a write to a full pipe takes as long as that lasts: the pace would wait with it,
and every guild. So a thread of its own writes, and who has something to say leaves it in a queue. The descriptor stays
as it is: other processes share it, and O_NONBLOCK would be theirs as well.
"""

from __future__ import annotations

import io
import os
import queue
import select
import threading
from collections.abc import Callable

MOST_LINES = 2_000
"""That wait to be written. What comes while so many do is dropped and counted."""


class Outlet(io.TextIOBase):
    """Takes text at once, and writes it line by line when there is room.

    Args:
        fd: where to.
        tell_dropped: told how many lines were dropped as soon as one goes through; what it writes here is not dropped.
    """

    def __init__(self, fd: int, tell_dropped: Callable[[int], None], most_lines: int = MOST_LINES) -> None:
        super().__init__()
        self._fd = fd
        self._tell_dropped = tell_dropped
        self._most_lines = most_lines
        self._begun = ""
        """A line that has no end yet."""
        self._dropped = 0
        self._lock = threading.RLock()
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="outlet", daemon=True)
        self._writer.start()

    @property
    def waiting(self) -> int:
        """Lines that nobody has begun to write."""
        return self._lines.qsize()

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            lines, end, self._begun = (self._begun + text).rpartition("\n")
            if end:
                self._leave(lines + end)
        return len(text)

    def flush(self) -> None:
        """Let a line go that has no end yet; waits for nobody."""
        with self._lock:
            begun, self._begun = self._begun, ""
            if begun:
                self._leave(begun)

    def drain(self, within_s: float) -> bool:
        """Have everything written that waits, for so long at most; whether all of it was. Nothing is taken any more."""
        self.flush()
        self._lines.put(None)
        self._writer.join(within_s)
        return not self._writer.is_alive()

    def _leave(self, text: str) -> None:
        if self.waiting >= self._most_lines and threading.current_thread() is not self._writer:
            self._dropped += 1
        else:
            self._lines.put(text.encode(errors="backslashreplace"))

    def _write_all(self) -> None:
        while True:
            line = self._lines.get()
            if line is not None:
                self._write(line)
            elif self._lines.empty():
                return
            else:
                self._lines.put(None)  # something was told behind the end

    def _write(self, line: bytes) -> None:
        while line:
            try:
                line = line[os.write(self._fd, line) :]
            except BlockingIOError:  # somebody else made it so, for all who have it
                room = select.poll()
                room.register(self._fd, select.POLLOUT)
                room.poll()
            except OSError:  # nobody will ever read it
                with self._lock:
                    self._dropped += 1
                return
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self._tell_dropped(dropped)
