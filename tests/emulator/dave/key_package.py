"""Key packages as clients send them in op 26: reading, checking, naming. Pure.

Source: reference section 6.4.
"""

from dataclasses import dataclass

from tests.emulator.dave.codec import MlsFormatError, Reader, reference, u64, verify

MLS_VERSION = 1
CIPHER_SUITE = 2
BASIC_CREDENTIAL = 1
SOURCE_KEY_PACKAGE = 1
SOURCE_UPDATE = 2
SOURCE_COMMIT = 3
LIFETIME = u64(0) + u64(2**64 - 1)


@dataclass(frozen=True, slots=True)
class Leaf:
    """What the gateway looks at in a leaf node. `signed` is all that its signature covers in a key package."""

    signature_key: bytes
    identity: bytes
    source: int
    lifetime: bytes
    signed: bytes
    signature: bytes


def read_leaf(reader: Reader) -> Leaf:
    """The leaf node that starts here. Raises: MlsFormatError."""
    start = reader.at
    reader.vector()  # encryption key
    signature_key = reader.vector()
    reader.expect(BASIC_CREDENTIAL, 2, "credential type")
    identity = reader.vector()
    for _ in ("versions", "suites", "extensions", "proposals", "credentials"):
        reader.vector()
    source = reader.uint(1)
    lifetime = b""
    if source == SOURCE_KEY_PACKAGE:
        lifetime = reader.take(16)
    elif source == SOURCE_COMMIT:
        reader.vector()  # parent hash
    elif source != SOURCE_UPDATE:
        raise MlsFormatError(f"leaf node source {source} does not exist")
    reader.vector()  # extensions
    signed = reader.data[start : reader.at]
    return Leaf(signature_key, identity, source, lifetime, signed, reader.vector())


def check_key_package(body: bytes, user_id: int) -> None:
    """Check that a key package is this user's and properly signed. Raises: MlsFormatError."""
    reader = Reader(body)
    reader.expect(MLS_VERSION, 2, "MLS version")
    reader.expect(CIPHER_SUITE, 2, "cipher suite")
    reader.vector()  # init key
    leaf = read_leaf(reader)
    reader.vector()  # extensions
    signed = body[: reader.at]
    signature = reader.vector()
    reader.end()
    if leaf.source != SOURCE_KEY_PACKAGE or leaf.lifetime != LIFETIME:
        raise MlsFormatError("the leaf node is not that of a key package without end")
    if leaf.identity != u64(user_id):
        raise MlsFormatError("the key package is somebody else's")
    verify(leaf.signature_key, b"LeafNodeTBS", leaf.signed, leaf.signature)
    verify(leaf.signature_key, b"KeyPackageTBS", signed, signature)


def key_package_reference(body: bytes) -> bytes:
    """The name of a key package in a Welcome."""
    return reference(b"KeyPackage Reference", body)
