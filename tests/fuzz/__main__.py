"""`python -m tests.fuzz --seconds 60`: spoil inputs and see that every reader takes or refuses them as it declares.

Prints executions per target, exits 1 with the input of the first find. `--target NAME --input HEX` runs one again.
"""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from random import Random

from tests.fuzz.isolated import Isolated
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

_TURN_S = 0.05
"""Targets take turns, so that a run of any length reaches all of them."""
_STUCK_AFTER_S = 20.0


class Stuck(Exception):
    """A reader did not come back."""


@dataclass(frozen=True)
class Find:
    """An input on which a reader raised what it does not declare."""

    target: str
    data: bytes
    trace: str


@dataclass
class Outcome:
    """How a run went: executions by target, and the find that ended it."""

    executions: dict[str, int] = field(default_factory=dict)
    find: Find | None = None


def fuzz(targets: Sequence[Target], seconds: float, seed: int) -> Outcome:
    """Run all targets in turn until the time is over or something is found."""
    outcome = Outcome(dict.fromkeys((target.name for target in targets), 0))
    random = Random(seed)
    with ExitStack() as stack:
        children = {t.name: stack.enter_context(Isolated(t, _STUCK_AFTER_S)) for t in targets if t.where}
        deadline_s = time.monotonic() + seconds
        while outcome.find is None and (time.monotonic() < deadline_s or 0 in outcome.executions.values()):
            for target in targets:
                child = children.get(target.name)
                if child is None:
                    outcome.find = _turn(target, random, outcome)
                else:
                    executions, found, trace = child.turn(random.getrandbits(32), _TURN_S)
                    outcome.executions[target.name] += executions
                    outcome.find = None if found is None else Find(target.name, found, trace)
                if outcome.find is not None:
                    break
    return outcome


def _turn(target: Target, random: Random, outcome: Outcome) -> Find | None:
    data = b""
    end_s = time.monotonic() + _TURN_S
    try:
        with _watched():
            while time.monotonic() < end_s:
                data = target.make(random)
                target.take(data)
                outcome.executions[target.name] += 1
    except Exception:  # noqa: BLE001 - whatever it is, it is the find
        return Find(target.name, data, traceback.format_exc())
    return None


@contextmanager
def _watched() -> Iterator[None]:
    """Raise `Stuck` in a reader that does not come back."""

    def stuck(*_: object) -> None:
        raise Stuck

    before = signal.signal(signal.SIGALRM, stuck)
    signal.setitimer(signal.ITIMER_REAL, _STUCK_AFTER_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    by_name = {target.name: target for target in TARGETS}
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="of a run to be repeated")
    parser.add_argument("--target", choices=by_name, default=None, help="only this one")
    parser.add_argument("--input", type=bytes.fromhex, default=None, help="hex; run once, with --target")
    options = parser.parse_args(arguments)
    if options.input is not None:
        if options.target is None:
            parser.error("--input needs --target")
        by_name[options.target].take(options.input)
        return 0
    seed = secrets.randbits(32) if options.seed is None else options.seed
    outcome = fuzz([by_name[options.target]] if options.target else TARGETS, options.seconds, seed)
    sys.stdout.write(f"fuzz, seed {seed}: executions\n")
    for name, count in outcome.executions.items():
        sys.stdout.write(f"  {name:18} {count:10,}\n")
    if outcome.find is None:
        return 0
    find = outcome.find
    sys.stdout.write(f"\n{find.trace}\nfound in {find.target!r}, input:\n{find.data.hex()}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
