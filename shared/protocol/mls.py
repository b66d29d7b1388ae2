"""The little of MLS that a caller of an MLS library must read itself: which epoch a commit is for, and what it commits.

    commit message = u16 1 | u16 1 | group_id<V> | u64 epoch | u8 1 | u32 leaf | authenticated_data<V> | u8 3
                     | proposals<V> | ...
    <V> = 1, 2 or 4 bytes of length, told by the two highest bits of the first, then so many bytes

Source: voice protocol reference, section 6.4; RFC 9420 sections 2.1.2 and 6.
"""

from __future__ import annotations

from typing import NamedTuple

from shared.errors import ProtocolError

_PUBLIC_MESSAGE = bytes.fromhex("00010001")
_MEMBER, _COMMIT = 1, 3


class Commit(NamedTuple):
    """What stands in the clear in a commit."""

    mls_epoch: int
    empty: bool
    """It commits no proposal."""


def read_commit(message: bytes) -> Commit:
    """Read a commit message, as made by a member or announced by the gateway.

    Args:
        message: MLSMessage, with or without a Welcome behind it.
    Raises: ProtocolError: it is none.
    """
    if message[:4] != _PUBLIC_MESSAGE:
        raise ProtocolError("commit: not a public MLS message")
    at = _after_vector(message, 4)
    mls_epoch = int.from_bytes(message[at : at + 8], "big")
    sender, at = message[at + 8 : at + 9], at + 13  # the sender's leaf is 4 bytes
    at = _after_vector(message, at)
    content, at = message[at : at + 1], at + 1
    if sender != bytes([_MEMBER]) or content != bytes([_COMMIT]):
        raise ProtocolError("commit: not a member's commit")
    return Commit(mls_epoch, empty=_after_vector(message, at) == at + 1)


def _after_vector(message: bytes, at: int) -> int:
    """Where the bytes behind a vector begin."""
    if at >= len(message):
        raise ProtocolError("commit: ends too early")
    form = message[at] >> 6
    size_bytes = 1 << form
    if form == 3 or at + size_bytes > len(message):
        raise ProtocolError("commit: a vector has no length")
    size = int.from_bytes(message[at : at + size_bytes], "big") & ((1 << (8 * size_bytes - 2)) - 1)
    end = at + size_bytes + size
    if end > len(message):
        raise ProtocolError("commit: a vector is longer than the message")
    return end
