"""Events: what is written is read, unknown fields are ignored, unknown types are refused."""

from __future__ import annotations

import json
from typing import get_args

import msgspec
import pytest

from shared.schema import event as events
from shared.schema.event import Event, EventType, broadcast_event, guild_event
from shared.schema.records import (
    BroadcastSpec,
    BroadcastState,
    BroadcastStatus,
    GuildSpec,
    GuildState,
    GuildStatus,
    OpusRecord,
    SourceRecord,
)

GUILD = GuildSpec(bot="main", guild="123456789012345678", channel="223456789012345678", broadcast="news", job="j")
BROADCAST = BroadcastSpec(broadcast="news", run=5, source=SourceRecord(url="file:a"), opus=OpusRecord(), job="j")


@pytest.mark.parametrize("kind", get_args(EventType))
def test_an_event_is_read_as_it_was_written(kind: EventType) -> None:
    """Every type of the contract survives the stream."""
    event = Event(type=kind, at=5, job="j", guild="g", close_code=4006, leave_first=False, term=2**53)
    assert events.decode(events.encode(event)) == event


def test_only_what_is_said_is_written() -> None:
    """An event has its type, its time and the ids it is about."""
    assert json.loads(events.encode(Event(type="job.done", at=5, job="j"))) == {"type": "job.done", "at": 5, "job": "j"}


def test_no_and_not_said_differ() -> None:
    """`leave_first` false is an answer and stays in the event."""
    assert json.loads(events.encode(Event(type="guild.voice_wanted", at=5, leave_first=False)))["leave_first"] is False


def test_a_field_of_a_later_version_is_ignored() -> None:
    """Two versions can run side by side."""
    assert events.decode('{"type":"job.done","at":5,"new":[1]}') == Event(type="job.done", at=5)


@pytest.mark.parametrize("body", ["", "{}", '{"type":"job.done"}', '{"type":"of.a.later.version","at":1}', "[]"])
def test_what_is_no_event_is_refused(body: str) -> None:
    """A reader is told that an event is not for it, by one kind of error."""
    with pytest.raises(msgspec.MsgspecError):
        events.decode(body)


@pytest.mark.parametrize("state", [state for state in get_args(GuildState) if state != "wanted"])
def test_the_state_of_a_guild_has_its_event(state: GuildState) -> None:
    """Type, ids and what went wrong follow from the guild and its status, and a reader knows the type."""
    status = GuildStatus(state=state, at=7, code="voice_closed", message="m", close_code=4006, listeners=3)
    event = guild_event(GUILD, status, worker="w", generation=9)
    assert events.decode(events.encode(event)) == event
    assert event == Event(
        type=f"guild.{state}",  # type: ignore[arg-type]
        at=7,
        job="j",
        bot="main",
        guild=GUILD.guild,
        channel=GUILD.channel,
        broadcast="news",
        worker="w",
        generation=9,
        code="voice_closed",
        message="m",
        close_code=4006,
    )


def test_an_event_says_what_it_is_about() -> None:
    """The number of listeners and the version that was fallen back to stand in the events that tell of them."""
    status = GuildStatus(state="playing", at=7, listeners=0, dave_protocol_version=0)
    listeners = guild_event(GUILD, status, "guild.listeners")
    assert (listeners.type, listeners.listeners, listeners.dave_protocol_version) == ("guild.listeners", 0, None)
    fallen = guild_event(GUILD, status, "guild.dave_downgraded")
    assert (fallen.type, fallen.listeners, fallen.dave_protocol_version) == ("guild.dave_downgraded", None, 0)


def test_what_is_final_is_said() -> None:
    """A failure after which nothing is tried is told from one after which something is."""
    failed = GuildStatus(state="failed", at=7)
    assert guild_event(GUILD, failed).final is None
    assert guild_event(GUILD, msgspec.structs.replace(failed, final=True)).final is True


@pytest.mark.parametrize("state", [state for state in get_args(BroadcastState) if state != "starting"])
def test_the_state_of_a_broadcast_has_its_event(state: BroadcastState) -> None:
    """Type, ids and what went wrong follow from the broadcast and its status."""
    status = BroadcastStatus(state=state, at=7, code="source_stalled", message="m", epoch_us=20_000)
    event = broadcast_event(BROADCAST, status, worker="w", generation=9, reason="r")
    assert events.decode(events.encode(event)) == event
    assert event == Event(
        type=f"broadcast.{state}",  # type: ignore[arg-type]
        at=7,
        job="j",
        broadcast="news",
        run=5,
        worker="w",
        generation=9,
        code="source_stalled",
        message="m",
        reason="r",
    )
