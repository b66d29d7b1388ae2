"""The leader follows a capped stream of events: what left it unread is noticed."""

from __future__ import annotations

import asyncio

import pytest

from coordinator import app
from coordinator.app import Coordinator
from coordinator.recovery import Recovery
from coordinator.registry import Registry
from shared.settings import Settings
from shared.store.client import Store
from shared.store.keys import Keys

BOUND_S = 10.0


@pytest.mark.parametrize(("kept", "missed"), [(20, False), (12, True)])
async def test_a_gap_is_noticed_by_whoever_catches_up_past_it(
    store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch, kept: int, missed: bool
) -> None:
    """Also where all that is left was read before anybody asks."""
    monkeypatch.setattr(app, "_READ_AT_ONCE", 5)
    for number in range(1, 21):
        await store.command("XADD", keys.events, f"5-{number}", "event", '{"type":"worker.up","at":1}')
    await store.command("XTRIM", keys.events, "MAXLEN", kept)
    coordinator = Coordinator(Settings(redis_url=store._url, namespace=keys.word), "h")
    coordinator._read_until = "5-1"
    registry = Registry(store, keys)
    following = asyncio.create_task(coordinator._follow(registry, Recovery(), asyncio.Lock(), asyncio.Event()))
    async with asyncio.timeout(BOUND_S):
        while coordinator._read_until != "5-20":  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(0.01)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert coordinator._missed is missed
    for one in (coordinator._store, coordinator._events_reader):
        await one.close()
