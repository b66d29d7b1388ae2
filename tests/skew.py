"""What tests and benchmarks of skew share: hosts whose clocks are wrong, and skew from what listeners recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.emulator.analysis import arrivals_ms, skew_percentiles
from tests.emulator.records import GuildPackets, Percentiles

SKEW_LIMIT_MS = 25.0
SKEW_WITHOUT_SLOT_LIMIT_MS = 5.0
NO_ERROR = "0,0"
TRUE_CLOCKS = {"coordinator": NO_ERROR, "host a": NO_ERROR, "host b": NO_ERROR, "host c": NO_ERROR}
WRONG_CLOCKS = {"coordinator": "3.2,200", "host a": "-7.5,-200", "host b": "11,150", "host c": NO_ERROR}
"""Seconds and ppm. Hosts a and b have a fan-out worker each, host c has the encode worker."""

Heard = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Payload ids and arrivals in ns of one guild."""


class Measured(NamedTuple):
    """Skew over all pairs of guilds."""

    skew_ms: Percentiles
    without_slot_ms: Percentiles


def hosts(clocks: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Settings of three supervisors: two hosts that send, one that encodes."""
    roles = {"host a": (1, 0), "host b": (1, 0), "host c": (0, 1)}
    return {
        host: {
            "GUILDCAST_FANOUT_WORKERS": str(fanout),
            "GUILDCAST_ENCODE_WORKERS": str(encode),
            "GUILDCAST_CLOCK_ERROR": clocks[host],
        }
        for host, (fanout, encode) in roles.items()
    }


def heard_in(packets: GuildPackets) -> Heard:
    """What a guild heard in its one session."""
    (recording,) = packets.sessions
    return np.asarray(recording.payload, np.int64), np.asarray(recording.arrival_ns, np.int64)


def between(heard: Heard, begin_ns: int, end_ns: int) -> Heard:
    """What arrived from a moment until another."""
    payloads, arrivals = heard
    inside = (arrivals >= begin_ns) & (arrivals < end_ns)
    return payloads[inside], arrivals[inside]


def skew_of(heard: Sequence[Heard], slots: Sequence[float]) -> Measured:
    """Skew as it is, and with each guild's slot (ms) taken out."""
    return Measured(skew_percentiles(arrivals_ms(heard)), skew_percentiles(arrivals_ms(heard, slots)))
