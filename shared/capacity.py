"""How many guilds fit: what a packet costs, against what a machine has. Pure.

A fan-out worker is two processes, one that builds and one that sends, and each has one core at most. So each has to
stay below a share of a core, and where the host has fewer cores than such processes, both together below that share of
the cores that are theirs. What is left is for handshakes, encrypted groups that change, encoders, and Redis beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

PACKETS_PER_S = 50
"""Of one guild that is played to."""
MEASURED_SHARE = 0.7
"""How full a core shall be where nobody said how many guilds a worker takes."""
SET_SHARE = 1.0
"""How full it may be where somebody did: that word holds until a core is full, and more would only make it late."""


class Cost(NamedTuple):
    """CPU per packet of each process, in microseconds."""

    worker_us: float
    sender_us: float


def limits(cost: Cost, cores: float, share: float) -> dict[str, float]:
    """Guilds that each of three things allows one worker: its own CPU, its sender's, and the cores they share.

    Args:
        cores: of this worker: those of the host, divided by its fan-out workers.
        share: of a core that may be used.
    """
    packets_us = share * 1e6 / PACKETS_PER_S
    return {
        "worker": packets_us / cost.worker_us,
        "sender": packets_us / cost.sender_us,
        "cores": packets_us * cores / (cost.worker_us + cost.sender_us),
    }


def guilds_within(cost: Cost, cores: float, share: float) -> int:
    """Guilds that one worker carries within its share of the cores."""
    return max(1, int(min(limits(cost, cores, share).values())))


class Spread(msgspec.Struct, frozen=True):
    """Several readings of one figure."""

    median: float
    least: float
    most: float


class Measured(msgspec.Struct, frozen=True):
    """What packets of one kind cost on this machine, in microseconds of CPU.

    Attributes:
        mode: transport encryption.
        dave: whether frames are encrypted end to end.
        build_us, send_us: building and sending alone, with cold caches.
        worker_us, sender_us: what the two processes are taken to cost as a whole.
        packet_bytes: UDP payload of a frame of 240 bytes (96 kbit/s).
    """

    mode: str
    dave: bool
    build_us: Spread
    send_us: Spread
    worker_us: float
    sender_us: float
    packet_bytes: int

    @property
    def cost(self) -> Cost:
        return Cost(self.worker_us, self.sender_us)


class Capability(msgspec.Struct, frozen=True):
    """What a capacity test found out about a machine.

    Attributes:
        cores: that may be used, limits of a container included.
        files: guilds that the limit of open files allows one worker.
        send_buffer_bytes: of a UDP socket, as the kernel counts.
        measured: one entry per transport mode, with and without end-to-end encryption.
    """

    cores: float
    files: int
    send_buffer_bytes: int
    measured: list[Measured]
