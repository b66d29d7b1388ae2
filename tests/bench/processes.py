"""What processes take of the machine, read from outside."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

_WHOLE_PROCESS_SCHEDULED = 2
"""Source: clock_getcpuclockid(3) of glibc: the clock of process p is ~p << 3, with this for all of its threads."""


def exact_cpu_ns(pid: int) -> int:
    """CPU time of a living process so far, to the nanosecond: /proc counts in hundredths of a second.

    Raises: OSError: it is gone.
    """
    return time.clock_gettime_ns((~pid << 3) | _WHOLE_PROCESS_SCHEDULED)


class Memory(NamedTuple):
    """KiB of one process; the proportional size counts a shared page once over all who map it.

    Source: proc(5), /proc/pid/smaps_rollup.
    """

    resident: int
    proportional: int
    private: int

    @classmethod
    def of(cls, pid: int) -> Memory:
        """Of a process that lives."""
        lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        kib = {words[0]: int(words[1]) for words in lines}
        return cls(kib["Rss:"], kib["Pss:"], kib["Private_Clean:"] + kib["Private_Dirty:"])
