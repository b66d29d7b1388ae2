"""Transport encryption of voice packets, in all seven modes.

    rtpsize   clear header with CSRC list and extension word | sealed | nonce suffix
    others    clear header of 12 bytes                       | sealed | nonce suffix

    mode                              cipher               nonce                   sealed      service
    aead_aes256_gcm_rtpsize           AES-256-GCM          suffix of 4 | zeros     ct | tag    live, preferred
    aead_xchacha20_poly1305_rtpsize   XChaCha20-Poly1305   suffix of 4 | zeros     ct | tag    live, always offered
    xsalsa20_poly1305_lite_rtpsize    XSalsa20-Poly1305    suffix of 4 | zeros     tag | ct    until November 2024
    aead_aes256_gcm                   AES-256-GCM          suffix of 4 | zeros     ct | tag    until November 2024
    xsalsa20_poly1305_lite            XSalsa20-Poly1305    suffix of 4 | zeros     tag | ct    until November 2024
    xsalsa20_poly1305_suffix          XSalsa20-Poly1305    suffix of 24            tag | ct    until November 2024
    xsalsa20_poly1305                 XSalsa20-Poly1305    clear header | zeros    tag | ct    until November 2024

AES-GCM and XChaCha20 authenticate the clear header, XSalsa20 does not. Counters belong to the caller: a (key, counter)
pair is never used twice. Each function takes one whole packet and keeps nothing: for receiving, for rare packets, for
tests. What sends fifty packets a second to each guild is `packet_seal`.

Source: voice protocol reference, sections 4.3 to 4.5; RFC 5116 (AEAD); draft-irtf-cfrg-xchacha; NaCl (secretbox).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

# The library object, not nacl.bindings: importing that runs sodium_init (see packet_seal).
from nacl._sodium import ffi, lib

from shared.errors import ErrorCode, MalformedPacket, NonceExhausted, VoiceError
from shared.protocol.rtp import HEADER_BYTES, RtpPacket, parse_header, split_packet

AES_GCM = "aead_aes256_gcm_rtpsize"
XCHACHA = "aead_xchacha20_poly1305_rtpsize"
XSALSA_LITE_RTPSIZE = "xsalsa20_poly1305_lite_rtpsize"
AES_GCM_FIXED = "aead_aes256_gcm"
XSALSA_LITE = "xsalsa20_poly1305_lite"
XSALSA_SUFFIX = "xsalsa20_poly1305_suffix"
XSALSA = "xsalsa20_poly1305"

KEY_BYTES = 32
TAG_BYTES = 16
NONCE_SUFFIX_BYTES = 4
"""Of all modes but the last two."""
RTCP_CLEAR_BYTES = 8
"""Clear part of an RTCP packet: its first word and the sender's SSRC."""

_AES_NONCE_BYTES = 12
_SODIUM_NONCE_BYTES = 24  # XChaCha20 and XSalsa20

_Cipher = Callable[[bytes, bytes, bytes, bytes], bytes]
"""Key, nonce, what is to be sealed or opened, clear header. One that opens raises MalformedPacket."""


class _Mode(NamedTuple):
    seal: _Cipher
    open: _Cipher
    nonce_bytes: int
    suffix_bytes: int
    rtpsize: bool
    """Whether CSRC list and extension word are clear."""


def choose_mode(offered: Sequence[str], usable: Sequence[str] | None = None) -> str:
    """Choose the encryption mode for Select Protocol: AES-GCM, else XChaCha20, else a discontinued one.

    Args:
        offered: modes of Ready.
        usable: those that can be used here, the best first; all seven if not given.
    Raises: VoiceError: voice_mode_unsupported, not retryable; none that can be used is offered.
    Source: voice protocol reference, section 4.4.
    """
    usable = MODES if usable is None else usable
    for mode in usable:
        if mode in offered:
            return mode
    raise _unsupported(f"the voice server offers {', '.join(offered) or 'no mode'}", usable)


def nonce_bytes(mode: str) -> int:
    """Length of a mode's whole nonce: 12 for AES-GCM, 24 for the others.

    Raises: VoiceError: voice_mode_unsupported; the mode is none of the seven.
    """
    return _mode(mode).nonce_bytes


def suffix_bytes(mode: str) -> int:
    """Bytes of nonce that end a packet of the mode: 4, 24 or none.

    Raises: VoiceError: voice_mode_unsupported; the mode is none of the seven.
    """
    return _mode(mode).suffix_bytes


def seal_packet(mode: str, key: bytes, header: bytes, frame: bytes, counter: int) -> bytes:
    """Seal one frame into a whole voice packet.

    Args:
        mode: one of the seven.
        key: 32 bytes, from Session Description.
        header: RTP header with CSRC list and extension word; what the mode does not leave clear is encrypted.
        frame: extension elements, Opus frame or its end-to-end encrypted form, padding.
        counter: 0 to 2^32 - 1, never used before under this key. In `XSALSA_SUFFIX` up to 2^192 - 1, drawn at random;
            in `XSALSA` of no effect: the header is the nonce.
    Returns: clear header | sealed | nonce suffix.
    Raises: NonceExhausted: the key must be renewed before another packet. VoiceError: voice_mode_unsupported.
        ValueError: the key has another length.
    Source: voice protocol reference, sections 4.3 and 4.4.
    """
    if _mode(mode).rtpsize:
        return _seal(mode, key, header, frame, counter)
    return _seal(mode, key, header[:HEADER_BYTES], header[HEADER_BYTES:] + frame, counter)


def open_rtp(mode: str, key: bytes, packet: bytes) -> RtpPacket:
    """Open one received voice packet and take it apart.

    Args:
        mode: one of the seven.
        key: 32 bytes, from Session Description.
        packet: RTP datagram as received.
    Raises: MalformedPacket: too short, forged, or inner lengths do not add up.
        VoiceError, ValueError: as `seal_packet`.
    Source: voice protocol reference, sections 4.3 and 4.5, steps 1 to 4.
    """
    clear_bytes = parse_header(packet).clear_bytes if _mode(mode).rtpsize else HEADER_BYTES
    return split_packet(_open(mode, key, packet, clear_bytes))


def open_packet(mode: str, key: bytes, packet: bytes) -> bytes:
    """Open one received voice packet; arguments and errors as `open_rtp`.

    Returns: payload without extension elements and padding; empty for a packet that was padding only.
    """
    return open_rtp(mode, key, packet).payload


def seal_rtcp(mode: str, key: bytes, packet: bytes, counter: int) -> bytes:
    """Seal an RTCP packet; its counter is the one of the voice packets, because the key is the same.

    Returns: clear part of 8 bytes | sealed | nonce suffix.
    Raises: MalformedPacket: shorter than its clear part. The rest as `seal_packet`.
    Source: voice protocol reference, section 4.3, RTCP.
    """
    if len(packet) < RTCP_CLEAR_BYTES:
        raise MalformedPacket(f"RTCP packet of {len(packet)} bytes, its clear part has {RTCP_CLEAR_BYTES}")
    return _seal(mode, key, packet[:RTCP_CLEAR_BYTES], packet[RTCP_CLEAR_BYTES:], counter)


def open_rtcp(mode: str, key: bytes, packet: bytes) -> bytes:
    """Open a received RTCP packet.

    Returns: the plain packet, clear part included.
    Raises: MalformedPacket: too short or forged. VoiceError, ValueError: as `seal_packet`.
    Source: voice protocol reference, section 4.3, RTCP.
    """
    return _open(mode, key, packet, RTCP_CLEAR_BYTES)


def _seal(mode: str, key: bytes, clear: bytes, plain: bytes, counter: int) -> bytes:
    rule = _mode(mode)
    _check_key(key)
    suffix = b""
    if rule.suffix_bytes:
        if counter >> 8 * rule.suffix_bytes:
            raise NonceExhausted(f"counter {counter} does not fit {rule.suffix_bytes} bytes")
        suffix = counter.to_bytes(rule.suffix_bytes, "big")
    nonce = (suffix or clear).ljust(rule.nonce_bytes, b"\x00")
    return clear + rule.seal(key, nonce, plain, clear) + suffix


def _open(mode: str, key: bytes, packet: bytes, clear_bytes: int) -> bytes:
    """Clear part and plaintext of a packet, one behind the other."""
    rule = _mode(mode)
    _check_key(key)
    suffix_offset = len(packet) - rule.suffix_bytes
    if suffix_offset - TAG_BYTES < clear_bytes:
        raise MalformedPacket(f"packet of {len(packet)} bytes has no room for tag and nonce")
    clear, sealed = packet[:clear_bytes], packet[clear_bytes:suffix_offset]
    nonce = (packet[suffix_offset:] or clear).ljust(rule.nonce_bytes, b"\x00")
    return clear + rule.open(key, nonce, sealed, clear)


# Lengths are right here: libsodium checks none. Keys have been checked, nonces were made as long as the mode says.


def _seal_aes_gcm(key: bytes, nonce: bytes, plain: bytes, clear: bytes) -> bytes:
    return AESGCM(key).encrypt(nonce, plain, clear)


def _open_aes_gcm(key: bytes, nonce: bytes, sealed: bytes, clear: bytes) -> bytes:
    try:
        return AESGCM(key).decrypt(nonce, sealed, clear)
    except InvalidTag:
        raise _forged() from None


def _seal_xchacha(key: bytes, nonce: bytes, plain: bytes, clear: bytes) -> bytes:
    sealed = bytearray(len(plain) + TAG_BYTES)
    lib.crypto_aead_xchacha20poly1305_ietf_encrypt(
        ffi.from_buffer(sealed), ffi.NULL, plain, len(plain), clear, len(clear), ffi.NULL, nonce, key
    )
    return bytes(sealed)


def _open_xchacha(key: bytes, nonce: bytes, sealed: bytes, clear: bytes) -> bytes:
    plain = bytearray(len(sealed) - TAG_BYTES)
    failed: int = lib.crypto_aead_xchacha20poly1305_ietf_decrypt(
        ffi.from_buffer(plain), ffi.NULL, ffi.NULL, sealed, len(sealed), clear, len(clear), nonce, key
    )
    if failed:
        raise _forged()
    return bytes(plain)


def _seal_xsalsa(key: bytes, nonce: bytes, plain: bytes, _: bytes) -> bytes:
    sealed = bytearray(len(plain) + TAG_BYTES)
    lib.crypto_secretbox_easy(ffi.from_buffer(sealed), plain, len(plain), nonce, key)
    return bytes(sealed)


def _open_xsalsa(key: bytes, nonce: bytes, sealed: bytes, _: bytes) -> bytes:
    plain = bytearray(len(sealed) - TAG_BYTES)
    if lib.crypto_secretbox_open_easy(ffi.from_buffer(plain), sealed, len(sealed), nonce, key):
        raise _forged()
    return bytes(plain)


_AES = (_seal_aes_gcm, _open_aes_gcm, _AES_NONCE_BYTES)
_XCHACHA = (_seal_xchacha, _open_xchacha, _SODIUM_NONCE_BYTES)
_XSALSA = (_seal_xsalsa, _open_xsalsa, _SODIUM_NONCE_BYTES)

_MODES = {  # in order of preference
    AES_GCM: _Mode(*_AES, NONCE_SUFFIX_BYTES, rtpsize=True),
    XCHACHA: _Mode(*_XCHACHA, NONCE_SUFFIX_BYTES, rtpsize=True),
    XSALSA_LITE_RTPSIZE: _Mode(*_XSALSA, NONCE_SUFFIX_BYTES, rtpsize=True),
    AES_GCM_FIXED: _Mode(*_AES, NONCE_SUFFIX_BYTES, rtpsize=False),
    XSALSA_LITE: _Mode(*_XSALSA, NONCE_SUFFIX_BYTES, rtpsize=False),
    XSALSA_SUFFIX: _Mode(*_XSALSA, _SODIUM_NONCE_BYTES, rtpsize=False),
    XSALSA: _Mode(*_XSALSA, 0, rtpsize=False),
}
MODES = tuple(_MODES)
"""All modes, the best first."""


def _mode(mode: str) -> _Mode:
    try:
        return _MODES[mode]
    except KeyError:
        raise _unsupported(f"{mode} is not known", MODES) from None


def _check_key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise ValueError(f"key of {len(key)} bytes, wanted {KEY_BYTES}")


def _forged() -> MalformedPacket:
    return MalformedPacket("packet is not authentic")


def _unsupported(what: str, supported: Sequence[str]) -> VoiceError:
    return VoiceError(
        f"{what}, supported are {', '.join(supported) or 'none'}",
        code=ErrorCode.VOICE_MODE_UNSUPPORTED,
        retryable=False,
    )
