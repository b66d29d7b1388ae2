"""Key packages with nobody behind them. Pure.

A ghost fills a group at next to no cost: it is added like anybody, and never asked, answered or waited for. Its keys
are thrown away, and its key package names no group, so one ghost may sit in any number of groups at once.
"""

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.emulator.dave.codec import sign, u16, u64, vector
from tests.emulator.dave.key_package import BASIC_CREDENTIAL, CIPHER_SUITE, LIFETIME, MLS_VERSION, SOURCE_KEY_PACKAGE


def make_key_package(user_id: int) -> bytes:
    """A properly signed key package whose private keys nobody has."""
    signing = ec.generate_private_key(ec.SECP256R1())
    leaf = (
        vector(_point(ec.generate_private_key(ec.SECP256R1())))
        + vector(_point(signing))
        + u16(BASIC_CREDENTIAL)
        + vector(u64(user_id))
        + vector(u16(MLS_VERSION))
        + vector(u16(CIPHER_SUITE))
        + vector(b"")
        + vector(b"")
        + vector(u16(BASIC_CREDENTIAL))
        + bytes((SOURCE_KEY_PACKAGE,))
        + LIFETIME
        + vector(b"")
    )
    content = (
        u16(MLS_VERSION)
        + u16(CIPHER_SUITE)
        + vector(_point(ec.generate_private_key(ec.SECP256R1())))
        + leaf
        + vector(sign(signing, b"LeafNodeTBS", leaf))
        + vector(b"")
    )
    return content + vector(sign(signing, b"KeyPackageTBS", content))


def _point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
