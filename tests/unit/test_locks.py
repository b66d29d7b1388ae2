"""Lock files hold names, versions and hashes: where packages come from is the business of the machine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.bench.peers.cargo_lock import dress, strip

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {
    "requirements.lock": "--hash=sha256:",
    "deploy/redis.lock": "sha256",
    "tests/interop/requirements.lock": "--hash=sha256:",
    "tests/interop/package-lock.json": '"integrity": "sha512-',
    "tests/bench/peers/songbird/Cargo.lock": 'checksum = "',
    "tests/bench/peers/disgo/go.sum": " h1:",
}
"""Each lock, and what stands before a hash in it."""

BY_CARGO = """version = 4

[[package]]
name = "of-a-registry"
version = "1.2.3"
source = "registry+scheme://somewhere"
checksum = "00ff"
dependencies = [
 "other",
]

[[package]]
name = "the-program-itself"
version = "0.0.0"
"""


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert LOCKS[lock] in text
    assert "://" not in text


def test_the_lock_is_what_the_project_asks_for() -> None:
    """A bound that is drawn closer, and a lock that is not made anew, would part the two unseen."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    asked = [Requirement(one) for one in (*project["dependencies"], *project["optional-dependencies"]["dev"])]
    names = {one.name: re.sub(r"[-_.]+", "-", one.name).lower() for one in asked}
    assert [one for one in asked if not one.specifier.contains(locked[names[one.name]])] == []


def test_a_private_library_object_is_bound_above() -> None:
    """What is called through a private name may be elsewhere in the next minor release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pynacl,) = [Requirement(one) for one in project["dependencies"] if one.startswith("PyNaCl")]
    assert any(bound.operator == "<" for bound in pynacl.specifier)


def test_cargo_gets_back_what_it_wrote() -> None:
    """A stripped lock that is dressed for this machine is what cargo made on it; only its addresses count."""
    bare = strip(BY_CARGO)
    assert "://" not in bare
    assert dress(bare, BY_CARGO) == BY_CARGO
    assert dress(bare, BY_CARGO.replace("1.2.3", "1.2.4")) == BY_CARGO


def test_packages_of_several_places_are_not_guessed_at() -> None:
    """Where cargo's packages come from more than one place, a bare lock cannot be dressed."""
    with pytest.raises(ValueError, match="unpack"):
        dress(strip(BY_CARGO), BY_CARGO + BY_CARGO.replace("somewhere", "elsewhere"))
