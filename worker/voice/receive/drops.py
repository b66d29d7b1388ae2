"""Why something that was received is not heard: counted by kind, told once."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Drop(StrEnum):
    """One list for packets, frames and what a slow reader misses."""

    CONTROL = "control"
    """Keepalives and discovery answers: nothing to hear in them."""
    RTCP = "rtcp"
    GARBAGE = "garbage"
    """Too short for RTP, or not version 2."""
    OTHER_PAYLOAD = "other_payload"
    """RTP that is not Opus: video, retransmission."""
    NO_KEY = "no_key"
    """Audio before the session's key came."""
    MALFORMED = "malformed"
    """Ends before its header does, or inner lengths do not add up."""
    FORGED = "forged"
    """Not sealed under this key; what an old key sealed looks the same."""
    DUPLICATE = "duplicate"
    """Its sequence was taken before: a copy or a replay."""
    OLD = "old"
    """Its sequence is too far from what was taken last."""
    UNKNOWN_SSRC = "unknown_ssrc"
    """Nobody said in time whose it is."""
    PADDING_ONLY = "padding_only"
    E2EE_FAILED = "e2ee_failed"
    NOT_OPUS = "not_opus"
    """What was inside is not one well-framed Opus packet of 20 ms."""
    LATE = "late"
    """Its time was over when it came."""
    BUFFER_FULL = "buffer_full"
    UNDECODABLE = "undecodable"
    QUEUE_FULL = "queue_full"
    """A reader of a stream was too slow: it misses the oldest."""


class Drops:
    """Counters of one guild, over all its sessions.

    Args:
        on_first: told of each kind when it is counted for the first time.
    """

    def __init__(self, on_first: Callable[[Drop], None]) -> None:
        self._on_first = on_first
        self._counts: dict[Drop, int] = {}

    def add(self, drop: Drop, number: int = 1) -> None:
        before = self._counts.get(drop, 0)
        self._counts[drop] = before + number
        if not before:
            self._on_first(drop)

    def __getitem__(self, drop: Drop) -> int:
        return self._counts.get(drop, 0)

    def as_dict(self) -> dict[str, int]:
        """Kinds that were counted, for a log line or a metric."""
        return {str(drop): number for drop, number in self._counts.items()}
