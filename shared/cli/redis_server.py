"""A Redis server of our own, for `make run` and for tests: nothing of it outlives its user."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.errors import ConfigError, StoreUnavailable
from shared.process import parent_death_signal

EMBEDDED = Path(__file__).resolve().parents[2] / ".run" / "redis" / "redis-server"
_READY_WITHIN_S = 10.0
_POLL_S = 0.02


def find_server() -> str:
    """Path of a Redis or Valkey server.

    Raises: ConfigError saying what to install.
    """
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    if EMBEDDED.exists():
        return str(EMBEDDED)
    raise ConfigError(
        "GUILDCAST_REDIS_URL is not set and there is no redis-server or valkey-server on PATH: "
        "install one, or run `python deploy/embedded_redis.py`"
    )


class RedisServer:
    """A server on a Unix socket in a folder of its own, without persistence."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="guildcast-redis-")
        self._socket = Path(self._folder.name) / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, again after a `stop` if need be, and wait until it listens.

        Raises: ConfigError, StoreUnavailable.
        """
        self._process = subprocess.Popen(
            [
                *(find_server(), "--port", "0", "--unixsocket", str(self._socket), "--save", ""),
                *("--appendonly", "no", "--dir", self._folder.name, "--loglevel", "warning"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=parent_death_signal,
        )
        deadline = time.monotonic() + _READY_WITHIN_S
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise StoreUnavailable(f"redis-server did not start (exit status {self._process.poll()})")
            time.sleep(_POLL_S)

    def _listens(self) -> bool:
        """Whether a connection is taken: the path is there a moment earlier, or from a server that was killed."""
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self._socket))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            return True

    def stop(self) -> None:
        """End the server; its data is gone."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._socket.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._folder.cleanup()
