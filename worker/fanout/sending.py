"""Starts and watches the sender of a fan-out worker and hands it the sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

from shared.logs import get_logger
from shared.settings import parse_clock_error
from worker.fanout.rows import RowTable

_RESTART_AFTER_S = 0.1
_END_WITHIN_S = 1.0


class SenderProcess:
    """The one sender of a worker; started anew when it ends, without the loss of a voice session."""

    def __init__(self, table: RowTable, clock_error: str) -> None:
        self._table = table
        self._clock_error = parse_clock_error(clock_error)
        self._sockets: list[socket.socket] = []
        self._link: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def add_socket(self, one: socket.socket) -> None:
        """Hand over a socket; its number is the count of those before it. Before any row that uses it."""
        self._sockets.append(one)
        if self._link is not None:
            self._pass(self._link, one)

    @staticmethod
    def _pass(link: socket.socket, one: socket.socket) -> None:
        try:
            socket.send_fds(link, [b"s"], [one.fileno()])
        except OSError as error:  # the sender just died: the next one gets all sockets
            get_logger().warning("sender.unreachable", error=str(error))

    async def start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        offset_s, drift_ppm = self._clock_error
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "worker.fanout.sender"),
                *(str(self._table.fd), str(self._table.rows), str(theirs.fileno()), str(os.getpid())),
                *(str(offset_s), str(drift_ppm)),
                pass_fds=(self._table.fd, theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        if self._link is not None:
            self._link.close()
        self._link = ours
        for one in self._sockets:
            self._pass(ours, one)

    async def watch(self) -> None:
        """Start the sender anew whenever it ends. Never returns."""
        while True:
            assert self._process is not None
            status = await self._process.wait()
            self.restarts += 1
            get_logger().error("sender.died", status=status, restarts=self.restarts)
            await asyncio.sleep(_RESTART_AFTER_S)
            await self.start()

    async def stop(self) -> None:
        """End the sender; it has nothing left to send."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(_END_WITHIN_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._link is not None:
            self._link.close()
            self._link = None
