"""The supervisor, one per host: starts the workers, deals out the UDP ports, reports the dead at once, restarts them.

Its children die with it, whichever way it ends. Source: design section 2.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import signal
import socket
import sys
import time

from shared.errors import EXIT_CONFIG, ConfigError, ErrorCode, StoreError
from shared.life import Life, Watch
from shared.logs import get_logger
from shared.settings import Settings, parse_ports
from shared.store.client import Store, reach
from shared.store.keys import Keys
from shared.tasks import begin
from shared.text import in_words
from worker.identity import Identity, host_name
from worker.membership import RECORD_TTL_MS

STOP_WITHIN_S = 2.5
_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 30.0
_HEALTHY_AFTER_S = 30.0
_REPORT_TRIES = 5
_LOOK_EVERY_S = 0.25
_LOOKS_WITHOUT_LIFE = 8
"""Workers beat twice a second: one that stands still is replaced 1.75 to 2.5 s later, before its lease runs out."""


def deal_ports(ports: range, workers: int) -> list[range]:
    """Equal parts of the host's ports, one per fan-out worker; empty ranges where the system picks.

    Raises: ConfigError when there are fewer ports than workers.
    """
    if not ports:
        return [range(0)] * workers
    share = len(ports) // workers if workers else 0
    if workers and not share:
        raise ConfigError(
            f"GUILDCAST_UDP_PORTS: {ports.start}-{ports.stop - 1} has {len(ports)} ports, "
            f"allowed: at least one for each of {workers} fan-out workers",
            code=ErrorCode.UDP_PORTS_TOO_FEW,
        )
    return [range(ports.start + n * share, ports.start + (n + 1) * share) for n in range(workers)]


def check_ports(address: str, ports: range) -> None:
    """See that every port of the range can be bound.

    Raises: ConfigError naming the port.
    """
    for port in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((address, port))
            except OSError as error:
                reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be bound: {error.strerror}"
                raise ConfigError(
                    f"GUILDCAST_UDP_PORTS: {ports.start}-{ports.stop - 1}: port {port} on {address} {reason}, "
                    "allowed: ports that nobody else uses",
                    code=ErrorCode.UDP_PORTS_IN_USE,
                ) from error


class _Child:
    """One worker process and its restarts."""

    def __init__(self, role: str, number: int, ports: range) -> None:
        self.role = role
        self.name = f"{host_name()}-{role}-{number}"
        self.number = number
        self.ports = ports
        self.process: asyncio.subprocess.Process | None = None
        self.id = ""
        self.life = Life()

    async def start(self) -> None:
        self.life.close()
        self.life = Life()
        self.id = f"{host_name()}-{self.role}-{self.number}-{secrets.token_hex(4)}"
        identity = Identity(self.id, self.name, os.getpid(), self.ports, self.life.fd)
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"worker.{self.role}", *identity.arguments()),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(self.life.fd,),
            start_new_session=True,  # Ctrl-C reaches the supervisor alone, which ends its children in order
        )


class Supervisor:
    """Parent of all workers of this host."""

    def __init__(self, settings: Settings) -> None:
        ports = parse_ports(settings.udp_ports)
        shares = deal_ports(ports, settings.fanout_workers)
        check_ports(settings.udp_address, ports)
        self._children = [_Child("fanout", number, share) for number, share in enumerate(shares)]
        self._children += [_Child("encode", number, range(0)) for number in range(settings.encode_workers)]
        self._keys = Keys(settings.namespace)
        self._store = Store(settings.redis_url, ca_file=settings.tls_ca_file)
        self._stopping = False

    async def run(self, stop: asyncio.Event) -> None:
        """Keep the workers running until `stop` is set.

        Raises: StoreUnavailable: Redis did not answer at the start. ConfigError: a worker refused its settings.
        """
        try:
            if not await reach(self._store, stop):
                return
            watchers = [asyncio.create_task(self._keep(child)) for child in self._children]
            stopped = asyncio.create_task(stop.wait())
            get_logger().info("supervisor.started", workers=len(self._children))
            await asyncio.wait([stopped, *watchers], return_when=asyncio.FIRST_COMPLETED)
            self._stopping = True
            stopped.cancel()
            await self._stop_children()
            for watcher in watchers:
                watcher.cancel()
            for result in await asyncio.gather(*watchers, stopped, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
        finally:
            await self._store.close()
        get_logger().info("supervisor.stopped")

    async def _keep(self, child: _Child) -> None:
        """Run a child for ever.

        Raises: ConfigError: its settings are wrong, a restart would not help.
        """
        backoff_s = _FIRST_BACKOFF_S
        while True:
            started_s = time.monotonic()
            try:
                await child.start()
            except OSError as error:  # no process to be had just now
                get_logger().error("worker.unstartable", worker=child.name, error=in_words(error))
            else:
                assert child.process is not None
                watching = begin(self._watch(child), f"watch of {child.name}")
                status = await child.process.wait()
                watching.cancel()
                if self._stopping:
                    return
                get_logger().error("worker.died", worker=child.id, status=status)
                await self._report_gone(child)
                if status == EXIT_CONFIG:
                    raise ConfigError(f"worker {child.name} refused its settings, see its line above")
            if time.monotonic() - started_s > _HEALTHY_AFTER_S:
                backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(_LONGEST_BACKOFF_S, backoff_s * 2)

    async def _watch(self, child: _Child) -> None:
        """Kill a worker that stands still: as long as it lives, nobody else may have what it holds."""
        assert child.process is not None
        looks = Watch(_LOOKS_WITHOUT_LIFE)
        while self._stopping or not looks.stands_still(child.life.beats):  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(_LOOK_EVERY_S)
        get_logger().error("worker.stood_still", worker=child.id, pid=child.process.pid)
        child.process.kill()

    async def _report_gone(self, child: _Child) -> None:
        """Tell the leader that a worker is dead, so that nobody waits for its lease to run out."""
        for attempt in range(_REPORT_TRIES):
            try:
                await self._store.transaction(
                    [
                        ("DEL", self._keys.lease(child.id)),
                        ("HSET", self._keys.worker(child.id), "gone", "true"),
                        ("PEXPIRE", self._keys.worker(child.id), RECORD_TTL_MS),
                        ("PUBLISH", self._keys.wake_leader, child.id),
                    ]
                )
                return
            except StoreError as error:
                get_logger().warning("worker.death_unreported", error=error.message)
                await asyncio.sleep(0.1 * 2**attempt)

    async def _stop_children(self) -> None:
        running = [child.process for child in self._children if child.process and child.process.returncode is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        if not running:
            return
        _, late = await asyncio.wait(
            [asyncio.create_task(process.wait()) for process in running], timeout=STOP_WITHIN_S
        )
        if late:
            get_logger().warning("worker.killed", count=len(late), after_s=STOP_WITHIN_S)
            for process in running:
                if process.returncode is None:
                    process.kill()
            await asyncio.gather(*late)
