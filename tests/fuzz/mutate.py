"""Ways to spoil an input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

_BYTES = (0x00, 0x01, 0x0F, 0x10, 0x3F, 0x7F, 0x80, 0x90, 0xB0, 0xBE, 0xDE, 0xFA, 0xFF)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    255,
    256,
    65_535,
    65_536,
    2**32 - 1,
    2**32,
    2**53,
    2**63,
    2**64,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "0",
    "1",
    "x" * 300,
    "\ud800",
    "\x00",
    "١٢٣",
    "1\n",
    [],
    [[]],
    [0] * 33,
    {},
    {"a": {}},
)
_MOST_CHANGES = 4
_LONGEST_INSERT = 8
_DEEP = b"[" * 3_000 + b"]" * 3_000
"""Nested deeper than any reader should go."""


def bytes_of(random: Random, seeds: Sequence[bytes]) -> bytes:
    """A seed with some of its bytes changed, cut, doubled, or joined with another's."""
    data = bytearray(random.choice(seeds))
    for _ in range(random.randint(0, _MOST_CHANGES)):
        at = random.randint(0, len(data))
        match random.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << random.randrange(8)
            case 1 if at < len(data):
                data[at] = random.choice(_BYTES)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + random.randint(1, _LONGEST_INSERT)]
            case 4:
                data[at:at] = data[at : at + random.randint(1, _LONGEST_INSERT)]
            case 5:
                data[at:at] = random.randbytes(random.randint(1, _LONGEST_INSERT))
            case _:
                data[at:] = random.choice(seeds)[at:]
    return bytes(data)


def json_of(random: Random, seeds: Sequence[Any]) -> bytes:
    """A seed with some of its values replaced, added or gone, and sometimes spoilt as text."""
    value = random.choice(seeds)
    for _ in range(random.randint(0, _MOST_CHANGES)):
        value = _changed(random, value)
    text = json.dumps(value, ensure_ascii=random.random() < 0.5).encode(errors="surrogatepass")
    chance = random.random()
    if chance < 0.01:
        place = random.choice([b"null", b"1", b'""', b"{}"])
        return text.replace(place, _DEEP, 1)
    return bytes_of(random, [text]) if chance < 0.3 else text


def _changed(random: Random, value: Any) -> Any:
    """The value with one change somewhere in it; the seed itself stays as it is."""
    if random.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return random.choice(_VALUES)
    if isinstance(value, list):
        place = random.randrange(len(value))
        return [*value[:place], _changed(random, value[place]), *value[place + 1 :]]
    key = random.choice(list(value))
    match random.randrange(6):
        case 0:
            return {name: inner for name, inner in value.items() if name != key}
        case 1:
            return {**value, random.choice(["x", "op", "id", "type", key + " "]): random.choice(_VALUES)}
        case _:
            return {**value, key: _changed(random, value[key])}
