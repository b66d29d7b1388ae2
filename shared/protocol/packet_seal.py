"""The fast path of transport encryption: libsodium's one-shot AEAD functions on fixed memory.

Per packet remains one call into C: packet, nonce and key of a connection stay where they are, so their pointers are
made once. That is half the cost of a cipher object per connection, and 32 bytes of key where that takes a kilobyte.

Modes that Discord has discontinued, and AES-GCM on a processor without it, take plain functions instead.

The module never runs `sodium_init`: AEAD under a nonce of ours does not need it, and it swaps in vector code for
XChaCha20 that is slower below 600 bytes. So what the processor can do is read from the kernel instead.

Source: voice protocol reference, section 4.4; libsodium, "AES256-GCM" and "XChaCha20-Poly1305-IETF".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from nacl._sodium import ffi, lib
from numpy.typing import NDArray

from shared.protocol.transport_crypto import (
    AES_GCM,
    KEY_BYTES,
    NONCE_SUFFIX_BYTES,
    XCHACHA,
    seal_packet,
    suffix_bytes,
)

Pointer = Any
"""`unsigned char *` of cffi."""
Encrypt = Callable[[Pointer, Pointer, bytes, int, Pointer, int, Pointer, Pointer, Pointer], int]
"""``encrypt(out, NULL, frame, frame_bytes, header, header_bytes, NULL, nonce, key)``: C's own argument order.

It checks no length: `out` has room for the frame and 16 bytes of tag, the nonce has 12 or 24 bytes, the key 32.
"""
NULL: Pointer = ffi.NULL

_FUNCTIONS: dict[str, Encrypt] = {
    AES_GCM: lib.crypto_aead_aes256gcm_encrypt,
    XCHACHA: lib.crypto_aead_xchacha20poly1305_ietf_encrypt,
}
_CPU_FLAGS = ({"aes", "pclmulqdq", "avx"}, {"aes", "pmull"})
"""What libsodium's AES-GCM takes, on x86-64 and on ARM."""


def encrypt_function(mode: str) -> Encrypt:
    """The function that seals packets of a mode: C where there is one, else plain Python, right and slow."""
    if mode not in _FUNCTIONS or (mode == AES_GCM and not _has_aes()):
        return partial(_encrypt_slowly, mode)
    return _FUNCTIONS[mode]


def _encrypt_slowly(
    mode: str,
    out: Pointer,
    _: Pointer,
    frame: bytes,
    _frame_bytes: int,
    header: Pointer,
    header_bytes: int,
    _unused: Pointer,
    nonce: Pointer,
    key: Pointer,
) -> int:
    counter = int.from_bytes(ffi.buffer(nonce, suffix_bytes(mode) or NONCE_SUFFIX_BYTES), "big")
    clear = bytes(ffi.buffer(header, header_bytes))
    packet = seal_packet(mode, bytes(ffi.buffer(key, KEY_BYTES)), clear, frame, counter)
    ffi.memmove(out, packet[header_bytes:], len(packet) - header_bytes)
    return 0


def pointer(array: NDArray[np.uint8]) -> Pointer:
    """Where an array begins; the caller keeps the array alive. Sums with byte offsets are pointers, too."""
    return ffi.cast("unsigned char *", array.ctypes.data)


@cache
def _has_aes() -> bool:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, words = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return any(wanted <= set(words.split()) for wanted in _CPU_FLAGS)
    return False
