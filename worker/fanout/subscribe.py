"""Reads one frame stream from Redis into a ring: back to the frame due now, then on as it grows.

One reader per worker and rendition, however many guilds hear it. Source: design section 3, "Late joiner".
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from shared.clock import CommonClock
from shared.errors import ProtocolError, StoreError
from shared.logs import get_logger
from shared.protocol.opus import MAX_FRAME_BYTES
from shared.schema.frame_entry import FIELD, FrameEntry, unpack
from shared.store.client import Store
from worker.fanout.grid import epoch_tick, tick_at
from worker.fanout.ring import FrameRing

BLOCK_S = 2.0
_BACK_AT_ONCE = 64
_READ_AT_ONCE = 256
GATHERED_S = 0.02
"""A lead is filled up by several entries in a row, and to wake for each costs as much as to read all: what follows one
is read with the next. A cut that is told within this time of another entry is known so much later, of 200 ms."""


class Subscriber:
    """Follows one stream.

    Args:
        store: a raw client; this reader takes a connection of its own from it.
        key: of the stream.
        ring: receives what is read.
    """

    def __init__(self, store: Store, key: str, ring: FrameRing, clock: CommonClock) -> None:
        self._store = store
        self._key = key
        self._ring = ring
        self._clock = clock
        self._last_id = ""
        self.malformed = 0

    async def run(self) -> None:
        """Read for ever; while Redis is away the ring plays what it holds."""
        while True:
            try:
                if not self._last_id:
                    await self._catch_up()
                while True:
                    reply = await self._store.command(
                        *("XREAD", "COUNT", _READ_AT_ONCE, "BLOCK", int(BLOCK_S * 1_000)),
                        *("STREAMS", self._key, self._last_id or "0-0"),
                    )
                    for _, entries in reply or ():
                        self._take(entries)
                    if reply:
                        await asyncio.sleep(GATHERED_S)
            except StoreError as error:
                get_logger().warning("frames.unreadable", error=error.message)
                await asyncio.sleep(random.uniform(0.1, 0.5))  # noqa: S311 - jitter

    async def _catch_up(self) -> None:
        """Read backwards until the frame due now is there, then apply in the stream's order."""
        found: list[Any] = []
        upper = "+"
        while True:
            chunk = await self._store.command("XREVRANGE", self._key, upper, "-", "COUNT", _BACK_AT_ONCE)
            found += chunk
            # The oldest that can be read: one that cannot must not end the search.
            oldest = next(filter(None, (self._read(*one) for one in reversed(chunk))), None)
            if len(chunk) < _BACK_AT_ONCE or (oldest and oldest.first_index <= self._due_index(oldest)):
                break
            upper = "(" + chunk[-1][0].decode()
        self._take(list(reversed(found)))

    def _due_index(self, entry: FrameEntry) -> int:
        return tick_at(self._clock.now_ns()) - epoch_tick(entry.epoch_us)

    def _take(self, entries: list[Any]) -> None:
        for entry_id, fields in entries:
            entry = self._read(entry_id, fields)
            if entry is not None:
                self._ring.apply(entry)
            self._last_id = entry_id.decode()

    def _read(self, entry_id: bytes, fields: dict[bytes, bytes]) -> FrameEntry | None:
        try:
            entry = unpack(entry_id.decode(), fields.get(FIELD.encode(), b""))
            if not all(1 <= len(packet) <= MAX_FRAME_BYTES for packet in entry.packets):
                raise ProtocolError(f"frame entry {entry.id}: a packet that is no 20 ms of Opus")
            return entry
        except ProtocolError as error:
            self.malformed += 1
            get_logger().warning("frames.malformed", error=error.message)
            return None
