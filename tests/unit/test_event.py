"""Events: what is written is read, unknown fields are ignored, unknown types are refused."""

from __future__ import annotations

import json
from typing import get_args

import msgspec
import pytest

from shared.schema import event as events
from shared.schema.event import Event, EventType


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
