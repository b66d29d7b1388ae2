"""`guildcast bench --here`: how many guilds a core of this machine carries, and what limits them.

Nothing is sent beyond 127.0.0.1. The measuring is the worker's own, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from shared.capacity import MEASURED_SHARE, PACKETS_PER_S, Capability, Measured, guilds_within, limits
from shared.settings import Settings
from shared.text import in_words

_ROOT = Path(__file__).resolve().parents[2]
_AT_LEAST_S = 30.0
"""For the start of the measuring process, on a slow machine."""
_BELOW_UDP_BYTES = 8 + 20 + 14 + 4 + 8 + 12
"""UDP, IPv4, Ethernet with check sum, preamble and gap: what a packet takes of a port's time."""
_KERNEL_PACKET_BYTES = 1280
"""What the kernel counts against a send buffer for a packet of about 300 bytes."""
_SLOTS = 20
_MBIT = 1_000_000


class Limit(NamedTuple):
    """One thing that ends somewhere.

    Attributes:
        guilds: that one worker, or the whole host, carries by it; None where that is not known.
        why: what the number comes from, or what to do about it.
    """

    name: str
    guilds: float | None
    why: str


class Port(NamedTuple):
    """The interface that packets leave by; its speed is None where it does not tell."""

    name: str
    mbit_per_s: int | None


def default_port(proc: Path = Path("/proc"), sys_class_net: Path = Path("/sys/class/net")) -> Port | None:
    """Interface of the default route; None without one. Source: proc(5), /proc/net/route; sysfs-class-net."""
    try:
        routes = (proc / "net" / "route").read_text().splitlines()[1:]
    except OSError:
        return None
    names = [fields[0] for fields in map(str.split, routes) if len(fields) > 1 and fields[1] == "00000000"]
    if not names:
        return None
    try:
        speed = int((sys_class_net / names[0] / "speed").read_text())
    except (OSError, ValueError):  # a virtual one has none
        speed = -1
    return Port(names[0], speed if speed > 0 else None)


def bits_per_s(packet_bytes: int) -> int:
    """What one guild takes of a port."""
    return (packet_bytes + _BELOW_UDP_BYTES) * 8 * PACKETS_PER_S


def worker_limits(found: Capability, one: Measured, settings: Settings) -> list[Limit]:
    """What limits one of this host's fan-out workers."""
    workers = max(1, settings.fanout_workers)
    by_cpu = limits(one.cost, found.cores / workers, MEASURED_SHARE)
    told = [
        Limit(
            "CPU of the worker", by_cpu["worker"], f"{MEASURED_SHARE:.0%} of a core at {one.worker_us:.1f} us a packet"
        ),
        Limit(
            "CPU of its sender", by_cpu["sender"], f"{MEASURED_SHARE:.0%} of a core at {one.sender_us:.1f} us a packet"
        ),
        Limit(
            "cores of both",
            by_cpu["cores"],
            f"{found.cores:g} cores, GUILDCAST_FANOUT_WORKERS {workers}: a worker uses two cores at most",
        ),
        Limit("open files", found.files, "raise the hard limit (LimitNOFILE, ulimit -Hn)"),
        Limit(
            "UDP send buffer",
            found.send_buffer_bytes // _KERNEL_PACKET_BYTES * _SLOTS,
            f"{found.send_buffer_bytes // 1024} KiB a socket, if all guilds shared one: raise net.core.wmem_max",
        ),
    ]
    if settings.worker_capacity is not None:
        told.append(Limit("GUILDCAST_WORKER_CAPACITY", settings.worker_capacity, "as set"))
    return told


def port_limit(port: Port | None, one: Measured) -> Limit:
    """What the network carries of this host's guilds."""
    guild = f"{bits_per_s(one.packet_bytes) / 1e3:.0f} kbit/s a guild at 96 kbit/s of sound"
    if port is None:
        return Limit("network", None, f"{guild}; there is no default route")
    if port.mbit_per_s is None:
        return Limit(f"network, {port.name}", None, f"{guild}; the interface tells no speed")
    full = port.mbit_per_s * _MBIT / bits_per_s(one.packet_bytes)
    return Limit(f"network, {port.name}", full, f"{guild}, port of {port.mbit_per_s} Mbit/s full")


def measure(seconds: float) -> Capability:
    """Run the test in a process of its own.

    Raises: subprocess.SubprocessError; msgspec.MsgspecError: what it printed is no result.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", "worker.fanout.capacity", "--seconds", str(seconds)],
        env=os.environ | {"PYTHONPATH": str(_ROOT)},  # what is measured lies beside us, wherever the caller stands
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_AT_LEAST_S + 4 * seconds,
        check=True,
    )
    return msgspec.json.decode(done.stdout, type=Capability)


def bench_here(settings: Settings, seconds: float) -> int:
    """Measure and print; returns the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        found = measure(seconds)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {error.returncode}"]
        console.print(f"[red]guildcast bench: nothing could be measured: {lines[-1]}[/red]", highlight=False)
        return 1
    except (subprocess.SubprocessError, msgspec.MsgspecError) as error:
        console.print(f"[red]guildcast bench: nothing could be measured: {in_words(error)}[/red]", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    console.print(_costs(found))
    # Encrypted end to end, by the mode that is chosen where a server offers it: as nearly all guilds are.
    usual = next(one for one in found.measured if one.dave)
    per_worker, port = worker_limits(found, usual, settings), port_limit(default_port(), usual)
    console.print(_limits(per_worker, port, max(1, settings.fanout_workers)))
    return 0


def _costs(found: Capability) -> Table:
    table = Table(
        title=f"Microseconds of CPU per packet; guilds at {MEASURED_SHARE:.0%} of each of {found.cores:g} cores",
        title_justify="left",
        caption="build, send: alone, with cold caches (lowest and highest); worker, sender: as whole processes",
        caption_justify="left",
    )
    for name in (
        "transport",
        "end to end",
        "build",
        "send",
        "worker",
        "sender",
        "guilds a core",
        "guilds a worker (2 cores)",
    ):
        table.add_column(name, justify="left" if name in ("transport", "end to end") else "right")
    for one in found.measured:
        build, send = (f"{each.median:.2f} ({each.least:.2f}-{each.most:.2f})" for each in (one.build_us, one.send_us))
        table.add_row(
            *(one.mode.removeprefix("aead_").removesuffix("_rtpsize"), "DAVE" if one.dave else "-", build, send),
            *(f"{one.worker_us:.2f}", f"{one.sender_us:.2f}"),
            *(f"{guilds_within(one.cost, cores, MEASURED_SHARE):,}" for cores in (1, 2)),
        )
    return table


def _limits(per_worker: list[Limit], port: Limit, workers: int) -> Table:
    """What limits guilds with DAVE: of a worker, and of the host; the lowest is marked."""
    whole = [Limit(one.name, (one.guilds or 0) * workers, one.why) for one in per_worker] + [port]
    known = [one for one in whole if one.guilds is not None]
    lowest = min(known, key=lambda one: one.guilds or 0.0)
    table = Table(
        title=f"What limits guilds with DAVE here: {int(lowest.guilds or 0):,} in all, by {lowest.name}",
        title_justify="left",
    )
    for name in ("limit", "guilds a worker", "guilds here", ""):
        table.add_column(name, justify="right" if name.startswith("guilds") else "left")
    for number, one in enumerate(whole):
        own = f"{int(per_worker[number].guilds or 0):,}" if number < len(per_worker) else "-"
        here = "unknown" if one.guilds is None else f"{int(one.guilds):,}"
        table.add_row(one.name, own, here, one.why, style="bold" if one is lowest else "")
    return table
