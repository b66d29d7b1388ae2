"""Tasks: those that nobody awaits tell how they end, and what must not be left half done is waited for.

Whoever awaits a task, or has it in a task group, hears of its end. Of any other one asyncio speaks only when the
collector finds it, and of a task that was cancelled never.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, ParamSpec, TypeVar

from shared.errors import TaskEnded
from shared.logs import get_logger

_T = TypeVar("_T")
_P = ParamSpec("_P")


def begin(work: Coroutine[Any, Any, _T], name: str) -> asyncio.Task[_T]:
    """Begin a task that nobody awaits at once: an end that nobody ordered is told in the log as soon as it comes."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_tell_end)
    return task


def _tell_end(task: asyncio.Task[Any]) -> None:
    error = unordered_end(task)
    if error is not None:
        get_logger().error("task.crashed", task=task.get_name(), exc_info=error)


def unordered_end(task: asyncio.Task[Any]) -> BaseException | None:
    """What a task that is done ended with, where that is neither its result nor a cancellation that it was told."""
    if not task.cancelled():
        return task.exception()
    return None if task.cancelling() else _cancelled_by_nobody()


async def endless(work: Callable[_P, Awaitable[object]], *args: _P.args, **named: _P.kwargs) -> NoReturn:
    """Do what only an order ends. A task group takes a return, and a cancellation from within, for a good end.

    Raises: TaskEnded: it ended by itself; and whatever the work raises.
    """
    await uncancelled(work(*args, **named))
    raise TaskEnded("ended, and goes on for ever by right")


async def uncancelled(work: Awaitable[_T]) -> _T:
    """Do something that may be cancelled by order, and by nothing else.

    A future that somebody else had cancelled cancels whoever awaits it: the task would end as if it had been told to.
    Raises: TaskEnded: that happened; and whatever the work raises.
    """
    try:
        return await work
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
    raise _cancelled_by_nobody()


def _cancelled_by_nobody() -> TaskEnded:
    return TaskEnded("cancelled, and nobody had ordered that")


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
