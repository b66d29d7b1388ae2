"""Runs inside the fan-out workers of a benchmark: Python imports a module of this name at its start.

Nothing in the product knows of it. A benchmark puts this folder first on the PYTHONPATH of its pool; in any other
process of that pool this module does nothing.
"""

from __future__ import annotations

import gc
import signal
import sys


def _collect(*_: object) -> None:
    gc.collect()


if "worker.fanout" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, _collect)
