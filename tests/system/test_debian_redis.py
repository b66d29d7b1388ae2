"""The server that a distribution ships instead of the embedded one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from shared.cli.redis_server import RedisServer, find_server
from shared.store.client import Store


async def test_a_redis_on_path_is_preferred() -> None:
    """Where the system has a Redis server, that one is started, not the embedded one."""
    assert find_server() == shutil.which("redis-server")
    with RedisServer() as server:
        store = Store(server.url)
        told = await store.command("INFO", "server")
        await store.close()
    assert int(str(told["redis_version"]).split(".")[0]) >= 7


def test_the_main_job_runs_on_it() -> None:
    """`guildcast run` is heard by every guild on the distribution's Redis."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("guildcast")), "run", "--guilds", "8", "--duration", "3"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8/8" in done.stdout
    assert " 0 lost, 0 duplicated, 0 out of order" in done.stdout
