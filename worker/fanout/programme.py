"""What a worker knows of one broadcast: its run on air, the ring of frames, and the lane of rows that play it."""

from __future__ import annotations

import asyncio
from typing import Literal, NoReturn

from shared.clock import CommonClock
from shared.errors import ErrorCode, SourceError
from shared.logs import get_logger
from shared.store.client import Store
from shared.store.keys import Keys
from shared.tasks import begin, endless, unordered_end
from shared.text import in_words
from worker.fanout.build import Lane
from worker.fanout.grid import epoch_tick
from worker.fanout.ring import FrameRing, Silence
from worker.fanout.subscribe import BLOCK_S, Subscriber

_RETIRE_AFTER_S = 3.0
"""A run that left the records plays on until its end mark, which lies 200 ms ahead, or this long."""
_FORGET_EVERY_TICKS = 50
_KEEP_PLAYED_TICKS = 10
_SILENCE_TOLD_TICKS = 50
"""A second without frames that nobody ordered is dead air, and told."""


ProgrammeState = Literal["playing", "idle", "starved"]


class Programme:
    """One broadcast as heard by this worker's guilds.

    Attributes:
        lane: the rows that play it.
        guilds: how many guilds are tuned; at none, the reader ends.
        underruns: frames that were due, not there, and not flagged as a gap.
    """

    def __init__(self, broadcast: str, frames: Store, keys: Keys, clock: CommonClock) -> None:
        self.broadcast = broadcast
        self.lane = Lane(self.frame_at, self.known_until)
        self.guilds = 0
        self.run = 0
        self.underruns = 0
        self.state: ProgrammeState = "idle"
        """What listeners hear: told of each change; `starved` is silence that nobody ordered."""
        self._silent_ticks = 0
        self._frames = frames
        self._keys = keys
        self._clock = clock
        self._ring = FrameRing()
        self._reader: asyncio.Task[NoReturn] | None = None
        self._read_again = False
        """The reader ended by itself: the run is followed anew."""
        self._defect = ""
        """Why it did, until frames are heard again."""
        self._reader_store: Store | None = None
        self._retiring: asyncio.TimerHandle | None = None
        self._retired_run = 0
        self._ending: asyncio.Task[None] | None = None

    def follow(self, run: int) -> None:
        """Play this run from now on; 0: none is on air."""
        if run == self.run and not (run and self._read_again):
            return
        if self._retiring is not None and run == self._retired_run:  # its record was lost for a moment
            self._retiring.cancel()
            self.run, self._retiring = run, None
            return
        log = get_logger().bind(broadcast=self.broadcast)
        before, self.run = self.run, run
        if self._retiring is not None:
            self._retiring.cancel()
            self._retiring = None
        if not run:
            self._retired_run = before
            log.info("programme.retired")
            self._retiring = asyncio.get_running_loop().call_later(_RETIRE_AFTER_S, self._drop)
            return
        self._drop()
        self._reader_store = self._frames.sibling(raw=True, block_s=BLOCK_S)
        subscriber = Subscriber(self._reader_store, self._keys.frames(run), self._ring, self._clock)
        self._reader = begin(endless(subscriber.run), f"reader of {self.broadcast}")
        self._reader.add_done_callback(self._reader_ended)
        log.info("programme.followed", run=run)

    def _reader_ended(self, reader: asyncio.Task[NoReturn]) -> None:
        """Have the run read again with the next look at it: nobody else would, and what the ring holds is soon over."""
        error = unordered_end(reader)
        if error is not None and reader is self._reader:
            self._read_again, self._defect = True, in_words(error)

    @property
    def why_starved(self) -> SourceError:
        """What to tell of silence that nobody ordered."""
        if self._defect:
            return SourceError(f"its frames cannot be read: {self._defect}", code=ErrorCode.INTERNAL_ERROR)
        return SourceError("nothing comes from the source", code=ErrorCode.SOURCE_STALLED)

    def _drop(self) -> None:
        """Let go of the run at once."""
        self._read_again = False
        self._retired_run = 0
        reader, store = self._reader, self._reader_store
        self._reader = self._reader_store = None
        self._ring = FrameRing()
        if reader is not None and store is not None:
            reader.cancel()
            self._ending = begin(_end(reader, store), f"end of {self.broadcast}")

    async def close(self) -> None:
        if self._retiring is not None:
            self._retiring.cancel()
        self._drop()
        if self._ending is not None:
            await self._ending

    def frame_at(self, tick: int) -> bytes | None:
        """The frame of a tick, or None."""
        ring = self._ring
        if ring.epoch_us is None:
            return None
        found = ring.at(tick - epoch_tick(ring.epoch_us))
        return None if isinstance(found, Silence) else found

    def known_until(self, first_tick: int, last_tick: int) -> int:
        """The last of these ticks up to which it is certain what is played; the first one in any case."""
        ring = self._ring
        if ring.epoch_us is None:
            return first_tick
        zero = epoch_tick(ring.epoch_us)
        return zero + ring.known_until(first_tick - zero, last_tick - zero)

    def changed_from(self) -> int | None:
        """The first tick at which something else is played than was known before; told once."""
        ring = self._ring
        index, ring.changed_from = ring.changed_from, None
        return None if index is None or ring.epoch_us is None else index + epoch_tick(ring.epoch_us)

    def passed(self, tick: int) -> None:
        """A tick is built for all: count what should have been there, and drop what was played."""
        ring = self._ring
        if ring.epoch_us is None:
            self.state = "idle"
            return
        index = tick - epoch_tick(ring.epoch_us)
        if not tick % _FORGET_EVERY_TICKS:
            ring.forget_before(index - _KEEP_PLAYED_TICKS)
        found = ring.at(index)
        self.underruns += found is Silence.MISSING
        dead_air = found in (Silence.MISSING, Silence.GAP)
        self._silent_ticks = self._silent_ticks + 1 if dead_air else 0
        if not isinstance(found, Silence):
            self.state, self._defect = "playing", ""
        elif not dead_air:
            self.state = "idle"
        elif self._silent_ticks >= _SILENCE_TOLD_TICKS:
            self.state = "starved"


async def _end(reader: asyncio.Task[NoReturn], store: Store) -> None:
    await asyncio.gather(reader, return_exceptions=True)
    await store.close()
