"""Texts that go out have a bound."""

from __future__ import annotations

import asyncio
import builtins

import aiohttp
import pytest

from shared.errors import JobError
from shared.schema import event as events
from shared.schema.event import Event
from shared.text import MOST_CHARS, cut, in_words


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


BUILT_IN = [one for one in vars(builtins).values() if isinstance(one, type) and issubclass(one, OSError)]
KINDS = [
    *(TimeoutError, asyncio.CancelledError, EOFError, RuntimeError, ValueError, AssertionError, MemoryError),
    *(aiohttp.ServerTimeoutError, aiohttp.ServerDisconnectedError, aiohttp.ClientConnectionError),
    *(aiohttp.ClientConnectionResetError, aiohttp.ClientPayloadError),
    *dict.fromkeys(BUILT_IN),
]


@pytest.mark.parametrize("kind", dict.fromkeys(KINDS))
def test_every_kind_of_exception_has_a_reason(kind: type[BaseException]) -> None:
    """Raised without a word, as asyncio and the kernel's resets are, none of them ends a message at its colon."""
    for error in (kind(), kind(" "), kind("it said this")):
        assert in_words(error).strip()
    assert "it said this" in in_words(kind("it said this"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "timeout error"),
        (ConnectionResetError(), "connection reset error"),
        (asyncio.CancelledError(), "cancelled error"),
        (OSError(), "os error"),
        (aiohttp.WSMessageTypeError(), "ws message type error"),
        (ConnectionResetError(104, "Connection reset by peer"), "[Errno 104] Connection reset by peer"),
    ],
)
def test_an_exception_without_a_text_is_named_by_its_class(error: BaseException, words: str) -> None:
    """In words, since people read it."""
    assert in_words(error) == words
