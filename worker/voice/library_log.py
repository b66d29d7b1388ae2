"""What libdave logs, as events of our log: counted and rate-limited, since it says something about each bad message.

Source: `dave.py` hands its log to Python's `logging`, under the name `dave`.
"""

from __future__ import annotations

import logging
import time

from shared.logs import get_logger

_EVENTS_PER_PERIOD = 5
_PERIOD_S = 60.0
_LONGEST_TEXT = 300


class LibraryLog(logging.Handler):
    """Takes a library's log records, and keeps them from everybody else."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.WARNING)
        self._name = name
        self._period_began_s = time.monotonic()
        self._logged = 0
        self.records = 0
        self.unlogged = 0

    def install(self) -> None:
        """Take the records from now on."""
        logger = logging.getLogger(self._name)
        logger.handlers = [self]
        logger.propagate = False
        logger.setLevel(self.level)

    def emit(self, record: logging.LogRecord) -> None:
        self.records += 1
        now_s = time.monotonic()
        if now_s - self._period_began_s > _PERIOD_S:
            self._period_began_s, self._logged = now_s, 0
        if self._logged >= _EVENTS_PER_PERIOD:
            self.unlogged += 1
            return
        self._logged += 1
        text = record.getMessage()[:_LONGEST_TEXT]
        get_logger().warning("library.logged", library=self._name, text=text, unlogged=self.unlogged)
