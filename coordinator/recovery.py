"""What follows when a guild's voice connection fails: try again, ask for new credentials, or leave it.

The worker alone decides only to resume; everything else is decided here. Source: design section 4, "Voice credentials";
voice protocol reference, section 2.6.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Literal

import msgspec

from coordinator.registry import Change, Guild, GuildKey, released
from shared.clock import unix_ms
from shared.errors import ErrorCode
from shared.protocol.close_codes import Action, action_for
from shared.schema.event import Event
from shared.schema.records import GuildStatus

ANSWER_WITHIN_MS = 10_000
"""How long an outside bot has to answer `guild.voice_wanted`."""
_FIRST_BACKOFF_S = 1.0
_LONGEST_BACKOFF_S = 60.0
_STEADY_AFTER_S = 60.0
"""A guild that was connected for this long starts afresh with its next failure."""


class Remedy(Enum):
    """What a failure asks for."""

    TRY_AGAIN = auto()
    NEW_CREDENTIALS = auto()
    NOTHING = auto()


def remedy_for(code: str, close_code: int | None) -> Remedy:
    """The remedy for a failed connection, from its error code and, where the server closed it, the close code."""
    if code in (ErrorCode.E2EE_REQUIRED, ErrorCode.VOICE_MODE_UNSUPPORTED):
        return Remedy.NOTHING
    if code == ErrorCode.VOICE_CREDENTIALS_REJECTED:
        return Remedy.NEW_CREDENTIALS
    if close_code is None:
        return Remedy.TRY_AGAIN
    match action_for(close_code):
        case Action.STOP:
            return Remedy.NOTHING
        case Action.RESUME:
            return Remedy.TRY_AGAIN  # the worker could not resume: identify afresh
        case _:
            return Remedy.NEW_CREDENTIALS


@dataclass(slots=True)
class _Trouble:
    """A guild's failures in a row, and what is due when (seconds of the caller's clock).

    Attributes:
        due_s: nothing is tried or asked before; None: at once.
        credentials: `none` is known of them, `lacking` new ones shall be asked for, `asked` an answer is awaited.
        reason, close_code: why credentials are asked for.
        fixes: failures that looked like a mistake of this side.
        well_since_s: the guild has been connected since.
    """

    failures: int = 0
    asked: int = 0
    fixes: int = 0
    due_s: float | None = None
    credentials: Literal["none", "lacking", "asked"] = "none"
    reason: str = str(ErrorCode.VOICE_CREDENTIALS_MISSING)
    close_code: int | None = None
    well_since_s: float | None = None


def _backoff_s(failures: int) -> float:
    longest_s = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16))
    return longest_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


class Recovery:
    """Remembers failures per guild; decides, changes, and is asked again when something is due."""

    def __init__(self) -> None:
        self._troubles: dict[GuildKey, _Trouble] = {}

    def holds_back(self, key: GuildKey, now_s: float) -> bool:
        """Whether a guild without a worker shall not be placed, nor asked for, yet."""
        trouble = self._troubles.get(key)
        return trouble is not None and (trouble.credentials == "asked" or (trouble.due_s or 0.0) > now_s)

    def well(self, key: GuildKey, now_s: float) -> None:
        """The guild is connected; its past is forgotten once that has lasted."""
        trouble = self._troubles.get(key)
        if trouble is not None and trouble.well_since_s is None:
            trouble.well_since_s = now_s

    def forget(self, key: GuildKey) -> None:
        """The guild left, or was asked for anew."""
        self._troubles.pop(key, None)

    def renewed(self, key: GuildKey) -> None:
        """Fresh credentials came: no old delay lets them age."""
        trouble = self._troubles.get(key)
        if trouble is not None:
            trouble.credentials = "none"
            trouble.due_s = None

    def failed(self, guild: Guild, code: str, close_code: int | None, now_s: float, change: Change) -> None:
        """A worker reported the end of a guild's connection."""
        remedy = remedy_for(code, close_code)
        trouble = self._troubles.setdefault(guild.key, _Trouble())
        if trouble.well_since_s is not None and now_s - trouble.well_since_s > _STEADY_AFTER_S:
            trouble = self._troubles[guild.key] = _Trouble()
        trouble.well_since_s = None
        trouble.failures += 1
        if close_code is not None and action_for(close_code) is Action.FIX_ONCE:
            trouble.fixes += 1
        if remedy is Remedy.NOTHING or trouble.fixes > 1:
            return
        status = GuildStatus(state="failed", at=unix_ms(), code=code, close_code=close_code)
        if remedy is Remedy.TRY_AGAIN:
            trouble.due_s = now_s + _backoff_s(trouble.failures)
            change.put_guild(replace(released(guild), status=status))
            return
        trouble.credentials = "lacking"
        trouble.reason, trouble.close_code = code, close_code
        if trouble.failures > 1:  # the first time they are asked for at once
            trouble.due_s = now_s + _backoff_s(trouble.failures)
        spec = msgspec.structs.replace(guild.spec, voice=None)
        change.put_guild(replace(released(guild), spec=spec, status=status))

    def wants_voice(self, guild: Guild, now_s: float, change: Change) -> None:
        """A guild has no credentials and is not held back: ask whoever holds the main gateway."""
        trouble = self._troubles.setdefault(guild.key, _Trouble())
        at = unix_ms()
        trouble.asked += 1
        trouble.credentials = "asked"
        trouble.due_s = now_s + ANSWER_WITHIN_MS / 1_000
        status = GuildStatus(state="voice_wanted", at=at, code=trouble.reason, close_code=trouble.close_code)
        change.put_guild(replace(guild, status=status))
        spec = guild.spec
        change.event(
            Event(
                type="guild.voice_wanted",
                at=at,
                job=spec.job,
                bot=spec.bot,
                guild=spec.guild,
                channel=spec.channel,
                reason=trouble.reason,
                close_code=trouble.close_code,
                leave_first=trouble.asked > 1,
                self_deaf=True,
                deadline_ms=ANSWER_WITHIN_MS,
            )
        )

    def overdue(self, guild: Guild, now_s: float, change: Change) -> None:
        """Look whether a question for credentials went unanswered: say so, ask again later."""
        trouble = self._troubles.get(guild.key)
        if trouble is None or trouble.credentials != "asked" or now_s < (trouble.due_s or 0.0):
            return
        at = unix_ms()
        trouble.credentials = "lacking"
        trouble.failures += 1
        trouble.due_s = now_s + _backoff_s(trouble.failures)
        code = str(ErrorCode.VOICE_CREDENTIALS_MISSING)
        message = f"guild.voice_wanted was not answered within {ANSWER_WITHIN_MS} ms"
        change.put_guild(replace(guild, status=GuildStatus(state="failed", at=at, code=code, message=message)))
        change.event(
            Event(
                type="guild.failed",
                at=at,
                job=guild.spec.job,
                bot=guild.spec.bot,
                guild=guild.spec.guild,
                channel=guild.spec.channel,
                code=code,
                message=message,
            )
        )
