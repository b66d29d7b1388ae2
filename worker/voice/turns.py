"""The worker's spare time, given out in turns: what holds its loop for milliseconds must not outrun the pace.

A TLS handshake takes the loop one to three milliseconds, an MLS operation two, or hundreds in a large group. The pace
refills a budget every few passes; work that was longer than its share is paid back by the next ones. So whatever comes
at once, and however slow the machine is just now, there is time to build between any two pieces of it.

A turn is a moment and not a place: whoever took one and waits for a server that never answers holds nobody up.

What alone takes longer than the pace is ahead (a group of a hundred) is announced to it just before.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

_HANDSHAKE_NS = 3_000_000
"""Charged for opening a connection: TLS, WebSocket and the messages until there is a key."""
_MOST_OWED_NS = 500_000_000
"""More than this was no work but a process that stood still: nobody shall wait for that."""
_ANNOUNCED_NS = 50_000_000
"""Work of this length is announced: what is known is built 120 ms ahead at least, and the pace and the answers to all
the handshakes of a budget need some of that."""
_GROUPS_PER_HANDSHAKE = 4
"""So many go ahead of a handshake that waits: calls that stand come first, but not for ever."""


class Turns:
    """Turns of one worker.

    Args:
        budget_ns: loop time per refill; None: without limit.
        announce: told how long the loop is about to be held up, where that is long.
        every_passes: passes of the pace from one refill to the next.
    """

    def __init__(
        self, budget_ns: int | None, announce: Callable[[int], None] = lambda _ns: None, *, every_passes: int = 1
    ) -> None:
        self._budget_ns = budget_ns
        self._announce = announce
        self._every_passes = every_passes
        self._passes = 0
        self._left_ns = budget_ns or 0
        self._groups: deque[asyncio.Future[None]] = deque()
        self._handshakes: deque[asyncio.Future[None]] = deque()
        self._ahead = 0
        """Groups that had a turn while a handshake waited."""

    @property
    def waiting(self) -> int:
        """Who waits for a turn."""
        return len(self._groups) + len(self._handshakes)

    def passed(self) -> None:
        """Called by the pace after each of its passes. A pace that is late has fewer of them, so it gives out less."""
        self._passes += 1
        if self._budget_ns is not None and not self._passes % self._every_passes:
            self._left_ns = min(self._budget_ns, self._left_ns + self._budget_ns)
            self._give()

    async def handshake(self) -> None:
        """Wait for a turn to open a connection."""
        await self._wait(self._handshakes)
        self.spent(_HANDSHAKE_NS)

    async def group(self, expected_ns: int = 0) -> None:
        """Wait for a turn to work on an encrypted group, ahead of all handshakes: calls that stand come first.

        Args:
            expected_ns: how long that may take.
        """
        await self._wait(self._groups)
        if expected_ns >= _ANNOUNCED_NS:
            began_ns = time.monotonic_ns()
            self._announce(expected_ns)
            self._left_ns -= time.monotonic_ns() - began_ns

    def spent(self, ns: int) -> None:
        """Charge for what was done in a turn, then let the next one have his."""
        self._left_ns = max(self._left_ns - ns, -_MOST_OWED_NS)
        self._give()

    async def _wait(self, queue: deque[asyncio.Future[None]]) -> None:
        if self._budget_ns is None or (self._left_ns > 0 and not self.waiting):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give()  # it came too late for us
            raise

    def _give(self) -> None:
        """Let one go on; he calls `spent`, and with that the next one comes."""
        while self._left_ns > 0 and self.waiting:
            turn = self._next().popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def _next(self) -> deque[asyncio.Future[None]]:
        if self._groups and (not self._handshakes or self._ahead < _GROUPS_PER_HANDSHAKE):
            self._ahead += bool(self._handshakes)
            return self._groups
        self._ahead = 0
        return self._handshakes
