"""The benchmark of joins is run once, short, so that it does not rot; its figures mean nothing here."""

from __future__ import annotations

from tests.bench.mass_join import libdave_ms, measure


async def test_mass_join_bench_hears_every_guild() -> None:
    """Each guild that joins has a first packet after the jobs were sent, in order."""
    joined = await measure(4, "voice", before=2, window_s=0.5)
    assert len(joined.first_packet_ms) == joined.guilds == 4
    assert joined.first_packet_ms == sorted(joined.first_packet_ms)
    assert joined.first_packet_ms[0] > 0
    assert joined.per_s > 0


def test_libdave_alone_makes_a_group() -> None:
    """The reference beside a join: the same messages without all else."""
    assert libdave_ms(2) > 0
