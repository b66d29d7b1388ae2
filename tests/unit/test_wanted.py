"""A worker's copy of what it shall do, and the messages that say what of it changed."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.schema.wake import LOOK, read_wake, wake_word
from worker.wanted import Wanted


class Entry(msgspec.Struct, frozen=True):
    number: int


def entry(number: int) -> str:
    return msgspec.json.encode(Entry(number)).decode()


names = st.text(min_size=1, max_size=20)
hashes = st.dictionaries(names, st.integers(0, 3).map(entry), max_size=8)


@given(st.sets(names, min_size=1, max_size=64))
def test_a_few_names_are_said_and_understood(changed: set[str]) -> None:
    """Whatever stands in them."""
    assert read_wake(wake_word(changed)) == sorted(changed)


@pytest.mark.parametrize("word", [None, "", LOOK, "[", '{"a":1}', "[1]", "[]", wake_word([])])
def test_what_names_nothing_means_all(word: str | None) -> None:
    """Silence, the plain word, and what cannot be read."""
    assert read_wake(word) == []


def test_many_names_are_not_said() -> None:
    """To read all is cheaper then."""
    assert wake_word([str(number) for number in range(65)]) == LOOK


@given(st.lists(hashes, min_size=1, max_size=5))
def test_a_copy_is_what_was_read_last(read: list[dict[str, str]]) -> None:
    """Read whole or by the names that changed, it is the hash; what is the same stays the same object."""
    whole, named = Wanted(Entry), Wanted(Entry)
    before: dict[str, str] = {}
    for raw in read:
        wants = named.wants
        whole.take_all(raw)
        changed = sorted(name for name in raw.keys() | before.keys() if raw.get(name) != before.get(name))
        named.take(changed, [raw.get(name) for name in changed])
        assert whole.wants == named.wants == {name: msgspec.json.decode(body, type=Entry) for name, body in raw.items()}
        assert all(named.wants[name] is wants[name] for name in raw.keys() & before.keys() if name not in changed)
        assert (named.wants is wants) == (raw == before)
        before = raw


def test_an_entry_that_cannot_be_read_costs_no_other_and_may_be_mended() -> None:
    """It is left out while it cannot be read, also where it could be before."""
    wanted = Wanted(Entry)
    wanted.take_all({"a": entry(1), "b": entry(1)})
    wanted.take(["a"], ['{"number":"x"}'])
    assert wanted.wants == {"b": Entry(1)}
    wanted.take(["a"], [entry(2)])
    assert wanted.wants == {"a": Entry(2), "b": Entry(1)}
    wanted.take(["a", "nobody"], [None, None])
    assert wanted.wants == {"b": Entry(1)}
