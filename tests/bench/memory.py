"""What processes hold of memory. Source: proc(5), /proc/pid/smaps_rollup."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Memory(NamedTuple):
    """KiB of one process, or of several; the proportional size counts a shared page once over all who map it."""

    resident: int
    proportional: int
    private: int

    @classmethod
    def of(cls, pid: int) -> Memory:
        """Of a process that lives."""
        lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        kib = {words[0]: int(words[1]) for words in lines}
        return cls(kib["Rss:"], kib["Pss:"], kib["Private_Clean:"] + kib["Private_Dirty:"])
