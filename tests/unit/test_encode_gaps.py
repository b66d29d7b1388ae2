"""Holes between frames: kept as time where time stamps tell of them, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from worker.encode.gaps import Gaps

FRAME_S = 0.02
FRAMES = 5_000
MOST_S = 60.0


def filled(begins: list[float | None]) -> float:
    """Silence in front of all frames."""
    gaps = Gaps(MOST_S)
    return sum(gaps.before(begin_s, FRAME_S) for begin_s in begins)


def stamps(of: Callable[[float], float | None]) -> list[float | None]:
    return [of(k * FRAME_S) for k in range(FRAMES)]


NO_HOLES: dict[str, Callable[[float], float | None]] = {
    "as they should be": lambda s: s,
    "beginning anywhere": lambda s: s + 5e4,
    "rounded to milliseconds": lambda s: round(s, 3),
    "rounded to a packet of five": lambda s: s // 0.1 * 0.1,
    "jittering": lambda s: s + 0.04 * (s * 7 % 1 - 0.5),
    "of a fast clock": lambda s: s * 1.0005,
    "of a slow clock": lambda s: s * 0.9995,
    "none": lambda _: None,
    "one in ten": lambda s: s if round(s / FRAME_S) % 10 == 0 else None,
    "jumping back": lambda s: s % 10,
    "jumping far": lambda s: s + s // 10 * 3_600,
    "wrapping as MPEG-TS does": lambda s: (s + 95_400) % 95_443.7,
}


@pytest.mark.parametrize("of", NO_HOLES.values(), ids=NO_HOLES)
def test_time_stamps_that_tell_of_no_hole_make_none(of: Callable[[float], float | None]) -> None:
    """Jitter, rounding, another clock, or a jump: what follows is heard at once."""
    assert filled(stamps(of)) == 0


@pytest.mark.parametrize("hole_s", [0.12, 0.4, 4.0, 59.0])
@pytest.mark.parametrize("clock", [1.0, 1.0005, 0.9995])
def test_a_hole_is_as_long_as_it_was(hole_s: float, clock: float) -> None:
    """Three holes of a kind, each told once, also where the clock is another one."""
    begins = stamps(lambda s: clock * (s + sum(s > at_s for at_s in (20, 50, 80)) * hole_s))
    assert filled(begins) == pytest.approx(3 * hole_s * clock, abs=0.03)


def test_packets_lost_here_and_there_cost_no_time_in_the_end() -> None:
    """Each hole is too small to be heard as one; together they are not closed up."""
    begins = [k * FRAME_S for k in range(FRAMES) if k % 10]
    lost_s = FRAMES * FRAME_S - len(begins) * FRAME_S
    made_up_s = 0.005 * len(begins) * FRAME_S
    assert filled([*begins]) == pytest.approx(lost_s - made_up_s, abs=0.2)


def test_frames_without_time_stamps_do_not_hide_a_hole() -> None:
    """They are counted, and the next stamp tells."""
    assert filled([0.0, None, None, 0.06, 1.08, None]) == pytest.approx(1.0)
