"""`guildcast schema`: one document that a user of another language can work from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import msgspec

from shared.cli.schema import schema
from shared.schema.event import EventType
from shared.schema.job import Job

TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}
JOBS = {str(kind.__struct_config__.tag): kind for kind in get_args(Job)}


def document() -> dict[str, Any]:
    """The document as it is printed."""
    loaded: dict[str, Any] = json.loads(msgspec.json.encode(schema()))
    return loaded


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    """All objects of the document."""
    if isinstance(node, dict):
        yield node
        for inner in node.values():
            yield from nodes(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from nodes(inner)


def job_definitions() -> dict[str, dict[str, Any]]:
    return {
        tag: definition
        for definition in document()["$defs"].values()
        for tag in definition.get("properties", {}).get("type", {}).get("enum", ())
        if tag in JOBS
    }


def test_every_record_stands_in_it() -> None:
    """All that passes over Redis is described."""
    assert set(document()["records"]) == {
        *("job", "job_status", "event", "guild_spec", "guild_status", "guild_want"),
        *("broadcast_spec", "broadcast_status", "source_want", "worker", "frame_entry"),
    }


def test_every_reference_leads_somewhere() -> None:
    """The document is whole."""
    found = document()
    references = [node["$ref"] for node in nodes(found) if isinstance(node.get("$ref"), str)]
    assert references
    for reference in references:
        assert reference.startswith("#/$defs/")
        assert reference.removeprefix("#/$defs/") in found["$defs"]


def test_it_is_json_schema() -> None:
    """It says which, its types are those of JSON Schema, and every required field is described."""
    found = document()
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for definition in found["$defs"].values():
        assert definition["type"] == "object"
        assert set(definition.get("required", ())) <= set(definition["properties"])
        for field in nodes(list(definition["properties"].values())):
            if isinstance(field.get("type"), str):
                assert field["type"] in TYPES
            if isinstance(field.get("pattern"), str):
                re.compile(field["pattern"])


def test_every_job_stands_in_it_and_forbids_extra_fields() -> None:
    """Jobs are strict, and the schema says so, inner records included."""
    found = document()
    definitions = job_definitions()
    assert set(definitions) == set(JOBS)
    for definition in definitions.values():
        assert definition["additionalProperties"] is False
        assert {"v", "id", "type"} <= set(definition["required"])
    for name in ("SourceSpec", "OpusOptions", "Voice", "AnnounceTo"):
        assert found["$defs"][name]["additionalProperties"] is False


def test_records_other_than_jobs_allow_fields_of_later_versions() -> None:
    """Everything but jobs ignores what it does not know."""
    found = document()
    for name in ("Event", "GuildSpec", "GuildStatus", "BroadcastStatus", "WorkerRecord", "GuildWant", "JobStatus"):
        assert found["$defs"][name].get("additionalProperties", True) is True


def test_every_type_of_event_stands_in_it() -> None:
    """A reader can know all events before it sees one."""
    assert set(document()["$defs"]["Event"]["properties"]["type"]["enum"]) == set(get_args(EventType))


def test_limits_of_the_contract_stand_in_it() -> None:
    """A sender can check a job before it sends it."""
    definitions = document()["$defs"]
    bitrate = definitions["OpusOptions"]["properties"]["bitrate"]
    assert (bitrate["minimum"], bitrate["maximum"], bitrate["default"]) == (16_000, 512_000, 96_000)
    pattern = definitions["GuildJoin"]["properties"]["guild"]["pattern"]
    assert re.search(pattern, "123456789012345678")
    assert not re.search(pattern, "12345")
