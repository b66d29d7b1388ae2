"""Close codes of the voice gateway."""

from __future__ import annotations

import pytest

from shared.protocol.close_codes import CLOSE_CODES, Action, action_for


@pytest.mark.parametrize(
    ("codes", "action"),
    [
        ((None, 1001, 1006, 1011, 3999, 4013, 4015), Action.RESUME),
        ((1000, 4004, 4005, 4006, 4009), Action.NEW_CREDENTIALS),
        ((4014, 4022), Action.WAIT),
        ((4001, 4002, 4003, 4011, 4020), Action.FIX_ONCE),
        ((4012, 4016, 4017, 4021), Action.STOP),
        ((4000, 4007, 4099, 4999), Action.NEW_CREDENTIALS),
    ],
)
def test_every_code_has_one_action(codes: tuple[int | None, ...], action: Action) -> None:
    """Network trouble resumes, known codes follow the table, unknown voice codes ask for new credentials."""
    assert {action_for(code) for code in codes} == {action}


def test_a_refused_resume_does_not_resume_again() -> None:
    """4006 answers a resume that came too late: resuming again would loop."""
    assert action_for(4006) is not Action.RESUME


def test_names_are_distinct() -> None:
    """A name in a log stands for one code."""
    names = [row.name for row in CLOSE_CODES.values()]
    assert len(set(names)) == len(names)
