"""What all tests share: a real Redis per test session, and the promise that nothing is left running."""

from __future__ import annotations

import faulthandler
import itertools
from collections.abc import AsyncIterator, Generator, Iterator

import pytest
from hypothesis import settings

from shared.cli.redis_server import RedisServer
from shared.store.client import Store
from shared.store.keys import Keys
from tests.tasks import none_left

# How long an example takes says something about the machine, not about the code.
settings.register_profile("guildcast", deadline=None)
settings.load_profile("guildcast")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--churn-seconds", default="12", help="how long members come and go in the test of churn")


_LONGEST_TEST_S = 600.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """A test that hangs ends the run, with a word of where each thread was: nobody waits for ever for a red light."""
    faulthandler.dump_traceback_later(_LONGEST_TEST_S, exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for the whole session; tests keep apart by their namespaces."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def own_redis_server() -> Iterator[RedisServer]:
    """A server of this test's own, to be stopped and started."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def keys() -> Keys:
    """A namespace that no other test uses."""
    return Keys(f"test-{next(_numbers)}")


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[Store]:
    store = Store(redis_server.url)
    yield store
    await store.close()


@pytest.fixture
async def raw_store(redis_server: RedisServer) -> AsyncIterator[Store]:
    store = Store(redis_server.url, raw=True)
    yield store
    await store.close()


@pytest.fixture(autouse=True)
async def no_task_outlives_its_test() -> AsyncIterator[None]:
    """A test that leaks a task fails."""
    async with none_left():
        yield
