"""What earlier versions wrote on Redis is read, and what later ones add is passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from coordinator.registry import Registry
from shared.schema import event as events
from shared.schema.job import Job, OpusOptions, SourceSpec, Voice
from shared.schema.records import (
    BroadcastSpec,
    BroadcastStatus,
    GuildSpec,
    GuildStatus,
    GuildWant,
    JobStatus,
    OpusRecord,
    Record,
    SourceRecord,
    SourceWant,
    VoiceRecord,
    WorkerStats,
)
from shared.seal import Seal
from shared.store.client import Store
from shared.store.keys import Keys

PREFIX = "{e2e}"
"""Of the keys of the pool that wrote them."""
WRITTEN = {
    path.stem.removeprefix("records_"): msgspec.json.decode(path.read_bytes())
    for path in sorted(Path(__file__).parent.glob("records_*.json"))
}
POOLS = [
    pytest.param(one[seal], one["seal_key"], id=f"{name}-{seal}")
    for name, one in WRITTEN.items()
    for seal in ("clear", "sealed")
]
by_pool = pytest.mark.parametrize(("pool", "seal_key"), POOLS)


def texts(pool: dict[str, dict[str, dict[str, str]]]) -> list[tuple[type[Record], str]]:
    """Every JSON text of a pool, and as what it is read."""
    found: list[tuple[type[Record], str]] = [(events.Event, one["event"]) for one in pool["event"].values()]
    for kind, spec, status in (("guild", GuildSpec, GuildStatus), ("broadcast", BroadcastSpec, BroadcastStatus)):
        found += [(spec, record["spec"]) for record in pool[kind].values()]
        found += [(status, record["status"]) for record in pool[kind].values() if "status" in record]
    for want in pool["want"].values():
        found += [(SourceWant if name.startswith("broadcast:") else GuildWant, body) for name, body in want.items()]
    found += [(WorkerStats, record["stats"]) for record in pool["worker"].values()]
    return found


def with_more(value: Any) -> Any:
    """The same with a field that nobody knows in every object of it, however deep."""
    if isinstance(value, dict):
        return {name: with_more(inner) for name, inner in value.items()} | {"of_a_later_version": {"deep": [1]}}
    return [with_more(inner) for inner in value] if isinstance(value, list) else value


@by_pool
def test_every_kind_of_record_was_written(pool: dict[str, Any], seal_key: str) -> None:
    """The vectors cover what passes over Redis: a kind that is missing proves nothing."""
    assert {kind for kind, _ in texts(pool)} == {
        *(events.Event, GuildSpec, GuildStatus, BroadcastSpec, BroadcastStatus, SourceWant, GuildWant, WorkerStats)
    }
    assert pool["job"]
    assert pool["dead"]
    voices = [msgspec.json.decode(record["spec"]).get("voice") for record in pool["guild"].values()]
    assert any(voices)
    assert seal_key


@by_pool
def test_what_was_written_means_what_it_meant(pool: dict[str, Any], seal_key: str) -> None:
    """Each text is read, and written again says what it said: no field is lost or got another meaning."""
    assert seal_key
    for kind, text in texts(pool):
        read = msgspec.json.decode(text, type=kind)
        assert msgspec.json.decode(msgspec.json.encode(read)) == msgspec.json.decode(text)


@by_pool
def test_a_field_of_a_later_version_is_passed_over_at_every_depth(pool: dict[str, Any], seal_key: str) -> None:
    """A record with fields that are new, in itself or in what it holds, is read as without them."""
    assert seal_key
    for kind, text in texts(pool):
        longer = msgspec.json.encode(with_more(msgspec.json.decode(text)))
        assert msgspec.json.decode(longer, type=kind) == msgspec.json.decode(text, type=kind)


@by_pool
async def test_a_leader_takes_over_what_stands_there(
    pool: dict[str, Any], seal_key: str, store: Store, keys: Keys
) -> None:
    """Guilds, broadcasts and workers are loaded, credentials opened, and job statuses read."""
    for kind in ("guild", "broadcast", "worker"):
        for name, fields in pool[kind].items():
            key = name.replace(PREFIX, keys.prefix)
            await store.pipeline([("HSET", key, field, value) for field, value in fields.items()])
    for index, kind in ((keys.guilds, "guild"), (keys.broadcasts, "broadcast"), (keys.workers, "worker")):
        await store.pipeline([("SADD", index, name.removeprefix(f"{PREFIX}:{kind}:")) for name in pool[kind]])
    registry = Registry(store, keys)
    await registry.load()
    assert len(registry.guilds) == len(pool["guild"])
    assert len(registry.broadcasts) == len(pool["broadcast"])
    assert {worker.record.role for worker in registry.workers.values()} == {"fanout", "encode"}
    for guild in registry.guilds.values():
        assert guild.status is not None
        if guild.spec.voice is not None:
            seal, of = Seal(seal_key), (guild.spec.bot, guild.spec.guild)
            assert seal.open_voice(seal.seal_anew(guild.spec.voice, *of), *of).session_id
    for fields in pool["job"].values():
        assert msgspec.convert(fields, JobStatus, strict=False).state in ("done", "failed")
    for fields in pool["dead"].values():
        assert {"job", "entry", "code", "message"} <= fields.keys()


async def test_a_state_that_only_the_next_version_knows_does_not_cost_the_guild(store: Store, keys: Keys) -> None:
    """A status that cannot be read is passed over, and what it is of is held on to."""
    spec = '{"bot":"main","guild":"123456789012345678","channel":"223456789012345678","broadcast":"radio"}'
    programme = '{"broadcast":"radio","run":1,"source":{"url":"a"},"opus":{}}'
    status = '{"state":"levitating","at":1}'
    await store.command("HSET", keys.guild("main", "123456789012345678"), "spec", spec, "status", status)
    await store.command("SADD", keys.guilds, "main:123456789012345678")
    await store.command("HSET", keys.broadcast("radio"), "spec", programme, "status", status)
    await store.command("SADD", keys.broadcasts, "radio")
    registry = Registry(store, keys)
    await registry.load()
    assert registry.guilds["main", "123456789012345678"].status is None
    assert registry.broadcasts["radio"].status is None


STRICT = [(SourceSpec, SourceRecord), (OpusOptions, OpusRecord), (Voice, VoiceRecord)]


@pytest.mark.parametrize(("strict", "tolerant"), STRICT, ids=lambda kind: kind.__name__)
def test_a_job_and_its_record_have_the_same_fields(
    strict: type[msgspec.Struct], tolerant: type[msgspec.Struct]
) -> None:
    """What a job may say is kept, under the same name and with the same default."""
    said, kept = ({one.name: one.default for one in msgspec.structs.fields(kind)} for kind in (strict, tolerant))
    assert said == kept


def test_no_record_holds_anything_strict() -> None:
    """One strict structure within a record makes it unreadable for the version before: jobs alone are strict."""
    jobs = set(get_args(Job))
    for kind in Record.__subclasses__():
        if kind in jobs or kind in {strict for strict, _ in STRICT}:
            continue
        _, components = msgspec.json.schema_components([kind])
        for name, definition in components.items():
            assert definition.get("additionalProperties", True) is not False, f"{kind.__name__} holds {name}"
