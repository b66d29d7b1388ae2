"""Who carries what: items to workers by headroom. Pure."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple, TypeVar

_Item = TypeVar("_Item", bound=Hashable)


class Room(NamedTuple):
    """What is known of a worker's room.

    Attributes:
        headroom: what it told with its last renewal.
        held: what it had taken up by then.
        assigned: what the coordinator has given it, told or not.
    """

    worker: str
    headroom: int
    held: int
    assigned: int

    @property
    def free(self) -> int:
        """Room left once everything that was assigned, and not counted by the worker yet, has arrived."""
        on_the_way = max(0, self.assigned - self.held)
        return self.headroom - on_the_way

    @property
    def whole(self) -> int:
        """Room taken and free."""
        return self.free + max(self.assigned, self.held)


class Pace:
    """How many guilds each worker is given per second: a bucket of tokens for each.

    Args:
        per_s: tokens that drip into a bucket each second.
        most: what it holds; a worker seen for the first time has as many.
    """

    def __init__(self, per_s: float, most: int) -> None:
        self._per_s = per_s
        self._most = most
        self._buckets: dict[str, tuple[float, float]] = {}
        """Tokens at a moment (seconds of the caller's clock)."""

    def left(self, worker: str, now_s: float) -> int:
        """What a worker may be given now."""
        tokens, at_s = self._buckets.get(worker, (float(self._most), now_s))
        return int(min(self._most, tokens + (now_s - at_s) * self._per_s))

    def take(self, worker: str, count: int, now_s: float) -> None:
        tokens, at_s = self._buckets.get(worker, (float(self._most), now_s))
        self._buckets[worker] = min(self._most, tokens + (now_s - at_s) * self._per_s) - count, now_s

    def forget(self, worker: str) -> None:
        self._buckets.pop(worker, None)


def place(items: Iterable[_Item], rooms: Iterable[Room], most: Mapping[str, int] | None = None) -> dict[_Item, str]:
    """Give each item to the worker with the largest part of its room left, counting each assignment at once.

    By the part and not by the number: workers of one kind measure themselves a little differently, and a few guilds
    would all go to the one that thinks best of itself.

    Args:
        most: what each worker is given at most this time; None for whatever it has room for.
    Returns: worker per item; items that fit nowhere are left out.
    """
    heap = [
        (-room.free / room.whole, room.worker, room.free, room.whole)
        for room in rooms
        if room.free > 0 and (most is None or most[room.worker] > 0)
    ]
    heapq.heapify(heap)
    given: Counter[str] = Counter()
    placed: dict[_Item, str] = {}
    for item in items:
        if not heap:
            break
        _, worker, free, whole = heapq.heappop(heap)
        placed[item] = worker
        given[worker] += 1
        if free > 1 and (most is None or given[worker] < most[worker]):
            heapq.heappush(heap, (-(free - 1) / whole, worker, free - 1, whole))
    return placed
