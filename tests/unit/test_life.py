"""Signs of life, and whoever looks for them."""

from __future__ import annotations

import os

from shared.life import Life, Watch


def test_beats_are_seen_through_a_descriptor_that_was_handed_on() -> None:
    """The memory is one, whoever maps it."""
    ours = Life()
    theirs = Life(os.dup(ours.fd))
    assert ours.beats == 0
    for _ in range(3):
        theirs.beat()
    assert ours.beats == 3
    theirs.close()
    ours.close()


def test_whoever_beats_does_not_stand_still() -> None:
    """Once between two looks is enough."""
    watch = Watch(2)
    assert not any(watch.stands_still(beats) for beats in range(1, 100))


def test_whoever_does_not_beat_is_told_after_so_many_looks() -> None:
    """And not before; a beat begins the count anew."""
    watch = Watch(2)
    assert [watch.stands_still(beats) for beats in (1, 1, 1, 2, 2, 2, 2)] == [False] * 6 + [True]


def test_nothing_is_missed_before_the_first_beat() -> None:
    """A process that starts takes its time."""
    watch = Watch(2)
    assert not any(watch.stands_still(0) for _ in range(100))
