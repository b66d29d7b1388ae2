"""The leader's lease and term, and the one way in which a leader writes: all or nothing, only while it leads.

Source: design section 4, "The one counter" and "Leases and outages".
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time

from shared.errors import LeaseLost, StoreUnavailable
from shared.logs import get_logger
from shared.schema import event as events
from shared.schema.event import Event
from shared.store.client import Store
from shared.store.keys import Keys

LEASE_MS = 3_000
RENEW_EVERY_S = 0.5
EVENTS_KEPT = 10_000


class Transaction:
    """Changes that happen together or not at all."""

    def __init__(self, keys: Keys) -> None:
        self._events_key = keys.events
        self.changes: list[tuple[str, str, tuple[str, ...]]] = []

    def add(self, command: str, key: str, *arguments: str | int) -> None:
        """One command on one key (or pub/sub channel)."""
        self.changes.append((command, key, tuple(str(argument) for argument in arguments)))

    def event(self, event: Event) -> None:
        self.add("XADD", self._events_key, "MAXLEN", "~", EVENTS_KEPT, "*", events.FIELD, events.encode(event))


class Leadership:
    """One candidate's leadership of the pool."""

    def __init__(self, store: Store, keys: Keys, host: str) -> None:
        self.id = f"{host}-{secrets.token_hex(4)}"
        self.term = 0
        self._store = store
        self._keys = keys

    async def campaign(self) -> None:
        """Wait until this process leads.

        Raises: StoreUnavailable.
        """
        while not await self._take(0):  # noqa: ASYNC110 - the lease stands on Redis, nobody tells of its end
            await asyncio.sleep(RENEW_EVERY_S)
        get_logger().info("leader.elected", term=self.term)

    async def _take(self, held: int) -> int:
        self.term = int(
            await self._store.script("lead", [self._keys.leader, self._keys.term], [self.id, LEASE_MS, held])
        )
        return self.term

    async def keep(self) -> None:
        """Renew for ever.

        Raises: LeaseLost: the lease ran out, or somebody else leads.
        """
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            asked = time.monotonic()
            try:
                if not await self._take(self.term):
                    raise LeaseLost("another coordinator leads")
                renewed = asked
            except StoreUnavailable as error:
                if time.monotonic() - renewed > LEASE_MS / 1_000:
                    raise LeaseLost(f"not renewed in time: {error.message}") from error

    async def draw(self, count: int = 1) -> int:
        """First of `count` consecutive terms, above all drawn before.

        Raises: LeaseLost, StoreUnavailable.
        """
        first = int(await self._store.script("draw", [self._keys.leader, self._keys.term], [self.id, self.term, count]))
        if not first:
            raise LeaseLost("another coordinator leads")
        return first

    async def commit(self, transaction: Transaction) -> None:
        """Carry out all changes, or none.

        Raises: LeaseLost: none was made. StoreUnavailable: not known; load everything anew.
        """
        if not transaction.changes:
            return
        numbers: dict[str, int] = {}
        changes = [
            [command, numbers.setdefault(key, len(numbers) + 2), *arguments]
            for command, key, arguments in transaction.changes
        ]
        done = await self._store.script(
            "commit", [self._keys.leader, *numbers], [self.id, self.term, json.dumps(changes)]
        )
        if not done:
            raise LeaseLost("another coordinator leads")

    async def resign(self) -> None:
        """Give the lease back so that a standby takes over at once.

        Raises: StoreUnavailable.
        """
        if self.term:
            await self._store.script("resign", [self._keys.leader], [self.id, self.term])
            self.term = 0
