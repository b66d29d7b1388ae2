"""Jobs: strict, each mistake named, and nothing but a JobError whatever is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ErrorCode, JobError
from shared.schema.job import (
    BroadcastStart,
    GuildJoin,
    GuildVoice,
    Voice,
    check_sense,
    decode_job,
    digest,
    job_id_of,
    unserved,
)

GUILD = "123456789012345678"
VOICE = {"user_id": GUILD, "session_id": "the-session", "token": "the-token", "endpoint": "voice.example:443"}
JOIN = {"v": 1, "id": "j1", "type": "guild.join", "guild": GUILD, "channel": GUILD, "broadcast": "news"}
START = {"v": 1, "id": "b1", "type": "broadcast.start", "broadcast": "news", "source": {"url": "file:a.flac"}}


def text(job: dict[str, Any], **changes: Any) -> str:
    return json.dumps(job | changes)


def without(job: dict[str, Any], name: str) -> str:
    return json.dumps({key: value for key, value in job.items() if key != name})


def refusal(body: str) -> JobError:
    with pytest.raises(JobError) as caught:
        decode_job(body)
    return caught.value


def test_a_job_is_read_with_its_defaults() -> None:
    """What was not said has the default of the contract."""
    job = decode_job(text(JOIN, voice=VOICE))
    assert isinstance(job, GuildJoin)
    assert (job.bot, job.on_kick, job.speaking) == ("main", "stay_out", ("microphone",))
    assert isinstance(job.voice, Voice)
    start = decode_job(text(START))
    assert isinstance(start, BroadcastStart)
    assert (start.opus.bitrate, start.opus.vbr, start.source.lead_ms) == (96_000, True, None)
    assert [start.source.lead_ms_of(live=live) for live in (False, True)] == [30_000, 1_000]


@pytest.mark.parametrize("name", ["guild", "channel", "broadcast", "id", "v"])
def test_a_missing_field_is_named(name: str) -> None:
    """A job without a field that it must have fails, and the message names the field."""
    error = refusal(without(JOIN, name))
    assert error.code == ErrorCode.JOB_INVALID
    assert f"`{name}`" in error.message


def test_a_missing_type_is_named() -> None:
    """A job that does not say what it is fails, and the message says so."""
    assert "`type`" in refusal(without(JOIN, "type")).message


@pytest.mark.parametrize("job", [JOIN, START])
def test_an_extra_field_is_named(job: dict[str, Any]) -> None:
    """A field that the contract does not know is a mistake, not an extension."""
    error = refusal(text(job, volume=3))
    assert error.code == ErrorCode.JOB_INVALID
    assert "`volume`" in error.message


def test_an_extra_field_of_an_inner_record_is_named_with_its_place() -> None:
    """Inner records are as strict as jobs."""
    error = refusal(text(START, source={"url": "file:a", "volume": 1}))
    assert "`volume`" in error.message
    assert "source" in error.message


def test_an_unknown_type_is_named_with_the_known_ones() -> None:
    """The message says what was asked for and what there is."""
    error = refusal(text(JOIN, type="guild.dance"))
    assert error.code == ErrorCode.JOB_INVALID
    assert "type" in error.message
    assert "'guild.dance'" in error.message
    assert "guild.join" in error.message


@pytest.mark.parametrize(
    "body",
    [
        '{"v":1,"id":"a","type":5}',
        '{"v":1,"id":"a","type":["guild.join"]}',
        '{"v":1,"id":"a","type":null}',
        '{"v":1,"id":7,"type":"guild.dance"}',
        '{"v":1,"id":{},"type":"guild.dance"}',
    ],
)
def test_a_head_of_the_wrong_kind_is_a_job_error(body: str) -> None:
    """An id or a type that is no text fails its own job and nothing else."""
    assert refusal(body).code == ErrorCode.JOB_INVALID


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"type":'])
def test_a_job_too_deep_to_read_is_a_job_error(opening: str) -> None:
    """Nesting without end fails its own job and nothing else."""
    body = opening * 100_000
    assert refusal(body).code == ErrorCode.JOB_UNREADABLE
    assert job_id_of(body) is None
    assert len(digest(body)) == 64


@pytest.mark.parametrize(
    "value",
    [
        int(GUILD),
        "123",
        "abc",
        "0123456789012345678",
        "-12345678901234567",
        "1" * 21,
        GUILD + "\n",
        " " + GUILD,
        "١٢٣٤٥٦٧٨٩٠١٢٣٤٥٦٧٨",
        "",
        None,
    ],
)
def test_a_wrong_snowflake_is_named(value: object) -> None:
    """Discord ids are decimal strings of 15 to 20 digits, nothing before or after them."""
    error = refusal(text(JOIN, guild=value))
    assert error.code == ErrorCode.JOB_INVALID
    assert "`guild`" in error.message


@pytest.mark.parametrize("value", ["", "-a", "a b", "a/b", "a:b", "{a}", "x" * 65, "news\n"])
def test_a_wrong_name_is_named(value: str) -> None:
    """Names of broadcasts go into keys: letters, digits, dot, dash, underscore."""
    assert "`broadcast`" in refusal(text(START, broadcast=value)).message


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("opus.bitrate", {"opus": {"bitrate": 15_999}}),
        ("opus.bitrate", {"opus": {"bitrate": 512_001}}),
        ("opus.expected_loss", {"opus": {"expected_loss": 101}}),
        ("source.lead_ms", {"source": {"url": "a", "lead_ms": 199}}),
        ("source.url", {"source": {"url": ""}}),
        ("v", {"v": 2}),
        ("at", {"at": -1}),
        ("id", {"id": ""}),
        ("id", {"id": "i" * 129}),
    ],
)
def test_a_value_out_of_bounds_is_named(field: str, changes: dict[str, Any]) -> None:
    """Bounds of the contract hold, and the message names the field with its place."""
    assert f"`{field}`" in refusal(text(START, **changes)).message


WRONG_ENDPOINTS = (
    *("", "http://voice", "wss://voice:443", "voice example", "voice\n", "voice/..", "../", "@host", "-voice"),
    *("voice:", ":443", "voice:0", "voice:99999", "voice:443:1", "::1", "[::1", "voice..example", "a." * 130 + "a"),
)


@pytest.mark.parametrize("endpoint", WRONG_ENDPOINTS)
def test_a_wrong_endpoint_is_refused(endpoint: str) -> None:
    """An endpoint is a host with or without a port, and no URL; the message says so, and shows no pattern."""
    message = refusal(text(JOIN, voice=VOICE | {"endpoint": endpoint})).message
    assert message == "Expected a host, or host:port with a port of 1 to 65535 - at `voice.endpoint`"


@pytest.mark.parametrize("endpoint", ["c-fra06-1.discord.media:8443", "voice.example", "127.0.0.1:1", "[::1]:65535"])
def test_an_endpoint_is_read(endpoint: str) -> None:
    """As Discord gives it, a host and a port; without one it is 443."""
    job = decode_job(text(JOIN, voice=VOICE | {"endpoint": endpoint}))
    assert isinstance(job, GuildJoin)
    assert isinstance(job.voice, Voice)
    assert job.voice.endpoint == endpoint


def test_at_least_one_speaking_flag_is_needed() -> None:
    """Clients ignore sound that was announced with none."""
    assert "`speaking`" in refusal(text(JOIN, speaking=[])).message


def test_wrong_credentials_are_not_told() -> None:
    """A message about credentials that are wrong does not repeat them."""
    message = refusal(text(JOIN, voice=VOICE | {"endpoint": "http://the-token", "session_id": 5})).message
    assert "the-token" not in message


@pytest.mark.parametrize("body", ["", "nonsense", "{", "[]", '"text"', "5", "null", '{"a":1}x', '{"id":"\\ud800"}'])
def test_what_is_no_json_object_is_unreadable(body: str) -> None:
    """Bytes that are no JSON object have a code of their own."""
    assert refusal(body).code == ErrorCode.JOB_UNREADABLE


@pytest.mark.parametrize("source", [{}, {"url": "a", "playlist": ["b"]}, {"playlist": []}])
def test_a_source_is_one_url_or_a_playlist(source: dict[str, Any]) -> None:
    """None of the two is no source, both is no clear one."""
    with pytest.raises(JobError, match="source") as caught:
        check_sense(decode_job(text(START, source=source)))
    assert caught.value.code == ErrorCode.JOB_INVALID


@pytest.mark.parametrize("source", [{"url": "a"}, {"playlist": ["a", "b"]}])
def test_a_source_with_one_of_the_two_is_fine(source: dict[str, Any]) -> None:
    """One of the two is a source."""
    check_sense(decode_job(text(START, source=source)))


def test_constant_bit_rate_ends_earlier_than_variable() -> None:
    """libopus takes 512000 with variable bit rate only."""
    check_sense(decode_job(text(START, opus={"bitrate": 512_000})))
    with pytest.raises(JobError, match=r"opus\.bitrate"):
        check_sense(decode_job(text(START, opus={"bitrate": 512_000, "vbr": False})))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("at", {"at": 1}),
        ("source.playlist", {"source": {"playlist": ["a"]}}),
        ("source.shuffle", {"source": {"url": "a", "shuffle": True}}),
        ("source.seed", {"source": {"url": "a", "seed": 0}}),
        ("source.crossfade_ms", {"source": {"url": "a", "crossfade_ms": 1}}),
        ("source.gain_db", {"source": {"url": "a", "gain_db": -3}}),
        ("source.loudness_lufs", {"source": {"url": "a", "loudness_lufs": -16}}),
        ("source.fallback", {"source": {"url": "a", "fallback": ["b"]}}),
        ("opus.ladder", {"opus": {"ladder": [64_000]}}),
    ],
)
def test_a_field_not_served_yet_is_named(field: str, changes: dict[str, Any]) -> None:
    """A well-formed wish that cannot be met is never met half."""
    assert unserved(decode_job(text(START, **changes))) == field


def test_asking_for_the_default_of_an_unserved_field_is_served() -> None:
    """Saying what holds anyway is no wish."""
    source = {"url": "a", "shuffle": False, "gain_db": 0, "crossfade_ms": 0, "fallback": []}
    assert unserved(decode_job(text(START, source=source, opus={"ladder": []}))) is None
    assert unserved(decode_job(text(JOIN, on_kick="stay_out"))) is None


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("broadcast.pause", {"broadcast": "news"}),
        ("guild.tune", {"guild": GUILD, "broadcast": "news"}),
        ("announce.cancel", {"announce": "a"}),
        ("worker.drain", {"worker": "w"}),
    ],
)
def test_a_type_not_served_yet_is_named(kind: str, fields: dict[str, Any]) -> None:
    """Types of the contract are read before they are served."""
    assert unserved(decode_job(json.dumps({"v": 1, "id": "x", "type": kind} | fields))) == f"type: {kind}"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("broadcast.start", {"broadcast": "news", "source": {"url": "a"}}),
        ("broadcast.stop", {"broadcast": "news", "leave": True}),
        ("guild.join", {"guild": GUILD, "channel": GUILD, "broadcast": "news", "voice": "sealed:abc"}),
        ("guild.voice", {"guild": GUILD, "channel": GUILD, "voice": VOICE}),
        ("guild.leave", {"guild": GUILD}),
    ],
)
def test_the_served_types_are_served(kind: str, fields: dict[str, Any]) -> None:
    """The five jobs of this version pass."""
    assert unserved(decode_job(json.dumps({"v": 1, "id": "x", "type": kind} | fields))) is None


def test_credentials_are_not_in_a_representation() -> None:
    """A job that lands in a log or a traceback shows no token and no session."""
    job = decode_job(
        json.dumps({"v": 1, "id": "x", "type": "guild.voice", "guild": GUILD, "channel": GUILD} | {"voice": VOICE})
    )
    assert isinstance(job, GuildVoice)
    assert "the-token" not in repr(job)
    assert "the-session" not in repr(job)


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def _shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shuffled(inner) for key, inner in reversed(value.items())}
    return [_shuffled(inner) for inner in value] if isinstance(value, list) else value


@given(_json)
def test_the_digest_is_of_what_is_said(value: Any) -> None:
    """Order of fields and spaces between them make no other job."""
    assert digest(json.dumps(value)) == digest(json.dumps(_shuffled(value), indent=3, ensure_ascii=False))


def test_another_value_or_order_of_a_list_is_another_digest() -> None:
    """What says something else is another job."""
    bodies = ['{"a":[1,2]}', '{"a":[2,1]}', '{"a":[1,2],"b":1}', '{"a":"1"}', '{"a":1}', "garbage", "garbage ", "{"]
    assert len({digest(body) for body in bodies}) == len(bodies)


_near = st.fixed_dictionaries(
    {},
    optional={
        "v": st.just(1) | _json,
        "id": st.just("a") | _json,
        "type": st.sampled_from(["guild.join", "broadcast.start", "guild.voice", "announce", "nope"]) | _json,
        "guild": st.just(GUILD) | _json,
        "channel": st.just(GUILD) | _json,
        "broadcast": st.just("news") | _json,
        "source": st.just({"url": "a"}) | _json,
        "voice": st.just(VOICE) | _json,
    },
)
_typeable = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@given(_typeable | _near.map(json.dumps) | _json.map(json.dumps) | _near.map(lambda job: json.dumps(job)[:-2]))
def test_garbage_raises_a_job_error_and_nothing_else(body: str) -> None:
    """Whatever is sent, one job fails; the coordinator lives."""
    assert job_id_of(body) is None or 0 < len(str(job_id_of(body))) <= 128
    assert len(digest(body)) == 64
    try:
        job = decode_job(body)
        unserved(job)
        check_sense(job)
        refused = None
    except JobError as error:
        refused = error
    assert refused is None or refused.code in (ErrorCode.JOB_INVALID, ErrorCode.JOB_UNREADABLE)


@pytest.mark.parametrize(
    ("body", "job_id"),
    [
        ('{"id":"a","type":"nope","more":1}', "a"),
        ('{"id":"a","type":5}', "a"),
        ('{"id":5}', None),
        ('{"id":""}', None),
        (json.dumps({"id": "i" * 129}), None),
        ('{"type":"guild.join"}', None),
        ("no json", None),
        ("[]", None),
    ],
)
def test_the_id_of_a_wrong_job_is_found_where_there_is_one(body: str, job_id: str | None) -> None:
    """A job that is wrong otherwise is reported under the id its sender chose."""
    assert job_id_of(body) == job_id
