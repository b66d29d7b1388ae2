"""What speaks for and against the UDP path of one session: evidence in, what to do about it out. Pure, without a clock.

    fine ──error, or no answer to a ping──▶ doubted ──nothing answers──▶ lost ──nothing answers still──▶ over
    (any answer of the server: fine again)

Sound that is sent says nothing about its arrival. Errors do, where the network sends them; and the servers' own ping
does, once it was answered: a server that never answered it may be one that does not (section 11, 4).

Source: voice protocol reference, sections 3.2 and 11.
"""

from __future__ import annotations

import errno
from enum import Enum

from shared.errors import ErrorCode

PING_EVERY_S = 5.0
ASK_EVERY_S = 1.0
"""A path that is doubted."""
_ANSWER_WITHIN_S = 2.0
"""Of a ping; a look that comes later doubts the path."""
_REFUSED_FOR_S = 1.0
"""So long errors alone are believed to pass."""
_SILENT_FOR_S = 3.0
"""So long a path that was doubted for want of an answer may go on without one."""
OVER_AFTER_S = 8.0
"""Of a path that swallows everything: more than a rebinding of a NAT takes, once it is asked."""
REFUSED_OVER_AFTER_S = 25.0
"""Of one that is refused: a media server that starts anew is back by then."""
_ERRORS_PASS_AFTER_S = 3.0
"""Fifty packets a second without another error say that a path is back, where no ping was ever answered to say so."""

_OVER_AFTER_S = {
    ErrorCode.UDP_LOST: OVER_AFTER_S,
    ErrorCode.UDP_REFUSED: REFUSED_OVER_AFTER_S,
    ErrorCode.UDP_UNREACHABLE: float("inf"),  # it is this host's: no other session would leave, either
}
_CODES = {errno.ECONNREFUSED: ErrorCode.UDP_REFUSED} | dict.fromkeys(
    (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.EPERM, errno.EACCES),
    ErrorCode.UDP_UNREACHABLE,
)
"""Errors that speak of the path, not of one datagram."""


class Verdict(Enum):
    """What a look at the path says."""

    FINE = "fine"
    DOUBTED = "doubted"
    """Ask it, now and at each look."""
    LOST = "lost"
    """The same, and say so."""
    OVER = "over"
    """It does not come back on this 5-tuple."""


class UdpPath:
    """One session's path to its media server.

    Attributes:
        code: why it is doubted; None while it is fine.
    """

    def __init__(self) -> None:
        self.code: ErrorCode | None = None
        self._pings_are_answered = False
        self._pinged_s: float | None = None
        """The first ping that was not answered."""
        self._doubted_s = 0.0
        self._failed_s = 0.0
        """When the last error came."""
        self._lost_s: float | None = None

    def pinged(self, now_s: float) -> None:
        """A ping leaves."""
        if self._pinged_s is None:
            self._pinged_s = now_s

    def answered(self, *, ping: bool) -> None:
        """The server answered a ping, or something else: it is there."""
        self._pings_are_answered |= ping
        if ping:
            self._pinged_s = None
        self.code = self._lost_s = None

    def failed(self, number: int, now_s: float) -> None:
        """A datagram to it came back with an error (errno)."""
        code = _CODES.get(number)
        if code is None:
            return
        self._failed_s = now_s
        if self.code is None:
            self.code, self._doubted_s = code, now_s

    def resumed(self, now_s: float) -> None:
        """Nobody looked while the WebSocket was away: whatever was doubted is doubted from now on."""
        self._pinged_s = None
        self._doubted_s = now_s
        if self._lost_s is not None:
            self._lost_s = now_s

    def look(self, now_s: float) -> Verdict:
        """How it stands."""
        by_error = self.code not in (None, ErrorCode.UDP_LOST)
        if by_error and not self._pings_are_answered and now_s - self._failed_s > _ERRORS_PASS_AFTER_S:
            self.code = self._lost_s = None
        if self.code is None:
            waited_s = 0.0 if self._pinged_s is None else now_s - self._pinged_s
            if not self._pings_are_answered or waited_s < _ANSWER_WITHIN_S:
                return Verdict.FINE
            self.code, self._doubted_s = ErrorCode.UDP_LOST, now_s
        if self._lost_s is None:
            patience_s = _SILENT_FOR_S if self.code is ErrorCode.UDP_LOST else _REFUSED_FOR_S
            if now_s - self._doubted_s < patience_s:
                return Verdict.DOUBTED
            self._lost_s = now_s
        return Verdict.OVER if now_s - self._lost_s >= _OVER_AFTER_S[self.code] else Verdict.LOST
