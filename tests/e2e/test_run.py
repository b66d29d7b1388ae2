"""`guildcast run`: one command that shows the main job, says what was heard, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from shared.errors import EXIT_CONFIG
from tests.e2e.stack import Finished, Process, descendants, gone, process_environment, run_to_end, until
from tests.media.radio import Radio

pytestmark = pytest.mark.asyncio(loop_scope="module")

GUILDS = 6
PROCESSES = 10
"""Redis, the local Discord, coordinator, supervisor, two fan-out workers with a sender each, encode worker, child."""
RUN_WITHIN_S = 60.0


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("guildcast")), "run", "--guilds", str(GUILDS), *arguments]


class Demo:
    """A running `guildcast run`."""

    def __init__(self, process: asyncio.subprocess.Process, temporary: Path, output: Path) -> None:
        self._process = process
        self._temporary = temporary
        self._output = output
        self.family: dict[int, Process] = {}

    @property
    def out(self) -> str:
        return self._output.read_text()

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    async def sees(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds, noting what processes there are meanwhile."""

        async def look() -> bool:
            self.family |= {one.pid: one for one in descendants(self._process.pid)}
            return condition()

        await until(look, f"{what} in the output:\n{self.out}", RUN_WITHIN_S, every_s=0.2)

    async def end(self) -> Finished:
        """Wait for the end, and see that it left neither process nor file."""
        await self.sees(lambda: self._process.returncode is not None, "the end")
        assert self._process.returncode is not None
        await gone(self.family.values(), 1.0)
        assert not list(self._temporary.iterdir())
        return Finished(self._process.returncode, self.out, "")

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def demo(folder: Path, *arguments: str) -> AsyncIterator[Demo]:
    """`guildcast run` from a folder of its own, with a folder of its own for temporary files."""
    temporary, output = folder / "tmp", folder / "output"
    temporary.mkdir()
    with output.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *command(*arguments),
            cwd=folder,
            env=process_environment({"TMPDIR": str(temporary), "COLUMNS": "200"}),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=asyncio.subprocess.STDOUT,
        )
    running = Demo(process, temporary, output)
    try:
        yield running
    finally:
        await running.kill()


async def started(folder: Path, source: str, exits: AsyncExitStack) -> Demo:
    """A run whose end takes a while, so that the other tests do not wait for it."""
    running = await exits.enter_async_context(demo(folder, "--source", source))
    # The runs share the folder of logs: the next one must not clear it while this one opens them.
    await running.sees(lambda: any(one.module == "worker.fanout" for one in running.family.values()), "a worker")
    return running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def without_station(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Demo]:
    """A run on a station that is away: it may come back, so it is tried for half a minute."""
    async with AsyncExitStack() as exits:
        yield await started(tmp_path_factory.mktemp("no-station"), "http://127.0.0.1:9/live.mp3", exits)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def without_audio(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Demo]:
    """A run on a file that is no audio, which is tried five times."""
    folder = tmp_path_factory.mktemp("no-audio")
    text = folder / "text.txt"
    text.write_text("This is no music. " * 200)
    async with AsyncExitStack() as exits:
        yield await started(folder, str(text), exits)


@pytest.mark.usefixtures("without_station", "without_audio")
async def test_a_missing_source_is_refused_in_one_line(tmp_path: Path) -> None:
    """A SOURCE that is no file ends with status 78 and a line that names it, before anything is started."""
    ended = await run_to_end(command("--source", str(tmp_path / "missing.ogg")), process_environment({}))
    assert ended.status == EXIT_CONFIG
    (line,) = ended.err.splitlines()
    assert "SOURCE" in line
    assert "missing.ogg" in line
    assert not ended.out


@pytest.mark.usefixtures("without_station", "without_audio")
async def test_the_main_job_is_done_by_one_command(tmp_path: Path) -> None:
    """It ends with status 0 after its duration; all guilds were heard and nothing was lost."""
    async with demo(tmp_path, "--duration", "3") as running:
        ended = await running.end()
    assert ended.status == 0, ended.out
    assert len(running.family) >= PROCESSES
    assert f"guilds heard   {GUILDS}/{GUILDS}" in ended.out
    assert ": 0 lost, 0 duplicated, 0 out of order" in ended.out
    assert "encodes        1 " in ended.out


@pytest.mark.usefixtures("without_station", "without_audio")
async def test_an_interrupt_in_the_middle_sums_up_and_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while it plays ends it like the end of its duration."""
    async with demo(tmp_path) as running:
        await running.sees(lambda: f"{GUILDS}/{GUILDS}" in running.out, "all guilds joined")
        running.interrupt()
        ended = await running.end()
    assert ended.status == 0, ended.out
    assert f"guilds heard   {GUILDS}/{GUILDS}" in ended.out
    assert ": 0 lost, 0 duplicated, 0 out of order" in ended.out


@pytest.mark.usefixtures("without_station", "without_audio")
async def test_silence_makes_it_fail(tmp_path: Path) -> None:
    """A station that stands still while it is listened to: every guild was heard, and the status is 1 all the same."""
    async with Radio("mp3", 2.0) as radio, demo(tmp_path, "--source", radio.url, "--duration", "5") as running:
        await running.sees(lambda: f"{GUILDS}/{GUILDS}" in running.out, "all guilds joined")
        radio.flowing.clear()
        ended = await running.end()
    assert ended.status == 1, ended.out
    assert f"guilds heard   {GUILDS}/{GUILDS}" in ended.out
    assert "silence for more than 1%" in ended.out
    assert "broadcast.stalled" in ended.out
    assert "source_stalled" in ended.out


async def test_a_source_that_is_no_audio_is_named_as_the_trouble(without_audio: Demo) -> None:
    """Where the source cannot be played, the run ends by itself with status 1 and says why."""
    ended = await without_audio.end()
    assert ended.status == 1, ended.out
    assert f"guilds heard   0/{GUILDS}" in ended.out
    assert "source_not_audio" in ended.out
    assert "text.txt" in ended.out


async def test_a_station_that_is_away_is_named_as_the_trouble(without_station: Demo) -> None:
    """The pool would try it for ever; whoever waits at a terminal is told after half a minute."""
    ended = await without_station.end()
    assert ended.status == 1, ended.out
    assert f"guilds heard   0/{GUILDS}" in ended.out
    assert "source_unreachable" in ended.out
