"""The benchmark of Redis is run once, short, so that it does not rot; its figures mean nothing here."""

from __future__ import annotations

from tests.bench.redis_load import Load, growth, measure


async def test_redis_bench_counts_commands_readers_and_bytes() -> None:
    """One worker whose guilds hear two sources has two readers, however many guilds there are."""
    small, large = await measure(1, 2, [6, 10], windows=1, window_s=2.5, settle_s=0)
    assert [(load.sources, load.readers, load.guilds) for load in (small, large)] == [(2, 2, 6), (2, 2, 10)]
    for load in (small, large):
        assert min(load.commands, load.bytes_in, load.bytes_out, load.calls["xread"], load.calls["xadd"]) > 0


def test_growth_finds_what_each_part_adds() -> None:
    """Readings made of known parts are taken apart again."""
    parts = [(1, 1, 1, 10), (1, 4, 4, 10), (2, 1, 2, 10), (2, 4, 8, 10), (2, 4, 8, 1_000)]
    loads = [Load(*part, *(3.0 + 8 * part[0] + 20 * part[1] + 10 * part[2] + 0.5 * part[3],) * 3, {}) for part in parts]
    found = {name: round(added["commands"], 6) for name, added in growth(loads).items()}
    assert found == {"pool": 3.0, "worker": 8.0, "source": 20.0, "reader": 10.0, "guild": 0.5}
