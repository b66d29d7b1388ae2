"""CI runs on the newest Python that is promised and that the machine has."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from shared.cli.pool import ROOT
from tests.newest_python import PROMISED, newest

OWN = sys.version_info[:3]


def put(python: Path, told: str, status: int = 0) -> None:
    """Something that is asked for its version as a Python is."""
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho '{told}'\nexit {status}\n")
    python.chmod(0o755)


@pytest.fixture
def pyenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    return tmp_path / "versions"


def test_the_newest_is_found_in_pyenv(pyenv: Path) -> None:
    """By number, not by letter."""
    for version in ("3.9.1", "3.14.2", "3.14.10"):
        put(pyenv / version / "bin" / "python3", f"{version} /{version}")
    assert newest() == ((3, 14, 10), "/3.14.10")


def test_what_is_not_promised_is_passed_over(pyenv: Path) -> None:
    """Newer than the promise, older than it, or not to be started: a shim of a version that is not chosen."""
    put(pyenv / "3.15.0" / "bin" / "python3", "3.15.0 /3.15.0")
    put(pyenv / "3.10.9" / "bin" / "python3", "3.10.9 /3.10.9")
    put(pyenv.parent / "bin" / "python3.14", "pyenv: python3.14: command not found", status=127)
    assert newest() == (OWN, sys.executable)


def test_what_is_promised_is_what_the_package_asks_for() -> None:
    """One promise, in two files."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert asked == f">=3.{PROMISED[0]},<3.{PROMISED[-1] + 1}"
