"""The version of a worker's `want`: a field beside the entries, written with each change of them.

It tells an order from a loss. A hash that is missing, has no version, or other entries than the version counts, was
lost, evicted or spoilt, and nobody meant it; one that is whole and has no entries means that nothing shall be done.
It names the store, too: what a worker holds from another one than the present was never taken from it by anybody.

Source: design section 4, "What a worker shall do".
"""

from __future__ import annotations

from typing import NamedTuple

FIELD = "version"
HELD_STORE = "store"
"""Field of a `held` hash beside what a worker holds: the store that it has it from."""


class WantVersion(NamedTuple):
    """What stands in the field.

    Attributes:
        store: id of the store, drawn by the first leader that finds it without one.
        change: differs for each change.
        entries: how many there are.
    """

    store: str
    change: str
    entries: int

    def __str__(self) -> str:
        return f"{self.store}:{self.change}:{self.entries}"


def read_version(text: str | None) -> WantVersion | None:
    """None where there is none that can be read."""
    parts = (text or "").split(":")
    if len(parts) != 3 or not parts[2].isdecimal():
        return None
    return WantVersion(parts[0], parts[1], int(parts[2]))


def take_version(want: dict[str, str]) -> WantVersion | None:
    """Take the version out of a `want`; None where the hash is not as it was written."""
    version = read_version(want.pop(FIELD, None))
    return version if version is not None and version.entries == len(want) else None


def is_whole(version: WantVersion | None, fields: int) -> bool:
    """Whether a hash with so many fields is what its version says."""
    return version is not None and fields == version.entries + 1
