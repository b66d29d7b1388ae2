"""The few MLS encodings the gateway reads and writes. Pure.

Source: reference section 6.4; RFC 9420 section 2.1.2 for vectors, section 5.1.2 for signatures with a label.
"""

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

_LABEL_PREFIX = b"MLS 1.0 "
_SHORT, _MIDDLE, _LONG = 1 << 6, 1 << 14, 1 << 30


class MlsFormatError(ValueError):
    """Bytes that are not what the protocol asks for."""


def u16(value: int) -> bytes:
    """Two bytes, big endian."""
    return value.to_bytes(2, "big")


def u32(value: int) -> bytes:
    """Four bytes, big endian."""
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    """Eight bytes, big endian."""
    return value.to_bytes(8, "big")


def vector(data: bytes) -> bytes:
    """Bytes behind their length in its shortest form."""
    size = len(data)
    if size < _SHORT:
        return bytes((size,)) + data
    if size < _MIDDLE:
        return u16(0x4000 | size) + data
    if size < _LONG:
        return u32(0x8000_0000 | size) + data
    raise MlsFormatError(f"{size} bytes do not fit into a vector")


class Reader:
    """Reads fields one after the other. Every method raises MlsFormatError where the bytes end too soon."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    @property
    def rest(self) -> bytes:
        """What has not been read."""
        return self.data[self.at :]

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        end = self.at + size
        if end > len(self.data):
            raise MlsFormatError(f"{size} bytes wanted at {self.at}, {len(self.data) - self.at} are left")
        taken, self.at = self.data[self.at : end], end
        return taken

    def uint(self, size: int) -> int:
        """A number of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def vector(self) -> bytes:
        """Content of a vector; a length that is longer than need be is refused."""
        first = self.uint(1)
        prefix = first >> 6
        if prefix == 3:
            raise MlsFormatError("impossible vector length")
        extra = (1 << prefix) - 1
        size = (first & 0x3F) << 8 * extra | self.uint(extra)
        if prefix and size < (_SHORT, _MIDDLE)[prefix - 1]:
            raise MlsFormatError("vector length is not in its shortest form")
        return self.take(size)

    def expect(self, value: int, size: int, what: str) -> None:
        """A number that can only be one."""
        found = self.uint(size)
        if found != value:
            raise MlsFormatError(f"{what} is {found}, not {value}")

    def end(self) -> None:
        """Raises: MlsFormatError: there is more."""
        if self.at != len(self.data):
            raise MlsFormatError(f"{len(self.data) - self.at} bytes too many")


def reference(label: bytes, content: bytes) -> bytes:
    """Hash by which a proposal or key package is named."""
    return hashlib.sha256(vector(_LABEL_PREFIX + label) + vector(content)).digest()


def sign(key: ec.EllipticCurvePrivateKey, label: bytes, content: bytes) -> bytes:
    """ECDSA over labelled content."""
    return key.sign(vector(_LABEL_PREFIX + label) + vector(content), ec.ECDSA(SHA256()))


def verify(point: bytes, label: bytes, content: bytes, signature: bytes) -> None:
    """Check a signature by the key that `point` encodes. Raises: MlsFormatError."""
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        key.verify(signature, vector(_LABEL_PREFIX + label) + vector(content), ec.ECDSA(SHA256()))
    except (InvalidSignature, ValueError) as error:
        raise MlsFormatError(f"the signature over {label.decode()} is wrong") from error
