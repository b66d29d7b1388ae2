"""Logging: events `noun.verb_past` with keys, one line each, to standard error.

Never a line per packet; never a token, key or session id. Nor does a line ever wait for whoever reads it.
"""

from __future__ import annotations

import atexit
import contextvars
import logging
import sys
from typing import TYPE_CHECKING, TextIO, cast

import structlog

from shared.outlet import Outlet
from shared.text import cut

if TYPE_CHECKING:
    from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_LAST_WORDS_WITHIN_S = 0.3
"""So long a process that ends waits for a reader; it has 3 s for all of its end."""


def wait_for_no_reader() -> None:
    """From now on, let nobody in this process wait for who reads its standard error: before `configure`, and once.

    All goes that way: our lines, those of libraries and asyncio, and the traceback of a crash, for which the end of the
    process waits a moment. What the kernel or C writes by itself does not.
    """
    stderr = sys.stderr
    if stderr is None:  # closed by whoever started us
        return
    outlet = Outlet(stderr.fileno(), _tell_dropped)
    sys.stderr = cast(TextIO, outlet)

    def drain() -> None:
        if outlet.drain(_LAST_WORDS_WITHIN_S):
            sys.stderr = stderr

    atexit.register(drain)


def _tell_dropped(count: int) -> None:
    _always.run(get_logger().error, "logs.dropped", count=count)  # an error: at no level is it left out itself


_always = contextvars.copy_context()
"""What stands in every line; threads have contexts of their own."""


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
    _always.run(structlog.contextvars.clear_contextvars)
    _always.run(structlog.contextvars.bind_contextvars, **always)


def _cut_values(_logger: WrappedLogger, _name: str, line: EventDict) -> EventDict:
    """Whatever a value says, a line stays a line."""
    return {name: cut(value) if isinstance(value, str) else value for name, value in line.items()}


def get_logger() -> FilteringBoundLogger:
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger
