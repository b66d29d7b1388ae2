"""Keep addresses out of cargo's lock: it holds names, versions and hashes only.

    python -m tests.bench.peers.cargo_lock strip FROM    FROM becomes the lock of this repository, by `make lock`
    python -m tests.bench.peers.cargo_lock dress INTO    the lock of this repository becomes INTO, before a build

Cargo wants to read with each package where it comes from. INTO must be a lock that cargo has just made by itself: from
it is taken where this machine's packages come from, and nothing else.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

LOCK = Path(__file__).parent / "songbird" / "Cargo.lock"
_SOURCE = re.compile(r'^source = "(.+)"\n', re.MULTILINE)


def strip(lock: str) -> str:
    """Cargo's lock without addresses."""
    return _SOURCE.sub("", lock)


def dress(bare: str, made_by_cargo: str) -> str:
    """A bare lock as cargo wants it.

    Raises: ValueError: this machine's packages come from several places, or from none.
    """
    (source,) = set(_SOURCE.findall(made_by_cargo))
    return re.sub(r'^checksum = "', f'source = "{source}"\n\\g<0>', bare, flags=re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["strip", "dress"])
    parser.add_argument("lock", type=Path)
    options = parser.parse_args()
    if options.what == "strip":
        LOCK.write_text(strip(options.lock.read_text()))
    else:
        options.lock.write_text(dress(LOCK.read_text(), options.lock.read_text()))


if __name__ == "__main__":
    main()
