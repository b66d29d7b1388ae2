"""Lateness of a worker's sender and of a bare loop beside it: histograms that grow, read while both run."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from shared.cli.pool import LocalPool
from shared.schema.records import WorkerStats
from tests.bench.pool import BenchPool, descendants
from tests.bench.results import Median
from worker.fanout.grid import SLOT_NS, SLOTS
from worker.fanout.rows import (
    CLOCK_OFFSET_NS,
    LATENESS_BIN_US,
    LATENESS_BINS,
    SENT,
    SKIPPED,
    RowTable,
)

Histogram = NDArray[np.int64]
BIN_MS = LATENESS_BIN_US / 1_000
_POLL_S = 0.25
_STATS_WITHIN_S = 30.0
QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


def quantiles_ms(histogram: Histogram) -> dict[str, float]:
    """Upper edges of the bins that hold p50, p99, p99.9 and the last; zeros where nothing was counted."""
    total = int(histogram.sum())
    if not total:
        return dict.fromkeys(QUANTILES, 0.0)
    reached = np.cumsum(histogram)
    places = {name: int(np.searchsorted(reached, quantile * total)) for name, quantile in QUANTILES.items()}
    return {name: (place + 1) * BIN_MS for name, place in places.items()}


def medians(readings: list[dict[str, float]]) -> dict[str, Median]:
    """Each of several readings' figures over all of them."""
    return {name: Median.of([reading[name] for reading in readings]) for name in readings[0]}


async def fresh_stats(pool: BenchPool) -> list[WorkerStats]:
    """Figures that all workers told later than now: what is on Redis may be half a second old. Raises: TimeoutError."""
    now_ns = time.monotonic_ns()
    async with asyncio.timeout(_STATS_WITHIN_S):
        while not (stats := await pool.stats()) or min(one.at_ns for one in stats) <= now_ns:  # noqa: ASYNC110 - it wakes nobody
            await asyncio.sleep(_POLL_S)
    return stats


class SenderFigures:
    """What a worker's sender counts, seen through the memory that both share.

    Of that memory only the part is mapped whose place does not depend on the number of rows.
    """

    def __init__(self, worker_pid: int) -> None:
        self._table = RowTable(1, _open_rows(worker_pid))
        self._table.close()  # what is mapped stays

    def lateness(self) -> Histogram:
        """Slots by the departure of their first packet, since the worker's start.

        Those of ticks that were skipped are among the latest: whoever leaves out its worst would look good.
        """
        histogram: Histogram = self._table.lateness.astype(np.int64)
        histogram[-1] += self.skipped * SLOTS
        return histogram

    @property
    def sent(self) -> int:
        """Packets that left."""
        return int(self._table.counters[SENT])

    @property
    def skipped(self) -> int:
        """Ticks that the sender skipped."""
        return int(self._table.counters[SKIPPED])

    @property
    def phase_ns(self) -> int:
        """Where in a millisecond of CLOCK_MONOTONIC slots are due."""
        return -int(self._table.head[CLOCK_OFFSET_NS]) % SLOT_NS


def _open_rows(pid: int) -> int:
    """A descriptor of a worker's shared memory. Raises: LookupError."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if entry.readlink().name.startswith("memfd:guildcast-rows"):
                return os.open(entry, os.O_RDWR | os.O_CLOEXEC)
    raise LookupError(f"process {pid} has no rows")


def _first_to_go(pid: int) -> int:
    """The thread of a process that the kernel prefers: the sender, where it is one."""
    threads = [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    return max(threads, key=lambda thread: os.sched_getparam(thread).sched_priority)


class BareLoop(NamedTuple):
    """The bare loop, a process of its own."""

    histogram: NDArray[np.uint64]

    @classmethod
    async def start(cls, processes: LocalPool, folder: Path, worker_pid: int) -> Self:
        """Start it at the priority of a worker's sender, and half a slot beside it: neither waits for the other."""
        path = folder / "bare-timer"
        histogram = np.memmap(path, np.uint64, "w+", shape=LATENESS_BINS)
        phase_ns = SenderFigures(worker_pid).phase_ns + SLOT_NS // 2
        await processes.start("bare timer", "tests.bench.bare_timer", str(path), str(phase_ns), ready_line=True)
        bare_pid = processes.processes["bare timer"].pid
        like_pid = (descendants(worker_pid, "worker.fanout.sender") or [_first_to_go(worker_pid)])[0]
        os.setpriority(os.PRIO_PROCESS, bare_pid, os.getpriority(os.PRIO_PROCESS, like_pid))
        os.sched_setscheduler(bare_pid, os.sched_getscheduler(like_pid), os.sched_getparam(like_pid))
        return cls(histogram)

    def lateness(self) -> Histogram:
        """Slots by how late it was, since its start."""
        return self.histogram.astype(np.int64)
