"""Fuzzing is run once, short, so that it cannot rot; `make fuzz` runs it for longer."""

from __future__ import annotations

import os
import signal

import pytest

from tests.fuzz.__main__ import fuzz, main
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS


def test_every_target_is_reached_and_nothing_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """A second of spoilt input ends with a count for each reader and no find."""
    status = main(["--seconds", "1"])
    told = capsys.readouterr().out
    assert status == 0, told
    counts = {line[:20].strip(): int(line[20:].replace(",", "")) for line in told.splitlines()[1:]}
    assert counts.keys() == {target.name for target in TARGETS}
    assert min(counts.values()) > 0


def test_what_is_not_declared_is_found_with_its_input() -> None:
    """An error of another kind ends the run, and its input runs it again."""

    def take(data: bytes) -> None:
        if data[0] > 200:
            raise KeyError(data)

    broken = Target("broken", lambda random: random.randbytes(3), take)
    outcome = fuzz([TARGETS[0], broken], seconds=30.0, seed=1)
    assert outcome.find is not None
    assert (outcome.find.target, len(outcome.find.data)) == ("broken", 3)
    assert "KeyError" in outcome.find.trace
    with pytest.raises(KeyError):
        take(outcome.find.data)
    assert fuzz([broken], seconds=30.0, seed=1).find == fuzz([broken], seconds=30.0, seed=1).find


def _crash(data: bytes) -> None:
    if data[0] > 200:
        os.kill(os.getpid(), signal.SIGSEGV)


CRASHING = Target("crashing", lambda random: random.randbytes(3), _crash, "tests.integration.test_fuzz_runs:CRASHING")


def test_a_crash_is_found_with_its_input() -> None:
    """What kills a process kills only the target's own, and the input that did it is told."""
    find = fuzz([CRASHING], seconds=30.0, seed=1).find
    assert find is not None
    assert find.data[0] > 200
    assert "Segmentation fault" in find.trace
    assert "_crash" in find.trace
