"""The replay window: each sequence once, whatever the order, over wraps and new starts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.voice.receive.replay import MAX_AHEAD_PACKETS, WINDOW_PACKETS, ReplayWindow


def filled(*sequences: int) -> ReplayWindow:
    window = ReplayWindow()
    for sequence in sequences:
        assert window.accept(sequence) is not None
    return window


@pytest.mark.parametrize("first", [0, 1, 40_000, 65_535])
def test_the_index_counts_packets_over_the_wrap(first: int) -> None:
    """Each packet's index is one more, also where its 16 bits begin again."""
    window = ReplayWindow()
    indices = [window.accept((first + number) % 65_536) for number in range(70_000)]
    start = indices[0]
    assert start is not None
    assert indices == list(range(start, start + 70_000))


def test_a_packet_is_taken_once() -> None:
    """A copy is seen before it is decrypted, and not taken when it is."""
    window = filled(10, 11, 13)
    for sequence in (10, 11, 13):
        assert window.seen(sequence)
        assert window.accept(sequence) is None
    assert not window.seen(12)
    assert window.accept(12) is not None
    assert window.seen(12)


def test_packets_sent_before_the_first_one_received_may_come_after_it() -> None:
    """What overtakes at the very start loses nobody its place."""
    window = ReplayWindow()
    first, earlier = window.accept(3), window.accept(65_534)
    assert first is not None
    assert earlier == first - 5


@pytest.mark.parametrize(
    ("sequence", "taken"),
    [
        (1_000 - WINDOW_PACKETS, False),
        (1_001 - WINDOW_PACKETS, True),
        (1_000 + MAX_AHEAD_PACKETS, True),
        (1_001 + MAX_AHEAD_PACKETS, False),
        (1_000 + 32_768, False),
    ],
)
def test_what_is_too_far_away_is_not_taken(sequence: int, taken: bool) -> None:
    """The window and a minute of loss are the limits."""
    window = filled(1_000)
    assert not window.seen(sequence)
    assert (window.accept(sequence) is not None) is taken


@pytest.mark.parametrize("restart", [1_000 - 20_000 + 65_536, 1_000 + 20_000])
def test_a_sender_that_starts_anew_is_followed_by_its_second_packet(restart: int) -> None:
    """Two packets in a row elsewhere move the window; the index grows all the same, and old copies stay out."""
    window = filled(1_000)
    assert window.accept(restart) is None
    index = window.accept(restart + 1)
    assert index is not None
    assert index > 65_536 + 1_000
    assert window.accept(restart + 1) is None
    assert window.accept(1_001) is None


def test_a_single_stray_moves_nothing() -> None:
    """One packet from far away, between packets of the stream, is refused each time."""
    window = filled(1_000)
    for number in range(1, 50):
        assert window.accept(30_000 + number) is None
        assert window.accept(1_000 + number) is not None


@given(st.integers(0, 65_535), st.lists(st.integers(-700, 700), max_size=200))
def test_no_index_is_given_twice(start: int, steps: list[int]) -> None:
    """Whatever comes in whatever order, an index is given once, belongs to its sequence, and was not seen before."""
    window = ReplayWindow()
    given_out: set[int] = set()
    for step in [0, *steps]:
        sequence = (start + step) % 65_536
        seen = window.seen(sequence)
        index = window.accept(sequence)
        if index is not None:
            assert not seen
            assert index % 65_536 == sequence
            assert index not in given_out
            given_out.add(index)
            assert window.seen(sequence)
