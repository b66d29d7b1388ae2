"""The gateway as external sender: the only one who may propose. Pure.

Source: reference section 6.4.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.emulator.dave.codec import reference, sign, u16, u32, u64, vector
from tests.emulator.dave.key_package import BASIC_CREDENTIAL, MLS_VERSION

PUBLIC_MESSAGE = 1
_IDENTITY = b"\0"
_SENDER_EXTERNAL = 2
_CONTENT_PROPOSAL = 2
_ADD = 1
_REMOVE = 3


@dataclass(frozen=True, slots=True)
class Proposal:
    """A signed proposal as an MLSMessage, and the name commits call it by."""

    message: bytes
    reference: bytes


class ExternalSender:
    """Signs proposals; one may serve many groups."""

    def __init__(self, key: ec.EllipticCurvePrivateKey | None = None) -> None:
        self._key = key or ec.generate_private_key(ec.SECP256R1())
        point = self._key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        self.package = vector(point) + u16(BASIC_CREDENTIAL) + vector(_IDENTITY)
        """Body of op 25."""

    def add(self, group_id: int, mls_epoch: int, key_package: bytes) -> Proposal:
        """Propose to take in the owner of a key package."""
        return self._propose(group_id, mls_epoch, u16(_ADD) + key_package)

    def remove(self, group_id: int, mls_epoch: int, leaf: int) -> Proposal:
        """Propose to put out whoever holds a leaf."""
        return self._propose(group_id, mls_epoch, u16(_REMOVE) + u32(leaf))

    def _propose(self, group_id: int, mls_epoch: int, proposal: bytes) -> Proposal:
        content = (
            vector(u64(group_id))
            + u64(mls_epoch)
            + bytes((_SENDER_EXTERNAL,))
            + u32(0)
            + vector(b"")
            + bytes((_CONTENT_PROPOSAL,))
            + proposal
        )
        framed = u16(PUBLIC_MESSAGE) + content
        signature = vector(sign(self._key, b"FramedContentTBS", u16(MLS_VERSION) + framed))
        named = framed + signature
        return Proposal(u16(MLS_VERSION) + named, reference(b"Proposal Reference", named))


def append_body(proposals: Iterable[Proposal]) -> bytes:
    """Body of op 27 that adds proposals."""
    return b"\0" + vector(b"".join(proposal.message for proposal in proposals))


def revoke_body(references: Iterable[bytes]) -> bytes:
    """Body of op 27 that takes proposals back."""
    return b"\1" + vector(b"".join(vector(name) for name in references))
