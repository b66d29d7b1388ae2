"""Opening and sealing of RTP packets in the two live modes. Pure.

Source: reference sections 4.2 to 4.5.
"""

from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_decrypt, crypto_aead_xchacha20poly1305_ietf_encrypt
from nacl.exceptions import CryptoError

from tests.emulator.wire import MODE_AES, MODE_XCHACHA, NONCE_BYTES, RTP_HEADER_BYTES, SMALLEST_RTP_BYTES

_PLAIN_FIRST_BYTE = 0x80
_PADDING_BIT = 0x20
_EXTENSION_BIT = 0x10
_CSRC_MASK = 0x0F
_AES_NONCE_TAIL = bytes(8)
_XCHACHA_NONCE_TAIL = bytes(20)


class DecryptFailedError(Exception):
    """The packet is not authentic under the session's key, or its layout is impossible."""


class Opener(Protocol):
    """Decrypts with one session's key."""

    def open(self, header: bytes, sealed: bytes, nonce: bytes) -> bytes:
        """Plaintext of ciphertext and tag. Raises: DecryptFailedError."""


class AesOpener:
    """`aead_aes256_gcm_rtpsize`."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def open(self, header: bytes, sealed: bytes, nonce: bytes) -> bytes:
        """See `Opener.open`."""
        try:
            return self._cipher.decrypt(nonce + _AES_NONCE_TAIL, sealed, header)
        except InvalidTag as error:
            raise DecryptFailedError from error


class XChaChaOpener:
    """`aead_xchacha20_poly1305_rtpsize`."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def open(self, header: bytes, sealed: bytes, nonce: bytes) -> bytes:
        """See `Opener.open`."""
        try:
            plain = crypto_aead_xchacha20poly1305_ietf_decrypt(sealed, header, nonce + _XCHACHA_NONCE_TAIL, self._key)
        except CryptoError as error:
            raise DecryptFailedError from error
        return bytes(plain)


def opener_for(mode: str, key: bytes) -> Opener:
    """The opener of a mode that was offered. Raises: KeyError: the mode is none of the live ones."""
    openers: dict[str, type[AesOpener] | type[XChaChaOpener]] = {MODE_AES: AesOpener, MODE_XCHACHA: XChaChaOpener}
    return openers[mode](key)


def open_rtp(opener: Opener, packet: bytes) -> bytes:
    """The Opus frame inside one sealed RTP packet; extension elements and padding are removed.

    Raises: DecryptFailedError.
    Source: reference section 4.5, receive order.
    """
    first = packet[0]
    header_bytes = RTP_HEADER_BYTES
    element_bytes = 0
    if first != _PLAIN_FIRST_BYTE:
        header_bytes += 4 * (first & _CSRC_MASK)
        if first & _EXTENSION_BIT:
            element_bytes = 4 * int.from_bytes(packet[header_bytes + 2 : header_bytes + 4], "big")
            header_bytes += 4
        if len(packet) < header_bytes + SMALLEST_RTP_BYTES - RTP_HEADER_BYTES:
            raise DecryptFailedError
    plain = opener.open(packet[:header_bytes], packet[header_bytes:-NONCE_BYTES], packet[-NONCE_BYTES:])
    if first == _PLAIN_FIRST_BYTE:
        return plain
    plain = plain[element_bytes:]
    if first & _PADDING_BIT:
        if not plain or not 1 <= plain[-1] <= len(plain):
            raise DecryptFailedError
        plain = plain[: -plain[-1]]
    return plain


class Sealer(Protocol):
    """Encrypts with one session's key."""

    def seal(self, header: bytes, plain: bytes, nonce: bytes) -> bytes:
        """Ciphertext and tag; `nonce` is the counter of 4 bytes."""


class AesSealer:
    """`aead_aes256_gcm_rtpsize`."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def seal(self, header: bytes, plain: bytes, nonce: bytes) -> bytes:
        """See `Sealer.seal`."""
        return self._cipher.encrypt(nonce + _AES_NONCE_TAIL, plain, header)


class XChaChaSealer:
    """`aead_xchacha20_poly1305_rtpsize`."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def seal(self, header: bytes, plain: bytes, nonce: bytes) -> bytes:
        """See `Sealer.seal`."""
        return bytes(crypto_aead_xchacha20poly1305_ietf_encrypt(plain, header, nonce + _XCHACHA_NONCE_TAIL, self._key))


def sealer_for(mode: str, key: bytes) -> Sealer:
    """The sealer of a live mode. Raises: KeyError."""
    sealers: dict[str, type[AesSealer] | type[XChaChaSealer]] = {MODE_AES: AesSealer, MODE_XCHACHA: XChaChaSealer}
    return sealers[mode](key)
