"""The coordinator: stands by until it leads, then takes jobs, plans, and follows what is reported."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace

import msgspec

from coordinator.election import Leadership
from coordinator.intake import Intake
from coordinator.jobs import JobEffects
from coordinator.planner import Planner
from coordinator.reconcile import Reconciler
from coordinator.recovery import Failure, Recovery
from coordinator.registry import Change, Registry, fenced
from shared.clock import unix_ms
from shared.errors import ErrorCode, StoreError
from shared.logs import get_logger
from shared.schema import event as events
from shared.schema.event import Event
from shared.seal import Seal
from shared.settings import Settings
from shared.store.client import Store, reach
from shared.store.keys import Keys
from shared.tasks import endless
from shared.voice_servers import VoiceServers

BLOCK_S = 1.0
_PLAN_EVERY_S = 0.25
_SWEEP_EVERY_S = 10.0
_READ_AT_ONCE = 500
_CONNECTED = ("guild.playing", "guild.idle", "guild.alone", "guild.suppressed")


class Coordinator:
    """One candidate; of any number, one leads."""

    def __init__(self, settings: Settings, host: str) -> None:
        self._keys = Keys(settings.namespace)
        self._store = Store(settings.redis_url, ca_file=settings.tls_ca_file)
        self._events_reader = self._store.sibling(block_s=BLOCK_S)
        self._seal = Seal(settings.seal_key.get_secret_value() if settings.seal_key else None)
        self._servers = VoiceServers(settings.voice_hosts, settings.voice_networks)
        self._leadership = Leadership(self._store, self._keys, host)
        self._read_until = "0-0"
        """Id of the last event that was read."""
        self._missed = False
        """An event went unread, or could not be understood."""
        if settings.seal_key is None:
            get_logger().warning("seal_key.missing", effect="credentials are stored in clear on Redis")

    async def run(self, stop: asyncio.Event) -> None:
        """Lead whenever possible, until `stop` is set.

        Raises: StoreUnavailable: Redis did not answer at the start.
        """
        try:
            if not await reach(self._store, stop):
                return
            work = asyncio.create_task(self._lead_for_ever())
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait([work, stopped], return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            work.cancel()
            ended = (await asyncio.gather(work, stopped, return_exceptions=True))[0]
            if isinstance(ended, Exception):
                raise ended
            try:
                await self._leadership.resign()
            except StoreError as error:
                get_logger().warning("leader.resign_failed", error=error.message)
        finally:
            for store in (self._events_reader, self._store):
                await store.close()
        get_logger().info("coordinator.stopped")

    async def _lead_for_ever(self) -> None:
        while True:
            try:
                await self._leadership.campaign()
                await self._lead()
            except* StoreError as ended:
                get_logger().warning("leader.stepped_down", error=str(ended.exceptions[0]))
            # Whatever was in flight is unknown now: the next term loads everything anew.
            await asyncio.sleep(random.uniform(0.1, 0.5))  # noqa: S311 - jitter

    async def _lead(self) -> None:
        """Lead from the first moment on: to read thousands of records takes longer than a lease."""
        async with asyncio.TaskGroup() as group:
            group.create_task(endless(self._leadership.keep), name="lease")
            await self._begin(group)

    async def _begin(self, group: asyncio.TaskGroup) -> None:
        registry = Registry(self._store, self._keys)
        self._read_until = await self._last_event()
        await registry.load()
        get_logger().info("registry.loaded", guilds=len(registry.guilds), broadcasts=len(registry.broadcasts))
        change = Change(registry)
        change.event(Event(type="leader.changed", at=unix_ms(), term=self._leadership.term))
        await change.commit(self._leadership)
        lock = asyncio.Lock()
        recovery = Recovery()
        for guild in registry.guilds.values():
            recovery.restore(guild, time.monotonic())
        effects = JobEffects(registry, self._leadership, self._seal, self._servers, recovery)
        reconciler = Reconciler(registry, self._leadership, self._store)
        await reconciler.claim()
        await self._seal_anew(registry)
        planner = Planner(registry, self._leadership, recovery, reconciler)
        woken = asyncio.Event()
        intake = Intake(self._store, registry, self._leadership, effects, lock, woken)
        await self._catch_up(registry, recovery)
        group.create_task(endless(self._listen, woken), name="wake")
        group.create_task(endless(self._follow, registry, recovery, lock, woken), name="events")
        group.create_task(endless(self._plan, planner, lock, woken), name="plan")
        group.create_task(endless(self._sweep, registry, recovery, lock), name="sweep")
        group.create_task(endless(intake.run), name="jobs")

    async def _seal_anew(self, registry: Registry) -> None:
        """Bring credentials into the form of this version; workers refuse those in clear where there is a key."""
        change = Change(registry)
        for guild in list(registry.guilds.values()):
            spec = guild.spec
            voice = self._seal.seal_anew(spec.voice, spec.bot, spec.guild) if spec.voice is not None else None
            if voice != spec.voice:
                change.put_guild(replace(guild, spec=msgspec.structs.replace(spec, voice=voice)))
        for broadcast in list(registry.broadcasts.values()):
            sealed = broadcast.spec if broadcast.spec.sealed else self._seal.seal_source(broadcast.spec)
            if sealed != broadcast.spec:
                change.put_broadcast(replace(broadcast, spec=sealed))
        await change.commit(self._leadership)

    async def _last_event(self) -> str:
        found = await self._store.command("XREVRANGE", self._keys.events, "+", "-", "COUNT", 1)
        return str(found[0][0]) if found else "0-0"

    async def _catch_up(self, registry: Registry, recovery: Recovery) -> None:
        """What was reported while nobody led stands in the statuses."""
        change = Change(registry)
        for guild in list(registry.guilds.values()):
            status = guild.status
            if guild.worker and status is not None and status.state == "failed":
                failure = Failure(status.code, status.close_code, status.message)
                recovery.failed(guild, failure, time.monotonic(), change)
        for broadcast in list(registry.broadcasts.values()):
            if broadcast.status is not None and broadcast.status.state == "ended":
                change.drop_broadcast(broadcast)
            elif broadcast.worker and broadcast.status is not None and broadcast.status.code == ErrorCode.FENCED:
                change.put_broadcast(fenced(broadcast, broadcast.status.message))
        await change.commit(self._leadership)

    async def _sweep(self, registry: Registry, recovery: Recovery, lock: asyncio.Lock) -> None:
        """Events are capped: what was reported and not read in time still stands in the statuses.

        Only then are they read: a reading of each guild is what Redis must not do all the time.
        """
        while True:
            await asyncio.sleep(_SWEEP_EVERY_S)
            if not self._missed and not await registry.missed_events(self._read_until):
                continue
            get_logger().warning("events.missed", read_until=self._read_until)
            self._missed = False
            async with lock:
                await registry.look_at_statuses()
                await self._catch_up(registry, recovery)

    async def _plan(self, planner: Planner, lock: asyncio.Lock, woken: asyncio.Event) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            async with lock:
                began_s = clock()
                await planner.step()
                took_s = clock() - began_s
            # a pass looks at the whole: each job of a thousand must not bring one of its own
            await asyncio.sleep(took_s)
            try:
                async with asyncio.timeout(_PLAN_EVERY_S):
                    await woken.wait()
            except TimeoutError:
                pass  # nobody called: look all the same
            woken.clear()

    async def _listen(self, woken: asyncio.Event) -> None:
        async for _ in self._store.hear([self._keys.wake_leader], BLOCK_S):
            woken.set()

    async def _follow(self, registry: Registry, recovery: Recovery, lock: asyncio.Lock, woken: asyncio.Event) -> None:
        """Follow the events: they are the workers' reports."""
        while True:
            reply = await self._events_reader.command(
                *("XREAD", "COUNT", _READ_AT_ONCE, "BLOCK", int(BLOCK_S * 1_000)),
                *("STREAMS", self._keys.events, self._read_until),
            )
            for _, entries in reply or ():
                # Behind a gap in the capped stream there is always more than one reading.
                if len(entries) == _READ_AT_ONCE and await registry.missed_events(self._read_until):
                    self._missed = True
                change = Change(registry)
                async with lock:
                    for entry_id, fields in entries:
                        self._note(fields.get(events.FIELD, ""), registry, recovery, change)
                        self._read_until = entry_id
                    if change.transaction.changes:
                        await change.commit(self._leadership)
                        woken.set()

    def _note(self, body: str, registry: Registry, recovery: Recovery, change: Change) -> None:
        try:
            event = events.decode(body)
        except msgspec.MsgspecError:
            self._missed = True  # of another version, perhaps: the status beside it may be understood
            return
        if event.type == "broadcast.ended":
            broadcast = registry.broadcasts.get(event.broadcast)
            if broadcast is not None and broadcast.generation and broadcast.generation == event.generation:
                change.drop_broadcast(broadcast)
            return
        if event.type == "broadcast.stalled" and event.code == ErrorCode.FENCED:
            broadcast = registry.broadcasts.get(event.broadcast)
            if broadcast is not None and broadcast.generation and broadcast.generation == event.generation:
                change.put_broadcast(fenced(broadcast, event.message))
            return
        if not event.guild:
            return
        key = (event.bot, event.guild)
        guild = registry.guilds.get(key)
        if guild is None:
            recovery.forget(key)
        elif guild.generation and guild.generation == event.generation:
            if event.type == "guild.failed":
                failure = Failure(event.code, event.close_code, event.message)
                recovery.failed(guild, failure, time.monotonic(), change)
            elif event.type in _CONNECTED:
                recovery.well(key, time.monotonic())
