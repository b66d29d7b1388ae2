"""Signs of life: a counter in shared memory that a process moves on, and whoever started it looks at.

A process that is stopped, or hangs, dies to nobody: its sockets stay open and its pipe just has nothing to say. Looks
are counted, and not seconds: where the whole machine stood still, whoever looks did, too.
"""

from __future__ import annotations

import mmap
import os
import struct

_COUNTER = struct.Struct("=Q")


class Life:
    """The counter.

    Args:
        fd: of the memory, as it was handed on; None makes it.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("guildcast-life", os.MFD_CLOEXEC) if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, _COUNTER.size)
        self._memory = mmap.mmap(self.fd, _COUNTER.size)

    def beat(self) -> None:
        """Say that one lives."""
        _COUNTER.pack_into(self._memory, 0, self.beats + 1)

    @property
    def beats(self) -> int:
        """How often that was said."""
        return int(_COUNTER.unpack_from(self._memory)[0])

    def close(self) -> None:
        """Give memory and descriptor back."""
        self._memory.close()
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
