"""What is wanted is compared with what stands on Redis, and not remembered: what was lost there is written again.

    a worker's want    the version beside its entries is the one that was written last, and counts them
    a record           is there
    the whole store    has the id that the records' leader gave it

An emptied store (FLUSHALL, a restart without data) is rebuilt from the workers: they keep their sessions and sources
and put down what they hold. Source: design section 4, "What a worker shall do".
"""

from __future__ import annotations

import itertools
import secrets
import time

import msgspec

from coordinator.election import Leadership
from coordinator.registry import Broadcast, Change, Guild, Registry, Worker
from shared.clock import unix_ms
from shared.logs import get_logger
from shared.schema.event import Event
from shared.schema.records import GuildWant, SourceWant
from shared.schema.wake import LOOK
from shared.schema.want_version import HELD_STORE, is_whole, read_version
from shared.store.client import Store
from shared.text import in_words

LOOK_EVERY_S = 1.0
_SAYS_MORE_WITHIN_S = 10.0
_GUILDS_AT_ONCE = 200
"""Records of guilds that are looked for each time, one after the other."""


class Reconciler:
    """Looks, and mends.

    Args:
        store: for what is only read.
    """

    def __init__(self, registry: Registry, leadership: Leadership, store: Store) -> None:
        self._registry = registry
        self._leadership = leadership
        self._store = store
        self._keys = registry.keys
        self._looked_at_s = 0.0
        self._last_guild = 0
        self._asked_s: dict[str, float] = {}
        """Workers that are to put down what they hold, since when."""

    async def claim(self) -> None:
        """Learn the store's id, or give it one; once, after the registry was loaded.

        Raises: LeaseLost, StoreUnavailable.
        """
        change = Change(self._registry)
        change.transaction.add("SET", self._keys.store, secrets.token_hex(8), "NX")
        await change.commit(self._leadership)
        self._registry.store_id = str(await self._store.command("GET", self._keys.store))

    async def step(self) -> None:
        """One look, if it is time for one.

        Raises: LeaseLost, StoreUnavailable.
        """
        if time.monotonic() - self._looked_at_s < LOOK_EVERY_S:
            return
        self._looked_at_s = time.monotonic()
        workers = [worker for worker in self._registry.workers.values() if worker.leased and not worker.record.gone]
        found = await self._store.scripts("wanted", [([self._keys.want(one.record.id)], ()) for one in workers])
        for worker, (text, fields) in zip(workers, found, strict=True):
            version = read_version(text)
            expected = self._registry.versions.get(worker.record.id)
            if not is_whole(version, fields) or version != (expected or version):
                await self._mend(worker, missing=not fields)
            elif expected is None:  # written by the leader before
                self._registry.accept(worker.record.id, version)
        await self._look_for_names()
        await self._look_for_records()

    async def _mend(self, worker: Worker, *, missing: bool) -> None:
        """Write a worker's want again: what is wanted, and what it holds from a store that is gone."""
        name = worker.record.id
        held = await self._store.command("HGETALL", self._keys.held(name)) if missing else {}
        if missing and not held and self._is_to_say_more(worker):
            await self._store.command("PUBLISH", self._keys.wake(name), LOOK)
            return
        self._asked_s.pop(name, None)
        change = Change(self._registry)
        held_from = held.pop(HELD_STORE, "")
        adopted = self._adopt(name, held, change) if held_from not in ("", self._registry.store_id) else 0
        if adopted:
            message = f"the store lost its data: {adopted} guilds and broadcasts were rebuilt from what {name} holds"
            get_logger().error("store.emptied", worker=name, rebuilt=adopted)
            change.event(Event(type="store.emptied", at=unix_ms(), worker=name, message=message))
            await change.commit(self._leadership)
            change = Change(self._registry)
        elif self._registry.versions.get(name) is not None or not missing:
            get_logger().error("want.restored", worker=name, missing=missing)
        change.rewrite_want(name)
        change.transaction.add("DEL", self._keys.held(name))
        await change.commit(self._leadership)

    def _is_to_say_more(self, worker: Worker) -> bool:
        """Whether a worker whose want nobody here has written holds something all the same, and may put it down yet.

        To tell it to do nothing would be to take from it what nobody knows of.
        """
        name, stats = worker.record.id, worker.record.stats
        if name in self._registry.versions or not (stats.held or stats.guilds or stats.sources):
            return False
        now_s = time.monotonic()
        return now_s - self._asked_s.setdefault(name, now_s) < _SAYS_MORE_WITHIN_S

    def _adopt(self, worker: str, held: dict[str, str], change: Change) -> int:
        """Make records of what a worker holds, where there are none; returns how many."""
        adopted = 0
        for field, body in held.items():
            try:
                if field.startswith("guild:"):
                    adopted += self._adopt_guild(worker, msgspec.json.decode(body, type=GuildWant), change)
                else:
                    adopted += self._adopt_source(worker, msgspec.json.decode(body, type=SourceWant), change)
            except msgspec.MsgspecError as error:
                get_logger().error("held.unreadable", worker=worker, want=field, error=in_words(error))
        return adopted

    def _adopt_guild(self, worker: str, want: GuildWant, change: Change) -> bool:
        guild = Guild(want.spec, want.generation, worker)
        if guild.key in self._registry.guilds:
            return False
        change.put_guild(guild)
        return True

    def _adopt_source(self, worker: str, want: SourceWant, change: Change) -> bool:
        if want.spec.broadcast in self._registry.broadcasts:
            return False
        change.put_broadcast(Broadcast(want.spec, want.generation, want.term, worker, want.stop))
        return True

    async def _look_for_names(self) -> None:
        """Write the sets of names again where one is not as large as it should be: the next leader reads them."""
        registry, keys = self._registry, self._keys
        guilds, broadcasts = await self._store.pipeline([("SCARD", keys.guilds), ("SCARD", keys.broadcasts)])
        change = Change(registry)
        if guilds < len(registry.guilds):
            change.name_all(keys.guilds, [":".join(key) for key in registry.guilds])
        if broadcasts < len(registry.broadcasts):
            change.name_all(keys.broadcasts, list(registry.broadcasts))
        await change.commit(self._leadership)

    async def _look_for_records(self) -> None:
        """Write records again that are not there any more: all broadcasts', and some guilds' each time."""
        registry = self._registry
        some = list(itertools.islice(registry.guilds.values(), self._last_guild, self._last_guild + _GUILDS_AT_ONCE))
        self._last_guild = self._last_guild + len(some) if len(some) == _GUILDS_AT_ONCE else 0
        broadcasts = list(registry.broadcasts.values())
        names = [self._keys.broadcast(one.spec.broadcast) for one in broadcasts]
        names += [self._keys.guild(*one.key) for one in some]
        there = await self._store.pipeline([("EXISTS", name) for name in names])
        records: list[Guild | Broadcast] = [*broadcasts, *some]
        lost = [one for one, exists in zip(records, there, strict=True) if not exists]
        if not lost:
            return
        get_logger().error("records.restored", count=len(lost))
        change = Change(registry)
        for one in lost:
            if isinstance(one, Guild):
                change.put_guild(one, anew=True)
            else:
                change.put_broadcast(one, anew=True)
        await change.commit(self._leadership)
