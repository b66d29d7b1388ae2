"""The sender as a thread of its worker: what the product would be without a process of its own for it."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections import deque
from contextlib import suppress

from shared.clock import LocalClock
from worker.fanout.sender import Sender, Timer
from worker.fanout.sending import SenderProcess


class SenderThread(SenderProcess):
    """In the place of `SenderProcess`: the same rows, sockets and code, under the worker's own interpreter lock."""

    async def start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setblocking(False)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        sender = Sender(self._table, theirs, LocalClock(*self._clock_error))
        for number, handler in handlers.items():  # those are the worker's here
            signal.signal(number, handler)
        self._unlink()
        self._link = ours
        self._unpassed = deque(self._sockets)
        self._pass()
        self._thread = threading.Thread(target=_run, args=(sender,), name="sender", daemon=True)
        self._thread.start()

    async def watch(self) -> None:
        """Nothing to start anew: it ends with its worker."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        self._unlink()  # tells the thread to end
        await asyncio.to_thread(self._thread.join, 1.0)


def _run(sender: Sender) -> None:
    sender._timer = Timer()  # the kernel's slack of timers is a thread's own
    with suppress(SystemExit):
        sender.run()
