"""The memory that a fan-out worker and its sender share: one row of built packets per connection. Layout only.

The worker writes packets ahead of time, the sender reads them when their slot is due. A packet counts when its `due`
tick is the tick being sent; it is written last. Counters of the sender are written by the sender alone; the errors that
it leaves are taken away by the worker.

Neither process waits for the other, so four orders have to hold, and `fence` is what holds them:

    worker                                     sender
    packet, length | fence | due               due        | fence | length, packet
    due = 0        | fence | taken_tick        taken_tick | fence | due
    row            | fence | layout            layout     | fence | row

The last column of the worker says what the first one of it did; the sender looks in the opposite order. In the second
line each writes and then reads what the other writes: at least one of them sees it, so that a packet is either taken
back or sent, never both. A processor may swap that even where it keeps stores in order, as x86 does; ARM may swap all.
A word of 8 bytes is read and written whole.
"""

from __future__ import annotations

import mmap
import os
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.fanout.grid import SLOTS

RING_TICKS = 24
"""Packets per row: twenty built ahead, the one due, and three for a sender that comes late."""
MOST_AHEAD_TICKS = RING_TICKS - 4
PACKET_BYTES = 1344
"""RTP header 12 + Opus 1275 + end-to-end encryption 16 + tag 16 + nonce 4 to 24, rounded up to cache lines."""
ADDRESS_BYTES = 16
LATENESS_BINS = 3_072
LATENESS_BIN_US = 20
_PAGE = mmap.PAGESIZE

# words of the head
CLOCK_OFFSET_NS, SOCKETS = 0, 1
_HEAD_WORDS = 8
# words of the sender's counters
SENT, DROPPED, SKIPPED, SENDER_CPU_NS, SENDER_ERRNO, PRIORITY = 0, 1, 2, 3, 4, 5
SENDER_CORE = 6
"""Number of the core that the sender runs on, plus one; 0 while it is not known."""
GRANTED, REFUSED = 1, 2
"""What became of the sender's wish for real-time priority."""
_COUNTER_WORDS = 8

HEAD = np.dtype(
    {
        "names": ["flags", "sequence", "timestamp", "ssrc"],
        "formats": [">u2", ">u2", ">u4", ">u4"],
        "offsets": [0, 2, 4, 8],
        "itemsize": 12,
    }
)
"""An RTP header as numpy sees it."""


_FENCE = threading.Lock()


def fence() -> None:
    """Have other processes see what was read and written before this ahead of what is read and written after it.

    Stores of numpy are plain ones, and a system call promises nothing either. A lock that is given back (release) and
    taken again (acquire) is a full barrier on x86 and on 64-bit ARM, where an acquire never overtakes a release. Whose
    lock it is does not matter: nobody else ever takes this one.

    Source: POSIX.1-2017, XBD 4.12, "Memory Synchronization"; Arm Architecture Reference Manual, B2.3,
    "Barrier-ordered-before"; Linux, kernel/sched/membarrier.c ("system call entry is not a mb").
    """
    with _FENCE:
        pass
    with _FENCE:
        pass


def _rounded(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


class RowTable:
    """Views on the shared memory.

    Attributes:
        head: i64 words: clock offset (common minus local, ns), sockets that rows may name.
        layout: i64 per slot, changed whenever the rows in it change.
        counters: u64 words written by the sender.
        lateness: u64 histogram of slots by the departure of their first packet, bins of 20 us, the last one open.
        taken_tick, sent_tick: i64 per slot, last tick that the sender began to send, and is through with.
        active, slot, socket, address: per row, who it is sent by and to (`sockaddr_in`).
        error: per row, what the kernel said of its last packet that could not leave (errno); the worker sets it to 0.
        due, length: (ring, row): tick for which a packet is built, bytes on the wire.
        packets: (row, ring, byte): what is built at once for a row lies side by side.
    """

    def __init__(self, rows: int, fd: int | None = None) -> None:
        fields: list[tuple[str, tuple[int, ...], Any]] = [
            ("head", (_HEAD_WORDS,), np.int64),
            ("counters", (_COUNTER_WORDS,), np.uint64),
            ("lateness", (LATENESS_BINS,), np.uint64),
            ("layout", (SLOTS,), np.int64),
            ("taken_tick", (SLOTS,), np.int64),
            ("sent_tick", (SLOTS,), np.int64),
            ("active", (rows,), np.uint8),
            ("slot", (rows,), np.uint8),
            ("socket", (rows,), np.uint16),
            ("address", (rows, ADDRESS_BYTES), np.uint8),
            ("error", (rows,), np.uint16),
            ("due", (RING_TICKS, rows), np.int64),
            ("length", (RING_TICKS, rows), np.uint32),
            ("packets", (rows, RING_TICKS, PACKET_BYTES), np.uint8),
        ]
        sizes = [_rounded(int(np.prod(shape)) * np.dtype(kind).itemsize) for _, shape, kind in fields]
        self.rows = rows
        self.fd = os.memfd_create("guildcast-rows", os.MFD_CLOEXEC) if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, sum(sizes))
        self._memory = mmap.mmap(self.fd, sum(sizes))
        self.head: NDArray[np.int64]
        self.counters: NDArray[np.uint64]
        self.lateness: NDArray[np.uint64]
        self.layout: NDArray[np.int64]
        self.taken_tick: NDArray[np.int64]
        self.sent_tick: NDArray[np.int64]
        self.active: NDArray[np.uint8]
        self.slot: NDArray[np.uint8]
        self.socket: NDArray[np.uint16]
        self.address: NDArray[np.uint8]
        self.error: NDArray[np.uint16]
        self.due: NDArray[np.int64]
        self.length: NDArray[np.uint32]
        self.packets: NDArray[np.uint8]
        at = 0
        for (name, shape, kind), size in zip(fields, sizes, strict=True):
            view = np.ndarray(shape, kind, self._memory, at)
            setattr(self, name, view)
            at += size

    def close(self) -> None:
        """Give the file descriptor back; the memory goes with the last view on it."""
        os.close(self.fd)


def lateness_quantile_us(histogram: NDArray[np.uint64], quantile: float) -> int:
    """Upper edge of the bin that holds a quantile of all that was counted, 0 where there is nothing."""
    total = int(histogram.sum())
    if not total:
        return 0
    place = int(np.searchsorted(np.cumsum(histogram), quantile * total))
    return (min(place, LATENESS_BINS - 1) + 1) * LATENESS_BIN_US
