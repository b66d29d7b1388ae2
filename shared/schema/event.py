"""Events: what became of what was asked for. Written to one capped stream, field `event`.

Source: design section 4, "Events out".
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.schema.records import Record

FIELD = "event"

EventType = Literal[
    "job.done",
    "job.failed",
    "broadcast.playing",
    "broadcast.paused",
    "broadcast.stalled",
    "broadcast.title",
    "broadcast.ended",
    "guild.connecting",
    "guild.playing",
    "guild.alone",
    "guild.idle",
    "guild.suppressed",
    "guild.reconnecting",
    "guild.listeners",
    "guild.voice_wanted",
    "guild.stopped",
    "guild.failed",
    "worker.up",
    "worker.lost",
    "worker.drained",
    "leader.changed",
]


class Event(Record, frozen=True, kw_only=True):
    """One event. Which ids stand in it follows from its type; `code` and `message` tell of a failure."""

    type: EventType
    at: int
    job: str = ""
    bot: str = ""
    guild: str = ""
    channel: str = ""
    broadcast: str = ""
    run: int = 0
    worker: str = ""
    generation: int = 0
    code: str = ""
    message: str = ""
    reason: str = ""
    close_code: int | None = None
    leave_first: bool | None = None
    self_deaf: bool | None = None
    deadline_ms: int | None = None
    term: int = 0


_decoder = msgspec.json.Decoder(Event)


def encode(event: Event) -> str:
    return msgspec.json.encode(event).decode()


def decode(body: str | bytes) -> Event:
    return _decoder.decode(body)
