"""Rounds: many things done again and again on one timer."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable

from worker.voice import rounds
from worker.voice.rounds import Rounds

SHORT_S = 0.02
LONG_S = 60.0
BOUND_S = 10.0


class Visits:
    """Counts visits, and tells when so many were made."""

    def __init__(self, wanted: int = 1, then: Callable[[], None] = lambda: None) -> None:
        self.number = 0
        self.failures: list[Exception] = []
        self._wanted = wanted
        self._then = then
        self._made = asyncio.Event()

    def visit(self) -> None:
        self.number += 1
        if self.number >= self._wanted:
            self._made.set()
        self._then()

    async def made(self) -> None:
        async with asyncio.timeout(BOUND_S):
            await self._made.wait()


async def test_it_is_done_again_and_again() -> None:
    """At its first time, then at its interval."""
    all_of_them, visits = Rounds(), Visits(3)
    one = all_of_them.begin(0, SHORT_S, visits.visit, visits.failures.append)
    await visits.made()
    one.cancel()
    assert visits.failures == []


async def test_the_one_due_first_comes_first_whenever_it_was_begun() -> None:
    """A later round with an earlier time does not wait for the timer of the first."""
    all_of_them, late, early = Rounds(), Visits(), Visits()
    rounds_begun = [
        all_of_them.begin(LONG_S, LONG_S, late.visit, late.failures.append),
        all_of_them.begin(SHORT_S, LONG_S, early.visit, early.failures.append),
    ]
    await early.made()
    assert late.number == 0
    for one in rounds_begun:
        one.cancel()


async def test_what_is_cancelled_is_not_done_and_the_last_one_stops_the_timer() -> None:
    """Nothing is kept of it, also where it is cancelled by another one's visit of the same moment."""
    all_of_them, second = Rounds(), Visits()
    first = Visits(then=lambda: later.cancel())
    earlier = all_of_them.begin(SHORT_S, SHORT_S, first.visit, first.failures.append)
    later = all_of_them.begin(SHORT_S, SHORT_S, second.visit, second.failures.append)
    await first.made()
    earlier.cancel()
    earlier.cancel()
    assert (second.number, second.failures, first.failures) == (0, [], [])
    assert (all_of_them._due, all_of_them._timer) == ([], None)


async def test_a_failure_ends_that_round_and_no_other() -> None:
    """Who began it is told, once."""

    def fail() -> None:
        raise ValueError("broken")

    all_of_them, good, bad = Rounds(), Visits(3), Visits(then=fail)
    broken = all_of_them.begin(0, SHORT_S, bad.visit, bad.failures.append)
    whole = all_of_them.begin(0, SHORT_S, good.visit, good.failures.append)
    await good.made()
    whole.cancel()
    assert broken.cancelled
    assert (bad.number, [str(error) for error in bad.failures]) == (1, ["broken"])


async def test_what_a_stall_missed_is_not_made_up_for() -> None:
    """One visit after it, and the next one is due later than this one came."""
    all_of_them, visits = Rounds(), Visits()
    one = all_of_them.begin(SHORT_S, SHORT_S, visits.visit, visits.failures.append)
    time.sleep(10 * SHORT_S)  # noqa: ASYNC251 - holding the loop is what is tested
    woken = int(asyncio.get_running_loop().time() / rounds._GRAIN_S)
    await visits.made()
    ((due, _, _),) = all_of_them._due
    assert visits.number == 1
    assert due > woken
    one.cancel()


async def test_many_at_once_let_the_loop_go_on_in_between() -> None:
    """The pace has a turn between two portions."""
    loop = asyncio.get_running_loop()
    number = 5 * rounds._PORTION
    visits, turns = Visits(number), [0]

    def turn() -> None:
        turns.append(visits.number)
        if visits.number < number:
            loop.call_soon(turn)

    all_of_them = Rounds()
    every = [all_of_them.begin(0, LONG_S, visits.visit, visits.failures.append) for _ in range(number)]
    loop.call_soon(turn)
    await visits.made()
    await asyncio.sleep(0)
    for one in every:
        one.cancel()
    assert max(after - before for before, after in itertools.pairwise(turns)) <= rounds._PORTION
