"""Guilds that no worker holds, by what they wait for: so a pass of the planner looks at what is due, and not at all.

    changed, or its time has come ──▶ asked, and unanswered         ──▶ overdue
                                      held back until a moment      ──▶ an alarm then
                                      no credentials                ──▶ mute: asked for as its bot can answer
                                      credentials                   ──▶ ready: placed as there is room

Where a guild belongs follows from its record and from `Recovery` alone. It is looked at again when its record changed,
and when an alarm goes off; an alarm that has become void does no harm.
"""

from __future__ import annotations

import heapq
import math

from coordinator.recovery import Recovery
from coordinator.registry import Guild, GuildKey, Registry
from shared.clock import unix_ms
from shared.errors import ErrorCode

TOLD_AFTER_MS = 5_000
"""How long a guild or a source may wait for a worker before that is told."""


class Waiting:
    """Where each guild without a worker stands."""

    def __init__(self, registry: Registry, recovery: Recovery) -> None:
        self._registry = registry
        self._recovery = recovery
        self._alarms: list[tuple[float, GuildKey]] = []
        self._alarm_s: dict[GuildKey, float] = {}
        """When the next alarm of each goes off: one is enough."""
        self._overdue: dict[GuildKey, None] = {}
        self._mute: dict[str, dict[GuildKey, float]] = {}
        """By bot, with the moment since when they may be asked for: the order of their turns."""
        self._ready: dict[GuildKey, float] = {}
        """With the moment since when they may be tried."""
        self._untold: dict[GuildKey, None] = {}
        """Ready ones that have waited for long, and nobody said so."""

    def look(self, now_s: float) -> None:
        """Put what changed, and what is due, where it belongs."""
        due = self._registry.take_changed()
        while self._alarms and self._alarms[0][0] <= now_s:
            at_s, key = heapq.heappop(self._alarms)
            if self._alarm_s.get(key) == at_s:
                del self._alarm_s[key]
                due[key] = None
        for key in due:
            self._place(key, now_s)

    def overdue(self) -> list[Guild]:
        """Those for whom a question was not answered in time."""
        return [self._registry.guilds[key] for key in self._overdue]

    def to_ask(self) -> list[Guild]:
        """Those without credentials who are asked for now: as many as their bots can answer."""
        asked: list[Guild] = []
        for bot, mute in self._mute.items():
            turns = self._recovery.questions_left(bot) if mute else 0
            asked += [self._registry.guilds[key] for key in heapq.nsmallest(turns, mute, key=mute.__getitem__)]
        return asked

    def ready(self, most: int) -> list[GuildKey]:
        """Those who may be placed, at most so many."""
        return heapq.nsmallest(most, self._ready, key=self._ready.__getitem__) if most > 0 else []

    def untold(self, most: int) -> list[Guild]:
        """Those of whom nobody said that they wait for a worker, at most so many."""
        return [self._registry.guilds[key] for key, _ in zip(self._untold, range(most), strict=False)]

    def _place(self, key: GuildKey, now_s: float) -> None:
        for place in (self._overdue, self._ready, self._untold, self._mute.get(key[0], {})):
            place.pop(key, None)
        guild = self._registry.guilds.get(key)
        if guild is None or guild.worker or (guild.status is not None and guild.status.final):
            return
        due_s = self._recovery.due_s(guild)
        if due_s > now_s:
            self._wake(key, due_s)
        elif self._recovery.is_asked(key):
            self._overdue[key] = None
        elif guild.spec.voice is None:
            self._mute.setdefault(key[0], {})[key] = due_s
        else:
            self._ready[key] = due_s
            self._tell_in_time(guild, now_s)

    def _tell_in_time(self, guild: Guild, now_s: float) -> None:
        status = guild.status
        if status is not None and status.code == ErrorCode.NO_WORKER:
            return
        left_ms = 0 if status is None else status.at + TOLD_AFTER_MS - unix_ms()
        if left_ms > 0:
            self._wake(guild.key, now_s + left_ms / 1_000)
        else:
            self._untold[guild.key] = None

    def _wake(self, key: GuildKey, at_s: float) -> None:
        if self._alarm_s.get(key, math.inf) > at_s:
            self._alarm_s[key] = at_s
            heapq.heappush(self._alarms, (at_s, key))
