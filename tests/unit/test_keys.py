"""Keys: one Cluster slot for all that one script touches, other slots for frames."""

from __future__ import annotations

import pytest

from shared.store.keys import Keys


def crc16(data: bytes) -> int:
    """CRC-16/XMODEM, as the Cluster specification defines it."""
    value = 0
    for byte in data:
        value ^= byte << 8
        for _ in range(8):
            value = (value << 1 ^ 0x1021 if value & 0x8000 else value << 1) & 0xFFFF
    return value


def slot(key: str) -> int:
    """Hash slot of a key: of what stands between the first `{` and the `}` after it, if anything."""
    start = key.find("{")
    end = key.find("}", start + 1)
    tag = key[start + 1 : end] if start >= 0 and end > start + 1 else key
    return crc16(tag.encode()) % 16_384


def control_keys(keys: Keys) -> list[str]:
    plain = [value for name, value in vars(keys).items() if name not in ("word", "prefix")]
    made = [
        *(keys.job("{x}"), keys.broadcast("news"), keys.guild("main", "1"), keys.worker("w"), keys.lease("w")),
        *(keys.want("w"), keys.wake("w")),
    ]
    return plain + made


def test_the_slot_of_the_test_is_the_one_of_redis() -> None:
    """CRC16 as the Cluster specification gives it, so that the other tests mean something."""
    assert crc16(b"123456789") == 0x31C3
    assert slot("foo") == 12_182
    assert slot("{foo}.bar") == 12_182


@pytest.mark.parametrize("word", ["guildcast", "a", "test-1"])
def test_all_control_keys_share_one_slot(word: str) -> None:
    """One script may touch any of them, on a cluster, too."""
    assert {slot(key) for key in control_keys(Keys(word))} == {slot(word)}


def test_no_two_control_keys_are_the_same() -> None:
    """Every record has a key of its own."""
    keys = control_keys(Keys("guildcast"))
    assert len(set(keys)) == len(keys)


def test_namespaces_are_apart() -> None:
    """Two namespaces on one server have no key in common."""
    one, two = Keys("one"), Keys("two")
    assert not set(control_keys(one)) & set(control_keys(two))
    assert one.frames(5) != two.frames(5)


def test_frame_streams_spread_over_slots() -> None:
    """Frames are the load: each run lies where its number puts it, all renditions of a run together."""
    keys = Keys("guildcast")
    assert len({slot(keys.frames(run)) for run in range(1_000)}) > 900
    assert slot(keys.frames(5, "main")) == slot(keys.frames(5, "duck")) != slot(keys.term)


def test_the_names_are_the_agreed_ones() -> None:
    """Users in other languages read and write these names."""
    keys = Keys("guildcast")
    assert (keys.jobs, keys.events, keys.term) == ("{guildcast}:jobs", "{guildcast}:events", "{guildcast}:term")
    assert keys.job("a") == "{guildcast}:job:a"
    assert keys.jobs_dead == "{guildcast}:jobs:dead"
    assert keys.guild("main", "1") == "{guildcast}:guild:main:1"
    assert (keys.want("w"), keys.lease("w")) == ("{guildcast}:want:w", "{guildcast}:lease:w")
    assert keys.frames(17) == "guildcast:frames:{17}:main"
