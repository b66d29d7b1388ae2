"""What a transport mode costs per packet, alone and with the sending: python -m tests.bench.seal --guilds 500

One builder and one plan of sending per mode, side by side in one process, tick by tick in turn, so that whatever else
the machine does falls on all modes alike. CPU of the thread, medians over ticks. Packets go to a socket on loopback.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from dataclasses import dataclass, field

import numpy as np

from shared.protocol.transport_crypto import AES_GCM, KEY_BYTES, MODES
from worker.fanout.build import Builder, Lane, Target
from worker.fanout.rows import RowTable
from worker.fanout.sender import SlotPlan

_FRAME = bytes(240)
_WARM_UP_TICKS = 5


@dataclass
class _Bed:
    """All rows of one mode."""

    table: RowTable
    builder: Builder
    plan: SlotPlan
    build_us: list[float] = field(default_factory=list)
    send_us: list[float] = field(default_factory=list)


def _bed(mode: str, guilds: int, remote: tuple[str, int], fd: int) -> _Bed:
    table = RowTable(guilds)
    builder = Builder(table)
    lane = Lane(frame_at=lambda _tick: _FRAME)
    builder.lanes.append(lane)
    for number in range(guilds):
        target = Target(number, remote, 0, mode, os.urandom(KEY_BYTES))
        builder.tune(builder.open(target), lane)
    return _Bed(table, builder, SlotPlan(table, np.arange(guilds), [fd]))


def measure(guilds: int, ticks: int) -> dict[str, tuple[float, float]]:
    """Per mode: microseconds of CPU to build a packet, and to build and send it."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("127.0.0.1", 0))
        sender.bind(("127.0.0.1", 0))
        beds = {mode: _bed(mode, guilds, receiver.getsockname(), sender.fileno()) for mode in MODES}
        for tick in range(1, _WARM_UP_TICKS + ticks + 1):
            for bed in beds.values():
                before_ns = time.thread_time_ns()
                bed.builder.build(tick)
                built_ns = time.thread_time_ns()
                sent, _ = bed.plan.send(bed.table, tick)
                sent_ns = time.thread_time_ns()
                assert sent == guilds
                if tick > _WARM_UP_TICKS:
                    bed.build_us.append((built_ns - before_ns) / 1e3 / guilds)
                    bed.send_us.append((sent_ns - built_ns) / 1e3 / guilds)
        for bed in beds.values():
            bed.table.close()
        # Sending knows no mode: one figure for all keeps its noise out of the comparison.
        send_us = statistics.median(figure for bed in beds.values() for figure in bed.send_us)
        return {
            mode: (statistics.median(bed.build_us), statistics.median(bed.build_us) + send_us)
            for mode, bed in beds.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guilds", type=int, default=500)
    parser.add_argument("--ticks", type=int, default=500)
    options = parser.parse_args()
    figures = measure(options.guilds, options.ticks)
    floor_us = figures[AES_GCM][1]
    sys.stdout.write(f"transport modes, {options.guilds} guilds, frames of {len(_FRAME)} bytes: us of CPU per packet\n")
    for mode, (build_us, total_us) in figures.items():
        sys.stdout.write(f"  {mode:34} build {build_us:5.2f}  with sending {total_us:5.2f}  ")
        sys.stdout.write(f"ratio {total_us / floor_us:.2f}\n")


if __name__ == "__main__":
    main()
