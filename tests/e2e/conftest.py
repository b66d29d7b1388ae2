"""What end-to-end tests share: a pool per module, whole and empty at the start of each test, its logs on failure."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from tests.e2e.stack import Stack, process_environment, python_module
from tests.media.audio import PROGRAMME, RATE, Pcm, decode_file, write_audio
from tests.tasks import none_left

CLIP_S = 3
LATE_FIXTURE = "processes_without_redis"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
    call: pytest.CallInfo[Any],  # noqa: ARG001 - named by pytest
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the ends of all process logs beside a failure."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Stack):
                report.sections.append(("process logs", value.tail()))
    return report


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who waits for the processes that were started first comes last."""
    items.sort(key=lambda item: LATE_FIXTURE in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def processes_without_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A coordinator and a supervisor that find no Redis: they try for 30 s."""
    nowhere = tmp_path_factory.mktemp("no-redis") / "redis.sock"
    started = {
        module: subprocess.Popen(
            python_module(module),
            env=process_environment({"GUILDCAST_REDIS_URL": f"unix://{nowhere}"}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for module in ("coordinator", "worker")
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture(scope="session", autouse=True)
def _started_early(request: pytest.FixtureRequest) -> None:
    """Start what takes 30 s by design while the other tests run."""
    if any(LATE_FIXTURE in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue(LATE_FIXTURE)


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def no_task_outlives_its_test() -> AsyncIterator[None]:
    """A test that leaks a task fails."""
    async with none_left():
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """One supervisor with two fan-out workers and one encode worker; a module may have another pool."""
    async with Stack(tmp_path_factory.mktemp("pool")) as stack:
        yield stack


@pytest_asyncio.fixture(loop_scope="module")
async def stack(running: Stack) -> Stack:
    """The module's pool: all processes up, nothing on air, no guild joined."""
    await running.whole()
    await running.clear()
    return running


@pytest.fixture(scope="session")
def churn_s(pytestconfig: pytest.Config) -> float:
    """How long members come and go: `pytest --churn-seconds 60`."""
    return float(pytestconfig.getoption("--churn-seconds"))


@pytest.fixture(scope="session")
def programme() -> Pcm:
    return decode_file(PROGRAMME)


@pytest.fixture
def clip(running: Stack, programme: Pcm) -> Path:
    """Three seconds of the programme that lie in the media folder."""
    return write_audio(running.media / "clip.wav", programme[10 * RATE : (10 + CLIP_S) * RATE])


@pytest.fixture
def music(running: Stack) -> Path:
    """The whole programme, 40 s, in the media folder."""
    path = running.media / "programme.ogg"
    if not path.exists():
        path.write_bytes(PROGRAMME.read_bytes())
    return path


@pytest.fixture(scope="session")
def tone() -> Pcm:
    """Two seconds that sound like nothing in the programme."""
    time_s = np.arange(2 * RATE) / RATE
    sound = 0.4 * np.sin(2 * np.pi * 700 * time_s)
    return np.stack([sound, sound], axis=1).astype(np.float32)
