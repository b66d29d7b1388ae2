"""The bare loop: a timerfd that fires at every slot of the grid, and nothing is done then but noting how late it is.

`python -m tests.bench.bare_timer <file> <phase ns>`

What a machine does to this loop, nobody who sends from user space can better. It writes its histogram into a file that
others map, with the bins of the sender's, and ends on SIGTERM. The phase is where in a millisecond it fires.

Source: timerfd_create(2); `os.timerfd_create` is not in Python 3.11.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time

import numpy as np

from worker.fanout.grid import SLOT_NS
from worker.fanout.rows import LATENESS_BIN_US, LATENESS_BINS

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1


def _timer(first_ns: int) -> int:
    """A descriptor of a timer that fires each slot, the first time when CLOCK_MONOTONIC reads `first_ns`."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.timerfd_create(_CLOCK_MONOTONIC, os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create")
    interval_and_first = (ctypes.c_long * 4)(0, SLOT_NS, *divmod(first_ns, 1_000_000_000))
    if libc.timerfd_settime(fd, _TFD_TIMER_ABSTIME, interval_and_first, None):
        raise OSError(ctypes.get_errno(), "timerfd_settime")
    return fd


def main(path: str, phase_ns: int) -> None:
    histogram = np.memmap(path, np.uint64, "r+", shape=LATENESS_BINS)
    due_ns = (time.monotonic_ns() // SLOT_NS + 2) * SLOT_NS + phase_ns % SLOT_NS
    timer = _timer(due_ns)
    due_ns -= SLOT_NS
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    gc.freeze()
    gc.disable()
    while True:
        fired = int.from_bytes(os.read(timer, 8), sys.byteorder)
        now_ns = time.monotonic_ns()
        for _ in range(fired):  # a slot that was slept through is late as well
            due_ns += SLOT_NS
            late_us = (now_ns - due_ns) // 1_000
            histogram[min(late_us // LATENESS_BIN_US, LATENESS_BINS - 1)] += np.uint64(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
