"""Brings what is into line with what is wanted: lost workers are let go, what nobody holds is placed.

Level-triggered: each pass looks at the whole, so a missed message costs time and nothing else.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import msgspec

from coordinator.election import Leadership
from coordinator.placement import Pace, Room, place
from coordinator.reconcile import Reconciler
from coordinator.recovery import Recovery
from coordinator.registry import Broadcast, Change, Guild, Registry, Worker, released
from coordinator.waiting import TOLD_AFTER_MS, Waiting
from shared.clock import unix_ms
from shared.errors import ErrorCode
from shared.logs import get_logger
from shared.schema.event import Event, broadcast_event, guild_event
from shared.schema.records import BroadcastStatus, GuildStatus, WorkerRecord, WorkerRole

GRACE_S = 5.0
"""After an election nobody is judged lost for this long: after an outage all leases are gone at once."""
_AT_ONCE = 100
"""Records changed in one script, so that Redis is never held up for long."""
_TOLD_AT_ONCE = 500
"""Guilds that are told of in one pass: jobs come in between."""
IDENTIFIES_PER_S = 100.0
IDENTIFIES_AT_ONCE = 100
"""Guilds that a worker is given. Handshakes have half of the time, at 3 ms each (`worker/voice/turns.py`): of
many more, most would wait with it, and behind the groups of calls that stand."""


class Planner:
    """Assigns guilds to fan-out workers and sources to encode workers."""

    def __init__(self, registry: Registry, leadership: Leadership, recovery: Recovery, reconciler: Reconciler) -> None:
        self._reconciler = reconciler
        self._registry = registry
        self._leadership = leadership
        self._recovery = recovery
        self._waiting = Waiting(registry, recovery)
        self._pace = Pace(IDENTIFIES_PER_S, IDENTIFIES_AT_ONCE)
        self._judges_from_s = time.monotonic() + GRACE_S

    async def step(self) -> None:
        """One pass.

        Raises: LeaseLost, StoreUnavailable.
        """
        await self._registry.look_at_workers()
        for worker in list(self._registry.workers.values()):
            if self._is_lost(worker):
                await self._let_go(worker)
        await self._reconciler.step()
        await self._ask_for_voice()
        await self._place_sources()
        await self._place_guilds()

    def _is_lost(self, worker: Worker) -> bool:
        if worker.record.gone:
            return True
        return not worker.leased and time.monotonic() >= self._judges_from_s

    async def _let_go(self, worker: Worker) -> None:
        """Release all that a lost worker held; its record goes last, so that a broken-off pass is made again."""
        record = worker.record
        guilds = self._registry.guilds_of(record.id)
        get_logger().warning("worker.lost", worker=record.id, guilds=len(guilds), reported=record.gone)
        for some in _batches(guilds):
            change = Change(self._registry)
            for guild in some:
                change.put_guild(released(guild))
            await change.commit(self._leadership)
        change = Change(self._registry)
        for broadcast in self._registry.broadcasts_of(record.id):
            change.put_broadcast(replace(broadcast, generation=0, worker=""))
        change.drop_worker(record.id)
        change.event(Event(type="worker.lost", at=unix_ms(), worker=record.id))
        await change.commit(self._leadership)
        self._pace.forget(record.id)
        self._recovery.forget_worker(record.id)

    async def _ask_for_voice(self) -> None:
        now_s = time.monotonic()
        self._waiting.look(now_s)
        change = Change(self._registry)
        for guild in self._waiting.overdue():
            self._recovery.overdue(guild, now_s, change)
        await change.commit(self._leadership)
        self._waiting.look(now_s)  # what was overdue may be over
        change = Change(self._registry)
        for guild in self._waiting.to_ask():
            self._recovery.wants_voice(guild, now_s, change)
        await change.commit(self._leadership)

    def _rooms(self, role: WorkerRole) -> list[Room]:
        now_s = time.monotonic()
        return [
            Room(
                *(worker.record.id, worker.record.headroom, _held(worker.record)),
                self._registry.entries_of(worker.record.id),
            )
            for worker in self._registry.workers.values()
            if worker.record.role == role and worker.leased and not worker.record.gone
            if not self._recovery.is_full(worker.record.id, now_s)
        ]

    async def _place_sources(self) -> None:
        waiting = [name for name, one in self._registry.broadcasts.items() if not one.worker]
        placed = place(waiting, self._rooms("encode"))
        await self._tell_unplaced_sources([self._registry.broadcasts[name] for name in waiting if name not in placed])
        if not placed:
            return
        term = await self._leadership.draw(len(placed))
        change = Change(self._registry)
        for number, (name, worker) in enumerate(placed.items(), term):
            # The generation is the publishing term, too: whoever published before is fenced by it.
            broadcast = self._registry.broadcasts[name]
            status = broadcast.status
            if status is not None and status.code == ErrorCode.FENCED:
                get_logger().error("run.renewed", broadcast=name, run=broadcast.spec.run, error=status.message)
                spec = msgspec.structs.replace(broadcast.spec, run=await self._leadership.draw())
                broadcast = replace(broadcast, spec=spec)
                status = BroadcastStatus(state="starting", at=unix_ms())
                change.wake_all()
            if status is not None and status.code == ErrorCode.NO_WORKER:
                status = BroadcastStatus(state="starting", at=unix_ms())  # else it would not be told again
            change.put_broadcast(replace(broadcast, generation=number, term=number, worker=worker, status=status))
        await change.commit(self._leadership)

    async def _place_guilds(self) -> None:
        now_s = time.monotonic()
        self._waiting.look(now_s)
        rooms = self._rooms("fanout")
        most = {room.worker: self._pace.left(room.worker, now_s) for room in rooms}
        ready = self._waiting.ready(sum(min(max(0, room.free), most[room.worker]) for room in rooms))
        placed = place(ready, rooms, most)
        if not any(room.free > 0 for room in rooms):  # else those who wait only wait for their turn
            await self._tell_unplaced_guilds(self._waiting.untold(_TOLD_AT_ONCE))
        if not placed:
            return
        for worker, count in Counter(placed.values()).items():
            self._pace.take(worker, count, now_s)
        generation = await self._leadership.draw(len(placed))
        for some in _batches(list(placed)):
            change = Change(self._registry)
            for key in some:
                guild = self._registry.guilds[key]
                # A failure told under an earlier generation must not be read as one of this.
                status = GuildStatus(state="wanted", at=unix_ms())
                change.put_guild(replace(guild, generation=generation, worker=placed[key], status=status))
                generation += 1
            await change.commit(self._leadership)

    async def _tell_unplaced_sources(self, unplaced: list[Broadcast]) -> None:
        """Say of sources that nobody can hold them; one that shall end anyway has ended."""
        change = Change(self._registry)
        for broadcast in unplaced:
            status, at = broadcast.status, unix_ms()
            if broadcast.stopping:
                change.drop_broadcast(broadcast)
                ended = BroadcastStatus(state="ended", at=at)
                change.event(broadcast_event(broadcast.spec, ended, reason="stopped"))
            elif status is None or (status.code != ErrorCode.NO_WORKER and at - status.at > TOLD_AFTER_MS):
                message = "no encode worker has room: it goes on as soon as one has"
                stalled = BroadcastStatus(state="stalled", at=at, code=str(ErrorCode.NO_WORKER), message=message)
                change.put_broadcast(replace(broadcast, status=stalled))
                change.event(broadcast_event(broadcast.spec, stalled))
        await change.commit(self._leadership)

    async def _tell_unplaced_guilds(self, unplaced: list[Guild]) -> None:
        """Say of guilds that nobody can hold them, once each."""
        for some in _batches(unplaced):
            change = Change(self._registry)
            for guild in some:
                message = "no fan-out worker has room: it is placed as soon as one has"
                status = GuildStatus(state="wanted", at=unix_ms(), code=str(ErrorCode.NO_WORKER), message=message)
                change.put_guild(replace(guild, status=status))
                change.event(guild_event(guild.spec, status, "guild.failed"))
            await change.commit(self._leadership)


def _held(record: WorkerRecord) -> int:
    """What a worker had taken up when it told its headroom."""
    return record.capacity - record.headroom if record.stats.held is None else record.stats.held


def _batches(items: list[Guild] | list[tuple[str, str]]) -> Iterator[list]:  # type: ignore[type-arg]
    for start in range(0, len(items), _AT_ONCE):
        yield items[start : start + _AT_ONCE]
