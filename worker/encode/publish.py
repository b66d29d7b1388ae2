"""Writes one rendition's frames to its stream, under a term: a publisher of a lower term is refused and stops.

Source: design section 4, "Frames".
"""

from __future__ import annotations

from shared.errors import Fenced, ProtocolError, StaleId
from shared.logs import get_logger
from shared.schema.frame_entry import FIELD, FRAMES_PER_ENTRY, TICK_US, FrameEntry, pack, unpack
from shared.store.client import Store

_KEPT_LEADS = 3
_LOOKED_AT = 16
_EXPIRES_MS = 60_000
"""A stream nobody writes to any more goes after the longest lead and this."""


class Publisher:
    """One frame stream.

    Args:
        store: a raw client.
        key: of the stream.
        lead_ms: how far ahead this source is published; three leads are kept.
    """

    def __init__(self, store: Store, key: str, lead_ms: int) -> None:
        self._store = store
        self._key = key
        entry_ms = FRAMES_PER_ENTRY * TICK_US // 1_000
        self._kept_entries = _KEPT_LEADS * max(lead_ms, 1_000) // entry_ms
        self._expires_ms = lead_ms + _EXPIRES_MS

    async def last(self) -> FrameEntry | None:
        """The newest entry that is one, by whomever; None where there is none among the last.

        Raises: StoreUnavailable.
        """
        for entry_id, fields in await self._store.command("XREVRANGE", self._key, "+", "-", "COUNT", _LOOKED_AT):
            try:
                return unpack(entry_id.decode(), fields.get(FIELD.encode(), b""))
            except ProtocolError as error:
                get_logger().warning("frames.malformed", error=error.message)
        return None

    async def publish(self, entry: FrameEntry) -> None:
        """Append an entry. Safe to repeat: an entry that is there already is not doubled.

        Raises: Fenced: another publisher took over, or something stands there that is in the way. StoreUnavailable: not
            known whether it is there, repeat it.
        """
        try:
            await self._store.pipeline(
                [
                    ("XADD", self._key, "MAXLEN", "~", self._kept_entries, entry.id, FIELD, pack(entry)),
                    ("PEXPIRE", self._key, self._expires_ms),
                ]
            )
        except StaleId as error:
            last = await self.last()
            if last is None or (last.term, last.first_index) != (entry.term, entry.first_index):
                there = last.id if last is not None else "nothing that can be read"
                raise Fenced(f"{self._key}: {entry.id} is refused, {there} stands there") from error

    async def expire(self) -> None:
        """The run has ended: the stream goes in 60 s.

        Raises: StoreUnavailable.
        """
        await self._store.command("PEXPIRE", self._key, _EXPIRES_MS)
