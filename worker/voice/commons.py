"""What all voice connections of a worker share."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field

import aiohttp


@dataclass(slots=True)
class VoiceCounters:
    """Of all connections of a worker since its start."""

    epochs: int = 0
    """Groups and epochs of end-to-end encryption that came into force."""
    failures: int = 0
    """Messages of the encrypted group that could not be used."""
    downgrades: int = 0
    ready_ms_max: int = 0
    """Longest time from somebody to talk to until the first frame could be encrypted."""
    malformed_messages: int = 0


class Turns:
    """Spreads TLS handshakes of a worker over time: one holds the loop for a millisecond or two, and the pace must not
    wait for hundreds of them. Nobody holds a place, so a server that does not answer delays no other.
    """

    def __init__(self, apart_s: float) -> None:
        self._apart_s = apart_s
        self._next_s = 0.0

    async def take(self) -> None:
        """Wait for a turn of one's own."""
        now_s = time.monotonic()
        self._next_s = max(self._next_s + self._apart_s, now_s)
        await asyncio.sleep(self._next_s - now_s)


@dataclass(slots=True)
class VoiceShared:
    """Handed to each connection.

    Attributes:
        http: opens the WebSockets.
        tls: trusts the servers.
        turns: of handshakes.
        dave_required: send nothing without end-to-end encryption.
        mls_turns: of MLS work.
    """

    http: aiohttp.ClientSession
    tls: ssl.SSLContext
    turns: Turns
    dave_required: bool = False
    counters: VoiceCounters = field(default_factory=VoiceCounters)
    mls_turns: asyncio.Lock = field(default_factory=asyncio.Lock)
