"""Which Python is the newest of those that are promised and that this machine has, on PATH or in pyenv.

    python -m tests.newest_python

Prints `3.13 /path/to/python3.13`. Where that is the version it runs on itself, it says so and prints nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PROMISED = range(11, 15)
"""Of 3.x, as `requires-python` has it."""
_ASK = "import sys; print('{}.{}.{} {}'.format(*sys.version_info[:3], sys.executable))"

Version = tuple[int, ...]


def _pythons() -> Iterator[Path]:
    """Whatever may be one."""
    for folder in os.get_exec_path():
        for name in ("python3", *(f"python3.{minor}" for minor in PROMISED)):
            yield Path(folder, name)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from pyenv.glob("versions/3.*/bin/python3")


def _asked(python: Path) -> tuple[Version, str] | None:
    """Its version and its own name for itself; None: it cannot run, as a shim of a version that is not chosen."""
    try:
        told = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.fullmatch(r"(\d+\.\d+\.\d+) (.+)\n", told)
    return None if found is None else (tuple(map(int, found[1].split("."))), found[2])


def newest() -> tuple[Version, str]:
    """The newest that is promised; at least the one this runs on."""
    found = {python.resolve() for python in _pythons() if python.exists()}
    asked = [told for told in map(_asked, sorted(found)) if told and told[0][0] == 3 and told[0][1] in PROMISED]
    return max([(sys.version_info[:3], sys.executable), *asked])


def main() -> None:
    version, python = newest()
    words = ".".join(map(str, version))
    if version[:2] == sys.version_info[:2]:
        sys.stderr.write(f"the newest promised Python here is {words}, on which all tests run\n")
        return
    sys.stderr.write(f"the newest promised Python here is {words}: {python}\n")
    sys.stdout.write(f"{version[0]}.{version[1]} {python}\n")


if __name__ == "__main__":
    main()
