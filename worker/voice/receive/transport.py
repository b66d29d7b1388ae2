"""Opening of voice packets under one key: the fast path of the receiving side.

`shared.protocol.transport_crypto.open_packet` sets its cipher up for each packet; here that is done once for a key, in
the two modes that are alive.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from nacl._sodium import ffi, lib  # the library object: see transport_crypto

from shared.errors import MalformedPacket
from shared.protocol.rtp import RtpHeader
from shared.protocol.transport_crypto import (
    AES_GCM,
    KEY_BYTES,
    NONCE_SUFFIX_BYTES,
    TAG_BYTES,
    XCHACHA,
    nonce_bytes,
    open_packet,
)

Open = Callable[[bytes, RtpHeader], bytes | None]
"""``open(packet, header)``: the payload without extension elements and padding, empty when it was padding only.

None: not authentic. Raises MalformedPacket: no room for a tag, or inner lengths that do not add up; in a discontinued
mode also when it is not authentic.
"""
_Decrypt = Callable[[bytes, bytes, bytes], bytes | None]
"""Nonce, ciphertext with tag, clear header."""


def new_opener(mode: str, key: bytes) -> Open:
    """Make the function that opens packets under one key.

    Args:
        mode: one of the seven.
        key: 32 bytes, from Session Description.
    Raises: VoiceError: voice_mode_unsupported. ValueError: the key has another length.
    Source: voice protocol reference, sections 4.3 to 4.5, steps 1 to 4.
    """
    zeros = bytes(nonce_bytes(mode) - NONCE_SUFFIX_BYTES)
    if len(key) != KEY_BYTES:
        raise ValueError(f"key of {len(key)} bytes, wanted {KEY_BYTES}")
    if mode not in _NEW_DECRYPT:
        return lambda packet, _: open_packet(mode, key, packet)
    decrypt = _NEW_DECRYPT[mode](key)

    def open_fast(packet: bytes, header: RtpHeader) -> bytes | None:
        clear_bytes = header.clear_bytes
        if len(packet) < clear_bytes + TAG_BYTES + NONCE_SUFFIX_BYTES:
            raise MalformedPacket(f"packet of {len(packet)} bytes has no room for tag and counter")
        plain = decrypt(
            packet[-NONCE_SUFFIX_BYTES:] + zeros, packet[clear_bytes:-NONCE_SUFFIX_BYTES], packet[:clear_bytes]
        )
        if plain is None:
            return None
        begin, end = header.extension_bytes, len(plain)
        if begin > end:
            raise MalformedPacket(f"extension of {begin} bytes in a payload of {end}")
        if header.padding:
            # RFC 3550 section 5.1: the last octet counts the padding, itself included; it is ciphertext until here
            padding_bytes = plain[-1] if end > begin else 0
            if not 1 <= padding_bytes <= end - begin:
                raise MalformedPacket(f"padding count does not fit a payload of {end - begin} bytes")
            end -= padding_bytes
        return plain[begin:end]

    return open_fast


def _new_aes_gcm(key: bytes) -> _Decrypt:
    cipher = AESGCM(key)

    def decrypt(nonce: bytes, sealed: bytes, clear: bytes) -> bytes | None:
        try:
            return cipher.decrypt(nonce, sealed, clear)
        except InvalidTag:
            return None

    return decrypt


def _new_xchacha(key: bytes) -> _Decrypt:
    library_decrypt = lib.crypto_aead_xchacha20poly1305_ietf_decrypt
    new, unpack, null = ffi.new, ffi.buffer, ffi.NULL
    array = ffi.typeof("unsigned char[]")
    key_array = ffi.from_buffer(array, bytes(key))  # keeps the bytes alive

    def decrypt(nonce: bytes, sealed: bytes, clear: bytes) -> bytes | None:
        plain_bytes = len(sealed) - TAG_BYTES
        out = new(array, plain_bytes)
        if library_decrypt(out, null, null, sealed, len(sealed), clear, len(clear), nonce, key_array):
            return None
        return bytes(unpack(out, plain_bytes))

    return decrypt


_NEW_DECRYPT = {AES_GCM: _new_aes_gcm, XCHACHA: _new_xchacha}
