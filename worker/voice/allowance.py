"""What one voice server may have a worker do: messages and time of the loop, which all its guilds share. Pure.

An honest server says thousands of things when a large channel is entered, and then a few a second. One that goes on
like that, for whatever reason, would be every other guild's trouble.
"""

from __future__ import annotations

MESSAGES = 30_000
MESSAGES_PER_S = 500.0
WORK_S = 2.0
WORK_PER_S = 0.05
"""Of the loop's time; the burst serves a channel of thousands, whose arrivals are all told at once."""
USERS = 50_000
"""In a channel."""


class Allowance:
    """One connection's."""

    def __init__(self, now_s: float) -> None:
        self._messages = float(MESSAGES)
        self._work_s = WORK_S
        self._at_s = now_s

    def excess(self, now_s: float, work_s: float) -> str:
        """Account for one message and the work that it made; returns what there is too much of, empty for nothing."""
        passed_s, self._at_s = max(0.0, now_s - self._at_s), now_s
        self._messages = min(MESSAGES, self._messages + passed_s * MESSAGES_PER_S) - 1
        self._work_s = min(WORK_S, self._work_s + passed_s * WORK_PER_S) - work_s
        if self._messages < 0:
            return f"more than {MESSAGES} messages at once and {MESSAGES_PER_S:g} a second"
        if self._work_s < 0:
            return f"more than {WORK_S:g} s of work at once and {WORK_PER_S:g} a second"
        return ""
