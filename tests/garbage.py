"""A worker's look at its garbage, in tests: without other collections, and with nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from worker.fanout.garbage import LOOKED_AT_EVERY_NS, Garbage


@contextmanager
def own_collections_off() -> Iterator[None]:
    """Python's own collections do not come in between; nothing stays frozen behind the test."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        gc.enable()


def look_minutes_later() -> None:
    """Something ended, and the time to look has come: after what was frozen is freed, or somebody holds it."""
    garbage = Garbage(lambda _: None)
    garbage.begin(0)
    garbage.look(LOOKED_AT_EVERY_NS, sessions=0, established=0, ended=1)
