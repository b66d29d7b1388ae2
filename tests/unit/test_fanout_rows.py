"""The shared memory: two views of it are one, and its figures are read right."""

from __future__ import annotations

import fcntl
import os

import numpy as np

from worker.fanout.rows import (
    LATENESS_BIN_US,
    LATENESS_BINS,
    PACKET_BYTES,
    RING_TICKS,
    RowTable,
    lateness_quantile_us,
)

FIELDS = (
    *("head", "counters", "lateness", "taken_tick", "sent_tick"),
    *("active", "slot", "socket", "address", "due", "length", "packets"),
)


def test_what_one_process_writes_the_other_reads() -> None:
    """Two tables on one descriptor have every field in the same place."""
    ours = RowTable(3)
    theirs = RowTable(3, os.dup(ours.fd))
    for number, name in enumerate(FIELDS, 1):
        getattr(ours, name)[...] = number
        assert (getattr(theirs, name) == number).all()
    for number, name in enumerate(FIELDS, 1):
        assert (getattr(theirs, name) == number).all(), "fields overlap"
    ours.close()
    theirs.close()


def test_memory_begins_empty() -> None:
    """No row is active and nothing is due before somebody says so."""
    table = RowTable(5)
    assert not any(getattr(table, name).any() for name in FIELDS)
    table.close()


def test_every_row_has_room_for_the_longest_packet_on_each_tick_of_the_ring() -> None:
    """Opus 1275, header 12, tag 16, nonce 4, and end-to-end encryption."""
    table = RowTable(2)
    assert table.packets.shape == (2, RING_TICKS, PACKET_BYTES)
    assert PACKET_BYTES >= 1_275 + 12 + 16 + 4 + 25
    table.close()


def test_only_who_is_given_it_inherits_the_memory() -> None:
    """No other child keeps the memory alive."""
    table = RowTable(1)
    assert fcntl.fcntl(table.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    table.close()


def test_a_quantile_of_nothing_is_nothing() -> None:
    """Before the first packet there is no lateness."""
    assert lateness_quantile_us(np.zeros(LATENESS_BINS, np.uint64), 0.999) == 0


def test_a_quantile_is_the_upper_edge_of_its_bin() -> None:
    """Of 1000 packets the 999th decides; the figure is never better than the truth."""
    histogram = np.zeros(LATENESS_BINS, np.uint64)
    histogram[0] = 999
    histogram[7] = 1
    assert lateness_quantile_us(histogram, 0.999) == LATENESS_BIN_US
    histogram[7] = 2
    assert lateness_quantile_us(histogram, 0.9999) == 8 * LATENESS_BIN_US
    assert lateness_quantile_us(histogram, 1.0) == 8 * LATENESS_BIN_US


def test_the_last_bin_is_open_and_counted() -> None:
    """Whatever comes later than the histogram reaches stands in its last bin."""
    histogram = np.zeros(LATENESS_BINS, np.uint64)
    histogram[-1] = 5
    assert lateness_quantile_us(histogram, 0.5) == LATENESS_BINS * LATENESS_BIN_US
