"""How much silence listeners heard: what was missing between sounds, between sessions, and at the end."""

from __future__ import annotations

from typing import Any

import pytest

from shared.cli.silence import silence_heard

S = 1_000_000_000
"""Nanoseconds."""


def session(first_s: float, last_s: float, silent_ticks: int = 0) -> dict[str, Any]:
    sound = {"first_sound_ns": round(first_s * S), "last_sound_ns": round(last_s * S)}
    return sound | {"silent_ticks": silent_ticks}


MUTE: dict[str, Any] = {"first_sound_ns": None, "last_sound_ns": None, "silent_ticks": 0}


def row(*sessions: dict[str, Any], guild: str = "g", sampled: bool = True) -> dict[str, Any]:
    return {"guild": guild, "sampled": sampled, "sessions": list(sessions)}


@pytest.mark.parametrize(
    ("sessions", "until_s", "share"),
    [
        ([session(1, 11)], 11.05, 0.0),
        ([session(1, 11, silent_ticks=100)], 11.0, 0.2),
        ([session(1, 6)], 11.06, 0.5),
        ([session(1, 6), session(8.02, 11)], 11.0, 0.2),
        ([MUTE, session(1, 11, silent_ticks=50), MUTE], 11.0, 0.1),
        ([session(1, 6, silent_ticks=25)], None, 0.1),
    ],
    ids=["whole", "holes", "dead at the end", "between sessions", "sessions without sound", "a programme that ended"],
)
def test_silence_is_what_was_missing(sessions: list[dict[str, Any]], until_s: float | None, share: float) -> None:
    """Of all the time since the first sound."""
    found = silence_heard([row(*sessions)], None if until_s is None else round(until_s * S))
    assert found.share == pytest.approx(share, abs=0.003)
    assert found.worst_share == pytest.approx(share, abs=0.003)


def test_one_guild_of_many_does_not_stand_for_all() -> None:
    """The share is that of all; the worst guild is named beside it."""
    rows = [row(session(1, 11), guild=str(number)) for number in range(99)]
    rows.append(row(session(1, 6), guild="dead"))
    found = silence_heard(rows, round(11.06 * S))
    assert found.share == pytest.approx(0.005, abs=0.0005)
    assert (found.worst_guild, found.is_too_much) == ("dead", False)
    assert silence_heard(rows[90:], round(11.06 * S)).is_too_much


def test_guilds_that_are_not_looked_into_say_nothing() -> None:
    """Silence is told from quiet sound by what is in a packet; and who heard nothing at all is told elsewhere."""
    assert silence_heard([row(session(1, 2), sampled=False), row(MUTE), row()], 100 * S).share == 0
