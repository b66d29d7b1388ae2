"""What follows when a guild's voice connection fails: try again, ask for new credentials, wait for word, or leave it.

The worker alone decides only to resume; everything else is decided here, by the one table of close codes. Nothing is
done in a storm: failures in a row back off, and a guild that used up its attempts is left alone for a long while.
Source: design section 4, "Voice credentials"; voice protocol reference, section 2.6.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import msgspec

from coordinator.registry import Change, Guild, GuildKey, released
from shared.clock import unix_ms
from shared.errors import ErrorCode
from shared.logs import get_logger
from shared.protocol.close_codes import Action, action_for
from shared.schema.event import guild_event
from shared.schema.records import GuildStatus

ANSWER_WITHIN_MS = 10_000
"""How long an outside bot has to answer `guild.voice_wanted`; after a kick or a move section 2.6 asks for 5 to 15 s."""
PLAIN_WITHIN_MS = 2_500
"""The same where it is asked to join and nothing more: that brings nothing where it is in the channel already (section
11, 7), so it is soon asked to leave first."""
PER_QUESTION_MS = 500
"""More for each question that the bot has before it: a shard may send two commands a second."""
ATTEMPTS = 12
ATTEMPTS_WITHIN_S = 600.0
"""Sessions that a server ended, and questions for credentials, of one guild: of more, the long retry is left."""
LONG_RETRY_S = 900.0
_LONGEST_RETRY_S = LONG_RETRY_S * 1.2
QUESTIONS_OPEN = 20
"""Unanswered questions of one bot. It may send 120 gateway commands a minute: more could not be answered in time."""
_FIRST_BACKOFF_S = 1.0
_LONGEST_BACKOFF_S = 60.0
_STEADY_AFTER_S = 60.0
"""A guild that was connected for this long starts afresh with its next failure."""
_TRIES_WITH_SAME = 2
"""Failures after which the credentials may be the cause, although nobody said so. Those that had a session may be
refused anyway (section 11, 6), so they are tried once more and not twice."""
AWAY_FOR_S = 60.0
"""So long a server that cannot be reached says nothing against credentials: others would be for another server."""
_LONGEST_AWAY_BACKOFF_S = 5.0
_DISCONNECTED = "disconnected"
NO_WAY_OUT_FOR_S = 10.0
FULL_FOR_S = 2.0
"""So long a worker that refused a guild is given nothing: by then it has told what room it has, four times."""


class Failure(NamedTuple):
    """The end of a guild's connection, as its worker told it."""

    code: str
    close_code: int | None = None
    message: str = ""


_VOID_CREDENTIALS = frozenset(
    {ErrorCode.VOICE_CREDENTIALS_REJECTED, ErrorCode.VOICE_CREDENTIALS_MISSING, ErrorCode.VOICE_SERVER_REFUSED}
)
_AWAY = frozenset({ErrorCode.VOICE_UNREACHABLE, ErrorCode.UDP_LOST, ErrorCode.UDP_REFUSED, ErrorCode.UDP_UNREACHABLE})
"""The server, or the way to it, is away: trying on does no harm, and says nothing against credentials."""
_NEVER_HAD = Failure(str(ErrorCode.VOICE_CREDENTIALS_MISSING))


def action_after(failure: Failure) -> Action:
    """What the end of a connection asks for: by its error code where that says enough, else by the close code."""
    if failure.code in (ErrorCode.E2EE_REQUIRED, ErrorCode.VOICE_MODE_UNSUPPORTED):
        return Action.STOP
    if failure.code in _VOID_CREDENTIALS:
        return Action.NEW_CREDENTIALS
    return action_for(failure.close_code)


@dataclass(slots=True)
class _Trouble:
    """A guild's failures in a row, and what is due when (seconds of the caller's clock).

    Attributes:
        failures: in a row; the back-off grows with them.
        same: failures in a row with the same credentials.
        faults: failures that looked like a mistake of this side.
        away_since_s: the server of these credentials could not be reached since.
        unanswered: the last question was not answered.
        attempts: when the last ones were made that cost somebody something.
        worn_out: the attempts were used up, only the long retry is left.
        due_s: nothing is tried or asked before; while a question is open, its deadline.
        question_open: credentials were asked for and did not come yet.
        deadline_ms: of the question.
        cause: why they are asked for.
        waits: the server disconnected the bot: only the outside bot knows whether it was kicked or moved.
        doubtful: credentials came while that was so. A voice server is often faster than the main gateway, and a bot
            that has been kicked answers with what it had: refused, they bring back the question, and no join.
        well_since_s: the guild has been connected since.
    """

    failures: int = 0
    same: int = 0
    faults: int = 0
    away_since_s: float | None = None
    unanswered: bool = False
    attempts: deque[float] = field(default_factory=lambda: deque(maxlen=ATTEMPTS))
    worn_out: bool = False
    due_s: float = 0.0
    question_open: bool = False
    deadline_ms: int = ANSWER_WITHIN_MS
    cause: Failure = _NEVER_HAD
    waits: bool = False
    doubtful: bool = False
    well_since_s: float | None = None

    def spent_until_s(self) -> float:
        """When the next attempt is free again; in the past while there is one."""
        return self.attempts[0] + ATTEMPTS_WITHIN_S if len(self.attempts) == ATTEMPTS else 0.0

    def hold(self, now_s: float) -> float:
        """Put off whatever is next, by the failures so far; returns for how long."""
        self.worn_out = self.worn_out or self.spent_until_s() > now_s
        # Never sooner than said, so that the cap holds; spread, so that guilds that failed together come back apart.
        wait_s = random.uniform(LONG_RETRY_S, _LONGEST_RETRY_S) if self.worn_out else _backoff_s(self.failures)  # noqa: S311
        if self.away_since_s is not None and not self.worn_out:
            wait_s = min(wait_s, _LONGEST_AWAY_BACKOFF_S)
        self.due_s = now_s + wait_s
        return wait_s


def _backoff_s(failures: int) -> float:
    longest_s = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16))
    return longest_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


class Recovery:
    """Remembers failures per guild; decides, changes, and is asked again when something is due."""

    def __init__(self) -> None:
        self._troubles: dict[GuildKey, _Trouble] = {}
        self._full_until_s: dict[str, float] = {}
        """Workers that refused a guild."""
        self._asked: dict[str, set[GuildKey]] = {}
        """By bot, whom it was asked for, and perhaps has answered."""

    # what is asked of it

    def is_full(self, worker: str, now_s: float) -> bool:
        """Whether a worker has just refused a guild, whatever room it told before."""
        return self._full_until_s.get(worker, 0.0) > now_s

    def due_s(self, guild: Guild) -> float:
        """Until when a guild is held back; in the past, since when it may be tried: the order of their turns."""
        trouble = self._troubles.get(guild.key)
        return trouble.due_s if trouble is not None else 0.0

    def is_asked(self, key: GuildKey) -> bool:
        """Whether credentials were asked for and did not come yet; `due_s` is the deadline then."""
        trouble = self._troubles.get(key)
        return trouble is not None and trouble.question_open

    def questions_left(self, bot: str) -> int:
        """For how many guilds more a bot may be asked now."""
        return QUESTIONS_OPEN - self._questions_open(bot)

    # what it is told

    def restore(self, guild: Guild, now_s: float) -> None:
        """Take over what an earlier leader decided about a guild that nobody holds: it stands in the status."""
        status = guild.status
        if guild.worker or status is None or (status.retry_at is None and status.state != "voice_wanted"):
            return
        left_s = ((status.retry_at or 0) - unix_ms()) / 1_000
        trouble = self._troubles[guild.key] = _Trouble(
            failures=1,
            # a wanted guild with this code waits for the cap only, by the user's will
            worn_out=status.state == "failed" and status.code == ErrorCode.TOO_MANY_ATTEMPTS,
            due_s=now_s + min(max(0.0, left_s), _LONGEST_RETRY_S),
            waits=action_for(status.close_code) is Action.WAIT,
            unanswered=status.state == "failed" and status.code == _NEVER_HAD.code,
        )
        if status.code and status.code != ErrorCode.TOO_MANY_ATTEMPTS:
            trouble.cause = Failure(status.code, status.close_code)

    def well(self, key: GuildKey, now_s: float) -> None:
        """The guild is connected; its past is forgotten once that has lasted."""
        trouble = self._troubles.get(key)
        if trouble is not None and trouble.well_since_s is None:
            trouble.well_since_s = now_s
            trouble.doubtful = False

    def forget(self, key: GuildKey) -> None:
        """The guild left."""
        self._troubles.pop(key, None)

    def forget_worker(self, worker: str) -> None:
        """The worker is lost."""
        self._full_until_s.pop(worker, None)

    def renewed(self, guild: Guild, now_s: float) -> float:
        """The user asked for the guild anew, or brought credentials: no old delay holds that up, but for the cap.

        Returns: seconds to wait all the same.
        """
        trouble = self._troubles.get(guild.key)
        if trouble is None:
            return 0.0
        if guild.spec.voice is not None and trouble.question_open:
            trouble.due_s = now_s  # asked for, and counted then
            trouble.doubtful = trouble.waits
        else:  # of the user's own accord
            trouble.worn_out = trouble.doubtful = False
            trouble.due_s = trouble.spent_until_s()
        trouble.question_open = trouble.unanswered = trouble.waits = False
        trouble.same, trouble.away_since_s = 0, None
        return max(0.0, trouble.due_s - now_s)

    def failed(self, guild: Guild, failure: Failure, now_s: float, change: Change) -> None:
        """A worker reported the end of a guild's connection, or that it has no room for it."""
        if failure.code == ErrorCode.WORKER_FULL:
            self._go_elsewhere(guild, failure, now_s, change)
            return
        action = action_after(failure)
        known = self._troubles.get(guild.key)
        was_well = known is None or known.well_since_s is not None
        trouble = self._troubles[guild.key] = _afresh(known, now_s)
        trouble.well_since_s = None
        if action is Action.FIX_ONCE:
            trouble.faults += 1
            get_logger().error("voice.fault_suspected", guild=guild.spec.guild, close_code=failure.close_code)
            if trouble.faults > 1:
                action = Action.STOP
        trouble.waits = action is Action.WAIT or (trouble.doubtful and action is not Action.STOP)
        if trouble.waits and was_well and guild.spec.on_kick == "stay_out":
            # Somebody's will, and the bot comes back only by somebody's will: no failure, and no attempt.
            trouble.worn_out = False
            self._let_go(guild, failure, trouble, 0.0, change, void=True)
            return
        still_away = failure.code == ErrorCode.UDP_BLOCKED and trouble.away_since_s is not None
        if still_away:
            trouble.attempts.append(now_s)  # the server let us in, and heard nothing
        if failure.code == ErrorCode.UDP_UNREACHABLE:  # this host's fault: whoever goes there has no way out
            self._full_until_s[guild.worker] = now_s + NO_WAY_OUT_FOR_S
        if failure.code in _AWAY or still_away:
            self._wait_for_server(guild, failure, trouble, now_s, change)
            return
        trouble.away_since_s = None
        trouble.attempts.append(now_s)
        if action is Action.STOP:
            self._stop(guild, failure, change)
            return
        trouble.failures += 1
        trouble.same += 1
        if action is Action.RESUME and trouble.same < _TRIES_WITH_SAME:
            # The worker could not resume: identify afresh, first with what is there.
            self._let_go(guild, failure, trouble, trouble.hold(now_s), change, void=False)
            return
        at_once = trouble.failures == 1 and trouble.spent_until_s() <= now_s
        wait_s = 0.0 if at_once else trouble.hold(now_s)
        trouble.due_s = now_s + wait_s
        self._let_go(guild, failure, trouble, wait_s, change, void=True)

    def _wait_for_server(self, guild: Guild, failure: Failure, trouble: _Trouble, now_s: float, change: Change) -> None:
        """Try again with the same credentials; once their server was away for long, ask for those of another."""
        trouble.failures += 1
        if trouble.away_since_s is None:
            trouble.away_since_s = now_s
        void = now_s - trouble.away_since_s >= AWAY_FOR_S
        if void:  # it has waited long enough
            trouble.away_since_s, trouble.failures = None, 1
        self._let_go(guild, failure, trouble, trouble.hold(now_s), change, void=void)

    def wants_voice(self, guild: Guild, now_s: float, change: Change) -> None:
        """A guild has no credentials and is not held back: ask whoever holds the main gateway."""
        trouble = self._troubles.setdefault(guild.key, _Trouble())
        rejoin = not trouble.waits or guild.spec.on_kick == "rejoin"
        if rejoin:
            trouble.attempts.append(now_s)
        cause = trouble.cause
        # Who had credentials is in the channel, as far as Discord's main gateway knows: a join alone brings nothing.
        had_some = cause.code != _NEVER_HAD.code and not trouble.waits
        leave_first = rejoin and (had_some or trouble.unanswered)
        trouble.deadline_ms = self._deadline_ms(guild.spec.bot) if rejoin and not leave_first else ANSWER_WITHIN_MS
        trouble.question_open = True
        self._asked.setdefault(guild.spec.bot, set()).add(guild.key)
        trouble.due_s = now_s + trouble.deadline_ms / 1_000
        status = GuildStatus(state="voice_wanted", at=unix_ms(), code=cause.code, close_code=cause.close_code)
        change.put_guild(replace(guild, status=status))
        change.event(
            msgspec.structs.replace(
                guild_event(guild.spec, status),
                code="",
                reason=_DISCONNECTED if trouble.waits else cause.code,
                rejoin=rejoin,
                leave_first=leave_first,
                self_deaf=True,
                deadline_ms=trouble.deadline_ms,
            )
        )

    def _deadline_ms(self, bot: str) -> int:
        """For a bot that is asked to join, with the questions that it has before it."""
        return min(ANSWER_WITHIN_MS, PLAIN_WITHIN_MS + self._questions_open(bot) * PER_QUESTION_MS)

    def _questions_open(self, bot: str) -> int:
        asked = self._asked.get(bot, set())
        asked -= {key for key in asked if not self.is_asked(key)}
        return len(asked)

    def overdue(self, guild: Guild, now_s: float, change: Change) -> None:
        """Look whether a question for credentials went unanswered: say so, and ask again later or stay out."""
        trouble = self._troubles.get(guild.key)
        if trouble is None or not trouble.question_open or now_s < trouble.due_s:
            return
        message = f"guild.voice_wanted was not answered within {trouble.deadline_ms} ms"
        if trouble.waits and guild.spec.on_kick == "stay_out":
            status = GuildStatus(
                state="stopped",
                at=unix_ms(),
                code=str(ErrorCode.KICKED),
                message=f"the bot was disconnected, and {message}: it stays out until guild.join or guild.voice",
                close_code=trouble.cause.close_code,
                final=True,
            )
            self._begin_anew(guild.key)
            change.put_guild(replace(guild, status=status))
            change.event(guild_event(guild.spec, status))
            return
        trouble.question_open, trouble.unanswered = False, True
        trouble.failures += 1
        failure = Failure(str(ErrorCode.VOICE_CREDENTIALS_MISSING), trouble.cause.close_code, message)
        status = _failed(failure, trouble, trouble.hold(now_s))
        change.put_guild(replace(guild, status=status))
        change.event(guild_event(guild.spec, status))

    # what it does

    def _go_elsewhere(self, guild: Guild, failure: Failure, now_s: float, change: Change) -> None:
        """Have the guild placed anew at once: nothing was tried, so nothing failed. It waits where nobody has room."""
        self._full_until_s[guild.worker] = now_s + FULL_FOR_S
        status = GuildStatus(state="wanted", at=unix_ms(), code=failure.code, message=failure.message)
        change.put_guild(replace(released(guild), status=status))

    def _begin_anew(self, key: GuildKey) -> None:
        """What comes next is no failure in a row; what was tried within ten minutes counts all the same."""
        self._troubles[key] = _Trouble(attempts=self._troubles[key].attempts)

    def _let_go(
        self, guild: Guild, failure: Failure, trouble: _Trouble, wait_s: float, change: Change, *, void: bool
    ) -> None:
        """Take the guild from its worker, and its credentials where they are void, until it is tried again."""
        if void:
            trouble.same, trouble.cause = 0, failure
        status = _failed(failure, trouble, wait_s)
        spec = msgspec.structs.replace(guild.spec, voice=None) if void else guild.spec
        change.put_guild(replace(released(guild), spec=spec, status=status))
        if trouble.worn_out:
            change.event(guild_event(guild.spec, status))

    def _stop(self, guild: Guild, failure: Failure, change: Change) -> None:
        """Leave the guild alone until the user asks for it anew: trying again makes it worse or cannot help."""
        get_logger().warning("guild.given_up", guild=guild.spec.guild, code=failure.code, close_code=failure.close_code)
        status = GuildStatus(
            state="failed",
            at=unix_ms(),
            code=failure.code,
            message=f"{failure.message}: nothing more is tried until guild.join or guild.voice",
            close_code=failure.close_code,
            final=True,
        )
        self._begin_anew(guild.key)
        change.put_guild(replace(released(guild), status=status))
        change.event(guild_event(guild.spec, status))


def _afresh(trouble: _Trouble | None, now_s: float) -> _Trouble:
    """A guild's trouble, or a new one where it was well for long; the attempts of ten minutes count all the same."""
    if trouble is None:
        return _Trouble()
    if trouble.well_since_s is not None and now_s - trouble.well_since_s > _STEADY_AFTER_S:
        return _Trouble(attempts=trouble.attempts)
    return trouble


def _failed(failure: Failure, trouble: _Trouble, wait_s: float) -> GuildStatus:
    """Status of a guild that is tried, or asked for, again."""
    at = unix_ms()
    code, message = failure.code, failure.message
    if trouble.worn_out:
        code = str(ErrorCode.TOO_MANY_ATTEMPTS)
        message = f"{ATTEMPTS} attempts in {ATTEMPTS_WITHIN_S / 60:.0f} min; next in {wait_s / 60:.0f} min; {message}"
    return GuildStatus(
        state="failed",
        at=at,
        code=code,
        message=message,
        close_code=failure.close_code,
        retry_at=at + round(wait_s * 1_000),
    )
