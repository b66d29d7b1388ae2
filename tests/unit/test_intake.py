"""What of a job may stand among the dead letters: everything but credentials."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.intake import without_credentials

VOICE = {"user_id": "1", "session_id": "SECRET-session", "token": "SECRET-token", "endpoint": "e"}
JOB = {"v": 1, "id": "j", "type": "guild.join", "guild": "5", "voice": VOICE}
DEEP = '{"a":' * 50_000


@pytest.mark.parametrize(
    "job",
    [
        JOB,
        JOB | {"voice": "sealed:SECRET"},
        JOB | {"voice": ["SECRET"]},
        {"id": "j", "token": "SECRET", "session_id": "SECRET"},
        [JOB],
        {"job": JOB},
        {"jobs": [{"inner": JOB}]},
        json.dumps(JOB),
        {"job": json.dumps(JOB)},
    ],
)
def test_json_keeps_its_sense_and_loses_its_secrets(job: Any) -> None:
    """However deep credentials stand in a job, also packed as text, they are taken out."""
    assert "SECRET" not in without_credentials(json.dumps(job))
    assert "SECRET" not in without_credentials(json.dumps(job, indent=2))


def test_all_else_of_a_job_stays() -> None:
    """A dead letter still says what was wrong; of a field that no job has, its name alone."""
    kept = json.loads(without_credentials(json.dumps(JOB | {"broadcast": [1, {"id": None}], "tokn": "a secret"})))
    assert {key: value for key, value in kept.items() if key != "voice"} == {
        "v": 1, "id": "j", "type": "guild.join", "guild": "5", "broadcast": [1, {"id": None}], "tokn": "(removed)",
    }  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(JOB)[:-1],
        json.dumps(JOB) + "}",
        json.dumps(JOB).replace("}}", ""),
        json.dumps(JOB, indent=2)[:-3],
        str(JOB),
        json.dumps(json.dumps(JOB))[:-1],
        '{"token": "SECRET',
        '{"token": "a\\"SECRET"',
        '{"session_id":"SECRET","x":',
        '{"voice":"sealed:SECRET", nonsense',
        '{token: "SECRET"}',
        "{'token': 'SECRET'}",
        '{"token"\n:\n"SECRET",}',
    ],
)
def test_what_is_no_json_loses_its_secrets_too(body: str) -> None:
    """A job with a comma too many, cut off, or printed by another language is the one that lands here."""
    assert "SECRET" not in without_credentials(body)


@pytest.mark.parametrize("scheme", ["http://", "https://", "HTTP://", "http:\\/\\/"])
@pytest.mark.parametrize("end", ["}}", ""])
def test_user_and_password_of_a_url_are_removed(scheme: str, end: str) -> None:
    """What is left says which host it was."""
    body = f'{{"id":"j","type":"broadcast.start","source":{{"url":"{scheme}SECRET:SECRET@host/a?b=c@d"{end}'
    kept = without_credentials(body)
    assert "SECRET" not in kept
    assert "host" in kept


@pytest.mark.parametrize(
    "source",
    [
        {"url": "https://host/a", "headers": {"Authorization": "SECRET"}},
        {"url": "https://host/a?token=SECRET"},
        {"url": "https://host/a?SECRET", "volume": 1},
        {"url": "https://host/a", "header": {"Authorization": "SECRET"}},
        {"url": "https://host/a", "Cookie": "SECRET", "password": "SECRET", "auth": ["SECRET"]},
        {"url": "rtsp://u:SECRET@host/a"},
        {"url": "http://u:SE'SECRET@host/a"},
        {"url": "http://u:SE SECRET@host/a"},
    ],
)
@pytest.mark.parametrize("cut", [0, 1])
def test_what_lets_one_into_a_source_is_removed(source: dict[str, Any], cut: int) -> None:
    """Headers and queries, whether or not the job is JSON."""
    body = json.dumps({"id": "j", "source": source})
    kept = without_credentials(body[: len(body) - cut])
    assert "SECRET" not in kept
    assert "host/a" in kept


@pytest.mark.parametrize(
    "url", ["http://u:p/SECRET@h", "http://u:p#SECRET@h", "icy://u:SECRET?@h", "http://h/?t=a'SECRET"]
)
def test_a_password_may_hold_anything(url: str) -> None:
    """What cannot be told apart is removed."""
    assert "SECRET" not in without_credentials(json.dumps({"source": {"url": url}}))
    assert "SECRET" not in without_credentials(json.dumps({"source": {"url": url}})[:-1])


def test_what_is_no_json_stays_readable() -> None:
    """The rest of a broken job stays."""
    kept = without_credentials('{"id": "j", "guild": "5", "token": "SECRET", "type": "guild.join",}')
    assert '"id": "j"' in kept
    assert '"type": "guild.join"' in kept


@pytest.mark.parametrize("body", ["x" * 100_000, json.dumps({"id": "x" * 100_000}), DEEP])
def test_a_dead_letter_has_a_bound(body: str) -> None:
    """Nobody fills the memory of Redis with what is no job."""
    assert 0 < len(without_credentials(body)) <= 4_096


def test_a_secret_behind_the_bound_does_not_come_back() -> None:
    """What is cut is cut after the secrets are out, so that no half of one is left."""
    for padding in range(4_000, 4_100):
        assert "SECRET" not in without_credentials('{"pad":"' + "x" * padding + '","token":"SECRET-SECRET"')


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_passes(body: str) -> None:
    """Whatever was sent has a dead letter."""
    assert isinstance(without_credentials(body), str)
