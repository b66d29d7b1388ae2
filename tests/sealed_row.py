"""Packets of one connection made in place, as the row builder makes them: fixed memory, one call each."""

from __future__ import annotations

import numpy as np

from shared.protocol.packet_seal import NULL, encrypt_function, pointer
from shared.protocol.rtp import HEADER_BYTES
from shared.protocol.transport_crypto import NONCE_SUFFIX_BYTES, TAG_BYTES, suffix_bytes

_NONCE_BYTES = 24
_FRAME_BYTES = 1_400


class SealedRow:
    """Memory of one connection with a header of 12 bytes.

    Args:
        nonce: of the first packet; what is missing at its end is zeros.
    """

    def __init__(self, mode: str, key: bytes, nonce: bytes) -> None:
        self._encrypt = encrypt_function(mode)
        self._suffix_bytes = suffix_bytes(mode)
        self._key = np.frombuffer(key, np.uint8).copy()
        self._nonce = np.frombuffer(nonce.ljust(_NONCE_BYTES, b"\x00"), np.uint8).copy()
        self._counter = self._nonce[:NONCE_SUFFIX_BYTES].view(">u4")
        self._packet = np.zeros(HEADER_BYTES + _FRAME_BYTES + TAG_BYTES + _NONCE_BYTES, np.uint8)
        self._start = pointer(self._packet)
        self._pointers = (pointer(self._nonce), pointer(self._key))

    def count(self) -> None:
        """Go on to the next nonce."""
        self._counter += np.uint32(1)

    def seal(self, header: bytes, frame: bytes) -> bytes:
        """The whole packet, with what it leaves on the wire of the nonce."""
        packet, size = self._packet, len(frame)
        packet[:HEADER_BYTES] = np.frombuffer(header, np.uint8)
        self._encrypt(self._start + HEADER_BYTES, NULL, frame, size, self._start, HEADER_BYTES, NULL, *self._pointers)
        end = HEADER_BYTES + size + TAG_BYTES
        packet[end : end + NONCE_SUFFIX_BYTES] = self._nonce[:NONCE_SUFFIX_BYTES]
        return packet[: end + self._suffix_bytes].tobytes()
