"""Follows Redis TIME for the common clock."""

from __future__ import annotations

import asyncio

from shared.clock import CommonClock
from shared.errors import StoreError
from shared.logs import get_logger
from shared.store.client import Store

_FIRST_SAMPLES = 8
_EVERY_S = 0.5


async def measure(store: Store, clock: CommonClock) -> None:
    """Take one measurement.

    Raises: StoreUnavailable.
    """
    sent_ns = clock.local.now_ns()
    seconds, microseconds = await store.command("TIME")
    clock.observe(sent_ns, clock.local.now_ns(), int(seconds) * 1_000_000 + int(microseconds))


async def synchronise(store: Store, clock: CommonClock) -> None:
    """Take the first measurements, before anything is sent by this clock.

    Raises: StoreUnavailable.
    """
    for _ in range(_FIRST_SAMPLES):
        await measure(store, clock)
    clock.step()


async def follow(store: Store, clock: CommonClock) -> None:
    """Measure for ever; while Redis is away, the clock goes on with what it has."""
    away = False
    while True:
        try:
            await measure(store, clock)
            away = False
        except StoreError as error:
            if not away:
                get_logger().warning("clock.sync_failed", error=error.message)
            away = True
        await asyncio.sleep(_EVERY_S)
