"""Commits and Welcomes as clients send them in op 28. Pure.

Source: reference section 6.4.
"""

from dataclasses import dataclass

from tests.emulator.dave.codec import MlsFormatError, Reader, u16, vector
from tests.emulator.dave.external_sender import PUBLIC_MESSAGE
from tests.emulator.dave.key_package import CIPHER_SUITE, MLS_VERSION, read_leaf

_SENDER_MEMBER = 1
_CONTENT_COMMIT = 3
_BY_REFERENCE = 2
_REFERENCE_BYTES = 32


@dataclass(frozen=True, slots=True)
class CommitWelcome:
    """Op 28, split. `welcome` is empty where nobody was added."""

    group_id: bytes
    mls_epoch: int
    leaf: int
    references: tuple[bytes, ...]
    has_path: bool
    commit: bytes
    welcome: bytes


def split(body: bytes) -> CommitWelcome:
    """Take op 28 apart; its commit ends where its fields end. Raises: MlsFormatError."""
    reader = Reader(body)
    reader.expect(MLS_VERSION, 2, "MLS version")
    reader.expect(PUBLIC_MESSAGE, 2, "wire format")
    group_id = reader.vector()
    mls_epoch = reader.uint(8)
    reader.expect(_SENDER_MEMBER, 1, "sender type")
    leaf = reader.uint(4)
    reader.vector()  # authenticated data
    reader.expect(_CONTENT_COMMIT, 1, "content type")
    proposals = Reader(reader.vector())
    references = []
    while proposals.rest:
        proposals.expect(_BY_REFERENCE, 1, "kind of proposal")
        references.append(_reference(proposals))
    has_path = reader.uint(1)
    if has_path == 1:
        read_leaf(reader)
        reader.vector()  # nodes of the path
    elif has_path:
        raise MlsFormatError("path is neither there nor missing")
    for _ in ("signature", "confirmation tag", "membership tag"):
        reader.vector()
    commit, welcome = body[: reader.at], reader.rest
    return CommitWelcome(group_id, mls_epoch, leaf, tuple(references), has_path == 1, commit, welcome)


def _reference(reader: Reader) -> bytes:
    name = reader.vector()
    if len(name) != _REFERENCE_BYTES:
        raise MlsFormatError(f"a reference of {len(name)} bytes")
    return name


@dataclass(frozen=True, slots=True)
class Welcome:
    """A Welcome with its secrets, each under the name of the key package it is for."""

    secrets: dict[bytes, bytes]
    group_info: bytes

    def for_one(self, key_package: bytes) -> bytes:
        """The Welcome with the secret of one key package only, by the name of that. Raises: KeyError."""
        return u16(CIPHER_SUITE) + vector(self.secrets[key_package]) + self.group_info


def read_welcome(body: bytes) -> Welcome:
    """Take a Welcome apart. Raises: MlsFormatError."""
    reader = Reader(body)
    reader.expect(CIPHER_SUITE, 2, "cipher suite")
    entries = Reader(reader.vector())
    secrets = {}
    while entries.rest:
        start = entries.at
        name = _reference(entries)
        entries.vector()  # kem output
        entries.vector()  # ciphertext
        secrets[name] = entries.data[start : entries.at]
    start = reader.at
    reader.vector()  # encrypted group info
    reader.end()
    return Welcome(secrets, body[start:])
