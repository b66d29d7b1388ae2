"""Texts that go out have a bound."""

from __future__ import annotations

from shared.errors import JobError
from shared.schema import event as events
from shared.schema.event import Event
from shared.text import MOST_CHARS, cut


def test_a_short_text_is_left_as_it_is() -> None:
    """To the last character that is allowed."""
    text = "x" * MOST_CHARS
    assert cut(text) is text


def test_a_long_text_says_how_long_it_was() -> None:
    """And keeps its beginning, which names the field."""
    told = cut("field: " + "x" * 1_000_000)
    assert len(told) == MOST_CHARS
    assert told.startswith("field: xxx")
    assert told.endswith(" .. (1000007 characters)")


def test_errors_and_events_are_cut_where_they_are_made() -> None:
    """Whoever makes them need not think of it."""
    assert len(JobError("x" * 10_000_000).message) == MOST_CHARS
    told = events.decode(events.encode(Event(type="broadcast.title", at=1, title="x" * 10_000, message="short")))
    assert (len(told.title or ""), told.message) == (MOST_CHARS, "short")
