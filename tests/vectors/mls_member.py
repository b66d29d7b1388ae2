"""A member of a DAVE group that only listens, in plain Python over `cryptography`: it opens a Welcome, derives what the
epoch holds, and decrypts frames. It shares no code with the libraries that the product and the local Discord use.

Source: RFC 9420 sections 5.1, 5.2, 8 and 12.4.3.1; RFC 9180 sections 4 and 5; voice protocol reference, 6.4, 6.8, 6.9.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.base import Cipher
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

_HASH_BYTES = 32
_KEY_BYTES = 16
_NONCE_BYTES = 12
_KEM_SUITE = b"KEM" + bytes.fromhex("0010")
_HPKE_SUITE = b"HPKE" + bytes.fromhex("001000010001")
_FRAME_TAG_BYTES = 8
_EXPORTER_LABEL = "Discord Secure Frames v0"
_GENERATION_SHIFT = 24


class Reader:
    """Reads numbers and variable-length vectors, one behind the other."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        part = self.data[self.at : self.at + size]
        assert len(part) == size
        self.at += size
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self) -> bytes:
        prefix = self.data[self.at] >> 6
        size_bytes = 1 << prefix
        return self.take(self.number(size_bytes) & (1 << 8 * size_bytes - 2) - 1)


def vector(data: bytes) -> bytes:
    """A variable-length vector."""
    for prefix, size_bytes in enumerate((1, 2, 4)):
        if len(data) < 1 << 8 * size_bytes - 2:
            return (prefix << 8 * size_bytes - 2 | len(data)).to_bytes(size_bytes, "big") + data
    raise ValueError("too long")


def ref_hash(label: str, value: bytes) -> bytes:
    """Hash by which proposals and key packages are named."""
    return hashlib.sha256(vector(label.encode()) + vector(value)).digest()


def signed_content(label: str, content: bytes) -> bytes:
    """What a signature under this label covers."""
    return vector(b"MLS 1.0 " + label.encode()) + vector(content)


def public_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Uncompressed point of a private key."""
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def private_key(scalar: bytes) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(scalar, "big"), ec.SECP256R1())


def _extract(salt: bytes, secret: bytes) -> bytes:
    return hmac.digest(salt, secret, "sha256")


def _expand(secret: bytes, info: bytes, size: int) -> bytes:
    return HKDFExpand(SHA256(), size, info).derive(secret)


def expand_with_label(secret: bytes, label: str, context: bytes, size: int) -> bytes:
    info = size.to_bytes(2, "big") + vector(b"MLS 1.0 " + label.encode()) + vector(context)
    return _expand(secret, info, size)


def _derive(secret: bytes, label: str) -> bytes:
    return expand_with_label(secret, label, b"", _HASH_BYTES)


def _hpke_open(private: ec.EllipticCurvePrivateKey, kem_output: bytes, info: bytes, ciphertext: bytes) -> bytes:
    """Single-shot HPKE in base mode: DHKEM over P-256, HKDF-SHA256, AES-128-GCM, no additional data."""

    def extract(suite: bytes, salt: bytes, label: str, secret: bytes) -> bytes:
        return _extract(salt, b"HPKE-v1" + suite + label.encode() + secret)

    def expand(suite: bytes, secret: bytes, label: str, info: bytes, size: int) -> bytes:
        return _expand(secret, size.to_bytes(2, "big") + b"HPKE-v1" + suite + label.encode() + info, size)

    ephemeral = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), kem_output)
    shared = extract(_KEM_SUITE, b"", "eae_prk", private.exchange(ec.ECDH(), ephemeral))
    shared = expand(_KEM_SUITE, shared, "shared_secret", kem_output + public_bytes(private), _HASH_BYTES)
    context = b"\x00" + extract(_HPKE_SUITE, b"", "psk_id_hash", b"") + extract(_HPKE_SUITE, b"", "info_hash", info)
    secret = extract(_HPKE_SUITE, shared, "secret", b"")
    key = expand(_HPKE_SUITE, secret, "key", context, _KEY_BYTES)
    return AESGCM(key).decrypt(expand(_HPKE_SUITE, secret, "base_nonce", context, _NONCE_BYTES), ciphertext, b"")


@dataclass(frozen=True)
class Epoch:
    """What a member knows of one epoch."""

    group_id: bytes
    number: int
    exporter_secret: bytes
    authenticator: bytes

    @property
    def privacy_code(self) -> str:
        """Six groups of five digits, which members may compare by voice."""
        groups = [self.authenticator[at : at + 5] for at in range(0, 30, 5)]
        return "".join(f"{int.from_bytes(group, 'big') % 100_000:05}" for group in groups)

    def base_secret(self, user_id: int) -> bytes:
        """Secret from which a sender's ratchet starts."""
        secret = _derive(self.exporter_secret, _EXPORTER_LABEL)
        context = hashlib.sha256(user_id.to_bytes(8, "little")).digest()
        return expand_with_label(secret, "exported", context, _KEY_BYTES)


def open_welcome(welcome: bytes, key_package: bytes, init_key: ec.EllipticCurvePrivateKey) -> Epoch:
    """Join by a Welcome; the confirmation tag proves that the group agrees on the epoch."""
    reader = Reader(welcome)
    assert reader.number(2) == 2  # cipher suite
    secrets = Reader(reader.vector())
    encrypted_group_info = reader.vector()
    assert reader.at == len(welcome)
    mine = ref_hash("MLS 1.0 KeyPackage Reference", key_package)
    while True:
        reference, kem_output, ciphertext = secrets.vector(), secrets.vector(), secrets.vector()
        if reference == mine:
            break
    info = vector(b"MLS 1.0 Welcome") + vector(encrypted_group_info)
    joiner_secret = Reader(_hpke_open(init_key, kem_output, info, ciphertext)).vector()
    member_secret = _extract(joiner_secret, bytes(_HASH_BYTES))
    welcome_secret = _derive(member_secret, "welcome")
    key = expand_with_label(welcome_secret, "key", b"", _KEY_BYTES)
    nonce = expand_with_label(welcome_secret, "nonce", b"", _NONCE_BYTES)
    reader = Reader(AESGCM(key).decrypt(nonce, encrypted_group_info, b""))
    assert (reader.number(2), reader.number(2)) == (1, 2)  # MLS 1.0, cipher suite
    group_id, number = reader.vector(), reader.number(8)
    _tree_hash, transcript_hash, _extensions = reader.vector(), reader.vector(), reader.vector()
    group_context = reader.data[: reader.at]
    _group_extensions, confirmation_tag = reader.vector(), reader.vector()
    epoch_secret = expand_with_label(member_secret, "epoch", group_context, _HASH_BYTES)
    assert hmac.digest(_derive(epoch_secret, "confirm"), transcript_hash, "sha256") == confirmation_tag
    return Epoch(group_id, number, _derive(epoch_secret, "exporter"), _derive(epoch_secret, "authentication"))


def ratchet(base_secret: bytes, generation: int) -> tuple[bytes, bytes]:
    """Key of a generation, and the nonce beside it, which frames do not use."""
    secret = base_secret
    for number in range(generation):
        secret = expand_with_label(secret, "secret", number.to_bytes(4, "big"), _HASH_BYTES)
    context = generation.to_bytes(4, "big")
    return (
        expand_with_label(secret, "key", context, _KEY_BYTES),
        expand_with_label(secret, "nonce", context, _NONCE_BYTES),
    )


def encrypt_frame(base_secret: bytes, nonce: int, plain: bytes) -> bytes:
    """An audio frame as a sender with this secret encrypts it."""
    key, _ = ratchet(base_secret, nonce >> _GENERATION_SHIFT)
    sealed = AESGCM(key).encrypt(gcm_nonce(nonce), plain, b"")
    uleb = b""
    left = nonce
    while left > 0x7F:
        uleb += bytes([left & 0x7F | 0x80])
        left >>= 7
    uleb += bytes([left])
    return sealed[: len(plain) + _FRAME_TAG_BYTES] + uleb + bytes([_FRAME_TAG_BYTES + len(uleb) + 3]) + b"\xfa\xfa"


def decrypt_frame(base_secret: bytes, nonce: int, ciphertext: bytes, tag: bytes) -> bytes:
    """The plain frame. Raises: InvalidTag."""
    key, _ = ratchet(base_secret, nonce >> _GENERATION_SHIFT)
    mode = GCM(gcm_nonce(nonce), tag, min_tag_length=_FRAME_TAG_BYTES)
    decryptor = Cipher(AES(key), mode).decryptor()
    return decryptor.update(ciphertext) + decryptor.finalize()


def gcm_nonce(nonce: int) -> bytes:
    return nonce.to_bytes(4, "little").rjust(_NONCE_BYTES, b"\x00")
