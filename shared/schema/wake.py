"""What is said on a worker's wake channel: which entries of its `want` changed, or just to look at all of them.

A message that was lost is made up for by the look every 2 s. Source: design section 4, "What a worker shall do".
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

LOOK = "look"
_NAMED_AT_MOST = 64
"""Of more, one reply with everything is cheaper than names to and fro."""
_decoder = msgspec.json.Decoder(list[str])


def wake_word(names: Collection[str]) -> str:
    """The message for entries that changed."""
    return msgspec.json.encode(sorted(names)).decode() if 0 < len(names) <= _NAMED_AT_MOST else LOOK


def read_wake(word: str | None) -> list[str]:
    """The entries that a message names; none where all are to be looked at, or there is no message."""
    try:
        return _decoder.decode(word) if word else []
    except msgspec.MsgspecError:
        return []
