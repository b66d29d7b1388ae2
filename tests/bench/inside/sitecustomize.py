"""Runs inside the fan-out workers of a benchmark: Python imports a module of this name at its start.

Nothing in the product knows of it. A benchmark puts this folder first on the PYTHONPATH of its pool; in any other
process of that pool this module does nothing. A worker collects garbage on SIGUSR1, and sends from a thread of its own
where BENCH_SENDING says so.
"""

from __future__ import annotations

import gc
import os
import signal
import sys


def _collect(*_: object) -> None:
    gc.collect()


if "worker.fanout" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, _collect)
    if os.environ.get("BENCH_SENDING") == "thread":
        from tests.bench.inside.sender_thread import SenderThread
        from worker.fanout import sending

        sending.SenderProcess = SenderThread  # type: ignore[misc]
