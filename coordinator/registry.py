"""Desired state as the leader knows it: a mirror of the records on Redis, changed only together with them.

A `Change` collects what shall be different; once Redis has it, the mirror follows. Source: design section 4, "State".
"""

from __future__ import annotations

import itertools
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from coordinator.election import Leadership, Transaction
from shared.clock import unix_ms
from shared.errors import ErrorCode
from shared.logs import get_logger
from shared.schema.event import Event
from shared.schema.records import (
    BroadcastSpec,
    BroadcastStatus,
    GuildSpec,
    GuildStatus,
    GuildWant,
    SourceWant,
    WorkerRecord,
)
from shared.schema.wake import wake_word
from shared.schema.want_version import FIELD, WantVersion
from shared.store.client import Store
from shared.store.keys import Keys
from shared.text import in_words

GuildKey = tuple[str, str]
_Held = TypeVar("_Held")
_DROPPED_WANT_MS = 60_000
_PAGE = 500


@dataclass(frozen=True, slots=True)
class Guild:
    """A guild's desired state. `generation` and `worker` are 0 and empty while nobody holds it."""

    spec: GuildSpec
    generation: int = 0
    worker: str = ""
    status: GuildStatus | None = None

    @property
    def key(self) -> GuildKey:
        return self.spec.bot, self.spec.guild

    @property
    def want_field(self) -> str:
        return f"guild:{self.spec.bot}:{self.spec.guild}"

    @property
    def want(self) -> GuildWant:
        """What its worker shall do."""
        return GuildWant(generation=self.generation, spec=self.spec)


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A broadcast's desired state. `term` is the one its encoder publishes with."""

    spec: BroadcastSpec
    generation: int = 0
    term: int = 0
    worker: str = ""
    stopping: bool = False
    status: BroadcastStatus | None = None

    @property
    def want_field(self) -> str:
        return f"broadcast:{self.spec.broadcast}"

    @property
    def want(self) -> SourceWant:
        """What its worker shall do."""
        return SourceWant(generation=self.generation, term=self.term, spec=self.spec, stop=self.stopping)


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker of the pool; `leased` says whether its lease stood at the last look."""

    record: WorkerRecord
    leased: bool


def _text(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()


class Registry:
    """Guilds, broadcasts and workers.

    Attributes:
        guilds, broadcasts, workers: by key, id and id.
    """

    def __init__(self, store: Store, keys: Keys) -> None:
        self.keys = keys
        self.guilds: dict[GuildKey, Guild] = {}
        self.broadcasts: dict[str, Broadcast] = {}
        self.workers: dict[str, Worker] = {}
        self.store_id = ""
        self.versions: dict[str, WantVersion] = {}
        """Of workers' wants, as they were written last."""
        self._store = store
        self._token = secrets.token_hex(4)
        self._changes = itertools.count(1)
        self._entries: Counter[str] = Counter()
        """In each worker's want."""
        self._changed: dict[GuildKey, None] = {}

    async def load(self) -> None:
        """Read everything; records that cannot be read are logged and left alone.

        Raises: StoreUnavailable.
        """
        keys = self.keys
        members = sorted(await self._store.command("SMEMBERS", keys.guilds))
        async for member, fields in self._pages({member: keys.guild(*member.split(":", 1)) for member in members}):
            guild = _read(_guild, fields, member)
            if guild is not None:
                self.keep(guild)
        names = sorted(await self._store.command("SMEMBERS", keys.broadcasts))
        async for name, fields in self._pages({name: keys.broadcast(name) for name in names}):
            broadcast = _read(_broadcast, fields, name)
            if broadcast is not None:
                self.broadcasts[name] = broadcast
        held: list[Guild | Broadcast] = [*self.guilds.values(), *self.broadcasts.values()]
        self._entries = Counter(one.worker for one in held if one.worker)
        await self.look_at_workers()

    async def _pages(self, records: dict[str, str]) -> AsyncGenerator[tuple[str, dict[str, str]], None]:
        """Hashes by name, some hundred in a round trip: between them the lease is renewed."""
        names = list(records)
        for start in range(0, len(names), _PAGE):
            page = names[start : start + _PAGE]
            found = await self._store.pipeline([("HGETALL", records[name]) for name in page])
            for name, fields in zip(page, found, strict=True):
                yield name, fields

    def keep(self, guild: Guild) -> None:
        """Take over a guild as Redis has it."""
        self.guilds[guild.key] = guild
        self._changed[guild.key] = None

    def forget(self, key: GuildKey) -> None:
        """The guild is gone."""
        self.guilds.pop(key, None)
        self._changed[key] = None

    def take_changed(self) -> dict[GuildKey, None]:
        """Guilds that changed since this was asked last."""
        changed, self._changed = self._changed, {}
        return changed

    def entries_of(self, worker: str) -> int:
        """How many guilds or sources a worker was given."""
        return self._entries[worker]

    def version_after(self, worker: str, more: int) -> WantVersion:
        """The next version of a worker's want, which has so many entries more then."""
        return self.version_of(self._entries[worker] + more)

    def version_of(self, entries: int) -> WantVersion:
        """A version like no other, of a want with so many entries."""
        return WantVersion(self.store_id, f"{self._token}-{next(self._changes)}", entries)

    def accept(self, worker: str, version: WantVersion | None) -> None:
        """A worker's want has this version now; None: it is gone."""
        self._entries.pop(worker, None)
        self.versions.pop(worker, None)
        if version is not None:
            self.versions[worker], self._entries[worker] = version, version.entries

    async def look_at_statuses(self) -> None:
        """Read what workers reported of guilds and broadcasts under the generations in force.

        Raises: StoreUnavailable.
        """
        guilds = [guild for guild in self.guilds.values() if guild.worker]
        found = await self._store.pipeline(
            [("HMGET", self.keys.guild(*guild.key), "generation", "status") for guild in guilds]
        )
        for guild, (generation, status) in zip(guilds, found, strict=True):
            if status and generation == str(guild.generation):
                told = _read(_guild_status, {"status": status}, guild.want_field)
                self.guilds[guild.key] = replace(guild, status=told)
        broadcasts = [broadcast for broadcast in self.broadcasts.values() if broadcast.worker]
        found = await self._store.pipeline(
            [("HMGET", self.keys.broadcast(one.spec.broadcast), "generation", "status") for one in broadcasts]
        )
        for one, (generation, status) in zip(broadcasts, found, strict=True):
            if status and generation == str(one.generation):
                heard = _read(_broadcast_status, {"status": status}, one.want_field)
                self.broadcasts[one.spec.broadcast] = replace(one, status=heard)

    async def missed_events(self, read_until: str) -> bool:
        """Whether events after this id may have left the capped stream before anybody read them.

        Raises: StoreUnavailable.
        """
        oldest = await self._store.command("XRANGE", self.keys.events, "-", "+", "COUNT", 1)
        return bool(oldest) and _place(str(oldest[0][0])) > _place(read_until)

    async def look_at_workers(self) -> None:
        """Read the workers' records and leases; a worker without a record counts as one without a lease.

        Raises: StoreUnavailable.
        """
        keys = self.keys
        ids = sorted({*await self._store.command("SMEMBERS", keys.workers), *self.workers})
        commands: list[tuple[str, str]] = []
        for worker_id in ids:
            commands += [("HGETALL", keys.worker(worker_id)), ("EXISTS", keys.lease(worker_id))]
        found = await self._store.pipeline(commands)
        for worker_id, fields, leased in zip(ids, found[::2], found[1::2], strict=True):
            record = _read(_worker, fields, worker_id) if fields else None
            before = self.workers.get(worker_id)
            if record is not None:
                self.workers[worker_id] = Worker(record, bool(leased))
            else:
                # No record is not a word of its end: after an outage all records have expired, as leases have.
                known = before.record if before is not None else _unknown(worker_id)
                self.workers[worker_id] = Worker(known, bool(leased))

    def guilds_of(self, worker: str) -> list[Guild]:
        return [guild for guild in self.guilds.values() if guild.worker == worker]

    def broadcasts_of(self, worker: str) -> list[Broadcast]:
        return [broadcast for broadcast in self.broadcasts.values() if broadcast.worker == worker]


def _place(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)


def _unknown(worker_id: str) -> WorkerRecord:
    return WorkerRecord(id=worker_id, name=worker_id, role="fanout", host="", capacity=0, headroom=0)


def _read(read: Callable[[dict[str, str]], _Held], fields: dict[str, str], name: str) -> _Held | None:
    try:
        return read(fields)
    except (KeyError, ValueError, msgspec.MsgspecError) as error:
        get_logger().error("record.unreadable", record=name, error=in_words(error))
        return None


def _guild_status(fields: dict[str, str]) -> GuildStatus | None:
    status = fields.get("status")
    return msgspec.json.decode(status, type=GuildStatus) if status else None


def _broadcast_status(fields: dict[str, str]) -> BroadcastStatus | None:
    status = fields.get("status")
    return msgspec.json.decode(status, type=BroadcastStatus) if status else None


def _guild(fields: dict[str, str]) -> Guild:
    spec = msgspec.json.decode(fields["spec"], type=GuildSpec)
    return Guild(
        spec=spec,
        generation=int(fields.get("generation") or 0),
        worker=fields.get("worker", ""),
        # a state that only the next version knows must not cost the guild itself
        status=_read(_guild_status, fields, f"status of guild {spec.guild}"),
    )


def _broadcast(fields: dict[str, str]) -> Broadcast:
    spec = msgspec.json.decode(fields["spec"], type=BroadcastSpec)
    return Broadcast(
        spec=spec,
        generation=int(fields.get("generation") or 0),
        term=int(fields.get("term") or 0),
        worker=fields.get("worker", ""),
        stopping=fields.get("stopping") == "1",
        status=_read(_broadcast_status, fields, f"status of broadcast {spec.broadcast}"),
    )


def _worker(fields: dict[str, str]) -> WorkerRecord:
    words = {"id", "name", "role", "host", "region"}
    return msgspec.convert(
        {name: value if name in words else msgspec.json.decode(value) for name, value in fields.items()},
        type=WorkerRecord,
    )


class Change:
    """What shall be different in one stroke, on Redis and then in the mirror."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._keys = registry.keys
        self._after: list[Callable[[], None]] = []
        self._moved: dict[str, tuple[str, str]] = {}
        """Entries of wants: the worker that had them, and the one that has them then."""
        self._touched: set[str] = set()
        """Workers whose want is another then."""
        self._rewritten: dict[str, int] = {}
        """Those whose want is written anew, with how many entries."""
        self._woken: dict[str, set[str]] = {}
        """By wake channel, what changed in `want`."""
        self.transaction = Transaction(registry.keys)

    async def commit(self, leadership: Leadership) -> None:
        """Carry it out.

        Raises: LeaseLost, StoreUnavailable.
        """
        versions = self._write_versions()
        for channel, names in sorted(self._woken.items()):
            self.transaction.add("PUBLISH", channel, wake_word(names))
        await leadership.commit(self.transaction)
        for worker, version in versions.items():
            self._registry.accept(worker, version)
        for follow in self._after:
            follow()

    def _write_versions(self) -> dict[str, WantVersion]:
        more: Counter[str] = Counter()
        for before, after in self._moved.values():
            if before != after:
                more[before] -= 1
                more[after] += 1
        versions = {worker: self._registry.version_after(worker, more[worker]) for worker in self._touched}
        versions |= {worker: self._registry.version_of(entries) for worker, entries in self._rewritten.items()}
        for worker, version in versions.items():
            self.transaction.add("HSET", self._keys.want(worker), FIELD, str(version))
            if worker not in self._registry.versions:  # of one that was given up and is back, it would expire
                self.transaction.add("PERSIST", self._keys.want(worker))
        return versions

    def event(self, event: Event) -> None:
        self.transaction.event(event)

    def wake_all(self) -> None:
        self._woken[self._keys.wake_all] = set()

    def _unwant(self, worker: str, field: str) -> None:
        if worker:
            self.transaction.add("HDEL", self._keys.want(worker), field)
            self._touch(worker, field)

    def _want(self, worker: str, field: str, want: GuildWant | SourceWant) -> None:
        self.transaction.add("HSET", self._keys.want(worker), field, _text(want))
        self._touch(worker, field)

    def _touch(self, worker: str, field: str) -> None:
        self._touched.add(worker)
        self._woken.setdefault(self._keys.wake(worker), set()).add(field)

    def _move(self, field: str, before: str, after: str) -> None:
        self._moved[field] = (self._moved.get(field, (before, ""))[0], after)

    def rewrite_want(self, worker: str) -> None:
        """Write all that a worker shall do, whatever stands there."""
        held: list[Guild | Broadcast] = [*self._registry.guilds_of(worker), *self._registry.broadcasts_of(worker)]
        self.transaction.add("DEL", self._keys.want(worker))
        for one in held:
            self.transaction.add("HSET", self._keys.want(worker), one.want_field, _text(one.want))
        self._rewritten[worker] = len(held)
        self._woken[self._keys.wake(worker)] = set()

    def name_all(self, names: str, members: Sequence[str]) -> None:
        """Put members into a set of names, some hundred at once."""
        for start in range(0, len(members), _PAGE):
            self.transaction.add("SADD", names, *members[start : start + _PAGE])

    def put_guild(self, guild: Guild, *, anew: bool = False) -> None:
        """Store a guild's record, and what its worker shall do about it; `anew`: nothing stands there any more."""
        key = self._keys.guild(*guild.key)
        before = self._registry.guilds.get(guild.key)
        self.transaction.add("SADD", self._keys.guilds, ":".join(guild.key))
        self.transaction.add(
            *("HSET", key, "spec", _text(guild.spec), "generation", guild.generation, "worker", guild.worker)
        )
        if guild.status is not None and (anew or before is None or guild.status != before.status):
            self.transaction.add("HSET", key, "status", _text(guild.status))
        if before is not None and before.worker != guild.worker:
            self._unwant(before.worker, guild.want_field)
        if guild.worker:
            self._want(guild.worker, guild.want_field, guild.want)
        self._move(guild.want_field, before.worker if before is not None else "", guild.worker)
        self._after.append(lambda: self._registry.keep(guild))

    def drop_guild(self, guild: Guild) -> None:
        self._unwant(guild.worker, guild.want_field)
        self._move(guild.want_field, guild.worker, "")
        self.transaction.add("DEL", self._keys.guild(*guild.key))
        self.transaction.add("SREM", self._keys.guilds, ":".join(guild.key))
        self._after.append(lambda: self._registry.forget(guild.key))

    def put_broadcast(self, broadcast: Broadcast, *, anew: bool = False) -> None:
        """Store a broadcast's record, and what its encode worker shall do about it; `anew`: as of `put_guild`."""
        name = broadcast.spec.broadcast
        before = self._registry.broadcasts.get(name)
        self.transaction.add("SADD", self._keys.broadcasts, name)
        self.transaction.add(
            *("HSET", self._keys.broadcast(name), "spec", _text(broadcast.spec), "run", broadcast.spec.run),
            *("generation", broadcast.generation, "term", broadcast.term, "worker", broadcast.worker),
            *("stopping", int(broadcast.stopping)),
        )
        if broadcast.status is not None and (anew or before is None or broadcast.status != before.status):
            self.transaction.add("HSET", self._keys.broadcast(name), "status", _text(broadcast.status))
        if before is not None and before.worker != broadcast.worker:
            self._unwant(before.worker, broadcast.want_field)
        if broadcast.worker:
            self._want(broadcast.worker, broadcast.want_field, broadcast.want)
        self._move(broadcast.want_field, before.worker if before is not None else "", broadcast.worker)
        self._after.append(lambda: self._registry.broadcasts.update({name: broadcast}))

    def drop_broadcast(self, broadcast: Broadcast) -> None:
        name = broadcast.spec.broadcast
        self._unwant(broadcast.worker, broadcast.want_field)
        self._move(broadcast.want_field, broadcast.worker, "")
        self.transaction.add("DEL", self._keys.broadcast(name))
        self.transaction.add("SREM", self._keys.broadcasts, name)
        self.wake_all()
        self._after.append(lambda: self._drop(self._registry.broadcasts, name))

    def drop_worker(self, worker_id: str) -> None:
        """Forget a worker. Should it live all the same, its want tells it to do nothing, for a while."""
        for key in (self._keys.worker(worker_id), self._keys.lease(worker_id), self._keys.want(worker_id)):
            self.transaction.add("DEL", key)
        self.transaction.add("SREM", self._keys.workers, worker_id)
        self.transaction.add("HSET", self._keys.want(worker_id), FIELD, str(self._registry.version_of(0)))
        self.transaction.add("PEXPIRE", self._keys.want(worker_id), _DROPPED_WANT_MS)
        self._touched.discard(worker_id)
        self._after.append(lambda: self._drop(self._registry.workers, worker_id))
        self._after.append(lambda: self._registry.accept(worker_id, None))

    @staticmethod
    def _drop(held: dict[Any, Any], key: object) -> None:
        held.pop(key, None)


def released(guild: Guild) -> Guild:
    """The guild without a worker: to be placed anew."""
    return replace(guild, generation=0, worker="")


def fenced(broadcast: Broadcast, message: str) -> Broadcast:
    """The broadcast without an encoder, and with a stream that is no good any more: to be placed with a fresh run."""
    status = BroadcastStatus(state="stalled", at=unix_ms(), code=str(ErrorCode.FENCED), message=message)
    return replace(broadcast, generation=0, worker="", status=status)
