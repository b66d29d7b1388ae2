"""Records between child and worker: what is packed is unpacked, everything else is refused."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import MalformedPacket
from shared.schema.records import OpusRecord
from worker.encode.records import (
    HEADER_BYTES,
    MAX_BODY_BYTES,
    ChildOrder,
    Kind,
    pack,
    pack_error,
    unpack_error,
    unpack_header,
)


@given(
    kind=st.sampled_from(Kind),
    body=st.binary(max_size=2_000),
    rendition=st.integers(0, 255),
    level_db=st.integers(-128, 127),
    item=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**64 - 1),
)
def test_a_packed_record_is_unpacked_as_it_was(
    kind: Kind, body: bytes, rendition: int, level_db: int, item: int, position: int
) -> None:
    """Every field survives the pipe."""
    record = pack(kind, body, rendition=rendition, level_db=level_db, item=item, position_samples=position)
    header = unpack_header(record[:HEADER_BYTES])
    assert (header.kind, header.item, header.position_samples) == (kind, item, position)
    assert (header.rendition, header.level_db) == (rendition, level_db)
    assert header.length_bytes == len(body)
    assert record[HEADER_BYTES:] == body


def test_layout_is_the_agreed_one() -> None:
    """u8 kind, u8 rendition, i8 level, u16 length, u32 item, u64 position, body, big endian."""
    record = pack(Kind.FRAME, b"ab", rendition=2, level_db=-3, item=3, position_samples=960)
    assert record.hex() == "0102fd00020000000300000000000003c06162"


@given(st.binary(max_size=40))
def test_a_header_of_another_size_or_kind_is_refused(data: bytes) -> None:
    """Bytes that are no header raise MalformedPacket and nothing else."""
    if len(data) == HEADER_BYTES and data[0] in list(Kind):
        return
    with pytest.raises(MalformedPacket):
        unpack_header(data)


@pytest.mark.parametrize(
    ("body_bytes", "item", "position"), [(MAX_BODY_BYTES + 1, 0, 0), (0, 2**32, 0), (0, 0, 2**64), (0, -1, 0)]
)
def test_a_value_that_does_not_fit_its_field_is_refused(body_bytes: int, item: int, position: int) -> None:
    """Nothing is cut off in silence."""
    with pytest.raises(ValueError, match="does not fit"):
        pack(Kind.FRAME, bytes(body_bytes), item=item, position_samples=position)


@given(st.text(), st.text(max_size=60_000))
def test_an_error_always_fits_and_can_be_read(code: str, message: str) -> None:
    """However long and strange the message, the record is whole."""
    code = code.encode("utf-8", "replace").decode()[:40]
    record = pack_error(code, message)
    body = unpack_error(record[HEADER_BYTES:])
    assert unpack_header(record[:HEADER_BYTES]).kind is Kind.ERROR
    assert body.code == code
    assert body.message == message[:2_000].encode("utf-8", "replace").decode()


def test_an_error_that_is_no_json_is_refused() -> None:
    """The worker gets MalformedPacket for the body of a broken child."""
    with pytest.raises(MalformedPacket):
        unpack_error(b"{")


def test_an_order_survives_json_and_refuses_unknown_fields() -> None:
    """Worker and child must be of one version."""
    order = ChildOrder(url="/a", loop=True, start_samples=5, opus=OpusRecord(bitrate=64_000))
    assert msgspec.json.decode(msgspec.json.encode(order), type=ChildOrder) == order
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"url": "/a", "shell": "ls"}', type=ChildOrder)


def test_the_worker_side_imports_no_decoder() -> None:
    """FFmpeg with all its parsers stays out of the process that talks to Redis."""
    program = """
import sys, worker.encode.records, worker.encode.source, worker.encode.resolve
print([name for name in ("av", "numpy", "redis") if name in sys.modules])
"""
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert loaded.stdout.strip() == "[]"
