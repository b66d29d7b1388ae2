"""Signs of life: a counter in a file in memory that a process moves on, and whoever started it looks at.

A process that is stopped, or hangs, dies to nobody: its sockets stay open and its pipe just has nothing to say. Looks
are counted, and not seconds: where the whole machine stood still, whoever looks did, too.
"""

from __future__ import annotations

import os
import struct

_COUNTER = struct.Struct(">Q")


class Life:
    """The counter.

    Args:
        fd: of the file, as it was handed on; None makes it.
        at_bytes: where in it the counter stands (u64, big endian).
    """

    def __init__(self, fd: int | None = None, at_bytes: int = 0) -> None:
        self.fd = os.memfd_create("guildcast-life", os.MFD_CLOEXEC) if fd is None else fd
        self._at_bytes = at_bytes
        self._said = 0

    def beat(self) -> None:
        """Say that one lives."""
        self._said += 1
        os.pwrite(self.fd, _COUNTER.pack(self._said), self._at_bytes)

    @property
    def beats(self) -> int:
        """How often that was said; 0 before that."""
        told = os.pread(self.fd, _COUNTER.size, self._at_bytes)
        return int(_COUNTER.unpack(told)[0]) if len(told) == _COUNTER.size else 0

    def close(self) -> None:
        """Give the file back."""
        os.close(self.fd)


class Watch:
    """What somebody who looks now and then has seen; before the first sign of life nothing is missed.

    Args:
        allowed: looks in a row that may see nothing new.
    """

    def __init__(self, allowed: int) -> None:
        self._allowed = allowed
        self._seen = 0
        self._missed = 0

    def stands_still(self, beats: int) -> bool:
        """Whether there was no sign of life for too many looks, this one included."""
        self._missed = self._missed + 1 if beats and beats == self._seen else 0
        self._seen = beats
        return self._missed > self._allowed
