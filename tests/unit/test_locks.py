"""Lock files hold names, versions and hashes: where packages come from is the business of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = [
    *("requirements.lock", "deploy/redis.lock"),
    *("tests/interop/requirements.lock", "tests/interop/package-lock.json"),
]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "sha" in text
    assert "://" not in text
