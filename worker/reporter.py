"""Tells Redis the states of guilds and sources in their order, and waits out an absence of Redis."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque

from shared.errors import StoreError
from shared.logs import get_logger
from shared.schema.event import Event
from shared.schema.records import BroadcastStatus, GuildStatus
from worker.membership import Membership, Report

_KEPT = 8
"""Reports that wait per record; of more, the oldest are given up."""
_AT_ONCE = 64
"""Written in one round trip: in a mass join each by itself would cost a tenth of the join."""
_MISSING_FOR_S, _MISSING_EVERY_S = 15.0, 1.0
"""A record that is not there may be written again: so long, and so often, what is told of it is tried."""
_PAUSE_S = 0.05
"""After a round trip that carried few, so that the next carries more, and the newest of each record."""


class Reporter:
    """A short queue per record: memory is bounded by what the worker holds."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._pending: dict[str, deque[Report]] = {}
        self._missing_since_s: dict[str, float] = {}
        """Records that are not there."""
        self._numbers = itertools.count(1)
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()

    def tell(
        self, record_key: str, generation: int, status: GuildStatus | BroadcastStatus | None, event: Event | None
    ) -> None:
        """Have a status, an event or both written soon, after those told before of the same record.

        A status alone takes the place of the one that waits before it, so that figures push no event out.
        """
        waiting = self._pending.setdefault(record_key, deque(maxlen=_KEPT))
        last = waiting[-1] if len(waiting) > 1 else None  # the first may be under way
        if event is None and status is not None and last is not None and last.generation == generation:
            waiting[-1] = last._replace(status=status)
        else:
            waiting.append(Report(record_key, generation, next(self._numbers), status, event))
        self._emptied.clear()
        self._filled.set()

    async def run(self) -> None:
        """Write for ever."""
        while True:
            await self._filled.wait()
            while self._pending:
                # one of each record: the next one must not be done where this one is not
                told = [waiting[0] for waiting in itertools.islice(self._pending.values(), _AT_ONCE)]
                try:
                    answers = await self._membership.report(told)
                except StoreError as error:
                    get_logger().warning("report.delayed", error=error.message, waiting=len(self._pending))
                    await asyncio.sleep(random.uniform(0.2, 1.0))  # noqa: S311 - jitter
                    continue
                for report, answer in zip(told, answers, strict=True):
                    if answer is None:
                        self._tell_later(report)
                    else:
                        self._missing_since_s.pop(report.record_key, None)
                    waiting = self._pending[report.record_key]
                    if waiting[0] is report:  # else a flood pushed it out meanwhile
                        waiting.popleft()
                    if not waiting:
                        del self._pending[report.record_key]
                if len(told) < _AT_ONCE:
                    await asyncio.sleep(_PAUSE_S)
            self._filled.clear()
            self._emptied.set()

    def _tell_later(self, report: Report) -> None:
        """Try again, unless it is told otherwise by then, or was missing for long: a guild that left has no record."""
        loop = asyncio.get_running_loop()
        since_s = self._missing_since_s.setdefault(report.record_key, loop.time())
        if loop.time() - since_s > _MISSING_FOR_S:
            del self._missing_since_s[report.record_key]
        else:
            loop.call_later(_MISSING_EVERY_S, self._tell_again, report)

    def _tell_again(self, report: Report) -> None:
        if report.record_key not in self._pending:
            self._pending[report.record_key] = deque([report], maxlen=_KEPT)
            self._emptied.clear()
            self._filled.set()

    async def flushed(self, timeout_s: float) -> None:
        """Wait until all is written, or the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._emptied.wait()
        except TimeoutError:
            get_logger().warning("report.given_up", waiting=len(self._pending))
