"""The fast path of transport encryption: what C writes is what other code opens."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.protocol import packet_seal
from shared.protocol.packet_seal import NULL, encrypt_function, pointer, suffix_bytes
from shared.protocol.transport_crypto import AES_GCM, MODES, open_packet

HEADER = bytes.fromhex("8078123400abcdefdeadbeef")


def sealed(mode: str, key: bytes, frame: bytes, counter: int) -> bytes:
    """A whole packet, made in place as a builder makes it."""
    packet = np.zeros(len(HEADER) + len(frame) + 16 + 24, np.uint8)
    packet[:12] = np.frombuffer(HEADER, np.uint8)
    nonce = np.zeros(24, np.uint8)
    nonce[:4] = np.frombuffer(counter.to_bytes(4, "big"), np.uint8)
    keys = np.frombuffer(key, np.uint8).copy()
    start = pointer(packet)
    encrypt_function(mode)(start + 12, NULL, frame, len(frame), start, 12, NULL, pointer(nonce), pointer(keys))
    end = 12 + len(frame) + 16
    packet[end : end + 4] = nonce[:4]
    return packet[: end + suffix_bytes(mode)].tobytes()


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
