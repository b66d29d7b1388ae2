"""Who carries what: items to workers by headroom. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable
from typing import NamedTuple, TypeVar

_Item = TypeVar("_Item", bound=Hashable)


class Room(NamedTuple):
    """What is known of a worker's room.

    Attributes:
        headroom: what it told with its last renewal.
        capacity: what it takes at most.
        assigned: what the coordinator has given it, told or not.
    """

    worker: str
    headroom: int
    capacity: int
    assigned: int

    @property
    def free(self) -> int:
        """Room left once everything that was assigned, and not counted by the worker yet, has arrived."""
        on_the_way = max(0, self.assigned - (self.capacity - self.headroom))
        return self.headroom - on_the_way


def place(items: Iterable[_Item], rooms: Iterable[Room]) -> dict[_Item, str]:
    """Give each item to the worker with the most room left, counting each assignment at once.

    Returns: worker per item; items that fit nowhere are left out.
    """
    heap = [(-room.free, room.worker) for room in rooms if room.free > 0]
    heapq.heapify(heap)
    placed: dict[_Item, str] = {}
    for item in items:
        if not heap:
            break
        free, worker = heapq.heappop(heap)
        placed[item] = worker
        if free + 1 < 0:
            heapq.heappush(heap, (free + 1, worker))
    return placed
