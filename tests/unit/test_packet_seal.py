"""The fast path of transport encryption: what C writes is what other code opens."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.protocol import packet_seal
from shared.protocol.transport_crypto import AES_GCM, MODES, open_packet
from tests.sealed_row import SealedRow

HEADER = bytes.fromhex("8078123400abcdefdeadbeef")


def sealed(mode: str, key: bytes, frame: bytes, counter: int) -> bytes:
    return SealedRow(mode, key, counter.to_bytes(4, "big")).seal(HEADER, frame)


@pytest.mark.parametrize("mode", MODES)
@given(frame=st.binary(max_size=1_300), counter=st.integers(0, 2**32 - 1))
def test_a_packet_made_in_place_is_opened_by_its_receiver(mode: str, frame: bytes, counter: int) -> None:
    """In every mode, the discontinued ones included."""
    key = os.urandom(32)
    assert open_packet(mode, key, sealed(mode, key, frame, counter)) == frame


def test_a_processor_without_aes_seals_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower, by plain functions; the packet is the same."""
    key = os.urandom(32)
    fast = sealed(AES_GCM, key, b"frame", 7)
    monkeypatch.setattr(packet_seal, "_has_aes", lambda: False)
    assert sealed(AES_GCM, key, b"frame", 7) == fast


def test_a_fan_out_worker_never_runs_sodium_init() -> None:
    """Importing nacl.bindings does, and XChaCha20 is slower below 600 bytes from then on."""
    code = "import sys, worker.fanout.__main__; sys.exit('nacl.bindings' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
