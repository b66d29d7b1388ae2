"""What libdave logs about bad messages: in our log, and bounded."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import dave
import pytest
from structlog.testing import capture_logs

from worker.voice.library_log import LibraryLog


@pytest.fixture
def log() -> Iterator[LibraryLog]:
    logger = logging.getLogger("dave")
    before = (logger.handlers, logger.propagate, logger.level)
    made = LibraryLog("dave")
    made.install()
    yield made
    logger.handlers, logger.propagate, logger.level = before


def test_a_refused_message_is_an_event(log: LibraryLog) -> None:
    """libdave has no other way to say what it did not like."""
    with capture_logs() as events:
        dave.Session().set_external_sender(b"\x00")
    assert [(one["event"], one["library"]) for one in events] == [("library.logged", "dave")]
    assert log.records == 1


def test_a_stream_of_refused_messages_does_not_fill_the_log(log: LibraryLog) -> None:
    """Five a minute are logged, the others counted."""
    session = dave.Session()
    with capture_logs() as events:
        for _ in range(50):
            session.set_external_sender(b"\x00")
    assert len(events) == 5
    assert (log.records, log.unlogged) == (50, 45)
