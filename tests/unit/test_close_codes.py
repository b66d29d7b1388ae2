"""Close codes of the voice gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.protocol import close_codes
from shared.protocol.close_codes import CLOSE_CODES, Action, action_for, close_code_table


@pytest.mark.parametrize(
    ("codes", "action"),
    [
        ((None, 1000, 1001, 1006, 1011, 3999, 4013, 4015), Action.RESUME),
        ((4004, 4005, 4006, 4009), Action.NEW_CREDENTIALS),
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


def test_codes_that_looping_would_make_worse_are_never_tried_again() -> None:
    """Missing end-to-end encryption cannot appear by itself, and a rate limit grows with every try."""
    assert {code for code, row in CLOSE_CODES.items() if row.action is Action.STOP} == {4012, 4016, 4017, 4021}


def test_the_page_holds_the_table_of_the_code() -> None:
    """What is written is what is done."""
    page = Path(close_codes.__file__).with_name("CLOSE_CODES.md").read_text()
    assert page[page.index("| code |") :] == close_code_table()
    assert all(f"* `{action}`:" in page for action in Action)


def test_the_table_says_for_every_code_what_follows() -> None:
    """One row for each code, one for the network's and one for those of a later day."""
    rows = [row.strip("| \n").split(" | ") for row in close_code_table().splitlines()[2:]]
    assert [row[0] for row in rows] == [*map(str, CLOSE_CODES), "none, other below 4000", "other"]
    follows = {row[0]: (row[3], row[4]) for row in rows}
    assert follows["4001"] == ("`fix_once`", "`stop`")
    assert follows["4015"] == ("`resume`", "a fresh Identify, then `new_credentials`")
    assert follows["4017"] == ("`stop`", "not tried again")
    assert follows["none, other below 4000"][0] == f"`{action_for(None)}`" == f"`{action_for(1006)}`"
    assert follows["other"][0] == f"`{action_for(4999)}`"
