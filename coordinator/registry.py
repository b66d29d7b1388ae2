"""Desired state as the leader knows it: a mirror of the records on Redis, changed only together with them.

A `Change` collects what shall be different; once Redis has it, the mirror follows. Source: design section 4, "State".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from coordinator.election import Leadership, Transaction
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
from shared.store.client import Store
from shared.store.keys import Keys

GuildKey = tuple[str, str]
_Held = TypeVar("_Held")


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
        self._store = store

    async def load(self) -> None:
        """Read everything; records that cannot be read are logged and left alone.

        Raises: StoreUnavailable.
        """
        keys = self.keys
        members = sorted(await self._store.command("SMEMBERS", keys.guilds))
        found = await self._store.pipeline([("HGETALL", keys.guild(*member.split(":", 1))) for member in members])
        for member, fields in zip(members, found, strict=True):
            guild = _read(_guild, fields, member)
            if guild is not None:
                self.guilds[guild.key] = guild
        names = sorted(await self._store.command("SMEMBERS", keys.broadcasts))
        found = await self._store.pipeline([("HGETALL", keys.broadcast(name)) for name in names])
        for name, fields in zip(names, found, strict=True):
            broadcast = _read(_broadcast, fields, name)
            if broadcast is not None:
                self.broadcasts[name] = broadcast
        await self.look_at_workers()

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
        ids = sorted(await self._store.command("SMEMBERS", keys.workers))
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
        get_logger().error("record.unreadable", record=name, error=str(error))
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
        self._woken: dict[str, set[str]] = {}
        """By wake channel, what changed in `want`."""
        self.transaction = Transaction(registry.keys)

    async def commit(self, leadership: Leadership) -> None:
        """Carry it out.

        Raises: LeaseLost, StoreUnavailable.
        """
        for channel, names in sorted(self._woken.items()):
            self.transaction.add("PUBLISH", channel, wake_word(names))
        await leadership.commit(self.transaction)
        for follow in self._after:
            follow()

    def event(self, event: Event) -> None:
        self.transaction.event(event)

    def wake_all(self) -> None:
        self._woken[self._keys.wake_all] = set()

    def _unwant(self, worker: str, field: str) -> None:
        if worker:
            self.transaction.add("HDEL", self._keys.want(worker), field)
            self._wake(worker, field)

    def _want(self, worker: str, field: str, want: GuildWant | SourceWant) -> None:
        self.transaction.add("HSET", self._keys.want(worker), field, _text(want))
        self._wake(worker, field)

    def _wake(self, worker: str, field: str) -> None:
        self._woken.setdefault(self._keys.wake(worker), set()).add(field)

    def put_guild(self, guild: Guild) -> None:
        """Store a guild's record, and what its worker shall do about it."""
        key = self._keys.guild(*guild.key)
        before = self._registry.guilds.get(guild.key)
        self.transaction.add("SADD", self._keys.guilds, ":".join(guild.key))
        self.transaction.add(
            *("HSET", key, "spec", _text(guild.spec), "generation", guild.generation, "worker", guild.worker)
        )
        if guild.status is not None and (before is None or guild.status != before.status):
            self.transaction.add("HSET", key, "status", _text(guild.status))
        if before is not None and before.worker != guild.worker:
            self._unwant(before.worker, guild.want_field)
        if guild.worker:
            self._want(guild.worker, guild.want_field, GuildWant(generation=guild.generation, spec=guild.spec))
        self._after.append(lambda: self._registry.guilds.update({guild.key: guild}))

    def drop_guild(self, guild: Guild) -> None:
        self._unwant(guild.worker, guild.want_field)
        self.transaction.add("DEL", self._keys.guild(*guild.key))
        self.transaction.add("SREM", self._keys.guilds, ":".join(guild.key))
        self._after.append(lambda: self._drop(self._registry.guilds, guild.key))

    def put_broadcast(self, broadcast: Broadcast) -> None:
        """Store a broadcast's record, and what its encode worker shall do about it."""
        name = broadcast.spec.broadcast
        before = self._registry.broadcasts.get(name)
        self.transaction.add("SADD", self._keys.broadcasts, name)
        self.transaction.add(
            *("HSET", self._keys.broadcast(name), "spec", _text(broadcast.spec), "run", broadcast.spec.run),
            *("generation", broadcast.generation, "term", broadcast.term, "worker", broadcast.worker),
            *("stopping", int(broadcast.stopping)),
        )
        if broadcast.status is not None and (before is None or broadcast.status != before.status):
            self.transaction.add("HSET", self._keys.broadcast(name), "status", _text(broadcast.status))
        if before is not None and before.worker != broadcast.worker:
            self._unwant(before.worker, broadcast.want_field)
        if broadcast.worker:
            want = SourceWant(
                generation=broadcast.generation, term=broadcast.term, spec=broadcast.spec, stop=broadcast.stopping
            )
            self._want(broadcast.worker, broadcast.want_field, want)
        self._after.append(lambda: self._registry.broadcasts.update({name: broadcast}))

    def drop_broadcast(self, broadcast: Broadcast) -> None:
        name = broadcast.spec.broadcast
        self._unwant(broadcast.worker, broadcast.want_field)
        self.transaction.add("DEL", self._keys.broadcast(name))
        self.transaction.add("SREM", self._keys.broadcasts, name)
        self.wake_all()
        self._after.append(lambda: self._drop(self._registry.broadcasts, name))

    def drop_worker(self, worker_id: str) -> None:
        for key in (self._keys.worker(worker_id), self._keys.lease(worker_id), self._keys.want(worker_id)):
            self.transaction.add("DEL", key)
        self.transaction.add("SREM", self._keys.workers, worker_id)
        self._after.append(lambda: self._drop(self._registry.workers, worker_id))

    @staticmethod
    def _drop(held: dict[Any, Any], key: object) -> None:
        held.pop(key, None)


def released(guild: Guild) -> Guild:
    """The guild without a worker: to be placed anew."""
    return replace(guild, generation=0, worker="")
