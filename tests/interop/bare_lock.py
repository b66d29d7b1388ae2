"""Strip npm's lock of addresses: it keeps names, versions and hashes. `make lock` runs it."""

from __future__ import annotations

import json
from pathlib import Path

LOCK = Path(__file__).parent / "package-lock.json"
_ADDRESSES = ("resolved", "funding")


def main() -> None:
    lock = json.loads(LOCK.read_text())
    for package in lock["packages"].values():
        for field in _ADDRESSES:
            package.pop(field, None)
    LOCK.write_text(json.dumps(lock, indent=2) + "\n")


if __name__ == "__main__":
    main()
