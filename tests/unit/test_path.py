"""What speaks for and against the UDP path of a session, and what is made of it."""

from __future__ import annotations

import errno

import pytest

from shared.errors import ErrorCode
from worker.voice.path import ASK_EVERY_S, OVER_AFTER_S, PING_EVERY_S, UdpPath, Verdict

TOLD_WITHIN_S, MENDED_WITHIN_S, REFUSAL_TOLD_WITHIN_S = 15.0, 30.0, 2.0


class Way:
    """A path that is pinged as a connection does it, and what answers."""

    def __init__(self) -> None:
        self.path = UdpPath()
        self.now_s = 100.0
        self.next_ping_s = self.now_s
        self.pings_are_answered = True
        self.errors: int | None = None
        self.told: list[tuple[float, Verdict]] = []

    def go(self, seconds: float) -> None:
        """Let time pass in steps of a look."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            if self.errors is not None:
                self.path.failed(self.errors, self.now_s)
            doubted = self.path.code is not None
            if doubted or self.now_s >= self.next_ping_s:
                verdict = self.path.look(self.now_s)
                if not self.told or self.told[-1][1] is not verdict:
                    self.told.append((self.now_s, verdict))
                self.path.pinged(self.now_s)
                self.next_ping_s = self.now_s + PING_EVERY_S
                if self.pings_are_answered:
                    self.path.answered(ping=True)
            self.now_s += ASK_EVERY_S

    @property
    def last(self) -> Verdict:
        return self.told[-1][1]

    def after_s(self, verdict: Verdict) -> float:
        """When something was said first, from the start on."""
        return next(at_s for at_s, one in self.told if one is verdict) - 100.0


def test_a_path_that_is_answered_is_fine() -> None:
    """For as long as one likes."""
    way = Way()
    way.go(300)
    assert [verdict for _, verdict in way.told] == [Verdict.FINE]


@pytest.mark.parametrize("dies_after_s", [0.0, 1.0, 2.0, 4.0, 4.9])
def test_a_path_that_swallows_everything_is_told_and_given_up_in_time(dies_after_s: float) -> None:
    """Wherever between two pings it dies."""
    way = Way()
    way.go(10 + dies_after_s)
    way.pings_are_answered = False
    died_s = way.now_s - 100.0
    way.go(60)
    assert way.path.code is ErrorCode.UDP_LOST
    assert way.after_s(Verdict.LOST) - died_s <= TOLD_WITHIN_S
    assert way.after_s(Verdict.OVER) - died_s <= MENDED_WITHIN_S


def test_one_lost_ping_says_nothing() -> None:
    """It is asked once more, sooner."""
    way = Way()
    way.go(10)
    way.pings_are_answered = False
    way.go(PING_EVERY_S)
    way.pings_are_answered = True
    way.go(60)
    assert {verdict for _, verdict in way.told} == {Verdict.FINE, Verdict.DOUBTED}
    assert way.path.code is None


def test_a_server_that_never_answered_a_ping_is_not_doubted_for_that() -> None:
    """Some do not: silence is evidence only where there was an answer before."""
    way = Way()
    way.pings_are_answered = False
    way.go(300)
    assert [verdict for _, verdict in way.told] == [Verdict.FINE]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ECONNREFUSED, ErrorCode.UDP_REFUSED),
        (errno.EHOSTUNREACH, ErrorCode.UDP_UNREACHABLE),
        (errno.ENETUNREACH, ErrorCode.UDP_UNREACHABLE),
        (errno.EPERM, ErrorCode.UDP_UNREACHABLE),
    ],
)
@pytest.mark.parametrize("knows_pings", [True, False])
def test_errors_are_believed_soon(number: int, code: ErrorCode, knows_pings: bool) -> None:
    """Whether or not the server answers pings."""
    way = Way()
    way.pings_are_answered = knows_pings
    way.go(10)
    way.pings_are_answered = False
    way.errors = number
    struck_s = way.now_s - 100.0
    way.go(20)
    assert way.path.code is code
    assert way.after_s(Verdict.LOST) - struck_s <= REFUSAL_TOLD_WITHIN_S


def test_an_error_that_passes_is_forgotten_with_the_next_answer() -> None:
    """A route that flapped: whatever the server says, it is there."""
    way = Way()
    way.pings_are_answered = False
    way.errors = errno.ENETUNREACH
    way.go(4)
    way.errors = None
    way.path.answered(ping=False)
    way.go(60)
    assert way.last is Verdict.FINE


@pytest.mark.parametrize("number", [errno.EMSGSIZE, errno.EAGAIN, errno.ENOBUFS, errno.EINVAL])
def test_errors_of_one_datagram_say_nothing_about_the_path(number: int) -> None:
    """Too large, or no room just now."""
    way = Way()
    way.errors = number
    way.go(60)
    assert [verdict for _, verdict in way.told] == [Verdict.FINE]


def test_a_path_that_is_back_in_time_is_not_over() -> None:
    """Lost, and found again on the same 5-tuple."""
    way = Way()
    way.go(10)
    way.pings_are_answered = False
    way.go(PING_EVERY_S + 8)
    assert way.told.pop()[1] is Verdict.LOST
    way.pings_are_answered = True
    way.go(OVER_AFTER_S + 10)
    assert way.last is Verdict.FINE


def test_a_host_without_a_way_out_keeps_its_sessions() -> None:
    """No other session would leave, either, and the server keeps those that stand for a while."""
    way = Way()
    way.go(10)
    way.pings_are_answered = False
    way.errors = errno.ENETUNREACH
    way.go(600)
    assert way.last is Verdict.LOST


def test_errors_that_stop_are_over_where_no_ping_was_ever_answered() -> None:
    """Fifty packets a second without another one say so."""
    way = Way()
    way.pings_are_answered = False
    way.errors = errno.ECONNREFUSED
    way.go(3)
    assert way.told.pop()[1] is Verdict.LOST
    way.errors = None
    way.go(10)
    assert way.last is Verdict.FINE


def test_what_nobody_looked_at_is_not_held_against_the_path() -> None:
    """While the WebSocket was away no ping left; what was lost is given its time anew."""
    way = Way()
    way.go(10)
    way.pings_are_answered = False
    way.go(PING_EVERY_S + 6)
    way.now_s += 60
    way.path.resumed(way.now_s)
    assert way.path.look(way.now_s) in (Verdict.DOUBTED, Verdict.LOST)
