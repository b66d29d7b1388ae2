"""Recovery: which failure asks for what, when it is tried again, and how credentials are asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.election import EVENTS_KEPT
from coordinator.recovery import (
    ANSWER_WITHIN_MS,
    ATTEMPTS,
    ATTEMPTS_WITHIN_S,
    AWAY_FOR_S,
    FULL_FOR_S,
    LONG_RETRY_S,
    PER_QUESTION_MS,
    PLAIN_WITHIN_MS,
    QUESTIONS_OPEN,
    Failure,
    Recovery,
    action_after,
)
from coordinator.registry import Change, Guild, Registry
from coordinator.waiting import Waiting
from shared.clock import unix_ms
from shared.errors import ErrorCode
from shared.protocol.close_codes import CLOSE_CODES, Action
from shared.schema import event as events
from shared.schema.event import Event
from shared.schema.records import GuildSpec, GuildState, GuildStatus, VoiceRecord
from shared.store.client import Store
from shared.store.keys import Keys

GUILD_ID = "123456789012345678"
VOICE = VoiceRecord(user_id=GUILD_ID, session_id="s", token="t", endpoint="voice.example")
SPEC = GuildSpec(bot="main", guild=GUILD_ID, channel=GUILD_ID, broadcast="news", voice=VOICE, job="j")
GUILD = Guild(SPEC, generation=7, worker="w")
REJOINING = replace(GUILD, spec=msgspec.structs.replace(SPEC, on_kick="rejoin"))
KEYS = Keys("test")
ANSWER_WITHIN_S = ANSWER_WITHIN_MS / 1_000
PLAIN_WITHIN_S = PLAIN_WITHIN_MS / 1_000
LONG_S = 10_000.0
STEADY_S = 61.0
"""A guild that was connected for so long has no past."""

ACTIONS = {
    1000: Action.RESUME,
    1001: Action.RESUME,
    1006: Action.RESUME,
    4001: Action.FIX_ONCE,
    4002: Action.FIX_ONCE,
    4003: Action.FIX_ONCE,
    4004: Action.NEW_CREDENTIALS,
    4005: Action.NEW_CREDENTIALS,
    4006: Action.NEW_CREDENTIALS,
    4009: Action.NEW_CREDENTIALS,
    4011: Action.FIX_ONCE,
    4012: Action.STOP,
    4013: Action.RESUME,
    4014: Action.WAIT,
    4015: Action.RESUME,
    4016: Action.STOP,
    4017: Action.STOP,
    4020: Action.FIX_ONCE,
    4021: Action.STOP,
    4022: Action.WAIT,
    4099: Action.NEW_CREDENTIALS,
}
"""What is done about each close code: a second table, so that a change of the first is seen."""


def with_action(*actions: Action) -> list[int]:
    return [code for code, action in ACTIONS.items() if action in actions]


class Scene:
    """One guild, what recovery makes of it, and a clock that is moved by hand."""

    def __init__(self, guild: Guild = GUILD, recovery: Recovery | None = None, now_s: float = 1_000.0) -> None:
        self.guild = guild
        self.recovery = recovery or Recovery()
        self.now_s = now_s
        self.attempts_s: list[float] = []
        """When a server was asked for a session that failed, or a bot to join."""

    def _carry_out(self, do: Callable[[Change], object]) -> list[Event]:
        """Do something and take over what it changed, as the registry does; the events that it brought."""
        change = Change(Registry(Store("unix:///nowhere"), KEYS))  # a client that is never asked
        do(change)
        fields: dict[str, str] = {}
        for command, key, arguments in change.transaction.changes:
            if command == "HSET" and key == KEYS.guild(*self.guild.key):
                fields |= dict(zip(arguments[::2], arguments[1::2], strict=True))
        if fields:
            self.guild = Guild(
                msgspec.json.decode(fields["spec"], type=GuildSpec),
                int(fields["generation"]),
                fields["worker"],
                msgspec.json.decode(fields["status"], type=GuildStatus) if "status" in fields else self.guild.status,
            )
        return [events.decode(arguments[-1]) for _, key, arguments in change.transaction.changes if key == KEYS.events]

    @property
    def status(self) -> GuildStatus:
        assert self.guild.status is not None
        return self.guild.status

    @property
    def held_s(self) -> float:
        """How long from now the guild is held back, where no answer comes."""
        if self.recovery.is_asked(self.guild.key) or (self.guild.status is not None and self.guild.status.final):
            return LONG_S
        return max(0.0, self.recovery.due_s(self.guild) - self.now_s)

    def passes(self, seconds: float) -> None:
        self.now_s += seconds

    def fail(self, close_code: int | None = 4015, code: str = "voice_closed", message: str = "told") -> list[Event]:
        if code != ErrorCode.VOICE_UNREACHABLE:
            self.attempts_s.append(self.now_s)
        failure = Failure(code, close_code, message)
        return self._carry_out(lambda change: self.recovery.failed(self.guild, failure, self.now_s, change))

    def step(self) -> list[Event]:
        """What a planner does about a guild that nobody holds."""
        told = self._carry_out(lambda change: self.recovery.overdue(self.guild, self.now_s, change))
        if self.guild.worker:
            return told
        if self.guild.spec.voice is None:
            for guild in self._waiting().to_ask():
                asked = self._carry_out(
                    lambda change, guild=guild: self.recovery.wants_voice(guild, self.now_s, change)  # type: ignore[misc]
                )
                told += asked
                self.attempts_s += [self.now_s for event in asked if event.rejoin]
        elif self._waiting().ready(1):
            self.guild = replace(self.guild, worker="w", generation=self.guild.generation + 1)
        return told

    def _waiting(self) -> Waiting:
        registry = Registry(Store("unix:///nowhere"), KEYS)
        registry.keep(self.guild)
        waiting = Waiting(registry, self.recovery)
        waiting.look(self.now_s)
        return waiting

    def renew(self, voice: VoiceRecord | None = VOICE) -> float:
        """The user's word: `guild.voice`, or a `guild.join` without credentials."""
        spec = msgspec.structs.replace(self.guild.spec, voice=voice)
        self.guild = replace(self.guild, spec=spec, worker="", status=GuildStatus(state="wanted", at=1))
        return self.recovery.renewed(self.guild, self.now_s)

    def well(self, for_s: float = 0.0) -> None:
        self.recovery.well(self.guild.key, self.now_s)
        self.passes(for_s)

    def due(self) -> list[Event]:
        """Let the time pass until the guild has its turn, and take it."""
        self.passes(self.held_s)
        return self.step()


# the table


def test_the_table_of_actions_has_every_close_code() -> None:
    """A close code that joins the table of the protocol needs its rule here."""
    assert set(CLOSE_CODES) <= set(ACTIONS)


@pytest.mark.parametrize(("close_code", "action"), ACTIONS.items())
def test_every_close_code_has_its_action(close_code: int, action: Action) -> None:
    """What cannot be helped is left, what broke is tried again, what is gone is asked for."""
    assert action_after(Failure(ErrorCode.VOICE_CLOSED, close_code)) is action


@pytest.mark.parametrize(
    ("code", "action"),
    [
        (ErrorCode.VOICE_UNREACHABLE, Action.RESUME),
        (ErrorCode.VOICE_TIMEOUT, Action.RESUME),
        (ErrorCode.UDP_BLOCKED, Action.RESUME),
        (ErrorCode.E2EE_FAILED, Action.RESUME),
        (ErrorCode.INTERNAL_ERROR, Action.RESUME),
        (ErrorCode.VOICE_CREDENTIALS_REJECTED, Action.NEW_CREDENTIALS),
        (ErrorCode.VOICE_CREDENTIALS_MISSING, Action.NEW_CREDENTIALS),
        (ErrorCode.E2EE_REQUIRED, Action.STOP),
        (ErrorCode.VOICE_MODE_UNSUPPORTED, Action.STOP),
        ("of_a_later_version", Action.RESUME),
    ],
)
def test_every_error_without_a_close_has_its_action(code: str, action: Action) -> None:
    """Where nobody closed, the error's code decides."""
    assert action_after(Failure(code)) is action


def test_a_guild_that_a_full_worker_refused_is_given_to_another_at_once() -> None:
    """Nothing was tried, so nothing failed: no delay, no attempt, the same credentials, and no word of ours."""
    scene = Scene()
    for _ in range(5 * ATTEMPTS):
        scene.step()
        assert scene.fail(None, "worker_full", "full") == []
        assert (scene.guild.worker, scene.guild.generation, scene.guild.spec.voice) == ("", 0, VOICE)
        assert (scene.status.state, scene.status.code, scene.held_s) == ("wanted", "worker_full", 0.0)
    scene.step()
    scene.fail(4006)
    assert scene.held_s == 0.0  # its first failure, for which new credentials are asked at once


def test_a_refusal_does_not_mend_a_guild_in_trouble() -> None:
    """What failed before it still counts."""
    scene = Scene()
    scene.fail(4015)
    scene.due()
    scene.fail(None, "worker_full")
    scene.step()
    scene.fail(4015)
    assert scene.held_s > 1.0  # the second in a row


def test_a_worker_that_refused_is_full_for_a_while() -> None:
    """Until it has told anew what room it has; of one that is lost nothing is kept."""
    scene = Scene()
    scene.step()
    worker = scene.guild.worker
    scene.fail(None, "worker_full")
    assert scene.recovery.is_full(worker, scene.now_s + FULL_FOR_S - 0.1)
    assert not scene.recovery.is_full(worker, scene.now_s + FULL_FOR_S)
    assert not scene.recovery.is_full("another", scene.now_s)
    scene.recovery.forget_worker(worker)
    assert not scene.recovery.is_full(worker, scene.now_s)


@pytest.mark.parametrize("close_code", with_action(Action.RESUME))
def test_what_could_not_be_resumed_is_identified_afresh_with_what_is_there(close_code: int) -> None:
    """The guild is given to a worker again, after a moment, with the credentials it had; nobody is asked."""
    scene = Scene()
    assert scene.fail(close_code) == []
    assert (scene.guild.worker, scene.guild.generation, scene.guild.spec.voice) == ("", 0, VOICE)
    assert (scene.status.state, scene.status.close_code, scene.status.message) == ("failed", close_code, "told")
    assert 0.0 < scene.held_s <= 1.01
    assert scene.due() == []
    assert scene.guild.worker == "w"


@pytest.mark.parametrize("close_code", with_action(Action.NEW_CREDENTIALS, Action.FIX_ONCE))
def test_a_session_that_is_gone_asks_for_credentials(close_code: int) -> None:
    """The old ones are dropped; the user's bot is told which guild and channel, why, and until when: at once."""
    scene = Scene()
    assert scene.fail(close_code) == []
    assert (scene.guild.worker, scene.guild.generation, scene.guild.spec.voice) == ("", 0, None)
    assert scene.held_s == 0.0
    (event,) = scene.due()
    assert event.type == "guild.voice_wanted"
    assert (event.bot, event.guild, event.channel, event.job) == ("main", GUILD_ID, GUILD_ID, "j")
    assert (event.reason, event.close_code) == ("voice_closed", close_code)
    assert (event.leave_first, event.rejoin, event.self_deaf) == (True, True, True)
    assert event.deadline_ms == ANSWER_WITHIN_MS
    assert scene.status.state == "voice_wanted"
    assert scene.renew() == 0.0
    scene.step()
    assert (scene.guild.worker, scene.guild.spec.voice) == ("w", VOICE)


@pytest.mark.parametrize("close_code", with_action(Action.FIX_ONCE))
def test_what_looks_like_our_mistake_is_tried_once_more_only(close_code: int) -> None:
    """A code that means a bad request is answered with new credentials once; when it comes back, the guild stops."""
    scene = Scene()
    scene.fail(close_code)
    scene.due()
    scene.renew()
    scene.step()
    (event,) = scene.fail(close_code)
    assert (event.type, event.final, event.close_code) == ("guild.failed", True, close_code)
    assert scene.held_s >= LONG_S - 1


@pytest.mark.parametrize("close_code", with_action(Action.WAIT))
def test_a_disconnected_bot_is_asked_for_word_and_not_to_join(close_code: int) -> None:
    """Kicked or moved: only the user's bot knows. It is asked at once, told not to join, and has 5 to 15 s."""
    scene = Scene()
    assert scene.fail(close_code) == []
    assert scene.guild.spec.voice is None
    (event,) = scene.step()
    assert (event.type, event.reason, event.close_code) == ("guild.voice_wanted", "disconnected", close_code)
    assert (event.rejoin, event.leave_first) == (False, False)
    assert 5_000 <= (event.deadline_ms or 0) <= 15_000
    scene.renew()
    scene.step()
    assert scene.guild.worker == "w"


@pytest.mark.parametrize("close_code", with_action(Action.WAIT))
def test_a_kicked_bot_stays_out_where_nobody_says_otherwise(close_code: int) -> None:
    """No word: the guild has stopped, says why, and is neither placed nor asked about again."""
    scene = Scene()
    scene.fail(close_code)
    scene.step()
    (event,) = scene.due()
    assert (event.type, event.code, event.close_code, event.final) == ("guild.stopped", "kicked", close_code, True)
    assert (scene.status.state, scene.status.code, scene.status.final) == ("stopped", "kicked", True)
    scene.passes(LONG_S)
    assert scene.step() == []


@pytest.mark.parametrize("close_code", with_action(Action.WAIT))
def test_a_kicked_bot_joins_again_where_that_was_asked_for(close_code: int) -> None:
    """With `on_kick: rejoin` the bot is asked to join, and again when it does not answer."""
    scene = Scene(REJOINING)
    scene.fail(close_code)
    (event,) = scene.step()
    assert (event.type, event.reason, event.rejoin) == ("guild.voice_wanted", "disconnected", True)
    (failed,) = scene.due()
    assert (failed.type, failed.code, failed.final) == ("guild.failed", "voice_credentials_missing", None)
    (again,) = scene.due()
    assert (again.type, again.rejoin, again.leave_first) == ("guild.voice_wanted", True, True)


@pytest.mark.parametrize("close_code", with_action(Action.STOP))
def test_what_cannot_be_helped_stops_at_once(close_code: int) -> None:
    """The guild is taken from its worker, its status says that nothing more is tried, and nothing is."""
    scene = Scene()
    (event,) = scene.fail(close_code)
    assert (event.type, event.code, event.close_code, event.final) == ("guild.failed", "voice_closed", close_code, True)
    assert (scene.guild.worker, scene.guild.generation) == ("", 0)
    assert (scene.status.state, scene.status.close_code, scene.status.final) == ("failed", close_code, True)
    assert "told" in scene.status.message
    scene.passes(LONG_S)
    assert scene.step() == []
    assert scene.guild.worker == ""


@pytest.mark.parametrize("code", [ErrorCode.E2EE_REQUIRED, ErrorCode.VOICE_MODE_UNSUPPORTED])
def test_what_both_sides_cannot_agree_on_stops_at_once(code: str) -> None:
    """No mode in common, no end-to-end encryption: trying again finds the same."""
    (event,) = Scene().fail(None, code)
    assert (event.type, event.code, event.final) == ("guild.failed", code, True)


@pytest.mark.parametrize("voice", [VOICE, None])
@pytest.mark.parametrize("close_code", with_action(Action.STOP, Action.WAIT))
def test_a_guild_that_stopped_comes_back_by_the_users_word(close_code: int, voice: VoiceRecord | None) -> None:
    """guild.voice is used, guild.join without credentials asks for them, as if nothing had been."""
    scene = Scene()
    scene.fail(close_code)
    scene.step()
    scene.passes(ANSWER_WITHIN_S)
    scene.step()
    assert scene.status.final
    assert scene.renew(voice) == 0.0
    told = scene.step()
    if voice is None:
        assert [(event.type, event.rejoin) for event in told] == [("guild.voice_wanted", True)]
    else:
        assert scene.guild.worker == "w"


# back-off


def test_backing_off_grows_and_is_bounded() -> None:
    """Each failure in a row waits longer, with jitter, and never longer than a minute."""
    scene = Scene()
    for number in range(40):
        scene.fail(None, ErrorCode.VOICE_TIMEOUT)
        longest_s = min(60.0, 2.0**number)
        assert longest_s / 2 - 0.02 <= scene.held_s <= longest_s + 0.02
        scene.renew()
        scene.passes(LONG_S)


def test_backing_off_has_jitter() -> None:
    """Guilds that failed together do not come back together."""
    waits = set()
    for _ in range(20):
        scene = Scene()
        scene.fail()
        waits.add(scene.held_s)
    assert len(waits) > 1


def test_when_it_is_tried_again_stands_in_the_status() -> None:
    """Whoever looks at a failed guild sees when something will happen."""
    scene = Scene()
    before_ms = unix_ms()
    scene.fail()
    assert scene.status.retry_at is not None
    assert before_ms - 20 <= scene.status.retry_at - scene.held_s * 1_000 <= unix_ms() + 20


def test_an_absence_costs_no_credentials() -> None:
    """Nobody being there says nothing against them: for a minute they are tried again, every few seconds."""
    scene = Scene()
    begun_s = scene.now_s
    tries = 0
    while scene.now_s - begun_s < AWAY_FOR_S:
        assert scene.fail(None, ErrorCode.VOICE_UNREACHABLE) == []
        assert scene.guild.spec.voice == VOICE
        assert scene.held_s <= 5.02
        assert scene.due() == []
        assert scene.guild.worker == "w"
        tries += 1
    assert tries > ATTEMPTS
    assert not scene.attempts_s


def test_a_server_that_stays_away_is_asked_for_through_new_credentials() -> None:
    """Credentials name a server: when it does not answer for long, others may name another one."""
    scene = Scene()
    scene.fail(None, ErrorCode.VOICE_UNREACHABLE)
    scene.due()
    scene.passes(AWAY_FOR_S)
    scene.fail(None, ErrorCode.VOICE_UNREACHABLE)
    (event,) = scene.due()
    assert (event.type, event.reason, event.leave_first) == ("guild.voice_wanted", "voice_unreachable", True)


@pytest.mark.parametrize("close_code", with_action(Action.RESUME))
def test_used_credentials_are_identified_with_once(close_code: int) -> None:
    """They may be refused for good once they had a session: the second failure asks for others, to leave first."""
    scene = Scene()
    scene.fail(close_code)
    assert scene.due() == []
    assert scene.guild.spec.voice == VOICE
    scene.fail(close_code)
    (event,) = scene.due()
    assert (event.type, event.leave_first) == ("guild.voice_wanted", True)


def test_a_guild_that_played_for_a_while_has_no_past() -> None:
    """Only failures in a row count; what played for a minute starts afresh."""
    scene = Scene()
    for _ in range(5):
        scene.fail()
        scene.renew()
    scene.well(STEADY_S)
    scene.fail()
    assert scene.held_s <= 1.01


def test_a_guild_that_plays_for_a_moment_only_keeps_its_past() -> None:
    """A connection that dies again at once must not be tried at full speed for ever."""
    scene = Scene()
    for _ in range(8):
        scene.fail()
        scene.passes(LONG_S)
        scene.renew()
        scene.well(0.1)
    scene.fail()
    assert scene.held_s >= 29.0


def test_a_guild_that_left_has_no_past() -> None:
    """What is joined anew is not held back by what was before."""
    scene = Scene()
    for _ in range(8):
        scene.fail()
    scene.recovery.forget(GUILD.key)
    assert scene.held_s == 0.0


def test_one_guilds_failures_hold_back_no_other() -> None:
    """Guilds do not touch each other."""
    scene = Scene()
    scene.fail()
    other = Guild(msgspec.structs.replace(SPEC, guild="223456789012345678"))
    assert Scene(other, scene.recovery).held_s == 0.0


# caps


@pytest.mark.parametrize("close_code", with_action(Action.RESUME, Action.NEW_CREDENTIALS))
def test_a_guild_that_used_up_its_attempts_is_left_alone_for_long(close_code: int) -> None:
    """After a dozen attempts the guild fails with a code of its own, and from then on only the long retry is left."""
    scene = Scene()
    told: list[Event] = []
    while not told:
        told = [event for event in scene.fail(close_code) if event.type == "guild.failed"]
        assert len(scene.attempts_s) < 2 * ATTEMPTS
        if not told and scene.due():
            scene.renew()
            scene.step()
    assert (told[0].code, told[0].close_code, told[0].final) == ("too_many_attempts", close_code, None)
    assert (scene.status.state, scene.status.code) == ("failed", "too_many_attempts")
    for _ in range(3):
        assert LONG_RETRY_S - 0.1 <= scene.held_s <= LONG_RETRY_S * 1.3
        if scene.due():
            scene.renew()
            scene.step()
        assert scene.guild.worker == "w"
        (again,) = scene.fail(close_code)
        assert again.code == "too_many_attempts"


ERRORS = [
    *(ErrorCode.VOICE_UNREACHABLE, ErrorCode.VOICE_TIMEOUT, ErrorCode.UDP_BLOCKED, ErrorCode.E2EE_FAILED),
    *(ErrorCode.VOICE_CREDENTIALS_REJECTED, ErrorCode.E2EE_REQUIRED, ErrorCode.INTERNAL_ERROR),
]
"""Ends without a close code; only the first costs no server anything."""
ENDS = [*(Failure(ErrorCode.VOICE_CLOSED, code) for code in ACTIONS), *(Failure(code) for code in ERRORS)]


@pytest.mark.parametrize("code", [ErrorCode.UDP_BLOCKED, ErrorCode.VOICE_TIMEOUT, ErrorCode.INTERNAL_ERROR])
def test_a_session_that_never_came_to_be_counts_as_an_attempt(code: ErrorCode) -> None:
    """A server that was asked, and our own crash: a dozen, and only the long retry is left."""
    scene = Scene()
    told: list[Event] = []
    while not told:
        told = [event for event in scene.fail(None, code) if event.type == "guild.failed"]
        assert len(scene.attempts_s) < 2 * ATTEMPTS
        if not told and scene.due():
            scene.renew()
            scene.step()
    assert told[0].code == "too_many_attempts"


@settings(deadline=None)
@given(
    st.sampled_from(ENDS),
    st.sampled_from([GUILD, REJOINING]),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 30.0, STEADY_S]),
)
def test_no_guild_is_ever_tried_more_often_than_the_cap(
    end: Failure, guild: Guild, answers: bool, plays_s: float
) -> None:
    """Whatever the server says, whether the bot answers, however long it plays between: ten minutes see a dozen."""
    scene = Scene(guild)
    begun_s = scene.now_s
    while scene.now_s < begun_s + 3 * LONG_RETRY_S:
        if scene.guild.worker:
            if plays_s:
                scene.well(plays_s)
            scene.fail(end.close_code, end.code)
            if action_after(end) is Action.WAIT and guild is GUILD and plays_s:
                scene.attempts_s.pop()  # somebody's will, not an attempt that failed
                scene.passes(1.0)
        elif any(event.type == "guild.voice_wanted" for event in scene.step()) and answers:
            scene.renew()
        else:
            scene.passes(min(scene.held_s, ANSWER_WITHIN_S) + 0.02)
        if scene.guild.status is not None and scene.status.final:
            break
    for number, at_s in enumerate(scene.attempts_s[ATTEMPTS + 1 :]):
        assert at_s - scene.attempts_s[number] >= ATTEMPTS_WITHIN_S


def test_not_even_the_user_can_make_a_storm() -> None:
    """A bot that brings credentials after every failure is slowed down by the cap, and told for how long."""
    scene = Scene()
    for _ in range(ATTEMPTS):
        assert scene.renew() == 0.0
        scene.step()
        assert scene.guild.worker == "w"
        scene.fail(4021)
        scene.passes(1.0)
    wait_s = scene.renew()
    assert wait_s == pytest.approx(ATTEMPTS_WITHIN_S - ATTEMPTS)
    assert scene.held_s == pytest.approx(wait_s, abs=0.02)
    scene.due()
    assert scene.guild.worker == "w"


def test_the_answer_to_the_last_question_is_used() -> None:
    """Credentials that were asked for do not age because the question was the last of a dozen attempts."""
    scene = Scene(WANTING)
    for _ in range(ATTEMPTS - 1):
        scene.due()
        scene.passes(ANSWER_WITHIN_S)
        scene.step()
    assert scene.due()
    assert scene.renew() == 0.0
    scene.step()
    assert scene.guild.worker == "w"
    (event,) = scene.fail(4006)
    assert event.code == "too_many_attempts"


def test_moving_the_bot_about_is_no_failure() -> None:
    """However often people move the bot, each move is followed at once."""
    scene = Scene()
    for _ in range(5 * ATTEMPTS):
        scene.well(1.0)
        scene.fail(4014)
        (event,) = scene.step()
        assert event.rejoin is False
        assert scene.renew() == 0.0
        scene.step()
        assert scene.guild.worker == "w"


# questions

WANTING = Guild(GuildSpec(bot="main", guild=GUILD_ID, channel=GUILD_ID, broadcast="news", job="j"))


@pytest.mark.parametrize("played_s", [0.0, 1.0, STEADY_S])
@pytest.mark.parametrize("close_code", with_action(Action.NEW_CREDENTIALS))
def test_whoever_had_credentials_is_asked_to_leave_first(close_code: int, played_s: float) -> None:
    """The bot is in the channel, as far as Discord's main gateway knows, and joining where it is brings nothing."""
    scene = Scene()
    scene.well(played_s)
    for _ in range(2):
        scene.fail(close_code)
        (event,) = scene.due()
        assert (event.rejoin, event.leave_first, event.deadline_ms) == (True, True, ANSWER_WITHIN_MS)
        scene.renew()
        scene.step()


# a kick


def kicked_and_answered() -> Scene:
    """The bot was asked before it heard of its kick, and answered with what it had."""
    scene = Scene()
    scene.well(1.0)
    scene.fail(4014)
    (event,) = scene.step()
    assert event.rejoin is False
    scene.renew()
    scene.step()
    assert scene.guild.worker == "w"
    return scene


@pytest.mark.parametrize("close_code", with_action(Action.NEW_CREDENTIALS))
def test_a_kick_stays_a_kick(close_code: int) -> None:
    """Credentials that came after a disconnect and are refused were the old ones: again the bot's word, and no join."""
    scene = kicked_and_answered()
    scene.fail(close_code)
    (event,) = scene.due()
    assert (event.type, event.reason, event.rejoin) == ("guild.voice_wanted", "disconnected", False)
    scene.passes(ANSWER_WITHIN_S)
    (stopped,) = scene.step()
    assert (stopped.type, stopped.code, stopped.final) == ("guild.stopped", "kicked", True)


def test_a_move_that_was_answered_is_over_once_it_stands() -> None:
    """Credentials that were good make whatever comes later a matter of its own."""
    scene = kicked_and_answered()
    scene.well(1.0)
    scene.fail(4006)
    (event,) = scene.due()
    assert (event.rejoin, event.leave_first) == (True, True)


def test_a_kick_is_over_by_the_users_word() -> None:
    """Who joins anew means it."""
    scene = kicked_and_answered()
    scene.renew()
    scene.step()
    scene.fail(4006)
    (event,) = scene.due()
    assert event.rejoin is True


# how long it may take


def test_a_plain_question_is_given_up_soon() -> None:
    """A bot that is in the channel already can answer nothing: it is asked to leave first after a moment."""
    scene = Scene(WANTING)
    (event,) = scene.step()
    assert (event.leave_first, event.deadline_ms) == (False, PLAIN_WITHIN_MS)
    scene.passes(PLAIN_WITHIN_S)
    scene.step()
    (again,) = scene.due()
    assert (again.leave_first, again.deadline_ms) == (True, ANSWER_WITHIN_MS)


def test_a_bot_with_many_questions_has_longer() -> None:
    """It may send two commands a second: what was asked later may be answered later."""
    recovery = Recovery()
    deadlines = []
    for number in range(QUESTIONS_OPEN):
        guild = Guild(GuildSpec(bot="main", guild=str(10**17 + number), channel=GUILD_ID, broadcast="n"))
        (event,) = Scene(guild, recovery).step()
        deadlines.append(event.deadline_ms)
    expected = [PLAIN_WITHIN_MS + number * PER_QUESTION_MS for number in range(QUESTIONS_OPEN)]
    assert deadlines == [min(one, ANSWER_WITHIN_MS) for one in expected]


def test_a_guild_that_never_had_credentials_is_asked_for_as_such() -> None:
    """A join without credentials: the reason says so, and its first failure is the first."""
    scene = Scene(WANTING)
    (event,) = scene.step()
    assert (event.type, event.reason, event.leave_first) == ("guild.voice_wanted", "voice_credentials_missing", False)
    scene.renew()
    scene.step()
    scene.fail(4006)
    (event,) = scene.step()
    assert (event.close_code, event.leave_first) == (4006, True)


def test_credentials_that_fail_again_and_again_are_asked_for_ever_more_rarely() -> None:
    """A bot whose answers never work is not made to leave and join at full speed."""
    scene = Scene()
    waits = []
    for _ in range(5):
        scene.fail(4006)
        waits.append(scene.held_s)
        scene.due()
        scene.renew()
        scene.step()
    assert waits[0] == 0.0
    assert 1.0 <= waits[1] <= 2.02
    assert waits[-1] >= 7.9


def test_while_an_answer_is_awaited_the_guild_is_asked_about_once() -> None:
    """While the question is open, it is not asked again."""
    scene = Scene(WANTING)
    assert scene.step()
    for _ in range(3):
        scene.passes(PLAIN_WITHIN_S / 4)
        assert scene.step() == []


def test_an_answer_in_time_settles_the_question() -> None:
    """Credentials that came are used at once, and nothing is overdue later."""
    scene = Scene(WANTING)
    scene.step()
    assert scene.renew() == 0.0
    assert scene.held_s == 0.0
    scene.step()
    scene.passes(LONG_S)
    assert scene.step() == []


def test_a_late_answer_is_used_at_once() -> None:
    """Fresh credentials do not age behind the back-off of an old question."""
    scene = Scene(WANTING)
    scene.step()
    scene.passes(ANSWER_WITHIN_S)
    scene.step()
    assert scene.held_s > 0.0
    assert scene.renew() == 0.0
    assert scene.held_s == 0.0


def test_a_question_is_overdue_only_after_its_deadline() -> None:
    """The user's bot has the whole time that it was told."""
    scene = Scene(WANTING)
    scene.step()
    scene.passes(PLAIN_WITHIN_S - 0.01)
    assert scene.step() == []


def test_an_unanswered_question_fails_and_is_asked_again_with_leave_first() -> None:
    """No answer: the guild fails with its code; asked again after a back-off, this time to leave before joining."""
    scene = Scene(WANTING)
    scene.step()
    scene.passes(ANSWER_WITHIN_S)
    (failed,) = scene.step()
    assert (failed.type, failed.code) == ("guild.failed", "voice_credentials_missing")
    assert scene.status.state == "failed"
    assert scene.step() == []
    assert 0 < scene.held_s <= 1.01
    (event,) = scene.due()
    assert (event.type, event.leave_first) == ("guild.voice_wanted", True)


def test_a_bot_that_never_answers_is_asked_ever_more_rarely() -> None:
    """The back-off between questions grows, up to the long retry, and it is still asked then."""
    scene = Scene(WANTING)
    waits = []
    for _ in range(2 * ATTEMPTS):
        assert [event.type for event in scene.due()] == ["guild.voice_wanted"]
        scene.passes(ANSWER_WITHIN_S)
        assert [event.type for event in scene.step()] == ["guild.failed"]
        waits.append(scene.held_s)
    assert waits[0] <= 1.01
    assert all(LONG_RETRY_S - 0.1 <= wait_s <= LONG_RETRY_S * 1.3 for wait_s in waits[ATTEMPTS:])


def test_a_new_join_asks_anew() -> None:
    """A question that is out is about the old channel: a `guild.join` without credentials is asked about by itself."""
    scene = Scene(WANTING)
    scene.step()
    assert scene.renew(None) == 0.0
    (event,) = scene.step()
    assert (event.type, event.leave_first) == ("guild.voice_wanted", False)


def test_a_bot_is_asked_for_no_more_guilds_than_it_can_answer() -> None:
    """Questions are open for so many guilds of a bot; with each answer the next is asked, the longest waiting first."""
    recovery = Recovery()

    def mute(number: int, bot: str = "main") -> Scene:
        return Scene(Guild(GuildSpec(bot=bot, guild=str(10**17 + number), channel=GUILD_ID, broadcast="n")), recovery)

    many = [mute(number) for number in range(3 * QUESTIONS_OPEN)]
    guilds = [scene.guild for scene in many]
    registry = Registry(Store("unix:///nowhere"), KEYS)
    waiting = Waiting(registry, recovery)

    def to_ask() -> list[Guild]:
        for scene in many:
            registry.keep(scene.guild)
        waiting.look(many[0].now_s)
        return waiting.to_ask()

    assert to_ask() == guilds[:QUESTIONS_OPEN]
    for scene in many[:QUESTIONS_OPEN]:
        scene.step()
    assert to_ask() == []
    many.append(mute(0, "other"))
    assert to_ask() == [many[-1].guild]
    many[3].renew()
    assert to_ask() == [guilds[QUESTIONS_OPEN], many[-1].guild]


# a new leader


def test_a_new_leader_keeps_what_was_put_off() -> None:
    """When a guild is tried again stands in its status: an election is no reason to try at once."""
    scene = Scene()
    for _ in range(6):
        scene.fail()
        scene.renew()
    scene.fail()
    held_s = scene.held_s
    later = Scene(scene.guild, now_s=5.0)
    later.recovery.restore(later.guild, later.now_s)
    assert later.held_s == pytest.approx(held_s, abs=1.0)
    assert later.due() == []
    assert later.guild.worker == "w"


@pytest.mark.parametrize(("state", "worn_out"), [("wanted", False), ("failed", True)])
def test_a_new_leader_knows_who_only_waits_for_the_cap(state: GuildState, worn_out: bool) -> None:
    """A user's guild that waits for its next attempt is not worn out, as one that failed with the same code is."""
    status = GuildStatus(state=state, at=unix_ms(), code=ErrorCode.TOO_MANY_ATTEMPTS, retry_at=unix_ms() + 5_000)
    scene = Scene(Guild(SPEC, status=status))
    scene.recovery.restore(scene.guild, scene.now_s)
    assert scene.held_s == pytest.approx(5.0, abs=0.5)
    assert scene.due() == []
    assert scene.guild.worker == "w"
    told = scene.fail()
    assert [event.code for event in told] == [ErrorCode.TOO_MANY_ATTEMPTS] * worn_out
    assert (scene.held_s >= LONG_RETRY_S - 0.1) is worn_out


def test_a_new_leader_brings_no_stopped_guild_back() -> None:
    """What has stopped for good has stopped for every leader."""
    scene = Scene()
    scene.fail(4017)
    later = Scene(scene.guild)
    later.recovery.restore(later.guild, later.now_s)
    later.passes(LONG_S)
    assert later.step() == []
    assert later.guild.worker == ""


def test_a_new_leader_asks_no_kicked_bot_to_join() -> None:
    """That the bot was disconnected is not forgotten while its word is awaited."""
    for ask_first in (True, False):
        scene = Scene()
        scene.fail(4014)
        if ask_first:
            scene.step()
        later = Scene(scene.guild)
        later.recovery.restore(later.guild, later.now_s)
        (event,) = later.due()
        assert (event.reason, event.close_code, event.rejoin) == ("disconnected", 4014, False)


def test_a_clock_that_was_wrong_holds_nothing_back_for_ever() -> None:
    """A time that no leader would have set is cut to the longest that one would."""
    status = GuildStatus(state="failed", at=1, retry_at=unix_ms() + 10**9)
    scene = Scene(Guild(SPEC, status=status), now_s=time.monotonic())
    scene.recovery.restore(scene.guild, scene.now_s)
    assert scene.held_s <= LONG_RETRY_S * 1.3


def test_events_are_capped() -> None:
    """Whatever fails, the stream of events has a bound."""
    change = Change(Registry(Store("unix:///nowhere"), KEYS))
    Recovery().wants_voice(WANTING, 0.0, change)
    (command,) = [arguments for _, key, arguments in change.transaction.changes if key == KEYS.events]
    assert command[:3] == ("MAXLEN", "~", str(EVENTS_KEPT))
