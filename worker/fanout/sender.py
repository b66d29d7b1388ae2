"""The sender: a process that does nothing but send the packets of a slot when the slot is due.

`python -m worker.fanout.sender <memory fd> <rows> <sockets fd> <parent pid> <clock error s> <clock error ppm>`

It reads rows and sockets, sleeps until the next slot and calls `sendmmsg`; it awaits nothing, logs nothing, and keeps
nothing once its plan stands. It stops when rows run dry and dies with its worker. On SIGTERM it exits as soon as
nothing is left to send, so that a signal to a whole process group does not cut off the closing silence.

Source: design sections 2 and 3, "Why a sender"; clock_nanosleep(2), sendmmsg(2).
"""

from __future__ import annotations

import array
import ctypes
import errno
import gc
import os
import select
import signal
import socket
import sys
import time

import numpy as np
from numpy.typing import NDArray

from shared.clock import LocalClock
from shared.process import die_with_parent, no_core_dump
from worker.fanout.grid import SLOTS, TICK_NS, slot_time_ns
from worker.fanout.rows import (
    CLOCK_OFFSET_NS,
    DROPPED,
    GRANTED,
    LATENESS_BIN_US,
    LATENESS_BINS,
    PACKET_BYTES,
    PRIORITY,
    REFUSED,
    RING_TICKS,
    SENDER_CORE,
    SENDER_CPU_NS,
    SENDER_ERRNO,
    SENT,
    SKIPPED,
    SOCKETS,
    RowTable,
    fence,
)

TOO_LATE_NS = 3 * TICK_NS
"""What is late by three ticks or more is skipped; less is made up for, two packets of a guild in one tick at most."""
_FULL = (errno.EAGAIN, errno.ENOBUFS)
"""Errors that say nothing about where a packet goes."""
_TRIES = 3
"""Of a packet that comes back with an error."""
_SOCKETS_WITHIN_S = 0.3
_RECEIVE_EVERY_TICKS = 8
_TERM_GRACE_NS = 2_000_000_000
_CLOCK_MONOTONIC = 1
_TIMER_ABSTIME = 1
_PR_SET_TIMERSLACK = 29

_libc = ctypes.CDLL(None, use_errno=True)
_sendmmsg = _libc.sendmmsg
_sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
_sendmmsg.restype = ctypes.c_int

IOVEC = np.dtype([("base", np.uintp), ("length", np.uintp)])
MMSGHDR = np.dtype(
    {
        "names": ["name", "namelen", "iov", "iovlen", "control", "controllen", "flags", "sent"],
        "formats": [np.uintp, np.uint32, np.uintp, np.uintp, np.uintp, np.uintp, np.int32, np.uint32],
        "offsets": [0, 8, 16, 24, 32, 40, 48, 56],
        "itemsize": 64,
    }
)
"""`struct mmsghdr` of 64-bit Linux."""


class Timer:
    """Sleeps until a reading of CLOCK_MONOTONIC, as exactly as the kernel can."""

    def __init__(self) -> None:
        _libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
        self._moment = (ctypes.c_long * 2)()

    def sleep_until(self, raw_ns: int) -> None:
        self._moment[0], self._moment[1] = divmod(raw_ns, 1_000_000_000)
        while error := _libc.clock_nanosleep(_CLOCK_MONOTONIC, _TIMER_ABSTIME, self._moment, None):
            if error != errno.EINTR:
                raise OSError(error, "clock_nanosleep")


class SlotPlan:
    """The rows of one slot in the order of their sockets, with one `mmsghdr` each.

    Their memory is small enough to stay in the cache from tick to tick; only where packets lie changes.

    Args:
        table: the shared memory.
        rows: row numbers, sorted by socket.
        fds: file descriptor of each socket number.
    """

    def __init__(self, table: RowTable, rows: NDArray[np.intp], fds: list[int]) -> None:
        self.leaving_ns = 0
        """When the first packet of the last `send` was handed to the kernel."""
        self._rows = rows
        self._sockets = table.socket[rows]
        self._fds = fds
        self._batches = self._batches_of(self._sockets)
        count = len(rows)
        self._due = np.empty(count, np.int64)
        self._length = np.empty(count, np.uint32)
        self._first = table.packets.ctypes.data + rows.astype(np.uintp) * np.uintp(table.packets.strides[0])
        self._names = table.address[rows]
        self._iovecs = np.zeros(count, IOVEC)
        self._messages = np.zeros(count, MMSGHDR)
        self._messages["name"] = self._names.ctypes.data + np.arange(count) * self._names.shape[1]
        self._messages["namelen"] = self._names.shape[1]
        self._messages["iovlen"] = 1
        self._messages["iov"] = self._iovecs.ctypes.data + np.arange(count) * IOVEC.itemsize
        self._base, self._size = self._iovecs["base"], self._iovecs["length"]
        self._address = self._messages.ctypes.data

    def _batches_of(self, sockets: NDArray[np.uint16]) -> list[tuple[int, int, int]]:
        """(fd, first, count) per run of rows on one socket."""
        if not len(sockets):
            return []
        starts = np.flatnonzero(np.diff(sockets.astype(np.int32), prepend=-1))
        ends = np.append(starts[1:], len(sockets))
        return [
            (self._fds[int(sockets[start])], int(start), int(end - start))
            for start, end in zip(starts, ends, strict=True)
        ]

    def send(self, table: RowTable, tick: int) -> tuple[int, int]:
        """Send what is built for a tick; returns packets sent and dropped."""
        ring = tick % RING_TICKS
        table.due[ring].take(self._rows, out=self._due)
        fence()
        table.length[ring].take(self._rows, out=self._length)
        built = self._due == tick
        number = np.count_nonzero(built)
        if not number:
            return 0, 0
        self._aim(ring, self._length)
        if number == len(built):
            self.leaving_ns = time.monotonic_ns()
            return self._send(table, self._address, self._batches, self._rows)
        some, batches = self._messages[built], self._batches_of(self._sockets[built])
        self.leaving_ns = time.monotonic_ns()
        return self._send(table, some.ctypes.data, batches, self._rows[built])

    def _aim(self, ring: int, lengths: NDArray[np.uint32] | int) -> None:
        np.add(self._first, ring * PACKET_BYTES, out=self._base, casting="unsafe")
        self._size[:] = lengths

    def prepare(self, length: int) -> None:
        """Aim at the first tick of the ring, whatever stands there."""
        self._aim(0, length)

    def send_prepared(self, table: RowTable) -> tuple[int, int]:
        """Send again what was aimed at: the floor that benchmarks compare with."""
        return self._send(table, self._address, self._batches, self._rows)

    @staticmethod
    def _send(
        table: RowTable, address: int, batches: list[tuple[int, int, int]], rows: NDArray[np.intp]
    ) -> tuple[int, int]:
        sent = dropped = 0
        for fd, first, count in batches:
            last = first + count
            tries = 0
            while first < last:
                done = _sendmmsg(fd, address + first * 64, last - first, socket.MSG_DONTWAIT)
                if done > 0:
                    sent += done
                    first += done
                    tries = 0
                    continue
                error = ctypes.get_errno()
                if error == errno.EINTR:
                    continue
                tries += 1
                if error not in _FULL and tries < _TRIES:
                    continue  # what became of an earlier packet is told to the next one, whoever's that is
                # A full buffer or an unreachable peer costs one packet, not the connection and not its neighbours.
                table.counters[SENDER_ERRNO] = error
                if error not in _FULL:
                    table.error[rows[first]] = error
                dropped += 1
                first += 1
                tries = 0
        return sent, dropped


class Sender:
    """Sends slot after slot."""

    def __init__(self, table: RowTable, sockets: socket.socket, clock: LocalClock) -> None:
        self._table = table
        self._sockets = sockets
        self._clock = clock
        self._timer = Timer()
        self._fds: list[int] = []
        self._layouts = [-1] * SLOTS
        self._plans: list[SlotPlan | None] = [None] * SLOTS
        self._left_ns = [[0] * SLOTS, [0] * SLOTS]
        """When the last packets of even and odd ticks left, per slot."""
        self._stopping_at_ns: int | None = None
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _stop(self, *_: object) -> None:
        self._stopping_at_ns = time.monotonic_ns()

    def _replan(self, slot: int) -> None:
        """Take over a change of the rows in a slot; the sockets that it needs are on their way."""
        table = self._table
        self._layouts[slot] = int(table.layout[slot])
        fence()
        self._receive_sockets()
        while len(self._fds) < table.head[SOCKETS]:
            if not select.select([self._sockets], [], [], _SOCKETS_WITHIN_S)[0]:
                raise SystemExit("sockets that rows name did not come")  # the next sender is given all of them
            self._receive_sockets()
        rows = np.flatnonzero((table.active == 1) & (table.slot == slot))
        rows = rows[np.argsort(table.socket[rows], kind="stable")]
        self._plans[slot] = SlotPlan(table, rows, self._fds) if len(rows) else None

    def _receive_sockets(self) -> None:
        while True:
            fds = array.array("i")
            try:
                body, ancillary, _, _ = self._sockets.recvmsg(256, socket.CMSG_SPACE(64 * fds.itemsize))
            except BlockingIOError:
                return
            if not body:
                raise SystemExit(0)
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
            self._fds += fds

    def _raw_ns(self, tick: int, slot: int) -> int:
        """CLOCK_MONOTONIC at which a slot is due."""
        return self._clock.to_raw_ns(slot_time_ns(tick, slot) - int(self._table.head[CLOCK_OFFSET_NS]))

    def run(self) -> None:
        """Send until told to stop."""
        table = self._table
        table.counters[SENDER_CORE] = _libc.sched_getcpu() + 1
        table.counters[PRIORITY] = GRANTED if _go_first() else REFUSED
        now_ns = self._clock.now_ns() + int(table.head[CLOCK_OFFSET_NS])
        tick, slot = now_ns // TICK_NS + 1, 0
        quiet_since_ns = time.monotonic_ns()
        while True:
            if table.layout[slot] != self._layouts[slot]:
                self._replan(slot)
            plan = self._plans[slot]
            if plan is not None or slot == 0:
                due_ns = self._raw_ns(tick, slot)
                left_ns = self._left_ns[tick % 2]
                self._timer.sleep_until(max(due_ns, left_ns[slot] + TICK_NS))
                now_ns = time.monotonic_ns()
                late_ns = now_ns - due_ns
                if late_ns >= TOO_LATE_NS:
                    missed = late_ns // TICK_NS
                    table.counters[SKIPPED] += np.uint64(missed)
                    table.sent_tick[:slot] = tick + missed
                    table.sent_tick[slot:] = tick + missed - 1
                    tick += missed
                    continue
                left_ns[slot] = now_ns
                table.taken_tick[slot] = tick  # before a row is looked at
                if plan is not None:
                    fence()
                    sent, dropped = plan.send(table, tick)
                    if sent or dropped:
                        quiet_since_ns = due_ns
                        table.counters[SENT] += np.uint64(sent)
                        table.counters[DROPPED] += np.uint64(dropped)
                        late_us = (plan.leaving_ns - due_ns) // 1_000
                        table.lateness[max(0, min(LATENESS_BINS - 1, late_us // LATENESS_BIN_US))] += np.uint64(1)
            table.sent_tick[slot] = tick
            slot += 1
            if slot == SLOTS:
                slot = 0
                tick += 1
                table.counters[SENDER_CORE] = _libc.sched_getcpu() + 1
                table.counters[SENDER_CPU_NS] = time.process_time_ns()
                if not tick % _RECEIVE_EVERY_TICKS:
                    self._receive_sockets()  # also those that no row names yet, so that the worker never waits
                if self._stopping_at_ns is not None:
                    now_ns = time.monotonic_ns()
                    if now_ns - self._stopping_at_ns > _TERM_GRACE_NS or now_ns - quiet_since_ns > 10 * TICK_NS:
                        return


def _go_first() -> bool:
    """Ask the kernel to run this process whenever it is due; False where it does not.

    Without it, whoever else computes on this core may hold up a batch for milliseconds. It takes CAP_SYS_NICE or a
    limit of real-time priority (systemd: LimitRTPRIO=1, Docker: --ulimit rtprio=1). Source: sched(7).
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        return False
    return True


def main(arguments: list[str]) -> None:
    memory_fd, rows, sockets_fd, parent = (int(argument) for argument in arguments[:4])
    die_with_parent(parent, signal.SIGKILL)
    no_core_dump()
    clock = LocalClock(float(arguments[4]), float(arguments[5]))
    sockets = socket.socket(fileno=sockets_fd)
    sockets.setblocking(False)
    table = RowTable(rows, memory_fd)
    sender = Sender(table, sockets, clock)
    gc.collect()
    gc.freeze()
    gc.disable()
    sender.run()


if __name__ == "__main__":
    main(sys.argv[1:])
