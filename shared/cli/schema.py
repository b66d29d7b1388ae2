"""JSON Schema of everything that passes over Redis, for users in other languages."""

from __future__ import annotations

from typing import Any

import msgspec

from shared.schema.event import Event
from shared.schema.job import Job
from shared.schema.records import (
    BroadcastSpec,
    BroadcastStatus,
    GuildSpec,
    GuildStatus,
    GuildWant,
    JobStatus,
    SourceWant,
    WorkerRecord,
)

_RECORDS: dict[str, Any] = {
    "job": Job,
    "job_status": JobStatus,
    "event": Event,
    "guild_spec": GuildSpec,
    "guild_status": GuildStatus,
    "guild_want": GuildWant,
    "broadcast_spec": BroadcastSpec,
    "broadcast_status": BroadcastStatus,
    "source_want": SourceWant,
    "worker": WorkerRecord,
}

_FRAME_ENTRY = {
    "title": "frame_entry",
    "description": (
        "Binary field `f` of an entry of a frame stream, big endian: u8 version (1), u8 flags (1 paused, 2 ended, "
        "4 gap follow the last frame), u16 count, u64 epoch_us (a multiple of 20000), u32 item, u64 position_samples, "
        "then count times u16 length and that many bytes of one 20 ms Opus packet. "
        "The entry's id is <term>-<index of the first frame>."
    ),
    "type": "string",
    "contentEncoding": "binary",
}


def schema() -> dict[str, Any]:
    """One document: a definition per record, and all that they refer to."""
    schemas, components = msgspec.json.schema_components(_RECORDS.values(), ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "guildcast records on Redis",
        "version": 1,
        "records": dict(zip(_RECORDS, schemas, strict=True)) | {"frame_entry": _FRAME_ENTRY},
        "$defs": components,
    }
