"""One known packet per transport mode: a mode that seals it wrongly is not used by this worker.

Sealing calls a library through a private name, on a processor that nobody has seen. If a build of it were wrong, each
packet would leave on time and be dropped by the server without a word: guilds would be `playing`, and silent. So the
code that seals in production, on the memory that it seals in, is asked once what is known beforehand.

Source: the vectors of transport encryption ("basic"), on which two other implementations agreed.
"""

from __future__ import annotations

from shared.protocol.packet_seal import Encrypt
from shared.protocol.transport_crypto import (
    AES_GCM,
    AES_GCM_FIXED,
    KEY_BYTES,
    XCHACHA,
    XSALSA,
    XSALSA_LITE,
    XSALSA_LITE_RTPSIZE,
    XSALSA_SUFFIX,
    suffix_bytes,
)
from worker.fanout.scratch import Scratch

KEY = bytes(range(KEY_BYTES))
HEADER = bytes.fromhex("8078123400abcdefdeadbeef")
FRAME = bytes.fromhex("7883d0a1b2c3d4e5f60718293a4b5c6d7e8f9001")
NONCE_COUNTER = 1
_BY_AES = "3cb51d0bbe99204da93b7db993f669ed19b059c14206a9b805715e7f222f3282f026dd13"
_BY_XCHACHA = "71248181ddc3453a38e0bfbdfe7bf27e5e94577a4619ea2e9b968f8f9726d045cee63c53"
_BY_XSALSA = "28a85fe9caf256bbc9c36dc7bee3d7b2b62805dff57223b6f4efdc40aceddea0e103c92f"
_BY_XSALSA_AND_HEADER = "b2299b7bd7bddf7d9f0139be54df03fb55dda7e44701aad140d97488c73f6e241f7c4e30"
SEALED = {
    AES_GCM: bytes.fromhex(_BY_AES),
    AES_GCM_FIXED: bytes.fromhex(_BY_AES),
    XCHACHA: bytes.fromhex(_BY_XCHACHA),
    XSALSA_LITE_RTPSIZE: bytes.fromhex(_BY_XSALSA),
    XSALSA_LITE: bytes.fromhex(_BY_XSALSA),
    XSALSA_SUFFIX: bytes.fromhex(_BY_XSALSA),
    XSALSA: bytes.fromhex(_BY_XSALSA_AND_HEADER),
}
"""What stands between header and nonce. With 12 bytes of header, modes of one cipher and one nonce agree."""


def known_packet(mode: str) -> bytes:
    """The whole packet of a mode."""
    return HEADER + SEALED[mode] + NONCE_COUNTER.to_bytes(4, "big").ljust(24, b"\x00")[: suffix_bytes(mode)]


def seals_rightly(mode: str, encrypt: Encrypt, scratch: Scratch) -> bool:
    """Whether the function seals the known packet of a mode in this memory, of which nothing is left there."""
    scratch.head[0, 0] = tuple(int.from_bytes(HEADER[a:b], "big") for a, b in ((0, 2), (2, 4), (4, 8), (8, 12)))
    scratch.nonces[0, 0] = NONCE_COUNTER
    scratch.keys[0] = list(KEY)
    try:
        ends = scratch.seal(encrypt, [FRAME], 1)
        return scratch.packets[0, 0, : int(ends[0, 0]) + suffix_bytes(mode)].tobytes() == known_packet(mode)
    except Exception:  # noqa: BLE001 - however it fails, other modes go on
        return False
    finally:
        scratch.packets[0, 0, len(HEADER) :] = 0
        scratch.keys[0] = 0
