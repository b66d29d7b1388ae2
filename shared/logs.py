"""Logging: events `noun.verb_past` with keys, one line each, to standard error.

Never a line per packet; never a token, key or session id.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import structlog

from shared.text import cut

if TYPE_CHECKING:
    from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(level: str, form: str, **always: str) -> None:
    """Set up logging of this process.

    Args:
        level: lowest level logged.
        form: `console` or `json`.
        always: keys that stand in every line, such as the process's role and name.
    """
    renderer: Processor = structlog.processors.JSONRenderer()
    if form == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=28)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _cut_values,
            structlog.processors.format_exc_info,  # a traceback is as long as it is
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        # one write for a line and its end: the processes of a host share one standard error
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**always)


def _cut_values(_logger: WrappedLogger, _name: str, line: EventDict) -> EventDict:
    """Whatever a value says, a line stays a line."""
    return {name: cut(value) if isinstance(value, str) else value for name, value in line.items()}


def get_logger() -> FilteringBoundLogger:
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger
