"""When a source that fails is opened again: live input for ever, a file five times."""

from __future__ import annotations

from itertools import pairwise

import pytest

from worker.encode.retries import FILE_TRIES, LONGEST_WAIT_S, OFTEN_FOR_S, Retries


def absence(retries: Retries, for_s: float, *, played_s: float = 60.0) -> list[float]:
    """When live input that is away is opened, in seconds from its loss on; each try fails at once."""
    now_s = played_s
    opened = []
    while now_s - played_s < for_s:
        now_s += retries.of_live_input(now_s)
        retries.opened(now_s)
        opened.append(now_s - played_s)
    return opened


def test_live_input_that_was_heard_is_opened_again_at_once() -> None:
    """A server that is restarted is back before the lead is used up."""
    assert absence(Retries(), 0.5)[0] == 0


def test_live_input_is_opened_each_second_for_a_minute() -> None:
    """Then less often, every ten seconds at least, and for ever."""
    opened = absence(Retries(), 24 * 3_600)
    steps = [later - sooner for sooner, later in pairwise(opened)]
    first = [step for step, at in zip(steps, opened, strict=False) if at + step < OFTEN_FOR_S]
    assert set(first) == {1.0}
    assert len(first) >= OFTEN_FOR_S - 2
    assert max(steps) <= LONGEST_WAIT_S
    assert min(steps[-100:]) > LONGEST_WAIT_S / 2


def test_any_sound_ends_an_absence() -> None:
    """After a day away it is tried each second again when it is lost once more."""
    retries = Retries()
    absence(retries, 24 * 3_600)
    retries.recovered()
    assert retries.attempt == 0
    again = absence(retries, 30, played_s=25 * 3_600)
    assert len(again) >= 29


@pytest.mark.parametrize("heard_s", [0.0, 0.02, 0.5, 0.99, 1.0, 6.0])
def test_live_input_that_hangs_up_all_the_time_is_opened_once_a_second(heard_s: float) -> None:
    """Whatever it does, it is no more often asked than that; where it plays for longer it is never waited for."""
    retries = Retries()
    now_s, opened = 100.0, []
    for _ in range(20):
        retries.opened(now_s)
        opened.append(now_s)
        retries.recovered()
        now_s += heard_s
        now_s += retries.of_live_input(now_s)
    steps = [later - sooner for sooner, later in pairwise(opened)]
    assert steps == pytest.approx([max(1.0, heard_s)] * 19)
    assert retries.attempt == 1


def test_a_file_is_given_up_after_its_tries() -> None:
    """With growing pauses, none of them long."""
    retries = Retries()
    waits = [retries.of_file(float(number)) for number in range(FILE_TRIES)]
    assert waits[-1] is None
    told = [wait for wait in waits if wait is not None]
    assert len(told) == FILE_TRIES - 1
    assert told == sorted(told)
    assert 0 < told[0] < 1
    assert told[-1] < 10


def test_a_file_that_was_read_on_has_its_tries_back() -> None:
    """A scratch here and a scratch there is no reason to give it up."""
    retries = Retries()
    for _ in range(10 * FILE_TRIES):
        assert retries.of_file(0.0) is not None
        assert retries.attempt == 1
        retries.recovered()
