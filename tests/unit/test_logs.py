"""Log lines as they leave a process."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator

import pytest
import structlog

from shared.logs import configure, get_logger


class Recorder(io.StringIO):
    """A standard error that remembers each write; unbuffered, each of them would be a system call."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)


@pytest.fixture
def _default_logging_afterwards() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.mark.usefixtures("_default_logging_afterwards")
def test_a_line_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that share one standard error do not write into each other's lines."""
    recorder = Recorder()
    monkeypatch.setattr(sys, "stderr", recorder)
    configure("info", "json", role="fanout")
    get_logger().info("connection.opened", slot=3)
    get_logger().debug("datagram.dropped")
    (line,) = recorder.writes
    assert line.endswith("}\n")
    told = json.loads(line)
    assert (told["event"], told["role"], told["slot"], told["level"]) == ("connection.opened", "fanout", 3, "info")
