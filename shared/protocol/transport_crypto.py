"""Transport encryption of voice packets: the two "rtpsize" modes that are alive.

    packet = clear header | ciphertext | tag (16 bytes) | counter (4 bytes)
    nonce  = counter (4 bytes, big endian) | zero bytes

The clear header is authenticated. Counters belong to the caller: a (key, counter) pair is never used twice.

Source: voice protocol reference, sections 4.3 to 4.5; RFC 5116 (AEAD); draft-irtf-cfrg-xchacha.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

# The library object, not nacl.bindings, whose functions cost eight times as much. Importing nacl.bindings also runs
# sodium_init: not needed for AEAD under a nonce of ours, and it swaps in vector code that is slower below 600 bytes.
from nacl._sodium import ffi, lib

from shared.errors import ErrorCode, MalformedPacket, NonceExhausted, VoiceError
from shared.protocol.rtp import parse_header

AES_GCM = "aead_aes256_gcm_rtpsize"
XCHACHA = "aead_xchacha20_poly1305_rtpsize"

KEY_BYTES = 32
TAG_BYTES = 16
NONCE_SUFFIX_BYTES = 4
MAX_COUNTER = 2 ** (8 * NONCE_SUFFIX_BYTES) - 1

_NONCE_BYTES = {AES_GCM: 12, XCHACHA: 24}  # in order of preference
_XCHACHA_NONCE_BYTES = _NONCE_BYTES[XCHACHA]

Buffer = bytes | bytearray | memoryview
Seal = Callable[[Buffer, Buffer, Buffer, Buffer], object]
"""``seal(nonce, frame, header, out)``: out receives ciphertext and tag, header is authenticated only.

``nonce`` has exactly `nonce_bytes` bytes, ``out`` is writable and has exactly ``len(frame) + TAG_BYTES``.
Raises ValueError for an ``out`` of another length. What it returns means nothing.
"""


def choose_mode(offered: Sequence[str]) -> str:
    """Choose the encryption mode for Select Protocol: AES-GCM where offered, else XChaCha20.

    Args:
        offered: modes of Ready.
    Raises: VoiceError: voice_mode_unsupported, not retryable; none of the two is offered.
    Source: voice protocol reference, section 4.4.
    """
    for mode in _NONCE_BYTES:
        if mode in offered:
            return mode
    raise _unsupported(f"the voice server offers {', '.join(offered) or 'no mode'}")


def nonce_bytes(mode: str) -> int:
    """Length of a mode's whole nonce: 12 for AES-GCM, 24 for XChaCha20.

    Raises: VoiceError: voice_mode_unsupported; the mode is neither of the two.
    """
    try:
        return _NONCE_BYTES[mode]
    except KeyError:
        raise _unsupported(f"{mode} is not known") from None


def new_sealer(mode: str, key: bytes) -> Seal:
    """Make the function that seals frames under one key, the fast path of the sending side.

    Args:
        mode: `AES_GCM` or `XCHACHA`.
        key: 32 bytes, from Session Description.
    Returns: see `Seal`; it copies nothing and keeps no counter.
    Raises: VoiceError: voice_mode_unsupported. ValueError: the key has another length.
    Source: voice protocol reference, section 4.4.
    """
    nonce_bytes(mode)
    _check_key(key)
    if mode == AES_GCM:
        return AESGCM(key).encrypt_into
    return _new_xchacha_sealer(key)


def _new_xchacha_sealer(key: bytes) -> Seal:
    """XChaCha20-Poly1305 through libsodium; everything it needs is bound once."""
    encrypt = lib.crypto_aead_xchacha20poly1305_ietf_encrypt
    from_buffer = ffi.from_buffer
    array = ffi.typeof("unsigned char[]")
    null = ffi.NULL
    key_array = from_buffer(array, bytes(key))  # keeps the bytes alive

    def seal(nonce: Buffer, frame: Buffer, header: Buffer, out: Buffer) -> None:
        frame_bytes = len(frame)
        # C checks no length: these two are what keeps it inside the buffers
        if len(out) != frame_bytes + TAG_BYTES or len(nonce) != _XCHACHA_NONCE_BYTES:
            raise ValueError(f"out has {len(out)} bytes for a frame of {frame_bytes}, the nonce {len(nonce)}")
        encrypt(
            from_buffer(array, out, True),  # True: refuse a read-only buffer
            null,
            frame if type(frame) is bytes else from_buffer(frame),
            frame_bytes,
            from_buffer(header),
            len(header),
            null,
            from_buffer(nonce),
            key_array,
        )

    return seal


def seal_packet(mode: str, key: bytes, header: bytes, frame: bytes, counter: int) -> bytes:
    """Seal one frame into a whole voice packet; for tests and rare packets.

    Args:
        mode: `AES_GCM` or `XCHACHA`.
        key: 32 bytes, from Session Description.
        header: clear RTP header, 12 bytes or more, sent in clear and authenticated.
        frame: Opus frame, or its end-to-end encrypted form.
        counter: 0 to 2^32 - 1, never used before under this key.
    Returns: header | ciphertext | tag (16 bytes) | counter (4 bytes).
    Raises: NonceExhausted: the key must be renewed before another packet. VoiceError, ValueError: as `new_sealer`.
    Source: voice protocol reference, section 4.4.
    """
    if counter > MAX_COUNTER:
        raise NonceExhausted(f"counter {counter} does not fit {NONCE_SUFFIX_BYTES} bytes")
    suffix = counter.to_bytes(NONCE_SUFFIX_BYTES, "big")
    sealed = bytearray(len(frame) + TAG_BYTES)
    new_sealer(mode, key)(suffix.ljust(nonce_bytes(mode), b"\x00"), frame, header, sealed)
    return header + sealed + suffix


def open_packet(mode: str, key: bytes, packet: bytes) -> bytes:
    """Open one received voice packet.

    Args:
        mode: `AES_GCM` or `XCHACHA`.
        key: 32 bytes, from Session Description.
        packet: RTP datagram as received.
    Returns: payload without extension elements and padding; empty for a packet that was padding only.
    Raises: MalformedPacket: too short, forged, or inner lengths do not add up. VoiceError, ValueError: as `new_sealer`.
    Source: voice protocol reference, sections 4.3 and 4.5, steps 1 to 4.
    """
    nonce_size = nonce_bytes(mode)
    _check_key(key)
    header = parse_header(packet)
    suffix_offset = len(packet) - NONCE_SUFFIX_BYTES
    if suffix_offset - TAG_BYTES < header.clear_bytes:
        raise MalformedPacket(f"packet of {len(packet)} bytes has no room for tag and counter")
    nonce = packet[suffix_offset:].ljust(nonce_size, b"\x00")
    sealed = packet[header.clear_bytes : suffix_offset]
    clear = packet[: header.clear_bytes]
    plain = _open_aes_gcm(key, nonce, sealed, clear) if mode == AES_GCM else _open_xchacha(key, nonce, sealed, clear)
    if header.extension_bytes > len(plain):
        raise MalformedPacket(f"extension of {header.extension_bytes} bytes in a payload of {len(plain)}")
    payload = plain[header.extension_bytes :]
    if not header.padding:
        return payload
    # RFC 3550 section 5.1: the last octet counts the padding, itself included; it is ciphertext until here
    if not payload or not 1 <= payload[-1] <= len(payload):
        raise MalformedPacket(f"padding count does not fit a payload of {len(payload)} bytes")
    return payload[: -payload[-1]]


def _open_aes_gcm(key: bytes, nonce: bytes, sealed: bytes, clear: bytes) -> bytes:
    try:
        return AESGCM(key).decrypt(nonce, sealed, clear)
    except InvalidTag:
        raise _forged() from None


def _open_xchacha(key: bytes, nonce: bytes, sealed: bytes, clear: bytes) -> bytes:
    plain = bytearray(len(sealed) - TAG_BYTES)
    failed: int = lib.crypto_aead_xchacha20poly1305_ietf_decrypt(
        ffi.from_buffer(plain), ffi.NULL, ffi.NULL, sealed, len(sealed), clear, len(clear), nonce, key
    )
    if failed:
        raise _forged()
    return bytes(plain)


def _check_key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise ValueError(f"key of {len(key)} bytes, wanted {KEY_BYTES}")


def _forged() -> MalformedPacket:
    return MalformedPacket("packet is not authentic")


def _unsupported(what: str) -> VoiceError:
    return VoiceError(
        f"{what}, supported are {', '.join(_NONCE_BYTES)}", code=ErrorCode.VOICE_MODE_UNSUPPORTED, retryable=False
    )
