"""What a worker shall do, as far as it was read: a copy of its `want` hash that takes over only what has changed.

A worker holds thousands of entries, and one of them changes: to read and decode all of them each time would cost more
than the change itself. Source: design section 4, "What a worker shall do".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import msgspec

from shared.logs import get_logger
from shared.text import in_words

_Want = TypeVar("_Want", bound=msgspec.Struct)


class Wanted(Generic[_Want]):
    """Entries by name.

    Attributes:
        raw: all entries, as they stand there.
        wants: those that can be read. Never changed: as long as nothing is different it is the same object, and an
            entry that is the same is the same object in the next one.
    """

    def __init__(self, kind: type[_Want]) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self.raw: dict[str, str] = {}
        self.wants: Mapping[str, _Want] = {}

    def take_all(self, raw: dict[str, str]) -> None:
        """The whole hash."""
        gone = [name for name in self.raw if name not in raw]
        changed = [name for name, body in raw.items() if self.raw.get(name) != body]
        self._change(gone, {name: raw[name] for name in changed})

    def take(self, names: Sequence[str], bodies: Sequence[str | None]) -> None:
        """Some entries; None: it is not there."""
        told = dict(zip(names, bodies, strict=True))
        gone = [name for name, body in told.items() if body is None and name in self.raw]
        there = {name: body for name, body in told.items() if body is not None}
        self._change(gone, {name: body for name, body in there.items() if body != self.raw.get(name)})

    def _change(self, gone: Sequence[str], bodies: Mapping[str, str]) -> None:
        if not gone and not bodies:
            return
        wants = dict(self.wants)
        for name in gone:
            del self.raw[name]
            wants.pop(name, None)
        for name, body in bodies.items():
            self.raw[name] = body
            try:
                wants[name] = self._decoder.decode(body)
            except msgspec.MsgspecError as error:  # it must not cost the others their worker
                wants.pop(name, None)
                get_logger().error("want.malformed", want=name, error=in_words(error))
        self.wants = wants
