"""Recovery: which failure asks for what, when it is tried again, and how credentials are asked for."""

from __future__ import annotations

import json

import msgspec
import pytest

from coordinator.election import EVENTS_KEPT
from coordinator.recovery import ANSWER_WITHIN_MS, Recovery, Remedy, remedy_for
from coordinator.registry import Change, Guild, Registry
from shared.errors import ErrorCode
from shared.protocol.close_codes import CLOSE_CODES, Action
from shared.schema import event as events
from shared.schema.event import Event
from shared.schema.job import Voice
from shared.schema.records import GuildSpec
from shared.store.client import Store
from shared.store.keys import Keys

GUILD_ID = "123456789012345678"
VOICE = Voice(user_id=GUILD_ID, session_id="s", token="t", endpoint="voice.example")
SPEC = GuildSpec(bot="main", guild=GUILD_ID, channel=GUILD_ID, broadcast="news", voice=VOICE, job="j")
GUILD = Guild(SPEC, generation=7, worker="w")
KEYS = Keys("test")
ANSWER_WITHIN_S = ANSWER_WITHIN_MS / 1_000
LONG_S = 10_000.0

REMEDIES = {
    1000: Remedy.NEW_CREDENTIALS,
    1001: Remedy.TRY_AGAIN,
    1006: Remedy.TRY_AGAIN,
    4001: Remedy.NEW_CREDENTIALS,
    4002: Remedy.NEW_CREDENTIALS,
    4003: Remedy.NEW_CREDENTIALS,
    4004: Remedy.NEW_CREDENTIALS,
    4005: Remedy.NEW_CREDENTIALS,
    4006: Remedy.NEW_CREDENTIALS,
    4009: Remedy.NEW_CREDENTIALS,
    4011: Remedy.NEW_CREDENTIALS,
    4012: Remedy.NOTHING,
    4013: Remedy.TRY_AGAIN,
    4014: Remedy.NEW_CREDENTIALS,
    4015: Remedy.TRY_AGAIN,
    4016: Remedy.NOTHING,
    4017: Remedy.NOTHING,
    4020: Remedy.NEW_CREDENTIALS,
    4021: Remedy.NOTHING,
    4022: Remedy.NEW_CREDENTIALS,
    4099: Remedy.NEW_CREDENTIALS,
}


def new_change() -> Change:
    return Change(Registry(Store("unix:///nowhere"), KEYS))  # a client that is never asked


def told(change: Change) -> list[Event]:
    """Events that a change brings."""
    return [
        events.decode(arguments[-1]) for command, key, arguments in change.transaction.changes if key == KEYS.events
    ]


def record(change: Change) -> dict[str, str]:
    """Fields of the guild's record that a change writes."""
    fields: dict[str, str] = {}
    for command, key, arguments in change.transaction.changes:
        if command == "HSET" and key == KEYS.guild(*GUILD.key):
            fields |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    return fields


def fail(recovery: Recovery, now_s: float, code: str = "voice_closed", close_code: int | None = 4015) -> Change:
    change = new_change()
    recovery.failed(GUILD, code, close_code, now_s, change)
    return change


def backoff_s(recovery: Recovery, now_s: float) -> float:
    """How long from now the guild is held back, to a hundredth of a second."""
    if not recovery.holds_back(GUILD.key, now_s):
        return 0.0
    low, high = 0.0, LONG_S
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if recovery.holds_back(GUILD.key, now_s + middle) else (low, middle)
    return high


def test_the_table_of_remedies_has_every_close_code() -> None:
    """A close code that joins the table of the protocol needs its remedy here."""
    assert set(CLOSE_CODES) <= set(REMEDIES)


@pytest.mark.parametrize(("close_code", "remedy"), REMEDIES.items())
def test_every_close_code_has_its_remedy(close_code: int, remedy: Remedy) -> None:
    """What cannot be helped is left, what broke is tried again, what is gone is asked for."""
    assert remedy_for(ErrorCode.VOICE_CLOSED, close_code) == remedy


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (ErrorCode.VOICE_UNREACHABLE, Remedy.TRY_AGAIN),
        (ErrorCode.VOICE_TIMEOUT, Remedy.TRY_AGAIN),
        (ErrorCode.UDP_BLOCKED, Remedy.TRY_AGAIN),
        (ErrorCode.VOICE_CREDENTIALS_REJECTED, Remedy.NEW_CREDENTIALS),
        (ErrorCode.E2EE_REQUIRED, Remedy.NOTHING),
        (ErrorCode.VOICE_MODE_UNSUPPORTED, Remedy.NOTHING),
        ("of_a_later_version", Remedy.TRY_AGAIN),
    ],
)
def test_every_error_without_a_close_has_its_remedy(code: str, remedy: Remedy) -> None:
    """Where nobody closed, the error's code decides."""
    assert remedy_for(code, None) == remedy


def test_no_close_code_that_ends_for_good_is_tried_again() -> None:
    """A server that refuses for good is left alone."""
    for close_code, row in CLOSE_CODES.items():
        if row.action is Action.STOP:
            assert not fail(Recovery(), 0.0, close_code=close_code).transaction.changes


def test_a_failure_releases_the_guild_and_holds_it_back() -> None:
    """The guild is placed anew, under a new generation, and not at once."""
    recovery = Recovery()
    change = fail(recovery, 100.0)
    fields = record(change)
    assert (fields["worker"], fields["generation"]) == ("", "0")
    assert msgspec.json.decode(fields["spec"], type=GuildSpec) == SPEC
    assert recovery.holds_back(GUILD.key, 100.0)
    assert not recovery.holds_back(GUILD.key, 100.0 + 1.0)


def test_backing_off_grows_and_is_bounded() -> None:
    """Each failure in a row waits longer, with jitter, and never longer than a minute."""
    recovery = Recovery()
    now_s = 0.0
    for number in range(40):
        fail(recovery, now_s)
        waited = backoff_s(recovery, now_s)
        longest = min(60.0, 2.0**number)
        assert longest / 2 - 0.02 <= waited <= longest + 0.02
        now_s += LONG_S


def test_backing_off_has_jitter() -> None:
    """Guilds that failed together do not come back together."""
    waits = set()
    for _ in range(20):
        recovery = Recovery()
        fail(recovery, 0.0)
        waits.add(backoff_s(recovery, 0.0))
    assert len(waits) > 1


def test_a_guild_that_played_for_a_while_has_no_past() -> None:
    """Only failures in a row count; what played for a minute starts afresh."""
    recovery = Recovery()
    for _ in range(8):
        fail(recovery, 0.0)
    recovery.well(GUILD.key, 100.0)
    fail(recovery, 161.0)
    assert backoff_s(recovery, 161.0) <= 1.01


def test_a_guild_that_plays_for_a_moment_only_keeps_its_past() -> None:
    """A connection that dies again at once must not be tried at full speed for ever."""
    recovery = Recovery()
    now_s = 0.0
    for _ in range(8):
        fail(recovery, now_s)
        now_s += LONG_S
        recovery.well(GUILD.key, now_s)
        now_s += 0.1
    fail(recovery, now_s)
    assert backoff_s(recovery, now_s) >= 29.0


def test_a_guild_that_left_has_no_past() -> None:
    """What is joined anew is not held back by what was before."""
    recovery = Recovery()
    for _ in range(8):
        fail(recovery, 0.0)
    recovery.forget(GUILD.key)
    assert not recovery.holds_back(GUILD.key, 0.0)


def test_one_guilds_failures_hold_back_no_other() -> None:
    """Guilds do not touch each other."""
    recovery = Recovery()
    fail(recovery, 0.0)
    assert not recovery.holds_back(("main", "223456789012345678"), 0.0)


WANTING = Guild(GuildSpec(bot="main", guild=GUILD_ID, channel=GUILD_ID, broadcast="news", job="j"))


def ask(recovery: Recovery, now_s: float) -> Change:
    change = new_change()
    recovery.wants_voice(WANTING, now_s, change)
    return change


def test_a_session_that_is_gone_asks_for_credentials_at_once() -> None:
    """The old credentials are dropped; the user's bot is told which guild and channel, why, and until when."""
    recovery = Recovery()
    fields = record(fail(recovery, 0.0, close_code=4006))
    assert "voice" not in json.loads(fields["spec"])
    assert (fields["worker"], fields["generation"]) == ("", "0")
    assert not recovery.holds_back(GUILD.key, 0.0)
    change = ask(recovery, 0.0)
    (event,) = told(change)
    assert event.type == "guild.voice_wanted"
    assert (event.bot, event.guild, event.channel, event.job) == ("main", GUILD_ID, GUILD_ID, "j")
    assert (event.reason, event.close_code, event.leave_first) == ("voice_closed", 4006, False)
    assert (event.deadline_ms, event.self_deaf) == (ANSWER_WITHIN_MS, True)
    assert json.loads(record(change)["status"])["state"] == "voice_wanted"


def test_credentials_that_fail_again_and_again_are_asked_for_ever_more_rarely() -> None:
    """A bot whose answers never work is not made to leave and join at full speed."""
    recovery = Recovery()
    now_s = 0.0
    waits = []
    for _ in range(8):
        fail(recovery, now_s, close_code=4006)
        waits.append(backoff_s(recovery, now_s))
        now_s += LONG_S
        ask(recovery, now_s)
        recovery.renewed(GUILD.key)
    assert waits[0] == 0.0
    assert 1.0 <= waits[1] <= 2.02
    assert waits[-1] >= 29.0


def test_what_looks_like_our_mistake_is_tried_once_more_only() -> None:
    """A close code that means a bad request is fixed once; when it comes back, the guild is left alone."""
    recovery = Recovery()
    assert fail(recovery, 0.0, close_code=4020).transaction.changes
    recovery.renewed(GUILD.key)
    assert not fail(recovery, LONG_S, close_code=4020).transaction.changes


def test_while_an_answer_is_awaited_the_guild_is_held_back() -> None:
    """A guild without credentials is asked about, and while the answer is out not again."""
    recovery = Recovery()
    (event,) = told(ask(recovery, 0.0))
    assert (event.type, event.reason, event.leave_first) == ("guild.voice_wanted", "voice_credentials_missing", False)
    assert recovery.holds_back(GUILD.key, LONG_S)


def test_an_answer_in_time_settles_the_question() -> None:
    """Credentials that came are used at once, and nothing is overdue later."""
    recovery = Recovery()
    ask(recovery, 0.0)
    recovery.renewed(GUILD.key)
    assert not recovery.holds_back(GUILD.key, 1.0)
    later = new_change()
    recovery.overdue(WANTING, LONG_S, later)
    assert not later.transaction.changes


def test_a_late_answer_is_used_at_once() -> None:
    """Fresh credentials do not age behind the back-off of an old question."""
    recovery = Recovery()
    ask(recovery, 0.0)
    recovery.overdue(WANTING, ANSWER_WITHIN_S, new_change())
    assert recovery.holds_back(GUILD.key, ANSWER_WITHIN_S)
    recovery.renewed(GUILD.key)
    assert not recovery.holds_back(GUILD.key, ANSWER_WITHIN_S)


def test_a_question_is_overdue_only_after_its_deadline() -> None:
    """The user's bot has the whole time that it was told."""
    recovery = Recovery()
    recovery.wants_voice(WANTING, 50.0, new_change())
    change = new_change()
    recovery.overdue(WANTING, 50.0 + ANSWER_WITHIN_S - 0.01, change)
    assert not change.transaction.changes


def test_an_unanswered_question_fails_and_is_asked_again_with_leave_first() -> None:
    """No answer: the guild fails with its code; asked again after a back-off, this time to leave before joining."""
    recovery = Recovery()
    recovery.wants_voice(WANTING, 0.0, new_change())
    overdue = new_change()
    recovery.overdue(WANTING, ANSWER_WITHIN_S, overdue)
    (failed,) = told(overdue)
    assert (failed.type, failed.code) == ("guild.failed", "voice_credentials_missing")
    assert json.loads(record(overdue)["status"])["state"] == "failed"
    assert recovery.holds_back(GUILD.key, ANSWER_WITHIN_S)
    wait_s = backoff_s(recovery, ANSWER_WITHIN_S)
    assert 0 < wait_s <= 1.01
    again = new_change()
    recovery.wants_voice(WANTING, ANSWER_WITHIN_S + wait_s, again)
    (event,) = told(again)
    assert (event.type, event.leave_first) == ("guild.voice_wanted", True)


def test_an_unanswered_question_is_told_once() -> None:
    """A pass that looks again says nothing twice."""
    recovery = Recovery()
    recovery.wants_voice(WANTING, 0.0, new_change())
    recovery.overdue(WANTING, ANSWER_WITHIN_S, new_change())
    again = new_change()
    recovery.overdue(WANTING, ANSWER_WITHIN_S + 0.1, again)
    assert not again.transaction.changes


def test_a_bot_that_never_answers_is_asked_ever_more_rarely() -> None:
    """The back-off between questions grows and is bounded."""
    recovery = Recovery()
    now_s = 0.0
    waits = []
    for _ in range(12):
        recovery.wants_voice(WANTING, now_s, new_change())
        now_s += ANSWER_WITHIN_S
        recovery.overdue(WANTING, now_s, new_change())
        waits.append(backoff_s(recovery, now_s))
        now_s += LONG_S
    assert waits[0] <= 1.01
    assert 29.0 <= waits[-1] <= 60.02


def test_events_are_capped() -> None:
    """Whatever fails, the stream of events has a bound."""
    change = ask(Recovery(), 0.0)
    (command,) = [arguments for _, key, arguments in change.transaction.changes if key == KEYS.events]
    assert command[:3] == ("MAXLEN", "~", str(EVENTS_KEPT))
