"""The common grid in numbers: ticks of 20 ms, 20 slots of 1 ms in each. Pure.

Source: design sections 0 and 3, "One grid".
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.clock import NS_PER_MS, NS_PER_US

TICK_NS = 20 * NS_PER_MS
SLOTS = 20
SLOT_NS = TICK_NS // SLOTS
_BATCH = 100
"""Connections of every other slot before the next one is woken: a wake-up costs as much as fifteen packets."""
_STEP = 16
"""By how many a slot may exceed the emptiest one once every other slot has its batch: then an even load counts."""


def tick_at(common_ns: int) -> int:
    """Tick in which a moment of the common clock lies."""
    return common_ns // TICK_NS


def epoch_tick(epoch_us: int) -> int:
    """Tick at which frame 0 of a run plays."""
    return epoch_us * NS_PER_US // TICK_NS


def slot_time_ns(tick: int, slot: int) -> int:
    """Moment on the common clock at which the packets of a slot leave."""
    return tick * TICK_NS + slot * SLOT_NS


def choose_slot(slot_loads: Sequence[int], socket_loads: Sequence[int]) -> int:
    """Slot for a new connection: company on the same socket first, then a slot that is awake anyway.

    Every other slot is filled first, so that one that takes longer than its millisecond does not delay the next.

    Args:
        slot_loads: connections per slot.
        socket_loads: connections per slot on the socket that the new connection uses.
    """
    most = min(slot_loads) + _STEP
    open_slots = [slot for slot in range(0, SLOTS, 2) if slot_loads[slot] < _BATCH] or [
        slot for slot in range(SLOTS) if slot_loads[slot] < most
    ]
    return min(open_slots, key=lambda slot: (-socket_loads[slot], -slot_loads[slot], slot % 2, slot))
