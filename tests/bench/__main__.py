"""The benchmarks, one after the other, each a process of its own: python -m tests.bench [item ...].

Tables go to the terminal, JSON and plots to `.run/bench/`. The soak is run only where it is named: it takes half an
hour. One item that fails does not keep the others from running; the exit status tells.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

ITEMS = ("fanout", "peers", "seal", "pace", "without_sender", "skew", "mass_join", "encode", "redis_load", "latency")
ON_DEMAND = ("receive", "soak")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("items", nargs="*", metavar="item", choices=[*ITEMS, *ON_DEMAND, []], help=", ".join(ITEMS))
    failed = []
    for item in parser.parse_args().items or ITEMS:
        began_s = time.monotonic()
        status = subprocess.run([sys.executable, "-m", f"tests.bench.{item}"], check=False).returncode
        sys.stdout.write(f"{item}: exit status {status} after {time.monotonic() - began_s:.0f} s\n\n")
        sys.stdout.flush()
        if status:
            failed.append(item)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
