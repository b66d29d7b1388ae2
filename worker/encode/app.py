"""The encode worker: holds the sources that the coordinator gave it. Knows of no guild."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from weakref import WeakKeyDictionary

import msgspec

from shared import process
from shared.clock import NS_PER_US, CommonClock, LocalClock, unix_ms
from shared.errors import ErrorCode, StoreError
from shared.life import Life
from shared.logs import get_logger
from shared.schema.event import Event, EventType, broadcast_event
from shared.schema.records import BroadcastStatus, SourceWant, WorkerRecord, WorkerStats
from shared.seal import Seal
from shared.settings import Settings, parse_clock_error
from shared.store.client import Store, reach
from shared.store.keys import Keys
from shared.store.time_sync import TimeSync
from shared.tasks import begin, endless
from worker.encode.publish import Publisher
from worker.encode.run import SourceRun, Word
from worker.membership import RENEW_EVERY_MS, Membership
from worker.reporter import Reporter

_FLUSH_WITHIN_S = 0.5


class EncodeWorker:
    """One worker process.

    Args:
        record: id, name, role, host and capacity.
        life: moved on twice a second.
    """

    def __init__(self, settings: Settings, record: WorkerRecord, life: Life) -> None:
        self._settings = settings
        self._keys = Keys(settings.namespace)
        self._clock = CommonClock(LocalClock(*parse_clock_error(settings.clock_error)))
        self._store = Store(settings.redis_url, ca_file=settings.tls_ca_file)
        self._frames = self._store.sibling(raw=True)
        self._host = record.host
        self._membership = Membership(self._store, self._keys, record, self._clock.local, life)
        self._reporter = Reporter(self._membership)
        self._capacity = record.capacity
        self._seal = Seal(settings.seal_key.get_secret_value() if settings.seal_key else None)
        self._runs: dict[str, SourceRun] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._told: WeakKeyDictionary[SourceRun, tuple[BroadcastStatus, Event | None]] = WeakKeyDictionary()
        """What was told of each last."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; sources are left to be taken over by another worker.

        Raises: StoreUnavailable: Redis did not answer at the start.
        """
        try:
            if not await reach(self._store, stop):
                return
            time_sync = TimeSync(self._store, self._keys, self._clock, self._host)
            await time_sync.synchronise()
            await self._membership.join()
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(endless(time_sync.follow), name="clock"),
                    group.create_task(endless(self._reconcile_for_ever), name="want"),
                    group.create_task(endless(self._reporter.run), name="reporter"),
                    group.create_task(endless(self._beat), name="beat"),
                ]
                get_logger().info("worker.started", capacity=self._capacity)
                await stop.wait()
                await asyncio.gather(*(run.close() for run in self._runs.values()), *self._ending)
                await self._reporter.flushed(_FLUSH_WITHIN_S)
                for task in tasks:
                    task.cancel()
            try:
                await self._membership.leave()
            except StoreError as error:
                get_logger().warning("worker.leave_failed", error=error.message)
        finally:
            await asyncio.gather(*(run.close() for run in self._runs.values()))
            await self._frames.close()
            await self._store.close()
        get_logger().info("worker.stopped")

    async def _beat(self) -> None:
        while True:
            self._membership.beat(max(0, self._capacity - len(self._runs)), self._stats())
            await asyncio.sleep(RENEW_EVERY_MS / 1_000)

    def _stats(self) -> WorkerStats:
        children = [run.child_pid for run in self._runs.values()]
        return WorkerStats(
            at_ns=time.monotonic_ns(),
            sources=len(self._runs),
            clock_error_us=self._clock.error_ns // NS_PER_US,
            cpu_ns=time.process_time_ns() + sum(process.cpu_ns(pid) for pid in children if pid is not None),
        )

    async def _reconcile_for_ever(self) -> None:
        restores = self._membership.restores
        async for wants in self._membership.wants(SourceWant):
            if self._membership.want_is_lost:
                continue  # nobody ordered that: all goes on as it is
            named = {name for name in self._membership.named if name in self._runs}
            if restores != self._membership.restores:
                restores = self._membership.restores
                named = set(self._runs)
            for name in named:
                if wants.get(name) is self._runs[name].want:
                    self._tell_again(self._runs[name])
            for key in list(self._runs):
                if key not in wants or wants[key].generation != self._runs[key].want.generation:
                    self._keep(begin(self._runs.pop(key).close(), f"end of {key}"))
            for key, want in wants.items():
                run = self._runs.get(key)
                if run is None:
                    lead_ms = want.spec.source.lead_ms_of(live=False)  # the longer one: not known yet
                    publisher = Publisher(self._frames, self._keys.frames(want.spec.run), lead_ms)
                    self._runs[key] = SourceRun(
                        want,
                        publisher,
                        self._clock,
                        self._settings.media_dir,
                        self._seal,
                        self._tell,
                        partial(self._recall, want.spec.broadcast),
                    )
                elif run.want != want:
                    run.update(want)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _recall(self, broadcast: str) -> BroadcastStatus | None:
        status = await self._store.command("HGET", self._keys.broadcast(broadcast), "status")
        try:
            return msgspec.json.decode(status, type=BroadcastStatus) if status else None
        except msgspec.MsgspecError:
            return None  # of another version: its figures begin anew

    def _tell(self, run: SourceRun, word: Word) -> None:
        spec, generation, worker = run.want.spec, run.want.generation, self._membership.id
        status = BroadcastStatus(
            state=word.state,
            at=unix_ms(),
            worker=worker,
            epoch_us=run.epoch_us,
            encodes=run.encodes,
            code=str(word.error.code) if word.error else "",
            message=word.error.message if word.error else "",
            silent_ms=run.silent_ms,
            attempt=word.attempt,
            delay_ms=run.delay_ms,
            title=run.title,
            level_db=run.level_db,
        )
        event = None
        if word.is_event:
            kind: EventType | None = "broadcast.title" if word.is_title else None
            event = broadcast_event(spec, status, kind, worker=worker, generation=generation, reason=word.reason)
        self._told[run] = status, event
        self._reporter.tell(self._keys.broadcast(spec.broadcast), generation, status, event)

    def _tell_again(self, run: SourceRun) -> None:
        """Report a status once more: where it stood it may be lost, and what must follow from it with it."""
        if run in self._told:
            spec, (status, event) = run.want.spec, self._told[run]
            must_follow = status.state == "ended" or status.code == ErrorCode.FENCED
            self._reporter.tell(
                self._keys.broadcast(spec.broadcast), run.want.generation, status, event if must_follow else None
            )
