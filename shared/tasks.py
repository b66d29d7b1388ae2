"""Waiting that no cancellation cuts short."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

_T = TypeVar("_T")


async def to_its_end(work: Awaitable[_T]) -> _T:
    """Wait for what must not be left half done, such as a killed process that is to be reaped.

    A task may be cancelled again while it tidies up after the first time. The work goes on, however often that comes.

    Raises: CancelledError: once the work is done; and whatever the work raises.
    """
    working = asyncio.ensure_future(work)
    cancelled = False
    while not working.done():
        try:
            await asyncio.wait({working})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        if not working.cancelled():
            working.exception()  # it was looked at
        raise asyncio.CancelledError
    return working.result()
