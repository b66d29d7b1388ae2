"""The benchmarks, one after the other, each a process of its own: python -m tests.bench [item ...].

Tables go to the terminal, JSON and plots to `.run/bench/`. Soak and breaks are run only where they are named: they take
nearly half an hour each. One item that fails does not keep the others from running; the exit status tells. Ctrl-C
reaches the item as well: it is waited for, because it has processes to end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

ITEMS = (
    *("fanout", "broadcasts", "peers", "seal", "pace", "without_sender", "skew", "mass_join", "encode", "redis_load"),
    "latency",
)
ON_DEMAND = ("breaks", "leading", "receive", "soak")


def _run(item: str) -> int:
    """The exit status of an item."""
    process = subprocess.Popen([sys.executable, "-m", f"tests.bench.{item}"])
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("items", nargs="*", metavar="item", choices=[*ITEMS, *ON_DEMAND, []], help=", ".join(ITEMS))
    failed = []
    for item in parser.parse_args().items or ITEMS:
        began_s = time.monotonic()
        status = _run(item)
        sys.stdout.write(f"{item}: exit status {status} after {time.monotonic() - began_s:.0f} s\n\n")
        sys.stdout.flush()
        if status:
            failed.append(item)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
