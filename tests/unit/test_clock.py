"""The common clock: the best of noisy measurements, followed smoothly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.clock import MAX_SLEW_PPM, NS_PER_MS, NS_PER_S, CommonClock, LocalClock

UNIX_NS = 1_700_000_000 * NS_PER_S


class HandClock(LocalClock):
    """A clock that is moved by hand; its rate may be wrong against true time."""

    def __init__(self, drift_ppm: float = 0.0) -> None:
        super().__init__()
        self.true_ns = 0
        self._drift = drift_ppm / 1e6

    def now_ns(self) -> int:
        return self.true_ns + round(self.true_ns * self._drift)

    def server_us(self) -> int:
        """What the server's clock reads at this moment."""
        return (UNIX_NS + self.true_ns) // 1_000


def measure(clock: CommonClock, local: HandClock, there_ns: int, back_ns: int) -> None:
    """Ask the server over a path that takes so long each way."""
    sent_ns = local.now_ns()
    local.true_ns += there_ns
    told_us = local.server_us()
    local.true_ns += back_ns
    clock.observe(sent_ns, local.now_ns(), told_us)


def off_by_ns(clock: CommonClock, local: HandClock) -> int:
    return clock.now_ns() - (UNIX_NS + local.true_ns)


def test_there_is_no_common_time_before_a_measurement() -> None:
    """Nobody may send on a clock that was never set."""
    clock = CommonClock(HandClock())
    assert not clock.synchronised
    clock.observe(0, 0, 0)
    assert clock.synchronised


def test_the_first_measurement_is_stepped_to() -> None:
    """The first offset is taken at once, however large."""
    local = HandClock()
    clock = CommonClock(local)
    measure(clock, local, NS_PER_MS, NS_PER_MS)
    assert abs(off_by_ns(clock, local)) < 1_000
    assert clock.error_ns == 0
    assert clock.now_us() == clock.now_ns() // 1_000


def test_the_shortest_round_trip_is_believed() -> None:
    """A measurement held up on one way is wrong by half of it; the one with the shortest round trip counts."""
    local = HandClock()
    clock = CommonClock(local)
    measure(clock, local, 40 * NS_PER_MS, NS_PER_MS)
    measure(clock, local, NS_PER_MS // 10, NS_PER_MS // 10)
    measure(clock, local, NS_PER_MS, 60 * NS_PER_MS)
    clock.step()
    assert abs(off_by_ns(clock, local)) < NS_PER_MS // 10


def test_an_old_measurement_is_worth_less_every_second() -> None:
    """Clocks drift apart, so a fair measurement of now beats a better one of minutes ago."""
    local = HandClock(drift_ppm=400)
    clock = CommonClock(local)
    measure(clock, local, NS_PER_MS, NS_PER_MS)
    local.true_ns += 60 * NS_PER_S
    measure(clock, local, 2 * NS_PER_MS, 2 * NS_PER_MS)
    clock.step()
    assert abs(off_by_ns(clock, local)) < 3 * NS_PER_MS


def test_a_later_measurement_is_slewed_to_and_not_stepped() -> None:
    """While the clock runs, its rate is never off by more than the slew limit."""
    local = HandClock()
    clock = CommonClock(local)
    clock.observe(0, 0, 1_000_000)
    clock.observe(0, 0, 1_000_000 + 10_000)  # as good as the first, and younger only in order
    local.true_ns += NS_PER_S
    clock.observe(local.now_ns(), local.now_ns(), 2_010_000)
    error_before = clock.error_ns
    assert error_before == 10 * NS_PER_MS
    before = clock.now_ns()
    local.true_ns += NS_PER_S
    moved = clock.now_ns() - before
    assert 0 < moved - NS_PER_S <= NS_PER_S * MAX_SLEW_PPM // 1_000_000
    assert clock.error_ns < error_before


@pytest.mark.parametrize("drift_ppm", [-200, -20, 20, 200])
def test_a_drifting_clock_is_followed(drift_ppm: int) -> None:
    """A clock that is wrong in rate, measured twice a second over a noisy path, stays near the server's."""
    local = HandClock(drift_ppm)
    clock = CommonClock(local)
    for number in range(400):
        measure(clock, local, NS_PER_MS // 5 * (1 + number % 7), NS_PER_MS // 5)
        local.true_ns += NS_PER_S // 2
        if number > 50:
            assert abs(off_by_ns(clock, local)) < 2 * NS_PER_MS


@given(
    st.lists(
        st.tuples(st.integers(0, NS_PER_S), st.integers(0, 50 * NS_PER_MS), st.integers(-NS_PER_S, NS_PER_S)),
        min_size=2,
        max_size=30,
    )
)
def test_time_never_goes_back_and_never_runs(steps: list[tuple[int, int, int]]) -> None:
    """Whatever is measured, common time rises with local time, within the slew limit."""
    local = HandClock()
    clock = CommonClock(local)
    clock.observe(0, 0, UNIX_NS // 1_000)
    before_local, before = local.now_ns(), clock.now_ns()
    for passed_ns, round_trip_ns, error_ns in steps:
        local.true_ns += passed_ns
        clock.observe(local.now_ns() - round_trip_ns, local.now_ns(), local.server_us() + error_ns // 1_000)
        elapsed = local.now_ns() - before_local
        after = clock.now_ns()
        assert abs((after - before) - elapsed) <= elapsed * MAX_SLEW_PPM // 1_000_000 + 1
        before_local, before = local.now_ns(), after


def test_another_servers_time_is_slewed_to_and_not_stepped() -> None:
    """After a failover only the new server's measurements count, and time goes on without a jump."""
    local = HandClock()
    clock = CommonClock(local)
    measure(clock, local, 0, 0)
    clock.change_server()
    assert clock.synchronised
    before = off_by_ns(clock, local)
    local.true_ns += NS_PER_S
    sent_ns = local.now_ns()
    local.true_ns += 60 * NS_PER_MS  # worse than what was measured before, and all there is
    clock.observe(sent_ns, local.now_ns(), local.server_us() - 30_000 + 4_000)
    assert clock.error_ns == pytest.approx(4 * NS_PER_MS, abs=1_000)
    assert abs(off_by_ns(clock, local) - before) <= 1_060 * NS_PER_MS * MAX_SLEW_PPM // 1_000_000


def test_a_step_takes_the_whole_error_at_once() -> None:
    """While nothing is sent, the clock may jump."""
    local = HandClock()
    clock = CommonClock(local)
    clock.observe(0, 0, 0)
    local.true_ns += NS_PER_S
    clock.observe(local.now_ns(), local.now_ns(), 3_000_000)
    assert clock.error_ns == 2 * NS_PER_S
    clock.step()
    assert clock.error_ns == 0
    assert clock.now_us() == 3_000_000


@given(st.floats(-1e6, 1e6), st.floats(-500, 500), st.integers(0, 10**9 * NS_PER_S // 100))
def test_a_wrong_clock_is_converted_both_ways(offset_s: float, drift_ppm: float, raw_ns: int) -> None:
    """What the kernel's timers are armed with is the moment at which the wrong clock reads that time."""
    clock = LocalClock(offset_s, drift_ppm)
    assert abs(clock.to_raw_ns(clock.from_raw_ns(raw_ns)) - raw_ns) <= 16


def test_a_right_clock_is_the_kernels() -> None:
    """Without an error put on it, the local clock is CLOCK_MONOTONIC."""
    clock = LocalClock()
    assert clock.from_raw_ns(123) == clock.to_raw_ns(123) == 123
    first = clock.now_ns()
    assert clock.now_ns() >= first
