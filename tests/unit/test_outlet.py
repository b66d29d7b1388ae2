"""A standard error that nobody reads: real processes, whose pipe is full."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import BinaryIO

import pytest

from shared.outlet import Outlet

BOUND_S = 30.0
LINES = 50
LOOP = f"""
import asyncio
from shared import logs
from shared.main import run_process

async def work(settings, stop):
    for number in range({LINES}):
        logs.get_logger().info("pace.turned", number=number)
        await asyncio.sleep(0)
    asyncio.get_running_loop().call_exception_handler({{"message": "by asyncio itself"}})
    print("turned", flush=True)
    await asyncio.to_thread(input)
    logs.get_logger().info("pace.ended")

run_process("fanout", "one", work)
"""
CRASH = """
from shared.main import run_process

async def work(settings, stop):
    {}

run_process("fanout", "one", work)
"""


@contextmanager
def full_pipe() -> Iterator[tuple[BinaryIO, int, int]]:
    """Its reading end, its writing end, and how many bytes fill it: there is no room for one more."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    filled = 0
    try:
        while True:
            filled += os.write(write_fd, b"." * 4_096)
    except BlockingIOError:
        os.set_blocking(write_fd, True)
    with os.fdopen(read_fd, "rb") as reader:
        try:
            yield reader, write_fd, filled
        finally:
            os.close(write_fd)


def start(program: str, stderr: int) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GUILDCAST_")}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment | {"GUILDCAST_LOG_FORMAT": "json"},
    )


def test_a_pipe_that_nobody_reads_stops_no_loop() -> None:
    """Each line waits for a reader, and nobody for the line."""
    with full_pipe() as (reader, stderr, filled), start(LOOP, stderr) as process:
        assert process.stdout is not None
        try:
            assert select.select([process.stdout], [], [], BOUND_S)[0], "the loop stands still"
            assert os.get_blocking(stderr), "it is others' standard error as well"
            reader.read(filled)
            process.communicate("\n", timeout=BOUND_S)
        finally:
            process.kill()
        told = [json.loads(reader.readline()) for _ in range(LINES)]
        assert reader.readline() == b"by asyncio itself\n"
        told.append(json.loads(reader.readline()))
    assert [one.get("number") for one in told] == [*range(LINES), None]
    assert {(one["role"], one["name"]) for one in told} == {("fanout", "one")}
    assert process.returncode == 0


def test_a_process_ends_whether_or_not_its_last_words_are_read() -> None:
    with full_pipe() as (_, stderr, _), start(CRASH.format("raise RuntimeError('the last word')"), stderr) as process:
        try:
            process.communicate(timeout=BOUND_S)
        finally:
            process.kill()
    assert process.returncode == 1


@pytest.mark.parametrize("last", ["raise RuntimeError('the last word')", "raise SystemExit('the last word')"])
def test_the_last_words_of_a_crash_come_out(last: str) -> None:
    """To a reader who is there."""
    with start(CRASH.format(last), subprocess.PIPE) as process:
        _, told = process.communicate(timeout=BOUND_S)
    assert told.splitlines()[-1].endswith("the last word")
    assert process.returncode == 1


async def test_what_had_no_room_is_counted_and_told_in_its_place() -> None:
    """Behind the lines that had room, before the ones that came after it; nothing is told twice."""
    outlet: Outlet
    with full_pipe() as (reader, stderr, filled):
        fcntl.fcntl(stderr, fcntl.F_SETPIPE_SZ, filled)
        outlet = Outlet(stderr, lambda count: print(f"dropped {count}", file=outlet), most_lines=3)
        print("in hand", file=outlet)
        async with asyncio.timeout(BOUND_S):
            while outlet.waiting:  # noqa: ASYNC110 - the thread that takes it tells nobody
                await asyncio.sleep(0.001)
        for number in range(8):
            print("line", number, file=outlet)
        reader.read(filled)
        told = [await asyncio.to_thread(reader.readline) for _ in range(5)]
        print("later", file=outlet)
        told.append(await asyncio.to_thread(reader.readline))
        assert outlet.drain(BOUND_S)
    assert told == [b"in hand\n", b"line 0\n", b"line 1\n", b"line 2\n", b"dropped 5\n", b"later\n"]


def test_a_reader_that_went_away_costs_nobody_anything() -> None:
    """Each line is dropped, as nobody will ever read it; to say something raises nothing."""
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    counted: list[int] = []
    with closing(os.fdopen(write_fd, "wb", buffering=0)):
        outlet = Outlet(write_fd, counted.append)
        print("into the void", file=outlet)
        assert outlet.drain(BOUND_S)
    assert counted == []


def test_a_description_that_somebody_made_non_blocking_loses_nothing() -> None:
    """Whoever started this process may have done so to its own standard error."""
    with full_pipe() as (reader, stderr, filled):
        os.set_blocking(stderr, False)
        outlet = Outlet(stderr, lambda _: None)
        text = "x" * 100_000 + "\n"
        outlet.write(text)
        assert reader.read(filled + len(text))[filled:].decode() == text
        assert outlet.drain(BOUND_S)


def test_a_line_is_whole_however_many_pieces_it_is_made_of() -> None:
    """A traceback is written word by word, and other processes write between."""
    read_fd, write_fd = os.pipe2(os.O_DIRECT)  # each write is read by itself
    outlet = Outlet(write_fd, lambda _: None)
    for piece in ("Trace", "back:\n", " at", " once\n", "and an end"):
        outlet.write(piece)
    assert outlet.drain(BOUND_S)
    assert [os.read(read_fd, 100) for _ in range(3)] == [b"Traceback:\n", b" at once\n", b"and an end"]
    os.close(read_fd)
    os.close(write_fd)
