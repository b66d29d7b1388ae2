"""What all voice connections of a worker share."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field

import aiohttp

from worker.voice.rounds import Rounds
from worker.voice.turns import Turns


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


@dataclass(slots=True)
class VoiceShared:
    """Handed to each connection.

    Attributes:
        http: opens the WebSockets.
        tls: trusts the servers.
        turns: of what holds the loop.
        dave_required: refuse to go on without end-to-end encryption in a session that had it.
        rounds: of what all connections do again and again.
    """

    http: aiohttp.ClientSession
    tls: ssl.SSLContext
    turns: Turns
    dave_required: bool = False
    counters: VoiceCounters = field(default_factory=VoiceCounters)
    rounds: Rounds = field(default_factory=Rounds)
