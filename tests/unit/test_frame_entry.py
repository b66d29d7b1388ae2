"""Frame entries: bytes pinned, round trips, and one error for everything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ErrorCode, ProtocolError
from shared.schema.frame_entry import Flags, FrameEntry, pack, unpack

_flags = st.sampled_from([Flags.NONE, Flags.PAUSED, Flags.ENDED, Flags.GAP, Flags.PAUSED | Flags.GAP])
_entries = st.builds(
    FrameEntry,
    term=st.integers(0, 2**53),
    first_index=st.integers(0, 2**53),
    epoch_us=st.integers(0, (2**64 - 1) // 20_000).map(lambda ticks: ticks * 20_000),
    item=st.integers(0, 2**32 - 1),
    position_samples=st.integers(0, 2**64 - 1),
    packets=st.lists(st.binary(max_size=1_275), max_size=8),
    flags=_flags,
)

ENTRY = FrameEntry(
    term=0x0102,
    first_index=250,
    epoch_us=1_700_000_000_000_000,
    item=7,
    position_samples=240_000,
    packets=[b"\xfc\xaa", b"", b"\xfc"],
    flags=Flags.ENDED,
)
BODY = bytes.fromhex(
    "01"  # version
    "02"  # flags: ended
    "0003"  # count
    "00060a24181e4000"  # epoch_us
    "00000007"  # item
    "000000000003a980"  # position in samples
    "0002fcaa"
    "0000"
    "0001fc"
)  # fmt: skip


def test_the_layout_is_the_agreed_one() -> None:
    """Every byte of the field is where design section 4 puts it, big endian."""
    assert pack(ENTRY) == BODY
    assert unpack("258-250", BODY) == ENTRY


def test_the_id_is_term_and_first_index() -> None:
    """The stream's id carries what the field does not."""
    assert ENTRY.id == "258-250"
    assert ENTRY.next_index == 253


@given(_entries)
def test_a_packed_entry_is_unpacked_as_it_was(entry: FrameEntry) -> None:
    """Every entry survives the stream."""
    assert unpack(entry.id, pack(entry)) == entry


@given(_entries, st.data())
def test_a_truncated_entry_is_refused(entry: FrameEntry, data: st.DataObject) -> None:
    """An entry cut anywhere is a protocol error and no shorter entry."""
    body = pack(entry)
    cut = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(ProtocolError) as caught:
        unpack(entry.id, body[:cut])
    assert caught.value.code == ErrorCode.MALFORMED_MESSAGE


@pytest.mark.parametrize("cut", range(len(BODY)))
def test_every_cut_of_the_agreed_bytes_is_refused(cut: int) -> None:
    """Not one byte may be missing."""
    with pytest.raises(ProtocolError):
        unpack(ENTRY.id, BODY[:cut])


@given(st.binary(max_size=80), st.text(max_size=12) | st.just("5-1"))
def test_garbage_is_a_protocol_error_and_nothing_else(body: bytes, entry_id: str) -> None:
    """Whatever stands in the stream, one entry is skipped."""
    try:
        unpack(entry_id, body)
        refused = None
    except ProtocolError as error:
        refused = error
    assert refused is None or refused.code == ErrorCode.MALFORMED_MESSAGE


@pytest.mark.parametrize("entry_id", ["", "5", "5-", "-5", "a-b", "1-2-3", "*"])
def test_an_id_that_is_no_term_and_index_is_refused(entry_id: str) -> None:
    """Entries that somebody else wrote are no frames."""
    with pytest.raises(ProtocolError):
        unpack(entry_id, BODY)


def test_fields_of_a_later_version_behind_the_packets_are_ignored() -> None:
    """Two versions can run side by side."""
    assert unpack(ENTRY.id, BODY + b"more") == ENTRY


def test_another_layout_version_is_refused() -> None:
    """A layout that is not known is not guessed at."""
    with pytest.raises(ProtocolError, match="version 2"):
        unpack(ENTRY.id, b"\x02" + BODY[1:])


def test_an_epoch_off_the_grid_is_refused() -> None:
    """All runs share one grid of 20 ms."""
    body = bytearray(BODY)
    body[11] += 1
    with pytest.raises(ProtocolError, match="epoch_us"):
        unpack(ENTRY.id, bytes(body))


def test_flags_of_a_later_version_are_kept() -> None:
    """An unknown flag does not make an entry unreadable, and hides no known one."""
    body = bytearray(BODY)
    body[1] = 0x82
    assert Flags.ENDED in unpack(ENTRY.id, bytes(body)).flags
