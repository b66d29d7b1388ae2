"""How much of the time listeners heard nothing, from the report of the local Discord. Pure.

Silence is a tick of 20 ms without a packet with sound where one was due: from the first that a guild heard to the end
of the programme, or to when it was looked at. Quiet sound is sound.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

_TICK_NS = 20_000_000
_UNDER_WAY_NS = 3 * _TICK_NS
"""What is this late may still come."""
ALLOWED_SHARE = 0.01


class Silence(NamedTuple):
    """Shares of the time, from 0 to 1: of all guilds together, and of the guild that heard the least."""

    share: float
    worst_share: float
    worst_guild: str

    @property
    def is_too_much(self) -> bool:
        return self.share > ALLOWED_SHARE


def silence_heard(rows: Iterable[dict[str, Any]], until_ns: int | None) -> Silence:
    """Look at guilds into whose packets the local Discord looked.

    Args:
        rows: `guild_rows` of its report.
        until_ns: when sound was last due, on the clock of the day; None: the programme ended by itself.
    """
    silent_ns = due_ns = 0
    worst = (0.0, "")
    for row in rows:
        if not row["sampled"]:
            continue
        silent, due = _guild(row["sessions"], until_ns)
        silent_ns, due_ns = silent_ns + silent, due_ns + due
        worst = max(worst, (silent / due if due else 0.0, row["guild"]))
    return Silence(silent_ns / due_ns if due_ns else 0.0, *worst)


def _guild(sessions: list[dict[str, Any]], until_ns: int | None) -> tuple[int, int]:
    """Nanoseconds of silence, and of all the time since the first sound; none of both where nothing was heard."""
    sounding = [one for one in sessions if one["first_sound_ns"]]
    if not sounding:
        return 0, 0
    silent_ns = sum(one["silent_ticks"] for one in sounding) * _TICK_NS
    for before, after in pairwise(sounding):
        silent_ns += max(0, after["first_sound_ns"] - before["last_sound_ns"] - _TICK_NS)
    last_ns = sounding[-1]["last_sound_ns"]
    end_ns = last_ns if until_ns is None else max(last_ns, until_ns - _UNDER_WAY_NS)
    return silent_ns + end_ns - last_ns, end_ns + _TICK_NS - sounding[0]["first_sound_ns"]
