"""Follows Redis TIME for the common clock, from one server to the next.

After a failover another server tells the time, and its clock is another one. Everybody keeps the common time that it
had: the first to notice writes down what must be added to the new server's TIME, and the others take that over.
Source: design section 3, "One clock".
"""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

from shared.clock import NS_PER_US, CommonClock
from shared.errors import StoreError
from shared.logs import get_logger
from shared.store.client import CALL_TIMEOUT_S, Store
from shared.store.keys import Keys

_SAMPLES = 8
"""Measurements of a server before its time is followed."""
_EVERY_S = 0.5
_SAME_TIME_US = 5_000
"""Servers whose clocks differ by no more tell the same time: the difference is slewed."""
_OTHERS_WITHIN_S = 2 * (CALL_TIMEOUT_S + _EVERY_S)
"""How long a process without a common time waits for those that have one: longer than the call to a server that is gone
and the pause after it, by which they may be late."""
_ASK_EVERY_S = 0.1


class _Reading(NamedTuple):
    """One measurement; `run_id` names the server process that told the time."""

    sent_ns: int
    received_ns: int
    server_us: int
    run_id: str

    @property
    def round_trip_ns(self) -> int:
        return self.received_ns - self.sent_ns

    @property
    def offset_ns(self) -> int:
        """Server minus local time."""
        return self.server_us * NS_PER_US - (self.sent_ns + self.received_ns) // 2


async def begin_time(store: Store, keys: Keys) -> None:
    """Let the common time of a new namespace be the server's, so that its first processes wait for nobody.

    For whoever knows that nobody lives by another time; what is agreed on about this server stands.
    Raises: StoreUnavailable.
    """
    _, _, run_id = await store.script("time", [], [])
    await store.script("clock", [keys.clock], [run_id, 0])


class TimeSync:
    """Keeps one process's common clock.

    Attributes:
        shift_us: what everybody adds to the TIME of the present server.
    """

    def __init__(self, store: Store, keys: Keys, clock: CommonClock) -> None:
        self.shift_us = 0
        self._store = store
        self._keys = keys
        self._clock = clock
        self._run_id: str | None = None

    async def synchronise(self) -> None:
        """Set the clock, before anything is sent by it.

        Raises: StoreUnavailable.
        """
        while self._run_id is None:
            await self._measure()
        self._clock.step()

    async def follow(self) -> None:
        """Measure for ever; while Redis is away, the clock goes on with what it has."""
        away = False
        while True:
            try:
                await self._measure()
                away = False
            except StoreError as error:
                if not away:
                    get_logger().warning("clock.sync_failed", error=error.message)
                away = True
            await asyncio.sleep(_EVERY_S)

    async def _measure(self) -> None:
        reading = await self._read()
        if reading.run_id == self._run_id:
            self._observe(reading)
        else:
            await self._change_server(reading.run_id)

    async def _read(self) -> _Reading:
        sent_ns = self._clock.local.now_ns()
        seconds, microseconds, run_id = await self._store.script("time", [], [])
        received_ns = self._clock.local.now_ns()
        return _Reading(sent_ns, received_ns, int(seconds) * 1_000_000 + int(microseconds), run_id)

    def _observe(self, reading: _Reading) -> None:
        self._clock.observe(reading.sent_ns, reading.received_ns, reading.server_us + self.shift_us)

    async def _change_server(self, run_id: str) -> None:
        """Another server tells the time, or the first one: agree with the others on what is added to it."""
        readings = [await self._read() for _ in range(_SAMPLES)]
        if any(reading.run_id != run_id for reading in readings):
            return  # yet another one: the next measurement begins with it
        best = min(readings, key=lambda reading: reading.round_trip_ns)
        proposal_us = self._proposal_us(best)
        self.shift_us = await self._agree(run_id, proposal_us)
        self._run_id = run_id
        self._clock.change_server()
        for reading in readings:
            self._observe(reading)
        get_logger().info("clock.server_changed", shift_us=self.shift_us)
        if proposal_us is not None and abs(proposal_us - self.shift_us) > _SAME_TIME_US:
            # It may be sending: this is slewed, however long that takes.
            get_logger().warning("clock.disagrees", by_us=proposal_us - self.shift_us)

    def _proposal_us(self, best: _Reading) -> int | None:
        """What keeps this process's common time; None when it has none."""
        if not self._clock.synchronised:
            return None
        jump_us = (self._clock.offset_ns() - best.offset_ns) // NS_PER_US
        return jump_us if abs(jump_us) > _SAME_TIME_US else 0

    async def _agree(self, run_id: str, proposal_us: int | None) -> int:
        """What all add to this server's TIME: whoever has a common time may say, the others wait for that."""
        give_up_s = time.monotonic() + _OTHERS_WITHIN_S
        while True:
            word = "" if proposal_us is None else str(proposal_us)
            agreed = await self._store.script("clock", [self._keys.clock], [run_id, word])
            if agreed != "":
                return int(agreed)
            if time.monotonic() > give_up_s:
                proposal_us = 0  # nobody is left who knew another time
            else:
                await asyncio.sleep(_ASK_EVERY_S)
