"""The promise that a test leaves no task behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_LAST_STEPS_S = 0.5


@asynccontextmanager
async def none_left() -> AsyncIterator[None]:
    """Raises: AssertionError: a task that was begun inside is still there at the end."""
    before = asyncio.all_tasks()
    yield
    begun = {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}
    if begun:
        # a client library may still write out what was answered already
        _, begun = await asyncio.wait(begun, timeout=_LAST_STEPS_S)
    assert not begun, f"tasks left: {begun}"
