"""What C code prints to standard error: kept apart from our log, bounded, and never a reason to stand still."""

from __future__ import annotations

import subprocess
import sys

import msgspec

PROGRAM = """
import asyncio, os
from worker.fanout.library_output import LibraryOutput
output = LibraryOutput()
from shared import logs
logs.configure("info", "json")

async def main():
    loop = asyncio.get_running_loop()
    output.follow(loop)
    for number in range({lines}):
        try:
            os.write(2, b"the library says %d\\n" % number)
        except BlockingIOError:
            break
    while not output.lines:
        await asyncio.sleep(0.001)
    output.unfollow(loop)
    logs.get_logger().info("program.ended", lines=output.lines, unlogged=output.unlogged)

asyncio.run(main())
"""


def run(lines: int) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(lines=lines)], capture_output=True, text=True, timeout=30, check=True
    )
    return [msgspec.json.decode(line) for line in done.stderr.splitlines()]


def test_what_a_library_prints_becomes_an_event() -> None:
    """It stands in our log, which goes where standard error went before."""
    printed, ended = run(1)
    assert (printed["event"], printed["line"]) == ("library.printed", "the library says 0")
    assert (ended["event"], ended["lines"]) == ("program.ended", 1)


def test_a_library_that_prints_without_end_fills_neither_log_nor_pipe() -> None:
    """Five lines a minute are logged, the rest are counted, and a full pipe blocks nobody."""
    *printed, ended = run(100_000)
    assert [one["event"] for one in printed] == ["library.printed"] * 5
    lines, unlogged = ended["lines"], ended["unlogged"]
    assert isinstance(lines, int)
    assert isinstance(unlogged, int)
    assert lines - unlogged == 5
