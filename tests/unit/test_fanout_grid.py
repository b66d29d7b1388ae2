"""The common grid: ticks, slots, and who gets which slot."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.fanout.grid import SLOT_NS, SLOTS, TICK_NS, choose_slot, epoch_tick, slot_time_ns, tick_at

EMPTY = [0] * SLOTS
BATCH = 100


def test_a_tick_is_twenty_milliseconds_in_twenty_slots() -> None:
    """The grid of design section 0."""
    assert (TICK_NS, SLOTS, SLOT_NS) == (20_000_000, 20, 1_000_000)


@given(st.integers(0, 10**12), st.integers(0, SLOTS - 1))
def test_a_slot_lies_in_its_tick(tick: int, slot: int) -> None:
    """A moment of a slot belongs to the tick that the slot is of, to the last nanosecond."""
    moment = slot_time_ns(tick, slot)
    assert tick_at(moment) == tick_at(moment + SLOT_NS - 1) == tick
    assert moment - slot_time_ns(tick, 0) == slot * SLOT_NS


@given(st.integers(0, 10**12))
def test_frame_zero_plays_at_the_epoch(tick: int) -> None:
    """A run's epoch is the moment at which its first frame leaves in slot 0."""
    assert epoch_tick(tick * 20_000) == tick
    assert slot_time_ns(epoch_tick(tick * 20_000), 0) == tick * 20_000 * 1_000


def test_the_first_connection_gets_the_first_slot() -> None:
    """Of slots that are alike the first is taken, so that the choice can be told beforehand."""
    assert choose_slot(EMPTY, EMPTY) == 0


def test_company_on_the_same_socket_is_sought() -> None:
    """Connections of one socket leave in one batch, while slots are about even."""
    mates = list(EMPTY)
    mates[12] = 3
    loads = list(EMPTY)
    loads[12] = 3
    assert choose_slot(loads, mates) == 12


def test_company_is_not_sought_at_the_price_of_evenness() -> None:
    """A slot that is a batch fuller than the emptiest gets no more, whatever company waits there."""
    mates = list(EMPTY)
    mates[12] = BATCH
    loads = list(EMPTY)
    loads[12] = BATCH
    assert choose_slot(loads, mates) != 12


def test_without_company_a_slot_that_is_awake_is_taken() -> None:
    """Where nobody of the same socket is, a slot that wakes the sender anyway costs no wake-up more."""
    loads = list(EMPTY)
    loads[6] = 1
    assert choose_slot(loads, EMPTY) == 6


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=600))
def test_slots_stay_even_whatever_sockets_are_used(sockets: list[int]) -> None:
    """No slot is ever fuller than the emptiest by more than a batch."""
    loads = list(EMPTY)
    of_socket = {number: list(EMPTY) for number in range(4)}
    for number in sockets:
        slot = choose_slot(loads, of_socket[number])
        loads[slot] += 1
        of_socket[number][slot] += 1
    assert max(loads) - min(loads) <= BATCH


@pytest.mark.parametrize(
    ("connections", "awake", "fullest"), [(1, 1, 1), (100, 1, 100), (101, 2, 100), (1_000, 10, 100), (1_400, 20, 100)]
)
def test_every_other_slot_is_filled_first_then_all_evenly(connections: int, awake: int, fullest: int) -> None:
    """Few connections wake few slots, and between two of them one is free; of many, the rest is spread."""
    loads = list(EMPTY)
    for _ in range(connections):
        loads[choose_slot(loads, EMPTY)] += 1
    assert (sum(map(bool, loads)), max(loads)) == (awake, fullest)
    if awake <= SLOTS / 2:
        assert not any(loads[1::2])
    else:
        assert max(loads[1::2]) - min(loads[1::2]) <= 16


@pytest.mark.parametrize("seed", range(3))
def test_slots_keep_their_order_while_connections_come_and_go(seed: int) -> None:
    """An odd slot is not opened while an even one has room, whoever left and whatever sockets are used."""
    chance = Random(seed)
    loads = list(EMPTY)
    of_socket = [list(EMPTY) for _ in range(3)]
    held: list[tuple[int, int]] = []
    for number in range(2_500):
        if number > 1_200 and chance.random() < 0.5:
            socket, slot = held.pop(chance.randrange(len(held)))
            loads[slot] -= 1
            of_socket[socket][slot] -= 1
            continue
        socket = chance.randrange(3)
        slot = choose_slot(loads, of_socket[socket])
        assert slot % 2 == 0 or min(loads[::2]) >= BATCH
        loads[slot] += 1
        of_socket[socket][slot] += 1
        held.append((socket, slot))
