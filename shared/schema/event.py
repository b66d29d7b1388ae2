"""Events: what became of what was asked for. Written to one capped stream, field `event`.

Source: design section 4, "Events out".
"""

from __future__ import annotations

from typing import Literal, cast

import msgspec

from shared.schema.records import BroadcastSpec, BroadcastStatus, GuildSpec, GuildStatus, Record
from shared.text import MOST_CHARS, cut

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
    "guild.dave_downgraded",
    "guild.udp_lost",
    "guild.voice_wanted",
    "guild.stopped",
    "guild.failed",
    "worker.up",
    "worker.lost",
    "worker.drained",
    "leader.changed",
    "store.emptied",
]


class Event(Record, frozen=True, kw_only=True):
    """One event. Which ids stand in it follows from its type; `code` and `message` tell of a failure.

    Of `guild.failed`: `final` is true where nothing more is tried until a new `guild.join` or `guild.voice`.
    Of `broadcast.stalled`: `attempt` counts the failures in a row; of many, the first, second, fourth ... are told.
    Of `guild.voice_wanted`: `leave_first` asks to leave, wait for that, then join; `rejoin` false asks for credentials
    only where the bot still is in a voice channel, and not to join.
    """

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
    attempt: int | None = None
    silent_ms: int | None = None
    title: str | None = None
    close_code: int | None = None
    leave_first: bool | None = None
    self_deaf: bool | None = None
    deadline_ms: int | None = None
    rejoin: bool | None = None
    final: bool | None = None
    listeners: int | None = None
    dave_protocol_version: int | None = None
    term: int = 0


_decoder = msgspec.json.Decoder(Event)
_TEXTS = ("message", "reason", "title", "code")


def encode(event: Event) -> str:
    """The event as it stands in the stream; texts that came from outside have a bound."""
    long = {name: cut(text) for name in _TEXTS if (text := getattr(event, name)) and len(text) > MOST_CHARS}
    if long:
        event = msgspec.structs.replace(event, **long)
    return msgspec.json.encode(event).decode()


def decode(body: str | bytes) -> Event:
    return _decoder.decode(body)


def guild_event(
    spec: GuildSpec, status: GuildStatus, kind: EventType | None = None, *, worker: str = "", generation: int = 0
) -> Event:
    """The event that tells a guild's status; `kind` where that is another than the state.

    A worker tells with its id and generation; what the coordinator tells has neither.
    """
    return Event(
        type=kind or cast(EventType, f"guild.{status.state}"),
        at=status.at,
        job=spec.job,
        bot=spec.bot,
        guild=spec.guild,
        channel=spec.channel,
        broadcast=spec.broadcast,
        worker=worker,
        generation=generation,
        code=status.code,
        message=status.message,
        close_code=status.close_code,
        final=status.final or None,
        listeners=status.listeners if kind == "guild.listeners" else None,
        dave_protocol_version=status.dave_protocol_version if kind == "guild.dave_downgraded" else None,
    )


def broadcast_event(
    spec: BroadcastSpec,
    status: BroadcastStatus,
    kind: EventType | None = None,
    *,
    worker: str = "",
    generation: int = 0,
    reason: str = "",
) -> Event:
    """The event that tells a broadcast's status; `kind` where that is another than the state."""
    return Event(
        type=kind or cast(EventType, f"broadcast.{status.state}"),
        at=status.at,
        job=spec.job,
        broadcast=spec.broadcast,
        run=spec.run,
        worker=worker,
        generation=generation,
        code=status.code,
        message=status.message,
        reason=reason,
        attempt=status.attempt or None,
        silent_ms=status.silent_ms or None,
        title=status.title if kind == "broadcast.title" else None,
    )
