"""`python -m tests.emulator`: the local Discord as a process of its own.

Prints one line of JSON when ready: {"control": "http://127.0.0.1:PORT", "ca_file": "/abs/path/ca.pem",
"api": "https://127.10.0.1:PORT/api/v10"}.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
from pathlib import Path

import msgspec
import uvloop

from tests.emulator.local import LocalDiscord
from tests.emulator.main.records import GatewayLimits
from tests.emulator.parent import die_with_parent


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def _limits(text: str) -> GatewayLimits:
    return msgspec.json.decode(text, type=GatewayLimits)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description="The local Discord.")
    parser.add_argument("--endpoint-guilds", type=int, default=8, help="guilds that share one voice server")
    parser.add_argument("--control", type=_address, default=("127.0.0.1", 0), help="loopback address, port 0 for any")
    parser.add_argument("--dir", type=Path, default=None, help="folder for the CA (a temporary one if not given)")
    parser.add_argument("--sample", type=int, default=128, help="so many guilds are decrypted and kept in full")
    parser.add_argument("--listen-every", type=int, default=1, help="of so many voice servers one is listened to")
    parser.add_argument("--heartbeat-ms", type=int, default=13_750, help="heartbeat interval that Hello tells")
    parser.add_argument(
        "--gateway", type=_limits, default=None, help="JSON of main/records.py's GatewayLimits where they differ"
    )
    return parser.parse_args()


_NICENESS = 10
"""It stands for other machines: on this one, what is measured goes first."""


def _stand_back() -> None:
    """Let others of this machine go first, also where the kernel weighs sessions and not processes: sched(7)."""
    os.nice(_NICENESS)
    autogroup = Path("/proc/self/autogroup")
    if os.getsid(0) == os.getpid() and autogroup.exists():
        # the kernel takes few such wishes at a time, and it is no more than a wish
        with contextlib.suppress(BlockingIOError, PermissionError):
            autogroup.write_text(str(_NICENESS))


async def _serve(options: argparse.Namespace) -> None:
    _stand_back()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    discord = LocalDiscord(
        endpoint_guilds=options.endpoint_guilds,
        control=options.control,
        folder=options.dir,
        sample=options.sample,
        listen_every=options.listen_every,
        heartbeat_interval_ms=options.heartbeat_ms,
        gateway=options.gateway,
    )
    async with discord:
        ready = {"control": discord.control_url, "ca_file": str(discord.ca_file), "api": discord.api_url}
        print(json.dumps(ready), flush=True)
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({stopped, discord.reading}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    die_with_parent(os.getppid())
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvloop.run(_serve(_options()))


if __name__ == "__main__":
    main()
