"""The common clock: Redis TIME of the primary that owns the control keys, followed by each process for itself.

`LocalClock` is this process's monotonic clock. `CommonClock` adds an offset to it, estimated by minimum round trip as
NTP does and slewed by at most 500 ppm, so that all processes of all hosts share one 20 ms grid.
Source: design section 3, "One clock"; RFC 5905 section 10 (clock filter).
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000
NS_PER_US = 1_000
MAX_SLEW_PPM = 500
_SAMPLES_KEPT = 8


def unix_ms() -> int:
    """Wall-clock time in unix milliseconds, for records and events; never for pacing."""
    return time.time_ns() // NS_PER_MS


class LocalClock:
    """CLOCK_MONOTONIC of this host; an error may be put on it to test the common clock."""

    def __init__(self, offset_s: float = 0.0, drift_ppm: float = 0.0) -> None:
        self._offset_ns = int(offset_s * NS_PER_S)
        self._rate_error = drift_ppm / 1e6

    def now_ns(self) -> int:
        return self.from_raw_ns(time.monotonic_ns())

    def from_raw_ns(self, raw_ns: int) -> int:
        """Reading of this clock when CLOCK_MONOTONIC reads `raw_ns`."""
        return raw_ns + self._offset_ns + int(raw_ns * self._rate_error)

    def to_raw_ns(self, local_ns: int) -> int:
        """Reading of CLOCK_MONOTONIC when this clock reads `local_ns`: what kernel timers are armed with."""
        raw_ns = local_ns - self._offset_ns
        return int(raw_ns / (1 + self._rate_error)) if self._rate_error else raw_ns


class _Sample(NamedTuple):
    local_ns: int
    offset_ns: int
    error_ns: int


class CommonClock:
    """Unix time that all processes agree on.

    `observe` takes measurements of one server, until `change_server`; `now_ns` is monotonic but for a step, and steps
    happen only through `step`.
    """

    def __init__(self, local: LocalClock) -> None:
        self.local = local
        self._samples: deque[_Sample] = deque(maxlen=_SAMPLES_KEPT)
        self._set = False
        self._offset_ns = 0
        self._target_ns = self._target_error_ns = self._measured_at_ns = 0
        self._slewed_at_ns = 0

    @property
    def synchronised(self) -> bool:
        """Whether a first measurement was taken; before it, there is no common time."""
        return self._set

    @property
    def error_ns(self) -> int:
        """Offset still to be slewed."""
        return self._target_ns - self._offset_ns

    @property
    def measured_ns(self) -> int:
        """Common minus local time, as it was measured: what is slewed towards."""
        return self._target_ns

    def measured_error_ns(self, local_ns: int) -> int:
        """By how much that may be wrong at most: half of the round trip that told it, and the drift since."""
        return self._target_error_ns + max(0, local_ns - self._measured_at_ns) * MAX_SLEW_PPM // 1_000_000

    def observe(self, sent_ns: int, received_ns: int, server_us: int) -> None:
        """Take one measurement of Redis TIME.

        Args:
            sent_ns, received_ns: local clock just before the request and just after the reply.
            server_us: unix microseconds that the server told.
        """
        round_trip_ns = received_ns - sent_ns
        offset_ns = server_us * NS_PER_US - (sent_ns + received_ns) // 2
        self._samples.append(_Sample(received_ns, offset_ns, round_trip_ns // 2))
        # An old sample is worth less: the clocks may have drifted apart by the slew limit since.
        best = min(
            self._samples,
            key=lambda sample: sample.error_ns + (received_ns - sample.local_ns) * MAX_SLEW_PPM // 1_000_000,
        )
        self._measured_at_ns, self._target_ns, self._target_error_ns = best
        if not self._set:
            self._set = True
            self.step()

    def change_server(self) -> None:
        """Another server is measured from now on: what the last one told says nothing of it. Time goes on as it is."""
        self._samples.clear()

    def step(self) -> None:
        """Take over the measured offset at once. Only while nothing is sent by this clock."""
        self._offset_ns = self._target_ns
        self._slewed_at_ns = self.local.now_ns()

    def offset_ns(self) -> int:
        """Common minus local time now, slewed towards what was measured."""
        now_ns = self.local.now_ns()
        limit_ns = max(0, now_ns - self._slewed_at_ns) * MAX_SLEW_PPM // 1_000_000
        error_ns = self._target_ns - self._offset_ns
        if limit_ns:
            self._offset_ns += max(-limit_ns, min(limit_ns, error_ns))
            self._slewed_at_ns = now_ns
        return self._offset_ns

    def now_ns(self) -> int:
        """Unix nanoseconds on the common clock."""
        return self.local.now_ns() + self.offset_ns()

    def now_us(self) -> int:
        return self.now_ns() // NS_PER_US
