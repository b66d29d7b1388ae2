"""What one voice server may have a worker do."""

from __future__ import annotations

from worker.voice.allowance import MESSAGES, MESSAGES_PER_S, WORK_PER_S, WORK_S, Allowance


def test_an_honest_server_is_never_limited() -> None:
    """Thousands of arrivals at once, then some messages a second for a day."""
    allowance = Allowance(0.0)
    assert not any(allowance.excess(0.0, 20e-6) for _ in range(20_000))
    assert not any(allowance.excess(second + number / 20, 1e-3) for second in range(1, 5_000) for number in range(20))


def test_too_many_messages_are_too_many() -> None:
    """However little each of them costs; what was unused before counts for a burst alone."""
    allowance = Allowance(0.0)
    results = [allowance.excess(1_000.0, 0.0) for _ in range(MESSAGES + 1)]
    assert not any(results[:-1])
    assert "messages" in results[-1]


def test_too_much_work_is_too_much() -> None:
    """However few messages make it."""
    allowance = Allowance(0.0)
    assert not allowance.excess(0.0, WORK_S)
    assert "work" in allowance.excess(0.0, 0.01)


def test_what_was_used_comes_back_with_time() -> None:
    """At the rates that are told."""
    allowance = Allowance(0.0)
    allowance.excess(0.0, WORK_S)
    assert not allowance.excess(10.0, 10 * WORK_PER_S)
    allowance = Allowance(0.0)
    for _ in range(MESSAGES):
        allowance.excess(0.0, 0.0)
    assert not any(allowance.excess(1.0, 0.0) for _ in range(int(MESSAGES_PER_S)))
    assert allowance.excess(1.0, 0.0)
