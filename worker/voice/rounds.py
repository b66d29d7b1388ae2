"""What all connections of a worker do again and again, on one timer: heartbeats, keepalives, questions asked again.

A task and a timer of its own for each of them would cost more than what they do. Times are rounded to grains, so that
one wake of the loop serves several connections; what comes at once is done in portions, because the pace has to build
in between.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from itertools import count

_GRAIN_S = 0.02
_PORTION = 64
"""Some 2 ms of work."""


class Round:
    """One thing that is done again and again, until it is cancelled or fails."""

    __slots__ = ("_failed", "_rounds", "_visit", "every")

    def __init__(
        self, rounds: Rounds, every: int, visit: Callable[[], None], failed: Callable[[Exception], None]
    ) -> None:
        self._rounds = rounds
        self._visit: Callable[[], None] | None = visit
        self._failed: Callable[[Exception], None] | None = failed
        self.every = every

    @property
    def cancelled(self) -> bool:
        return self._visit is None

    def cancel(self) -> None:
        """Never visit again, and let go of whom it visited."""
        if self._visit is not None:
            self._visit = self._failed = None
            self._rounds.left()

    def visit(self) -> None:
        """Do it; what it raises ends it and goes to who began it, and to nobody else."""
        if self._visit is None or self._failed is None:
            return
        failed = self._failed
        try:
            self._visit()
        except Exception as error:  # noqa: BLE001 - one connection's defect must not stop the others' heartbeats
            self.cancel()
            failed(error)


class Rounds:
    """The rounds of one worker: a heap of due times, and one timer for its top."""

    def __init__(self) -> None:
        self._due: list[tuple[int, int, Round]] = []
        """Grain, order of entering, what."""
        self._numbers = count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_grain = 0
        self._living = 0

    def begin(
        self, after_s: float, every_s: float, visit: Callable[[], None], failed: Callable[[Exception], None]
    ) -> Round:
        """Have something done after a while, and then again and again.

        Args:
            failed: takes what `visit` raised, which ends the round.
        """
        loop = asyncio.get_running_loop()
        one = Round(self, max(1, round(every_s / _GRAIN_S)), visit, failed)
        self._living += 1
        self._enter(one, round((loop.time() + after_s) / _GRAIN_S))
        self._set_timer(loop)
        return one

    def left(self) -> None:
        """A round was cancelled; the last one takes the timer along."""
        self._living -= 1
        if not self._living:
            self._due.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _enter(self, one: Round, grain: int) -> None:
        heapq.heappush(self._due, (grain, next(self._numbers), one))

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        grain = self._due[0][0]
        if self._timer is not None:
            if self._timer_grain <= grain:
                return
            self._timer.cancel()
        self._timer_grain = grain
        self._timer = loop.call_at(grain * _GRAIN_S, self._go_round, loop)

    def _go_round(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = round(loop.time() / _GRAIN_S)
        for _ in range(_PORTION):
            if not self._due or self._due[0][0] > now:
                break
            grain, _, one = heapq.heappop(self._due)
            one.visit()
            if not one.cancelled:
                # after a stall, what was missed is not made up for
                self._enter(one, max(grain, now + 1 - one.every) + one.every)
        if self._due:
            self._set_timer(loop)
