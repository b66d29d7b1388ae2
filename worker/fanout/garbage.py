"""What a worker's collections look at, and when.

Sessions live long and packets leave no garbage. A collection of a thousand sessions would hold the pace up for 150 ms
and find nothing, so who is established is kept out of them (`gc.freeze`).

What was frozen and ends then goes only where it is part of no cycle. Whether it is depends on our lines, on those of
libraries, and on the version of Python, so nothing relies on that: where anything ended since, all that was frozen is
looked at every two minutes, or sooner where much ended. The pace is told before, and has built ahead for that long.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from shared.clock import NS_PER_MS, NS_PER_S
from shared.logs import get_logger

LOOKED_AT_EVERY_NS = 120 * NS_PER_S
LOOKED_AT_ENDED = 500
"""So many are not waited with: to free 1,500 lost WebSockets at once took 0.6 s, longer than can be built ahead."""
_THRESHOLDS = (20_000, 20, 50)
"""Python's own collections: rarely."""
_AT_ONCE = 32
"""While sessions open, so many are frozen together."""
_NEW_NS = NS_PER_MS
"""The most that a collection takes for each session which is not frozen yet: in a storm; else a tenth."""
_MODULES_NS, _FROZEN_NS = 60 * NS_PER_MS, NS_PER_MS // 4
"""What a collection of all that was frozen takes: for modules, and for each session; 0.15 ms, or as much again where
it ended."""


class Garbage:
    """The garbage of one worker.

    Args:
        announce: told how long the loop is about to be held up.
    """

    def __init__(self, announce: Callable[[int], None]) -> None:
        self._announce = announce
        self._established = 0
        """As of the last look."""
        self._frozen = 0
        """Sessions that were established before the last `gc.freeze`."""
        self._looked_at_ns = 0
        self._ended = 0
        """As of then."""

    def begin(self, now_ns: int) -> None:
        """Freeze what there is: modules, and what lives as long as the worker."""
        gc.set_threshold(*_THRESHOLDS)
        gc.freeze()
        self._looked_at_ns = now_ns

    def look(self, now_ns: int, *, sessions: int, established: int, ended: int) -> None:
        """Do what has to be done now: called twice a second.

        Args:
            sessions: that are there.
            established: sessions that ever were.
            ended: whatever ended so far and may have left garbage among what is frozen: sessions and WebSockets.
        """
        calm, self._established = established == self._established, established
        new, gone = established - self._frozen, ended - self._ended
        if gone >= LOOKED_AT_ENDED or (gone and now_ns - self._looked_at_ns >= LOOKED_AT_EVERY_NS):
            self._looked_at_ns, self._ended = now_ns, ended
            self._announce(_MODULES_NS + (sessions + gone) * _FROZEN_NS)
            gc.unfreeze()
        elif new >= (1 if calm else _AT_ONCE):
            self._announce(new * _NEW_NS)
        else:
            return
        self._frozen = established
        began_ns = time.monotonic_ns()
        found = gc.collect()
        gc.freeze()
        took_ms = (time.monotonic_ns() - began_ns) // NS_PER_MS
        get_logger().debug("garbage.collected", objects=found, took_ms=took_ms)
