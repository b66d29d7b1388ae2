"""A worker's place in the pool: its record and lease, what it shall do, and what it reports.

Source: design section 4, "What a worker shall do" and "Leases and outages".
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import NamedTuple, TypeVar

import msgspec

from shared.clock import NS_PER_MS, LocalClock, unix_ms
from shared.errors import StoreError
from shared.life import Life
from shared.logs import get_logger
from shared.schema import event as events
from shared.schema.event import Event
from shared.schema.records import BroadcastStatus, GuildStatus, WorkerRecord, WorkerStats
from shared.schema.wake import read_wake
from shared.schema.want_version import FIELD, HELD_STORE, take_version
from shared.store.client import Store
from shared.store.keys import Keys
from shared.tasks import begin
from worker.wanted import Wanted

LEASE_MS = 3_000
RENEW_EVERY_MS = 500
LOOK_EVERY_S = 2.0
RECORD_TTL_MS = 60_000
EVENTS_KEPT = 10_000
_HELD_TTL_MS = 30_000

_Want = TypeVar("_Want", bound=msgspec.Struct)


def worker_fields(record: WorkerRecord) -> list[str]:
    """Fields and values of a worker's hash on Redis: words as they are, the rest as JSON."""
    pairs: list[str] = []
    for name, value in msgspec.to_builtins(record).items():
        pairs += (name, value if isinstance(value, str) else msgspec.json.encode(value).decode())
    return pairs


class Report(NamedTuple):
    """A status, an event or both; the number stays the same however often it is written."""

    record_key: str
    generation: int
    number: int
    status: GuildStatus | BroadcastStatus | None
    event: Event | None


class Membership:
    """One worker as the coordinator sees it."""

    def __init__(
        self, store: Store, keys: Keys, record: WorkerRecord, clock: LocalClock, life: Life | None = None
    ) -> None:
        self.record = record
        self._life = life
        self.keys = keys
        self._store = store
        self._clock = clock
        self._lease_until_ns = 0
        self._beating: asyncio.Task[None] | None = None
        self._cleared = asyncio.Event()
        self._lapses = 0
        self._lapses_read = 0
        """Lapses of the lease after which `want` was read: guilds may have been given away meanwhile."""
        self._store_id = ""
        """Of the store that `want` was read from last."""
        self.want_is_lost = False
        """What this worker shall do does not stand there any more: it goes on with what it does."""
        self.named: Sequence[str] = ()
        """Entries that the last wake named; one that has not changed is asked about: its record was lost."""
        self.restores = 0
        """Times that a lost `want` came back: records may have lost the statuses that were told."""

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def lease_valid(self) -> bool:
        """Whether the lease stands, judged by the own clock."""
        return self._clock.now_ns() < self._lease_until_ns

    async def join(self) -> None:
        """Announce the worker.

        Raises: StoreUnavailable.
        """
        await self.renew(self.record.headroom, self.record.stats)
        up = Event(type="worker.up", at=unix_ms(), worker=self.id)
        await self._store.pipeline(
            [
                ("XADD", self.keys.events, "MAXLEN", "~", EVENTS_KEPT, "*", events.FIELD, events.encode(up)),
                ("PUBLISH", self.keys.wake_leader, self.id),
            ]
        )

    async def renew(self, headroom: int, stats: WorkerStats) -> None:
        """Write lease and record.

        Raises: StoreUnavailable.
        """
        asked_ns = self._clock.now_ns()
        lapsed = 0 < self._lease_until_ns <= asked_ns
        self.record = msgspec.structs.replace(self.record, headroom=headroom, stats=stats)
        await self._store.transaction(
            [
                ("SET", self.keys.lease(self.id), self.record.name, "PX", LEASE_MS),
                ("HSET", self.keys.worker(self.id), *worker_fields(self.record)),
                ("PEXPIRE", self.keys.worker(self.id), RECORD_TTL_MS),
                ("SADD", self.keys.workers, self.id),
            ]
        )
        self._lapses += lapsed
        self._lease_until_ns = asked_ns + LEASE_MS * NS_PER_MS
        self._clear()

    def beat(self, headroom: int, stats: WorkerStats) -> None:
        """Renew without waiting for it; called from the pace of the work itself, so that a dead pace ends the lease."""
        if self._life is not None:
            self._life.beat()
        if self._beating is None or self._beating.done():
            self._beating = begin(self._renew_or_note(headroom, stats), "renewal")

    async def _renew_or_note(self, headroom: int, stats: WorkerStats) -> None:
        try:
            await self.renew(headroom, stats)
        except StoreError as error:
            get_logger().warning("lease.renewal_failed", error=error.message, valid=self.lease_valid)

    @property
    def may_identify(self) -> bool:
        """Whether the lease is valid and, if it ever ran out, `want` was read since."""
        return self.lease_valid and self._lapses_read == self._lapses

    async def wait_clearance(self) -> None:
        """Wait until `may_identify`: nobody identifies or resumes without it."""
        while not self.may_identify:
            self._cleared.clear()
            await self._cleared.wait()

    def _clear(self) -> None:
        if self.may_identify:
            self._cleared.set()

    async def wants(self, kind: type[_Want]) -> AsyncGenerator[Mapping[str, _Want], None]:
        """What this worker shall do: at once, on every wake, every 2 s, and after every reconnect. Never ends.

        As long as nothing has changed it is the same object, and so is each entry that has not.
        """
        wanted = Wanted(kind)
        channels = [self.keys.wake(self.id), self.keys.wake_all]
        while True:
            try:
                async with aclosing(self._store.hear(channels, LOOK_EVERY_S)) as woken:
                    async for word in woken:
                        lapses, names = self._lapses, read_wake(word)
                        if names and lapses == self._lapses_read and not self.want_is_lost:
                            wanted.take(names, await self._store.command("HMGET", self.keys.want(self.id), *names))
                            self.named = names
                            yield wanted.wants
                            continue
                        self.named = ()
                        if not await self._read_want(wanted):
                            yield wanted.wants
                            continue
                        yield wanted.wants
                        self._lapses_read = lapses
                        self._clear()
            except StoreError as error:
                get_logger().warning("want.unreadable", error=error.message)
                await asyncio.sleep(random.uniform(0.2, 1.0))  # noqa: S311 - jitter

    async def _read_want(self, wanted: Wanted[_Want]) -> bool:
        """Read all of `want`; False where it was lost, or was never written.

        A leader of the version before writes none beside the entries, and nothing where there are none: then, and
        before any leader wrote one, a want that is not there is an empty one.
        Raises: StoreUnavailable.
        """
        want: dict[str, str] = await self._store.command("HGETALL", self.keys.want(self.id))
        is_versioned = FIELD in want
        version = take_version(want)
        if version is None and (is_versioned or (not want and self._store_id)):
            if wanted.raw:
                await self._hold(wanted.raw)
            return False
        if version is not None:
            self._store_id = version.store
        if self.want_is_lost:
            get_logger().warning("want.returned", entries=len(want))
            self.want_is_lost = False
            self.restores += 1
        wanted.take_all(want)
        return True

    async def _hold(self, raw: Mapping[str, str]) -> None:
        """Go on, and put down what is held: nobody else may know it any more.

        Raises: StoreUnavailable.
        """
        if not self.want_is_lost:
            self.want_is_lost = True
            get_logger().error("want.lost", held=len(raw))
        fields = [part for field, body in raw.items() for part in (field, body)]
        await self._store.transaction(
            [
                ("DEL", self.keys.held(self.id)),
                ("HSET", self.keys.held(self.id), HELD_STORE, self._store_id, *fields),
                ("PEXPIRE", self.keys.held(self.id), _HELD_TTL_MS),
                ("PUBLISH", self.keys.wake_leader, self.id),
            ]
        )

    async def want_stands(self) -> bool:
        """Whether there is anything of `want` on Redis just now.

        Raises: StoreUnavailable.
        """
        return bool(await self._store.command("EXISTS", self.keys.want(self.id)))

    async def report(self, reports: Sequence[Report]) -> list[bool | None]:
        """Write statuses and events under their generations; False where the work was assigned anew since, None where
        there is no record.

        Reports that are written again, because the answer was lost, change nothing.
        Raises: StoreUnavailable.
        """
        answers = await self._store.scripts(
            "report",
            [
                (
                    [report.record_key, self.keys.events],
                    [
                        report.generation,
                        report.number,
                        msgspec.json.encode(report.status).decode() if report.status else "",
                        events.encode(report.event) if report.event else "",
                        EVENTS_KEPT,
                    ],
                )
                for report in reports
            ],
        )
        return [None if int(answer) < 0 else bool(answer) for answer in answers]

    async def leave(self) -> None:
        """Take the worker out of the pool, after it has ended its work.

        Raises: StoreUnavailable.
        """
        if self._beating is not None:
            await asyncio.gather(self._beating, return_exceptions=True)
        self._lease_until_ns = 0
        gone = msgspec.structs.replace(self.record, gone=True, headroom=0)
        await self._store.transaction(
            [
                ("DEL", self.keys.lease(self.id)),
                ("HSET", self.keys.worker(self.id), *worker_fields(gone)),
                ("PEXPIRE", self.keys.worker(self.id), RECORD_TTL_MS),
                ("PUBLISH", self.keys.wake_leader, self.id),
            ]
        )
