"""Starts and watches the sender of a fan-out worker and hands it the sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections import deque

from shared.life import Watch
from shared.logs import get_logger
from shared.settings import parse_clock_error
from shared.text import in_words
from worker.fanout.cores import Cores
from worker.fanout.rows import GRANTED, PRIORITY, SENDER_CORE, SOCKETS, RowTable

_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 5.0
_HEALTHY_AFTER_S = 10.0
_END_WITHIN_S = 1.0
_STUCK_PASSES = 20
"""Of the worker's pace without a tick of the sender's: 400 ms."""
_START_PASSES = 250
"""The same before its first tick."""


class SenderProcess:
    """The one sender of a worker; started anew when it ends, without the loss of a voice session.

    Args:
        clock_error: of this host's clock, for tests.
        workers: on this host.
    """

    def __init__(self, table: RowTable, clock_error: str, workers: int = 1) -> None:
        self._table = table
        self._clock_error = parse_clock_error(clock_error)
        self._sockets: list[socket.socket] = []
        self._unpassed: deque[socket.socket] = deque()
        self._link: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._cores = Cores(workers)
        self._looks = Watch(_STUCK_PASSES)
        self._start_passes = 0
        self._begun_at_tick = 0
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def add_socket(self, one: socket.socket) -> None:
        """Hand over a socket; its number is the count of those before it. Before any row that uses it."""
        self._sockets.append(one)
        self._table.head[SOCKETS] = len(self._sockets)
        if self._link is not None:
            self._unpassed.append(one)
            self._pass()

    def _pass(self) -> None:
        """Pass sockets on in their order; what the link does not take now goes when it has room."""
        loop = asyncio.get_running_loop()
        link = self._link
        while link is not None and self._unpassed:
            try:
                socket.send_fds(link, [b"s"], [self._unpassed[0].fileno()])
            except BlockingIOError:
                loop.add_writer(link, self._pass)
                return
            except OSError as error:  # the sender just died: the next one gets all sockets
                get_logger().warning("sender.unreachable", error=in_words(error))
                self._unpassed.clear()
                break
            self._unpassed.popleft()
        if link is not None:
            loop.remove_writer(link)

    async def start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        offset_s, drift_ppm = self._clock_error
        self._cores.use_all()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "worker.fanout.sender"),
                *(str(self._table.fd), str(self._table.rows), str(theirs.fileno()), str(os.getpid())),
                *(str(offset_s), str(drift_ppm)),
                pass_fds=(self._table.fd, theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if not name.startswith("GUILDCAST_")},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._unlink()
        self._expect()
        ours.setblocking(False)
        self._link = ours
        self._unpassed = deque(self._sockets)
        self._pass()

    def look(self) -> None:
        """Called with each pass of the pace: a sender that goes through no ticks while we do sends nothing either.

        It is killed, which also a stopped one obeys, and `watch` starts the next.
        """
        if self._process is None or self._process.returncode is not None:
            return
        ticks = int(self._table.sent_tick[0]) - self._begun_at_tick
        self._start_passes = 0 if ticks else self._start_passes + 1
        if self._looks.stands_still(ticks) or self._start_passes > _START_PASSES:
            get_logger().error("sender.stood_still", pid=self._process.pid)
            self._process.kill()
            self._expect()

    def _expect(self) -> None:
        """Count anew from here: nothing is missed before the first tick."""
        self._begun_at_tick = int(self._table.sent_tick[0])
        self._looks = Watch(_STUCK_PASSES)
        self._start_passes = 0

    def step_aside(self) -> None:
        """Keep this process off the core of a sender that goes first; called each tick, as the kernel may move it."""
        counters = self._table.counters
        if counters[PRIORITY] == GRANTED and counters[SENDER_CORE]:
            self._cores.keep_off(int(counters[SENDER_CORE]) - 1)
        else:
            self._cores.use_all()

    def _unlink(self) -> None:
        if self._link is not None:
            asyncio.get_running_loop().remove_writer(self._link)
            self._link.close()
            self._link = None

    async def watch(self) -> None:
        """Start the sender anew whenever it ends. Never returns."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            started_s = time.monotonic()
            if self._process is not None:
                status = await self._process.wait()
                self.restarts += 1
                get_logger().error("sender.died", status=status, restarts=self.restarts)
            if time.monotonic() - started_s > _HEALTHY_AFTER_S:
                backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(_LONGEST_BACKOFF_S, backoff_s * 2)
            try:
                await self.start()
            except OSError as error:  # no process to be had just now
                get_logger().error("sender.unstartable", error=in_words(error))
                self._process = None

    async def stop(self) -> None:
        """End the sender; it has nothing left to send."""
        self._cores.use_all()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(_END_WITHIN_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._unlink()
