"""Records on Redis: what is written is read, and what a later version adds is ignored."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shared.schema.records import (
    BroadcastSpec,
    BroadcastStatus,
    GuildSpec,
    GuildStatus,
    GuildWant,
    JobStatus,
    OpusRecord,
    SourceRecord,
    SourceWant,
    VoiceRecord,
    WorkerRecord,
    WorkerStats,
)

GUILD = "123456789012345678"
VOICE = VoiceRecord(user_id=GUILD, session_id="s", token="t", endpoint="voice.example:443")
GUILD_SPEC = GuildSpec(bot="main", guild=GUILD, channel=GUILD, broadcast="news", voice=VOICE, job="j")
BROADCAST_SPEC = BroadcastSpec(
    broadcast="news", run=5, source=SourceRecord(url="file:a"), opus=OpusRecord(bitrate=64_000)
)
RECORDS = [
    GUILD_SPEC,
    msgspec.structs.replace(GUILD_SPEC, voice="sealed:abc", speaking=("priority", "microphone"), on_kick="rejoin"),
    msgspec.structs.replace(GUILD_SPEC, voice=None),
    GuildStatus(state="failed", at=1, worker="w", slot=0, code="voice_closed", message="m", close_code=4006),
    GuildStatus(state="failed", at=1, retry_at=5, final=True),
    GuildStatus(
        state="alone", at=1, listeners=0, dave_protocol_version=1, privacy_code="12345", mls_epoch=2,
        gateway_version=8, backend_version="0.11.0/0.4.9",
    ),
    BROADCAST_SPEC,
    BroadcastStatus(state="playing", at=2, epoch_us=20_000, encodes=1),
    WorkerRecord(
        id="h-fanout-0-ab", name="h-fanout-0", role="fanout", host="h", capacity=9, headroom=4,
        stats=WorkerStats(guilds=5, lateness_p999_us=300), gone=True,
    ),
    GuildWant(generation=7, spec=GUILD_SPEC),
    SourceWant(generation=8, term=9, spec=BROADCAST_SPEC, stop=True),
    JobStatus(state="failed", at=3, code="job_invalid", message="guild"),
]  # fmt: skip
by_name = pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)


@by_name
def test_a_record_is_read_as_it_was_written(record: msgspec.Struct) -> None:
    """Every record survives Redis."""
    assert msgspec.json.decode(msgspec.json.encode(record), type=type(record)) == record


@by_name
def test_a_field_of_a_later_version_is_ignored(record: msgspec.Struct) -> None:
    """Two versions can run side by side."""
    fields: dict[str, Any] = msgspec.to_builtins(record)
    body = msgspec.json.encode(fields | {"of_a_later_version": {"deep": [1]}})
    assert msgspec.json.decode(body, type=type(record)) == record


@by_name
def test_defaults_are_not_written(record: msgspec.Struct) -> None:
    """A record says what is, not what is not: defaults may be added later without a rewrite."""
    written = set(msgspec.to_builtins(record))
    for field in msgspec.structs.fields(record):
        if field.default is not msgspec.NODEFAULT and getattr(record, field.name) == field.default:
            assert field.name not in written


@by_name
def test_a_record_does_not_change(record: msgspec.Struct) -> None:
    """Records are values: a change makes another one."""
    with pytest.raises(AttributeError):
        setattr(record, msgspec.structs.fields(record)[0].name, None)


@pytest.mark.parametrize(
    "kind", [GuildSpec, GuildStatus, BroadcastSpec, WorkerRecord, GuildWant, SourceWant, JobStatus]
)
def test_a_record_without_what_it_must_have_is_refused(kind: type[msgspec.Struct]) -> None:
    """Half a record is none."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b"{}", type=kind)


def test_credentials_of_a_spec_are_not_in_its_representation() -> None:
    """A spec that lands in a log shows no token and no session."""
    secret = VoiceRecord(user_id=GUILD, session_id="the-session", token="the-token", endpoint="e")
    shown = repr(msgspec.structs.replace(GUILD_SPEC, voice=secret))
    assert "the-session" not in shown
    assert "the-token" not in shown
