"""What follows when a guild's voice connection fails: try again, ask for new credentials, or leave it.

The worker alone decides only to resume; everything else is decided here. Source: design section 4, "Voice credentials";
voice protocol reference, section 2.6.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from enum import Enum, auto

import msgspec

from coordinator.jobs import unix_ms
from coordinator.registry import Change, Guild, GuildKey, released
from shared.errors import ErrorCode
from shared.protocol.close_codes import Action, action_for
from shared.schema.event import Event
from shared.schema.records import GuildStatus

ANSWER_WITHIN_MS = 10_000
"""How long an outside bot has to answer `guild.voice_wanted`."""
_FIRST_BACKOFF_S = 1.0
_LONGEST_BACKOFF_S = 60.0


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
    """A guild's failures in a row, and what is due when (seconds of the caller's clock)."""

    failures: int = 0
    asked: int = 0
    due_s: float | None = None
    waiting_for_voice: bool = False


class Recovery:
    """Remembers failures per guild; decides, changes, and is asked again when something is due."""

    def __init__(self) -> None:
        self._troubles: dict[GuildKey, _Trouble] = {}

    def holds_back(self, key: GuildKey, now_s: float) -> bool:
        """Whether a guild without a worker shall not be placed yet."""
        trouble = self._troubles.get(key)
        return trouble is not None and (trouble.waiting_for_voice or (trouble.due_s or 0.0) > now_s)

    def well(self, key: GuildKey) -> None:
        """The guild plays, or left: its past is forgotten."""
        self._troubles.pop(key, None)

    def answered(self, key: GuildKey) -> None:
        """The guild has credentials: if they were asked for, that is settled."""
        trouble = self._troubles.get(key)
        if trouble is not None and trouble.waiting_for_voice:
            trouble.waiting_for_voice = False
            trouble.due_s = None

    def failed(self, guild: Guild, code: str, close_code: int | None, now_s: float, change: Change) -> None:
        """A worker reported the end of a guild's connection."""
        remedy = remedy_for(code, close_code)
        if remedy is Remedy.NOTHING:
            return
        trouble = self._troubles.setdefault(guild.key, _Trouble())
        trouble.failures += 1
        if remedy is Remedy.NEW_CREDENTIALS:
            self._ask(guild, trouble, code, close_code, now_s, change)
            return
        backoff_s = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (trouble.failures - 1))
        trouble.due_s = now_s + backoff_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        change.put_guild(replace(released(guild), status=guild.status))

    def wants_voice(self, guild: Guild, now_s: float, change: Change) -> None:
        """A guild was joined without credentials, or they were never answered."""
        trouble = self._troubles.setdefault(guild.key, _Trouble())
        if not trouble.waiting_for_voice:
            self._ask(guild, trouble, str(ErrorCode.VOICE_CREDENTIALS_MISSING), None, now_s, change)

    def _ask(
        self, guild: Guild, trouble: _Trouble, reason: str, close_code: int | None, now_s: float, change: Change
    ) -> None:
        at = unix_ms()
        trouble.asked += 1
        trouble.waiting_for_voice = True
        trouble.due_s = now_s + ANSWER_WITHIN_MS / 1_000
        status = GuildStatus(state="voice_wanted", at=at, code=reason, close_code=close_code)
        spec = msgspec.structs.replace(guild.spec, voice=None)
        change.put_guild(replace(released(guild), spec=spec, status=status))
        change.event(
            Event(
                type="guild.voice_wanted",
                at=at,
                job=spec.job,
                bot=spec.bot,
                guild=spec.guild,
                channel=spec.channel,
                reason=reason,
                close_code=close_code,
                leave_first=trouble.asked > 1,
                self_deaf=True,
                deadline_ms=ANSWER_WITHIN_MS,
            )
        )

    def overdue(self, guild: Guild, now_s: float, change: Change) -> None:
        """Look whether a question for credentials went unanswered: say so, ask again later."""
        trouble = self._troubles.get(guild.key)
        if trouble is None or not trouble.waiting_for_voice or trouble.due_s is None or now_s < trouble.due_s:
            return
        at = unix_ms()
        trouble.waiting_for_voice = False
        trouble.failures += 1
        backoff_s = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (trouble.failures - 1))
        trouble.due_s = now_s + backoff_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
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
