"""How many more guilds a worker can take: figures in, headroom out. Pure, without a clock of its own.

A worker is full when it holds its capacity, or as many guilds as its CPU carries at what its packets really cost. For
a while it takes none at all when its pace slipped while it was busy; a machine that stands still now and then does not
go better because a worker that does little does no more. Fullness has two edges, so that nothing goes to and fro: room
is offered below the one, what comes all the same is refused above the other.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from shared.capacity import PACKETS_PER_S, Cost, limits
from shared.clock import NS_PER_S

_MEMORY_NS = 5 * NS_PER_S
"""Costs are smoothed over this time."""
_ENOUGH_PACKETS_PER_S = 100 * PACKETS_PER_S
"""Of fewer, what a process costs that does nothing would be taken for the cost of guilds."""
_PACE_COUNTS_FOR_NS = 3 * NS_PER_S
_PACE_AGAIN = 2
"""Slips of the pace before work that was given is refused; at the first no more is offered."""
_LEAST_LEAD_TICKS = 1
_BUSY = 0.5
"""Part of the CPU that may be used from which on a slip is laid to the worker's own work."""
_EDGE = 50
"""Guilds above the number that the CPU carries are refused only beyond one fiftieth of it."""


class Reading(NamedTuple):
    """Figures of a worker at one moment; all but the lead count from its start.

    Attributes:
        lead: the fewest ticks that were built ahead since the last reading.
        opened: sessions that were opened.
        guilds: sessions that are connected.
    """

    at_ns: int
    worker_cpu_ns: int
    sender_cpu_ns: int
    packets: int
    ticks_skipped: int
    lead: int
    opened: int
    guilds: int


class Admission:
    """Knows what guilds cost a worker, and what it has.

    What handshakes cost is no cost of guilds: while sessions are opened only cheaper readings of the worker are
    believed. A herd is held back by number instead, because a guild counts from the moment that it is given.

    Args:
        capacity: guilds that the worker takes at most.
        cores: of this worker, see `shared.capacity`.
        share: of each core that may be used.
    """

    def __init__(self, capacity: int, cores: float, share: float) -> None:
        self.capacity = capacity
        self._cores = cores
        self._share = share
        # Until something is known, packets cost what makes the capacity right.
        packets_us = share * 1e6 / PACKETS_PER_S / capacity
        self._cost = Cost(*[min(1.0, cores / 2) * packets_us] * 2)
        self._last: Reading | None = None
        self._slips: deque[int] = deque(maxlen=_PACE_AGAIN)
        """When the pace slipped last."""
        self._overloaded = False
        self._load = 0.0
        """How much is used of the CPU that may be, smoothed."""

    @property
    def cost(self) -> Cost:
        """CPU per packet, as far as it is known."""
        return self._cost

    @property
    def _carried(self) -> int:
        """Guilds that the CPU carries."""
        # What comes of a capacity that was turned into a cost shall be that capacity.
        carried = int(min(limits(self._cost, self._cores, self._share).values()) + 1e-6)
        # Where most guilds are silent, all that the processes do falls on few packets: the load tells more.
        return max(carried, int(self._last.guilds / self._load)) if self._last and self._load else carried

    @property
    def limit(self) -> str:
        """What would keep guilds out first: `pace`, `capacity`, or the CPU: `worker`, `sender` or `cores`."""
        if self._slips:
            return "pace"
        if self._carried >= self.capacity:
            return "capacity"
        found = limits(self._cost, self._cores, self._share)
        return min(found, key=found.__getitem__)

    def headroom(self, held: int) -> int:
        """Guilds to offer room for.

        Args:
            held: guilds that are connected, about to be, or saying goodbye.
        """
        if self._slips:
            return 0
        return max(0, min(self.capacity, self._carried) - held)

    def refuses(self, held: int) -> bool:
        """Whether one more guild is too many."""
        if held >= self.capacity or len(self._slips) >= _PACE_AGAIN:
            return True
        carried = self._carried
        return held >= carried + carried // _EDGE

    def overloaded(self, held: int) -> bool:
        """Whether guilds are kept out although the capacity would allow more; over only when there is room again."""
        if self.limit == "capacity":
            self._overloaded = False
        elif not self._overloaded:
            self._overloaded = not self.headroom(held)
        else:
            self._overloaded = self.headroom(held) <= self.capacity // _EDGE
        return self._overloaded

    def note(self, reading: Reading) -> None:
        """Take in the next figures."""
        before, self._last = self._last, reading
        if before is None:
            return
        slipped = reading.ticks_skipped > before.ticks_skipped or reading.lead < _LEAST_LEAD_TICKS
        load = self._used(before, reading)
        weight = 1 - math.exp((before.at_ns - reading.at_ns) / _MEMORY_NS)
        self._load += (weight if self._load else 1.0) * (load - self._load)
        if slipped and load >= _BUSY:
            self._slips.append(reading.at_ns)
        while self._slips and reading.at_ns - self._slips[0] >= _PACE_COUNTS_FOR_NS:
            self._slips.popleft()
        self._learn(before, reading)

    def _used(self, before: Reading, now: Reading) -> float:
        """How much was used of the CPU that may be."""
        worker_ns, sender_ns = now.worker_cpu_ns - before.worker_cpu_ns, now.sender_cpu_ns - before.sender_cpu_ns
        used_ns = max(worker_ns, sender_ns, (worker_ns + sender_ns) / self._cores)
        return used_ns / max(1, now.at_ns - before.at_ns) / self._share

    def _learn(self, before: Reading, now: Reading) -> None:
        span_ns, packets = now.at_ns - before.at_ns, now.packets - before.packets
        worker_ns, sender_ns = now.worker_cpu_ns - before.worker_cpu_ns, now.sender_cpu_ns - before.sender_cpu_ns
        if packets * NS_PER_S < _ENOUGH_PACKETS_PER_S * span_ns or packets <= 0 or worker_ns <= 0 or sender_ns <= 0:
            return  # too little to learn from, or a sender that began anew
        weight = 1 - math.exp(-span_ns / _MEMORY_NS)
        worker_us, sender_us = self._cost
        heard_us = worker_ns / 1e3 / packets
        calm = (now.opened, now.guilds) == (before.opened, before.guilds)
        if calm or heard_us < worker_us:
            worker_us += weight * (heard_us - worker_us)
        sender_us += weight * (sender_ns / 1e3 / packets - sender_us)
        self._cost = Cost(worker_us, sender_us)
