"""What all voice connections of a worker share."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field

import aiohttp

from shared.protocol.transport_crypto import MODES
from shared.voice_servers import VoiceServers
from worker.voice.doors import Doors
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
    websockets_ended: int = 0
    """And attempts to open one: each may leave garbage behind."""
    udp_paths_lost: int = 0
    malformed_messages: int = 0


@dataclass(slots=True)
class VoiceShared:
    """Handed to each connection.

    Attributes:
        http: opens the WebSockets, see `voice_http`.
        tls: trusts the servers.
        servers: those that credentials and sound may go to.
        turns: of what holds the loop.
        dave_required: refuse to go on without end-to-end encryption in a session that had it.
        modes: of transport encryption that this worker seals in, the best first.
        doors: of all voice servers.
        rounds: of what all connections do again and again.
    """

    http: aiohttp.ClientSession
    tls: ssl.SSLContext
    servers: VoiceServers
    turns: Turns
    dave_required: bool = False
    modes: tuple[str, ...] = MODES
    counters: VoiceCounters = field(default_factory=VoiceCounters)
    doors: Doors = field(default_factory=Doors)
    rounds: Rounds = field(default_factory=Rounds)


def voice_http() -> aiohttp.ClientSession:
    """A client for the WebSockets of voice servers: without cookies and proxies, and it follows nobody elsewhere."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        middlewares=(_stay_here,),
    )


async def _stay_here(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Refuse a redirect: what is said next would be Identify, and go wherever the answer names."""
    response = await handler(request)
    if 300 <= response.status < 400:
        response.close()
        raise aiohttp.ClientConnectionError(f"the server redirects ({response.status}), which is not followed")
    return response
