"""Sessions are kept out of collections; what ended is freed within minutes all the same, and the pace told before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest

from tests.garbage import own_collections_off
from worker.fanout.garbage import LOOKED_AT_ENDED, LOOKED_AT_EVERY_NS, Garbage

MS = 1_000_000
SOON_NS = LOOKED_AT_EVERY_NS // 240


class Ring:
    """What no count of references frees: it holds itself."""

    def __init__(self) -> None:
        self.itself = self


class Worker:
    """The garbage of a worker, and what its pace was told."""

    def __init__(self) -> None:
        self.garbage = Garbage(self._announced)
        self.told_ms: list[int] = []
        self.during: Callable[[], None] = lambda: None
        self.garbage.begin(0)

    def _announced(self, for_ns: int) -> None:
        self.told_ms.append(for_ns // MS)
        self.during()

    def look(self, now_ns: int, *, established: int = 0, ended: int = 0, sessions: int = 0) -> None:
        self.garbage.look(now_ns, sessions=sessions, established=established, ended=ended)


@pytest.fixture
def worker() -> Iterator[Worker]:
    with own_collections_off():
        yield Worker()


def frozen_ring(worker: Worker) -> weakref.ref[Ring]:
    """One that was frozen while it lived, and ended then."""
    ring = Ring()
    worker.look(SOON_NS, established=1)
    worker.look(2 * SOON_NS, established=1)
    ended = weakref.ref(ring)
    del ring
    gc.collect()
    assert ended() is not None, "a usual collection looks at it"
    return ended


def test_what_was_frozen_and_ended_is_freed_within_minutes(worker: Worker) -> None:
    """Whatever made the cycle: we, a library, or another version of Python."""
    ended = frozen_ring(worker)
    worker.look(LOOKED_AT_EVERY_NS - 1, established=1, ended=1)
    assert ended() is not None
    worker.look(LOOKED_AT_EVERY_NS, established=1, ended=1)
    assert ended() is None


def test_where_much_ended_it_is_not_waited_with(worker: Worker) -> None:
    """All at once it would take longer than can be built ahead."""
    ended = frozen_ring(worker)
    worker.look(3 * SOON_NS, established=1, ended=LOOKED_AT_ENDED - 1)
    assert ended() is not None
    worker.look(4 * SOON_NS, established=1, ended=LOOKED_AT_ENDED)
    assert ended() is None


def test_the_pace_is_told_before(worker: Worker) -> None:
    """By then it has built ahead; sessions that are there take time, and those that ended."""
    ended = frozen_ring(worker)
    lives_still: list[bool] = []
    worker.during = lambda: lives_still.append(ended() is not None)
    worker.look(LOOKED_AT_EVERY_NS, established=1, ended=400, sessions=800)
    assert lives_still == [True]
    assert worker.told_ms[-1] == 60 + (400 + 800) / 4


def test_where_nothing_ended_nothing_is_looked_at(worker: Worker) -> None:
    """A pool that only plays is never held up."""
    ended = frozen_ring(worker)
    worker.look(LOOKED_AT_EVERY_NS, established=1, ended=1)
    assert ended() is None
    told = len(worker.told_ms)
    for minutes in range(60):
        worker.look(LOOKED_AT_EVERY_NS * (2 + minutes), established=1, ended=1)
    assert len(worker.told_ms) == told


def test_in_a_storm_sessions_are_frozen_by_dozens(worker: Worker) -> None:
    """The rest of them is frozen when it is over."""
    established = 0
    for look, opened in enumerate((20, 20, 31, 31, 10, 0, 0)):
        established += opened
        worker.look(look * SOON_NS, established=established, sessions=established)
    assert worker.told_ms == [40, 62, 10]


def test_what_is_looked_at_is_frozen_again(worker: Worker) -> None:
    """And with it whatever came since: the next usual collection has nothing to do."""
    ring = Ring()
    worker.look(LOOKED_AT_EVERY_NS, established=5, ended=5, sessions=5)
    worker.look(LOOKED_AT_EVERY_NS + SOON_NS, established=5, ended=5, sessions=5)
    assert len(worker.told_ms) == 1
    ended = weakref.ref(ring)
    del ring
    gc.collect()
    assert ended() is not None
