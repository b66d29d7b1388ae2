"""Sources on air for tests: real Redis, real children, and what they tell is remembered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from shared.clock import CommonClock, LocalClock
from shared.schema.frame_entry import FIELD, FrameEntry, unpack
from shared.schema.job import SourceKind
from shared.schema.records import BroadcastSpec, BroadcastStatus, OpusRecord, SourceRecord, SourceWant
from shared.seal import Seal
from shared.store.client import Store
from shared.store.keys import Keys
from shared.store.time_sync import TimeSync, begin_time
from worker.encode.publish import Publisher
from worker.encode.run import SourceRun, Word

PATIENCE_S = 30.0


class Air:
    """Runs sources against a real Redis and remembers what they told."""

    def __init__(self, store: Store, raw_store: Store, clock: CommonClock, media: Path) -> None:
        self.store = store
        self.raw = raw_store
        self.clock = clock
        self.media = media
        self.told: list[tuple[str, str, str]] = []
        self.words: list[Word] = []
        self._told_of: dict[SourceRun, list[tuple[str, str, str]]] = {}
        self.before: BroadcastStatus | None = None
        self.runs: list[SourceRun] = []

    def want(
        self,
        url: str,
        *,
        run: int,
        term: int,
        loop: bool = False,
        lead_ms: int | None = 30_000,
        kind: SourceKind = "auto",
    ) -> SourceWant:
        source = SourceRecord(url=url, loop=loop, lead_ms=lead_ms, kind=kind)
        spec = BroadcastSpec(broadcast="b", run=run, source=source, opus=OpusRecord())
        return SourceWant(generation=term, term=term, spec=spec)

    def start(self, want: SourceWant) -> SourceRun:
        publisher = Publisher(self.raw, self.key(want), lead_ms=30_000)  # keeps all that a test looks at
        run = SourceRun(want, publisher, self.clock, self.media, Seal(None), self._tell, self._recall)
        self.runs.append(run)
        return run

    def key(self, want: SourceWant) -> str:
        return f"air:frames:{{{want.spec.run}}}:main"

    def _tell(self, run: SourceRun, word: Word) -> None:
        self.words.append(word)
        if word.is_event:
            told = (word.state, word.reason, str(word.error.code) if word.error else "")
            self.told.append(told)
            self._told_of.setdefault(run, []).append(told)

    def told_of(self, run: SourceRun) -> list[tuple[str, str, str]]:
        """Events of one run: state, reason, code."""
        return self._told_of.get(run, [])

    async def _recall(self) -> BroadcastStatus | None:
        return self.before

    async def entries(self, want: SourceWant) -> list[FrameEntry]:
        found = await self.raw.command("XRANGE", self.key(want), "-", "+")
        return [unpack(entry_id.decode(), fields[FIELD.encode()]) for entry_id, fields in found]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - what is told wakes nobody here
                await asyncio.sleep(0.02)

    async def until_frames(self, want: SourceWant, count: int) -> list[FrameEntry]:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                entries = await self.entries(want)
                if sum(len(entry.packets) for entry in entries) >= count:
                    return entries
                await asyncio.sleep(0.02)


@asynccontextmanager
async def on_air(store: Store, raw_store: Store, keys: Keys, media: Path) -> AsyncIterator[Air]:
    """Close all runs at the end."""
    clock = CommonClock(LocalClock())
    await begin_time(store, keys)
    await TimeSync(store, keys, clock, "here").synchronise()
    air = Air(store, raw_store, clock, media)
    try:
        yield air
    finally:
        await asyncio.gather(*(run.close() for run in air.runs))
