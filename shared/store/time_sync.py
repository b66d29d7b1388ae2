"""Follows Redis TIME for the common clock, from one server to the next, and where a server's own clock jumps.

After a failover another server tells the time, and its clock is another one. Everybody keeps the common time that it
had: the first to notice writes down what must be added to the new server's TIME, and the others take that over with
their next reading. So it is where the TIME of one and the same server jumps, by an administrator's hand or at the end
of its boot: those that run would slew, those that start would step, and two parts of a pool would be seconds apart.

A jump can be the reader's as well, whose host stood still. So each host claims the time that it lives by: where others
claim the same jump it is the server's, and where they do not, the reader slews to the time that they have.

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
_JUMP_READINGS = 2
"""In a row that the way to the server cannot explain: one of the two clocks has jumped."""
_CLAIMS_WITHIN_READINGS = 10
"""So long the other hosts have to notice the same; else the jump is ours."""


class _Reading(NamedTuple):
    """One measurement.

    Attributes:
        run_id: names the server process that told the time.
        shift_us: what all add to it; None where nothing is agreed on.
        others_us: what is to be added by the time that other hosts live by; None where none has said.
    """

    sent_ns: int
    received_ns: int
    server_us: int
    run_id: str
    shift_us: int | None
    others_us: int | None

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
    run_id = (await store.script("time", [keys.clock, keys.claims], ["", ""]))[2]
    await store.script("clock", [keys.clock], [run_id, 0, ""])


class TimeSync:
    """Keeps one process's common clock.

    Args:
        host: on whose clock this process runs.

    Attributes:
        shift_us: what everybody adds to the TIME of the present server.
    """

    def __init__(self, store: Store, keys: Keys, clock: CommonClock, host: str) -> None:
        self.shift_us = 0
        self._host = host
        self._store = store
        self._keys = keys
        self._clock = clock
        self._run_id: str | None = None
        self._jumped = 0
        """Readings in a row that show a jump."""
        self._others_claim = False
        """As of the last reading that showed none."""

    async def synchronise(self) -> None:
        """Set the clock, before anything is sent by it.

        Raises: StoreUnavailable.
        """
        give_up_s = time.monotonic() + _OTHERS_WITHIN_S
        while self._run_id is None:
            reading = await self._read()
            if not self._contradicted(reading) or time.monotonic() > give_up_s:
                await self._change_server(reading.run_id)
            else:  # the server's clock has just jumped, and the others are about to say so
                await asyncio.sleep(_ASK_EVERY_S)
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
        if reading.run_id != self._run_id:
            await self._change_server(reading.run_id)
        elif reading.shift_us is None:  # the server lost it
            await self._store.script("clock", [self._keys.clock], [reading.run_id, self.shift_us, ""])
        else:
            self.shift_us = reading.shift_us
            if self._shows_jump(reading):
                await self._look_at_jump(reading)
            else:
                self._jumped = 0
                self._others_claim = reading.others_us is not None
                self._observe(reading)

    async def _read(self) -> _Reading:
        sent_ns = self._clock.local.now_ns()
        ours = self._clock.now_us() if self._clock.synchronised else ""
        keys = [self._keys.clock, self._keys.claims]
        seconds, microseconds, run_id, shift, others = await self._store.script("time", keys, [self._host, ours])
        received_ns = self._clock.local.now_ns()
        server_us = int(seconds) * 1_000_000 + int(microseconds)
        return _Reading(sent_ns, received_ns, server_us, run_id, _number(shift), _number(others))

    def _observe(self, reading: _Reading) -> None:
        self._clock.observe(reading.sent_ns, reading.received_ns, reading.server_us + self.shift_us)

    # a jump

    def _shows_jump(self, reading: _Reading) -> bool:
        """Whether TIME is another than the way to the server, and the drift meanwhile, can make it seem."""
        apart_ns = reading.offset_ns + self.shift_us * NS_PER_US - self._clock.measured_ns
        may_be_ns = reading.round_trip_ns // 2 + self._clock.measured_error_ns(reading.received_ns)
        return abs(apart_ns) > _SAME_TIME_US * NS_PER_US + may_be_ns

    @staticmethod
    def _contradicted(reading: _Reading) -> bool:
        """Whether others live by another time than what is agreed on."""
        if reading.shift_us is None or reading.others_us is None:
            return False
        apart_us = abs(reading.others_us - reading.shift_us)
        return apart_us > _SAME_TIME_US + reading.round_trip_ns // NS_PER_US

    async def _look_at_jump(self, reading: _Reading) -> None:
        """Keep the common time where it is the server's jump; where it is ours, follow the others."""
        self._jumped += 1
        if self._jumped < _JUMP_READINGS:
            return
        before_us = self.shift_us
        ours_us = (self._clock.measured_ns - reading.offset_ns) // NS_PER_US
        if self._is_servers(ours_us, before_us, reading.others_us):
            self.shift_us = int(
                await self._store.script("clock", [self._keys.clock], [reading.run_id, ours_us, before_us])
            )
            self._jumped = 0
            get_logger().warning("clock.server_jumped", by_us=before_us - ours_us, shift_us=self.shift_us)
        elif self._jumped >= _CLAIMS_WITHIN_READINGS:
            self._jumped = 0
            self._clock.change_server()
            self._observe(reading)  # it may be sending: this is slewed, however long that takes
            get_logger().warning("clock.disagrees", by_us=ours_us - before_us)

    def _is_servers(self, ours_us: int, before_us: int, others_us: int | None) -> bool:
        """Whether a jump is the server's: others, if there are any, live by the same time as before, as we do."""
        if others_us is None:
            return not self._others_claim
        return abs(others_us - ours_us) < abs(others_us - before_us)

    # another server

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
            agreed = await self._store.script("clock", [self._keys.clock], [run_id, word, ""])
            if agreed != "":
                return int(agreed)
            if time.monotonic() > give_up_s:
                proposal_us = 0  # nobody is left who knew another time
            else:
                await asyncio.sleep(_ASK_EVERY_S)


def _number(word: str) -> int | None:
    return int(word) if word else None
