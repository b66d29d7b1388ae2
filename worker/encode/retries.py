"""When a source that fails is opened again. Pure.

    live input:  no sooner than a second after it was opened last, for ever; after a minute away less often
    a file:      five times in a row where it broke, with growing pauses

Source: design section 3, "Off air only by order".
"""

from __future__ import annotations

import random

OPENED_EVERY_S = 1.0
"""A source is opened no more often than this, whatever it does."""
OFTEN_FOR_S = 60.0
"""So long an absence is tried each second."""
LONGEST_WAIT_S = 10.0
FILE_TRIES = 5
_FILE_WAIT_S, _LONGEST_FILE_WAIT_S = 0.5, 8.0
_JITTER = 0.2
"""Sources that fell silent together come back apart."""


class Retries:
    """Counts the failures of one source since sound last came.

    Attributes:
        attempt: of the failure told last, from 1; 0 while sound comes.
    """

    def __init__(self) -> None:
        self.attempt = 0
        self._opened_s = 0.0
        self._away_since_s = 0.0
        self._wait_s = OPENED_EVERY_S

    def opened(self, now_s: float) -> None:
        """The source is opened now."""
        self._opened_s = now_s

    def recovered(self) -> None:
        """Sound came, of a file enough of it: the next failure is the first one."""
        self.attempt = 0
        self._wait_s = OPENED_EVERY_S

    def of_live_input(self, now_s: float) -> float:
        """It failed; returns in how many seconds it is opened again."""
        self._failed(now_s)
        if now_s - self._away_since_s < OFTEN_FOR_S:
            return max(0.0, self._opened_s + OPENED_EVERY_S - now_s)
        self._wait_s = min(LONGEST_WAIT_S, 2 * self._wait_s)
        return self._wait_s * random.uniform(1 - _JITTER, 1)  # noqa: S311

    def of_file(self, now_s: float) -> float | None:
        """It failed; returns in how many seconds it is opened again, None once that has been tried often enough."""
        self._failed(now_s)
        if self.attempt >= FILE_TRIES:
            return None
        wait_s = min(_LONGEST_FILE_WAIT_S, _FILE_WAIT_S * 2.0 ** (self.attempt - 1))
        return wait_s * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311

    def _failed(self, now_s: float) -> None:
        if not self.attempt:
            self._away_since_s = now_s
        self.attempt += 1
