"""Tasks that nobody awaits: an end that nobody ordered is told when it comes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from shared.errors import ErrorCode, TaskEnded
from shared.tasks import begin, endless, uncancelled


@pytest.fixture
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """Lines as they come; no collection has a part in them."""
    gc.disable()
    with capture_logs() as lines:
        yield lines
    gc.enable()


async def fail() -> None:
    raise ZeroDivisionError("a defect")


async def cancelled_from_within() -> None:
    """Awaits what somebody else has cancelled."""
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


async def test_a_crash_is_told_at_once(logs: list[MutableMapping[str, Any]]) -> None:
    """With its exception, and while somebody still holds the task."""
    task = begin(fail(), "reader")
    await asyncio.wait({task})
    (line,) = logs
    assert (line["event"], line["task"], line["log_level"]) == ("task.crashed", "reader", "error")
    assert isinstance(line["exc_info"], ZeroDivisionError)


async def test_a_cancellation_that_nobody_ordered_is_told(logs: list[MutableMapping[str, Any]]) -> None:
    task = begin(cancelled_from_within(), "reader")
    await asyncio.wait({task})
    (line,) = logs
    assert (line["event"], type(line["exc_info"])) == ("task.crashed", TaskEnded)


@pytest.mark.parametrize("steps", [0, 1])
async def test_an_end_that_was_ordered_is_not_told(logs: list[MutableMapping[str, Any]], steps: int) -> None:
    """Neither a result nor a cancellation, whether or not the task had begun."""
    done, waiting = begin(asyncio.sleep(0), "done"), begin(asyncio.Event().wait(), "waiting")
    for _ in range(steps):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({done, waiting})
    assert logs == []


@pytest.mark.parametrize("work", [lambda: asyncio.sleep(0), cancelled_from_within])
async def test_a_group_ends_with_whatever_should_go_on_for_ever(work: Callable[[], Awaitable[None]]) -> None:
    """By itself it would take both for a good end, and its other tasks would go on without this one."""

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(endless(asyncio.Event().wait))
            group.create_task(endless(work))

    with pytest.raises(ExceptionGroup) as ended:
        await both()
    (error,) = ended.value.exceptions
    assert isinstance(error, TaskEnded)
    assert error.code == ErrorCode.INTERNAL_ERROR


@pytest.mark.parametrize("steps", [0, 1])
async def test_what_goes_on_for_ever_ends_by_order(steps: int) -> None:
    """Also before its first step, and then nothing is left that was never awaited."""
    task = asyncio.create_task(endless(asyncio.Event().wait))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


async def test_what_is_cancelled_from_within_is_a_failure() -> None:
    """Whoever handles failures handles it; it would pass by as an order."""
    with pytest.raises(TaskEnded):
        await uncancelled(cancelled_from_within())
    with pytest.raises(ZeroDivisionError):
        await uncancelled(fail())
    assert await uncancelled(asyncio.sleep(0, "result")) == "result"
