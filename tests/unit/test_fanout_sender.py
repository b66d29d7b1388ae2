"""The sender, as a process of its own: what is built for a tick leaves in that tick, or never."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from shared.clock import LocalClock
from shared.protocol.transport_crypto import AES_GCM
from worker.fanout import rows, sender
from worker.fanout.build import Builder, Lane, Target
from worker.fanout.cores import Cores
from worker.fanout.grid import TICK_NS, tick_at
from worker.fanout.rows import (
    CLOCK_OFFSET_NS,
    DROPPED,
    GRANTED,
    PRIORITY,
    REFUSED,
    RING_TICKS,
    SENDER_ERRNO,
    SENT,
    SKIPPED,
    RowTable,
)
from worker.fanout.sending import SenderProcess

BOUND_S = 10.0
LOOPBACK = "127.0.0.1"
ROWS = 8
CORES = os.sched_getaffinity(0)


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition, not for a time; fail if it never comes."""
    async with asyncio.timeout(BOUND_S):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.002)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Heard(NamedTuple):
    """One packet as it arrived."""

    ssrc: int
    timestamp: int
    sequence: int
    port: int


class Rig:
    """A worker's side of the sender, and a socket that hears everything."""

    def __init__(self, clock_error: str = "0,0") -> None:
        self.ear = self.new_socket()
        self.table = RowTable(ROWS)
        self.builder = Builder(self.table)
        self.on_air: set[int] = set()
        self.lane = Lane(frame_at=lambda tick: b"frame" if tick in self.on_air else None)
        self.builder.lanes.append(self.lane)
        self.sender = SenderProcess(self.table, clock_error)
        self.clock = LocalClock(*(float(part) for part in clock_error.split(",")))
        self.sockets: list[socket.socket] = []
        self.dropped = 0
        self._ssrc = 0
        self._watching: asyncio.Task[None] | None = None

    @staticmethod
    def new_socket() -> socket.socket:
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        one.bind((LOOPBACK, 0))
        return one

    def add_socket(self) -> int:
        """Hand a socket over; returns its port."""
        self.sockets.append(self.new_socket())
        self.sender.add_socket(self.sockets[-1])
        return self.port_of(len(self.sockets) - 1)

    def port_of(self, number: int) -> int:
        return int(self.sockets[number].getsockname()[1])

    def connect(self, socket_number: int = 0, remote: tuple[str, int] | None = None) -> int:
        """Open a row on the lane; returns its SSRC, which is its number plus one."""
        self._ssrc += 1
        address = remote or self.ear.getsockname()
        row = self.builder.open(Target(self._ssrc, address, socket_number, AES_GCM, bytes(32)))
        self.builder.tune(row, self.lane)
        return self._ssrc

    async def start(self) -> None:
        await self.sender.start()
        self._watching = asyncio.create_task(self.sender.watch())
        await self.runs()

    async def runs(self) -> None:
        """Wait until the sender goes through its ticks, those of all slots."""
        tick = self.now
        await until(lambda: int(self.table.sent_tick.min()) > tick)

    @property
    def now(self) -> int:
        """Tick that lies on the common clock now."""
        return tick_at(self.clock.now_ns() + int(self.table.head[CLOCK_OFFSET_NS]))

    def build(self, first: int, number: int) -> None:
        for tick in range(first, first + number):
            self.on_air = {tick}
            self.builder.build(tick)

    def hear(self) -> list[Heard]:
        """All that has arrived."""
        heard = []
        with suppress(BlockingIOError):
            while True:
                data, (_, port) = self.ear.recvfrom(2_048)
                _, _, sequence, timestamp, ssrc = struct.unpack(">BBHII", data[:12])
                heard.append(Heard(ssrc, timestamp, sequence, port))
        return heard

    def worker_is_off(self, core: int) -> bool:
        self.sender.step_aside()
        return os.sched_getaffinity(0) == (CORES - {core} or CORES)

    def began_anew(self, before: int) -> bool:
        """The sender has another process; the worker looks where it is all the while, as its pace does."""
        self.sender.step_aside()
        return self.sender.restarts == 1 and self.sender.pid != before

    def reached(self, tick: int) -> bool:
        return self.now >= tick

    async def through(self, tick: int) -> None:
        """Wait until the sender is through with a tick."""
        await until(lambda: int(self.table.sent_tick.min()) >= tick)

    async def burst(self, number: int = 4) -> list[Heard]:
        """Build some ticks in time and return what arrives of them; again if the machine was too slow to count."""
        for _ in range(20):
            self.hear()
            skipped, dropped = int(self.table.counters[SKIPPED]), int(self.table.counters[DROPPED])
            first = self.now + 3
            self.build(first, number)
            in_time = self.now < first - 1
            await self.through(first + number + 1)
            if in_time and int(self.table.counters[SKIPPED]) == skipped:
                self.dropped = int(self.table.counters[DROPPED]) - dropped
                return self.hear()
        raise AssertionError("this machine never kept the pace")

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self.sender.stop()

    async def close(self) -> None:
        await self.stop()
        for one in (self.ear, *self.sockets):
            one.close()
        self.table.close()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    made.add_socket()
    yield made
    await made.close()


async def test_what_is_built_ahead_arrives_in_order_and_once(rig: Rig) -> None:
    """Each packet leaves in its tick: four ticks, four packets, in the order of time."""
    ssrc = rig.connect()
    await rig.start()
    sent = int(rig.table.counters[SENT])
    heard = await rig.burst(4)
    assert [one.ssrc for one in heard] == [ssrc] * 4
    assert [(one.timestamp - heard[0].timestamp) % 2**32 for one in heard] == [0, 960, 1_920, 2_880]
    assert [(one.sequence - heard[0].sequence) % 2**16 for one in heard] == [0, 1, 2, 3]
    assert int(rig.table.counters[SENT]) >= sent + 4
    assert int(rig.table.lateness.sum()) == int(rig.table.counters[SENT])  # one row: each is a first


async def test_no_packet_leaves_before_its_tick(rig: Rig) -> None:
    """What is built ahead waits: nothing has left while its tick is still to come."""
    rig.connect()
    await rig.start()
    looks = 0
    for _ in range(4):
        first = rig.now + 6
        rig.build(first, 1)
        while rig.now < first - 1:
            heard = rig.hear()
            if rig.now < first - 1:  # looked in time
                assert not heard
                looks += 1
            await asyncio.sleep(0.002)
        await rig.through(first)
        rig.hear()
    assert looks


async def test_each_row_leaves_by_its_own_socket(rig: Rig) -> None:
    """A connection's packets come from the port that its server knows, sockets added late included."""
    first, port = rig.connect(0), rig.port_of(0)
    await rig.start()
    late_port = rig.add_socket()
    late = rig.connect(1)
    heard = await rig.burst(3)
    assert sorted({(one.ssrc, one.port) for one in heard}) == [(first, port), (late, late_port)]
    assert len(heard) == 6


async def test_a_packet_for_a_tick_that_is_over_is_never_sent(rig: Rig) -> None:
    """Late is worse than lost: what was built too late stays, whatever the ring turns to."""
    rig.connect()
    await rig.start()
    rig.hear()
    rig.build(rig.now - 3, 2)
    await rig.through(rig.now + 2 * RING_TICKS)
    assert rig.hear() == []
    assert len(await rig.burst(2)) == 2


async def test_a_sender_that_was_stopped_skips_what_is_over(rig: Rig) -> None:
    """After a pause of the process the ticks missed are counted, and their packets do not leave in a burst."""
    rig.connect()
    await rig.start()
    rig.hear()
    assert rig.sender.pid is not None
    os.kill(rig.sender.pid, signal.SIGSTOP)
    first = rig.now + 3
    rig.build(first, 4)
    await until(lambda: rig.now > first + 20)
    before = rig.hear()  # a slot in whose sleep it was stopped may not have come yet: nothing was due
    os.kill(rig.sender.pid, signal.SIGCONT)
    await rig.through(first + 22)
    assert before + rig.hear() == []
    assert int(rig.table.counters[SKIPPED]) > 0
    assert len(await rig.burst(2)) == 2


async def test_a_sender_held_up_for_less_than_three_ticks_loses_nothing(rig: Rig) -> None:
    """A pause of two ticks is made up for: every packet leaves, in order, and none is skipped."""
    rig.connect()
    await rig.start()
    pid = rig.sender.pid
    assert pid is not None
    for _ in range(50):  # a pause that this machine made too short or too long proves nothing
        rig.hear()
        skipped = int(rig.table.counters[SKIPPED])
        first = rig.now + 2
        rig.build(first, 4)
        await until(partial(rig.reached, first - 1))
        os.kill(pid, signal.SIGSTOP)
        began_ns = time.monotonic_ns()
        await asyncio.sleep(2.1 * TICK_NS / 1e9)  # the pause itself
        os.kill(pid, signal.SIGCONT)
        held_ns = time.monotonic_ns() - began_ns
        await rig.through(first + 5)
        heard = rig.hear()
        if held_ns < 2.8 * TICK_NS and int(rig.table.counters[SKIPPED]) == skipped:
            break
    else:
        raise AssertionError("this machine never kept the pace")
    assert [(one.timestamp - heard[0].timestamp) % 2**32 for one in heard] == [0, 960, 1_920, 2_880]


async def test_a_packet_that_cannot_be_sent_costs_itself_alone(rig: Rig) -> None:
    """It is dropped and counted; its neighbours in the same batch leave, and the sender lives."""
    one, _, other = rig.connect(), rig.connect(remote=(LOOPBACK, 0)), rig.connect()  # nobody can send to port 0
    await rig.start()
    pid = rig.sender.pid
    heard = await rig.burst(3)
    assert {one_heard.ssrc for one_heard in heard} == {one, other}
    assert len(heard) == 6
    assert rig.dropped == 3
    assert int(rig.table.counters[SENDER_ERRNO]) != 0
    assert rig.sender.pid == pid
    assert rig.sender.restarts == 0


async def test_a_peer_that_refuses_costs_no_other_row_a_packet(rig: Rig) -> None:
    """What became of its packets is told to whoever sends next on the socket, and that is tried again."""
    rig.sockets[0].setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR, as the worker's sockets have it
    with rig.new_socket() as gone:
        refusing = gone.getsockname()
    rows = [rig.connect() for _ in range(ROWS - 1)]
    rows.insert(3, rig.connect(remote=refusing))
    await rig.start()
    heard = await rig.burst(8)
    assert len(heard) == 8 * (ROWS - 1)
    assert {one.ssrc for one in heard} == set(range(1, ROWS))
    assert rig.dropped == 0
    assert not rig.table.error.any()


async def test_a_packet_that_cannot_leave_is_told_of_its_row(rig: Rig) -> None:
    """The worker learns which of its guilds has no way out, and why."""
    rig.connect()
    lost = rig.connect(remote=(LOOPBACK, 0))
    await rig.start()
    await rig.burst(3)
    assert [bool(number) for number in rig.table.error[: lost + 1]] == [False] * (lost - 1) + [True, False]


async def test_a_killed_sender_is_started_anew_with_all_sockets(rig: Rig) -> None:
    """Losing the sender loses no session: the next one gets every socket and goes on."""
    rig.add_socket()
    ssrcs = [rig.connect(0), rig.connect(1)]
    await rig.start()
    pid = rig.sender.pid
    assert pid is not None
    before = (await rig.burst(1))[-1]
    os.kill(pid, signal.SIGKILL)
    await until(lambda: rig.sender.restarts == 1 and rig.sender.pid != pid)
    await rig.runs()
    heard = await rig.burst(3)
    assert sorted({(one.ssrc, one.port) for one in heard}) == sorted(zip(ssrcs, map(rig.port_of, (0, 1)), strict=True))
    assert len(heard) == 6
    assert before.port in {rig.port_of(0), rig.port_of(1)}
    rig.add_socket()
    third = rig.connect(2)
    assert (third, rig.port_of(2)) in {(one.ssrc, one.port) for one in await rig.burst(2)}


async def test_a_sender_that_stands_still_is_replaced(rig: Rig) -> None:
    """Stopped, it lives, and sends nothing; the pace of the worker notices, and nothing is lost but what was due."""
    ssrc = rig.connect()
    await rig.start()
    await rig.burst()
    stopped = rig.sender.pid
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)

    def looked() -> bool:
        rig.sender.look()
        return rig.sender.restarts == 1 and rig.sender.pid != stopped

    async with asyncio.timeout(BOUND_S):
        while not looked():  # noqa: ASYNC110 - the pace
            await asyncio.sleep(0.02)
    assert not alive(stopped)
    await rig.runs()
    assert {one.ssrc for one in await rig.burst()} == {ssrc}


async def test_a_sender_that_runs_is_left_alone(rig: Rig) -> None:
    """With rows or without."""
    await rig.start()
    pid = rig.sender.pid
    for number in range(60):
        if number == 30:
            rig.connect()
        rig.sender.look()
        await asyncio.sleep(0.02)
    assert (rig.sender.pid, rig.sender.restarts) == (pid, 0)


async def test_a_worker_keeps_off_the_core_of_its_sender(rig: Rig) -> None:
    """It follows one that goes first from core to core; a sender that is started anew may use all of them.

    A worker that has one core stays on it, and one whose sender does not go first may use all.
    """
    await rig.start()
    rig.table.counters[PRIORITY] = GRANTED
    try:
        for core in sorted(CORES)[:2]:
            assert rig.sender.pid is not None
            os.sched_setaffinity(rig.sender.pid, {core})
            await until(partial(rig.worker_is_off, core))
        rig.table.counters[PRIORITY] = REFUSED
        rig.sender.step_aside()
        assert os.sched_getaffinity(0) == CORES
        rig.table.counters[PRIORITY] = GRANTED
        first = rig.sender.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(partial(rig.began_anew, first))
        assert rig.sender.pid is not None
        assert os.sched_getaffinity(rig.sender.pid) == CORES
    finally:
        os.sched_setaffinity(0, CORES)


def test_as_many_workers_as_cores_choose_none() -> None:
    """Each would be left with the core of another's sender, and could not be moved."""
    try:
        Cores(workers=len(CORES)).keep_off(min(CORES))
        assert os.sched_getaffinity(0) == CORES
    finally:
        os.sched_setaffinity(0, CORES)


async def test_a_socket_handed_over_while_the_sender_is_dead_is_not_lost(rig: Rig) -> None:
    """Between a death and the next start sockets are taken, too."""
    rig.connect(0)
    await rig.start()
    pid = rig.sender.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not alive(pid))
    late_port = rig.add_socket()
    late = rig.connect(1)
    await until(lambda: rig.sender.restarts == 1 and rig.sender.pid != pid)
    await rig.runs()
    assert (late, late_port) in {(one.ssrc, one.port) for one in await rig.burst(2)}


async def test_hundreds_of_sockets_are_handed_over(rig: Rig) -> None:
    """With one socket for each guild the sender has them all, at its start as well as later."""
    for _ in range(400):
        rig.add_socket()
    first = rig.connect(399)
    await rig.start()
    for _ in range(100):
        rig.add_socket()
    late = rig.connect(500)
    assert sorted({(one.ssrc, one.port) for one in await rig.burst(2)}) == [
        (first, rig.port_of(399)),
        (late, rig.port_of(500)),
    ]


async def test_a_row_that_was_closed_sends_no_more(rig: Rig) -> None:
    """What was built for it is void; the others go on."""
    rig.connect()
    staying = rig.connect()
    await rig.start()
    await rig.burst(1)
    rig.builder.close(0)
    heard = await rig.burst(2)
    assert [one.ssrc for one in heard] == [staying] * 2


async def test_a_wrong_clock_of_the_host_is_made_up_for() -> None:
    """The sender sends by common time: its own clock, wrong in offset and rate, plus what the worker measured."""
    rig = Rig("5,200")
    try:
        rig.table.head[CLOCK_OFFSET_NS] = -3_000_000_000
        rig.add_socket()
        rig.connect()
        await rig.start()
        assert len(await rig.burst(3)) == 3
    finally:
        await rig.close()


async def test_a_term_signal_lets_what_is_built_leave_first(rig: Rig) -> None:
    """A signal to the whole group must not cut off the closing silence: the sender ends when nothing is left."""
    rig.connect()
    await rig.start()
    for _ in range(20):
        rig.hear()
        pid = rig.sender.pid
        assert pid is not None
        skipped = int(rig.table.counters[SKIPPED])
        first = rig.now + 2
        rig.build(first, 6)
        os.kill(pid, signal.SIGTERM)
        in_time = rig.now < first - 1
        await until(lambda: not alive(pid))  # noqa: B023
        heard = rig.hear()
        if in_time and int(rig.table.counters[SKIPPED]) == skipped:
            assert len(heard) == 6
            return
        await until(lambda: rig.sender.pid != pid)  # noqa: B023
        await rig.runs()
    raise AssertionError("this machine never kept the pace")


async def test_a_stopped_sender_is_gone(rig: Rig) -> None:
    """Who stops it leaves no process behind."""
    await rig.start()
    pid = rig.sender.pid
    assert pid is not None
    await rig.stop()
    assert not alive(pid)


_PARENT = """
import asyncio
import sys
import time
from pathlib import Path

from worker.fanout.rows import RowTable
from worker.fanout.sending import SenderProcess

async def main():
    table = RowTable(2)
    sender = SenderProcess(table, "0,0")
    await sender.start()
    while not table.sent_tick[0]:
        await asyncio.sleep(0.01)
    Path(sys.argv[1]).write_text(f"{sender.pid}\\n")
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_the_sender_dies_with_its_worker(tmp_path: Path) -> None:
    """Whichever way a worker ends, nobody goes on sending for it."""
    told = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", _PARENT, str(told)]) as parent:  # noqa: ASYNC220 - for a moment
        await until(lambda: told.exists() and told.read_text().endswith("\n"))
        pid = int(told.read_text())
        try:
            assert alive(pid)
            parent.kill()
            await until(lambda: not alive(pid))
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_what_is_due_is_read_before_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder writes the other way round: so the sender never sends a packet that it saw half of."""
    table, tick = RowTable(1), 2 * RING_TICKS
    table.due[0] = tick

    def fence() -> None:
        """In this moment the rest of what was written before `due` comes into view."""
        rows.fence()
        table.length[0] = 5
        table.packets[0, 0, :5] = np.frombuffer(b"whole", np.uint8)

    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as ear, closing(ear.dup()) as mouth:
        ear.bind((LOOPBACK, 0))
        ear.settimeout(BOUND_S)
        address = struct.pack("=H", socket.AF_INET) + struct.pack(">H", ear.getsockname()[1])
        table.address[0, :8] = np.frombuffer(address + socket.inet_aton(LOOPBACK), np.uint8)
        plan = sender.SlotPlan(table, np.array([0], np.intp), [mouth.fileno()])
        monkeypatch.setattr(sender, "fence", fence)
        assert plan.send(table, tick) == (1, 0)
        assert ear.recv(100) == b"whole"
    table.close()


def test_the_sender_imports_nothing_that_it_does_not_need() -> None:
    """A process that must never be late has no event loop, no Redis, no logging and no records."""
    code = "import sys, worker.fanout.sender; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "numpy" in loaded
    assert not loaded & {"asyncio", "redis", "structlog", "logging", "msgspec", "pydantic", "av", "cryptography", "ssl"}
