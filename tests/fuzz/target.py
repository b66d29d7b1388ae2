"""What a target of fuzzing is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Target:
    """A reader of foreign bytes.

    Attributes:
        make: draws an input.
        take: reads it; handles what is declared, so that everything it raises is a find.
        where: `module:name` of this target, for one that is run in a process of its own; empty: it is run right here.
    """

    name: str
    make: Callable[[Random], bytes]
    take: Callable[[bytes], None]
    where: str = ""
