"""The frame ring: cuts, gaps, memory, and equality with a model that is too simple to be wrong."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.schema.frame_entry import Flags, FrameEntry
from worker.fanout.ring import HORIZON_FRAMES, FrameRing, Silence

EPOCH_US = 1_700_000_000_000_000


def entry(term: int, first: int, *packets: str, flags: Flags = Flags.NONE) -> FrameEntry:
    return FrameEntry(term, first, EPOCH_US, 0, 0, [packet.encode() for packet in packets], flags)


def ring(*entries: FrameEntry) -> FrameRing:
    filled = FrameRing()
    for one in entries:
        filled.apply(one)
    return filled


def played(of: FrameRing, start: int, end: int) -> str:
    """One letter per index: the frame, or `_` before the start, `|` paused, `-` a gap, `.` ended, `?` missing."""
    letters = {
        Silence.BEFORE_START: "_",
        Silence.PAUSED: "|",
        Silence.GAP: "-",
        Silence.ENDED: ".",
        Silence.MISSING: "?",
    }
    found = [of.at(index) for index in range(start, end)]
    return "".join(letters[one] if isinstance(one, Silence) else one.decode() for one in found)


def test_an_empty_ring_has_not_started() -> None:
    """Before anything is published there is nothing and nothing is missing."""
    empty = FrameRing()
    assert empty.at(0) is Silence.BEFORE_START
    assert (empty.next_index, empty.epoch_us, len(empty)) == (None, None, 0)


def test_frames_are_played_by_their_index() -> None:
    """An entry's frames have the indices from its first on; what is behind them is missing, before them not started."""
    filled = ring(entry(1, 10, *"abc"), entry(1, 13, *"de"))
    assert played(filled, 8, 17) == "__abcde??"
    assert (filled.next_index, filled.epoch_us, filled.term) == (15, EPOCH_US, 1)


def test_a_higher_term_voids_lower_ones_at_and_above_its_first_index() -> None:
    """A cut replaces what was published from its first index on, and nothing below it."""
    filled = ring(entry(1, 0, *"abcdef"), entry(2, 3, *"XY"))
    assert played(filled, 0, 6) == "abcXY?"
    assert filled.next_index == 5


def test_a_cut_above_all_frames_voids_nothing() -> None:
    """A takeover that goes on later leaves what is there, and the hole is missing."""
    assert played(ring(entry(1, 0, *"ab"), entry(2, 4, *"XY")), 0, 6) == "ab??XY"


def test_a_lower_term_is_refused() -> None:
    """Whoever was replaced cannot come back, whatever index it publishes."""
    filled = ring(entry(2, 0, *"ab"), entry(1, 2, *"xyz"), entry(1, 0, "x"))
    assert played(filled, 0, 4) == "ab??"
    assert filled.refused == 4
    assert filled.term == 2


@pytest.mark.parametrize(
    ("flags", "letter"),
    [(Flags.GAP, "-"), (Flags.PAUSED, "|"), (Flags.ENDED, "."), (Flags.ENDED | Flags.PAUSED, "."), (Flags.NONE, "?")],
)
def test_a_gap_is_told_from_a_hole(flags: Flags, letter: str) -> None:
    """A flagged gap is no underrun; what has no flag is one; an end is an end."""
    assert played(ring(entry(1, 0, *"ab", flags=flags)), 0, 4) == "ab" + letter * 2


def test_a_gap_ends_where_the_next_entry_begins() -> None:
    """After a pause the run goes on; behind what is published then, frames are missing again."""
    filled = ring(entry(1, 0, *"ab", flags=Flags.PAUSED), entry(1, 5, *"cd"))
    assert played(filled, 0, 9) == "ab|||cd??"


def test_a_mark_without_packets_flags_from_its_index_on() -> None:
    """An entry without packets says only what follows; holes before it stay holes."""
    filled = ring(entry(1, 0, *"ab"), entry(1, 4, flags=Flags.ENDED))
    assert played(filled, 0, 7) == "ab??..."
    assert filled.next_index == 2


def test_a_mark_of_a_higher_term_cuts() -> None:
    """A pause voids what was published from its index on, and flags it."""
    filled = ring(entry(1, 0, *"abcdef"), entry(2, 2, flags=Flags.PAUSED))
    assert played(filled, 0, 6) == "ab||||"


def test_a_cut_closes_a_gap_that_is_open() -> None:
    """What is published after a cut counts, and behind it a hole is a hole."""
    filled = ring(entry(1, 0, *"ab", flags=Flags.ENDED), entry(2, 4, *"XY"))
    assert played(filled, 0, 8) == "ab..XY??"


def test_a_cut_voids_gaps_above_it_and_shortens_those_across_it() -> None:
    """Flags of lower terms hold below the cut only."""
    paused = ring(entry(1, 0, *"ab", flags=Flags.PAUSED), entry(1, 8, *"cd", flags=Flags.ENDED))
    paused.apply(entry(2, 4, "X"))
    assert played(paused, 0, 12) == "ab||X???????"


def test_what_is_known_ends_where_there_is_no_frame() -> None:
    """What is missing may still come, and a flagged gap may end at any time."""
    filled = ring(entry(1, 10, *"abc"), entry(1, 15, *"de", flags=Flags.PAUSED))
    assert [filled.known_until(first, 30) for first in (5, 10, 12, 13, 14, 16)] == [5, 12, 12, 13, 16, 16]
    assert filled.known_until(10, 11) == 11


def test_a_cut_is_told_once() -> None:
    """Whoever built ahead has to know from where on that is no more true."""
    filled = ring(entry(1, 10, *"abcdef"))
    assert filled.changed_from is None
    filled.apply(entry(2, 14, *"XY"))
    filled.apply(entry(3, 12, *"Z"))
    assert filled.changed_from == 12


def test_what_was_played_is_forgotten() -> None:
    """Frames before an index go; the rest stays; what is gone is before the start and not missing."""
    filled = ring(entry(1, 0, *"abc", flags=Flags.GAP), entry(1, 5, *"defg"))
    filled.forget_before(6)
    assert len(filled) == 3
    assert played(filled, 0, 10) == "______efg?"


def test_forgetting_bounds_memory() -> None:
    """A run of days, forgotten as it plays, holds what is ahead and no more."""
    filled = FrameRing()
    for number in range(5_000):
        filled.apply(entry(1, number * 6, *"abcde", flags=Flags.GAP))
        filled.forget_before(number * 6 - 60)
    assert len(filled) <= 65
    assert len(filled._gaps) <= 12


def test_an_open_gap_is_never_forgotten() -> None:
    """A broadcast that was paused an hour ago is still paused."""
    filled = ring(entry(1, 0, *"ab", flags=Flags.PAUSED))
    filled.forget_before(100_000)
    assert filled.at(100_001) is Silence.PAUSED


def test_frames_beyond_the_horizon_are_not_kept() -> None:
    """Whatever is published, memory has a bound; as the run plays, the horizon moves on."""
    filled = ring(entry(1, 0, "a"), entry(1, HORIZON_FRAMES - 1, *"bc"))
    assert played(filled, HORIZON_FRAMES - 1, HORIZON_FRAMES + 1) == "b?"
    assert filled.refused == 1
    filled.forget_before(10)
    filled.apply(entry(1, HORIZON_FRAMES + 5, "d"))
    assert filled.at(HORIZON_FRAMES + 5) == b"d"


SIZE: Final = 60


class Model:
    """What each index plays, written down cell by cell."""

    def __init__(self) -> None:
        self.term = 0
        self.floor: int | None = None
        self.cells: list[bytes | Flags | None] = [None] * SIZE

    def apply(self, one: FrameEntry) -> None:
        if one.term < self.term:
            return
        for index in range(one.first_index, SIZE):
            if one.term > self.term or isinstance(self.cells[index], Flags):
                self.cells[index] = None
        self.term = one.term
        self.floor = one.first_index if self.floor is None else self.floor
        for index, packet in enumerate(one.packets, one.first_index):
            self.cells[index] = packet
        if one.flags:
            for index in range(one.next_index, SIZE):
                self.cells[index] = one.flags

    def forget_before(self, index: int) -> None:
        self.cells[:index] = [None] * index
        if self.floor is not None:
            self.floor = max(self.floor, index)

    def at(self, index: int) -> bytes | Silence:
        cell = self.cells[index]
        if isinstance(cell, bytes):
            return cell
        if isinstance(cell, Flags):
            return {Flags.PAUSED: Silence.PAUSED, Flags.ENDED: Silence.ENDED, Flags.GAP: Silence.GAP}[cell]
        return Silence.BEFORE_START if self.floor is None or index < self.floor else Silence.MISSING


@st.composite
def streams(draw: st.DrawFn) -> list[FrameEntry | int]:
    """Entries as encoders publish them, with takeovers and late publishers of old terms; numbers: forget before."""
    steps: list[FrameEntry | int] = []
    term, at = 1, draw(st.integers(0, 10))
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["next", "next", "next", "gap", "cut", "stale", "forget"]))
        if kind == "forget":
            steps.append(draw(st.integers(0, 20)))
            continue
        flags = draw(st.sampled_from([Flags.NONE, Flags.NONE, Flags.PAUSED, Flags.ENDED, Flags.GAP]))
        packets = tuple(f"{len(steps)}.{number}" for number in range(draw(st.integers(0, 4))))
        if kind == "stale" and term > 1:
            steps.append(entry(term - 1, draw(st.integers(0, 40)), *packets, flags=flags))
            continue
        if kind == "gap":
            at += draw(st.integers(1, 5))
        elif kind == "cut":
            term += 1
            at = draw(st.integers(max(0, at - 10), at + 3))
        if at + len(packets) > SIZE - 5:
            break
        one = entry(term, at, *packets, flags=flags)
        steps.append(one)
        at = one.next_index if packets else at + 1  # the stream takes no id twice
    return steps


@settings(max_examples=300)
@given(streams())
def test_the_ring_plays_what_the_model_plays(steps: list[FrameEntry | int]) -> None:
    """Whatever encoders publish in the stream's order, each index not yet played plays what the rules say."""
    filled, model = FrameRing(), Model()
    now = 0
    for step in steps:
        if isinstance(step, int):
            now = max(now, step)
            filled.forget_before(step)
            model.forget_before(step)
        else:
            filled.apply(step)
            model.apply(step)
        assert [filled.at(index) for index in range(now, SIZE)] == [model.at(index) for index in range(now, SIZE)]
        assert len(filled) == sum(isinstance(cell, bytes) for cell in model.cells)
