"""The benchmark of encoding is run once, short, so that it does not rot; its figures mean nothing here."""

from __future__ import annotations

from tests.bench.encode import Step, measure


async def test_encode_bench_gives_figures_for_each_number_of_sources_and_guilds() -> None:
    """A source costs something, whoever hears it, and with each source comes a child."""
    found = await measure([Step(1, 1), Step(1, 2), Step(2, 3)], windows=1, window_s=2.5, settle_s=0)
    assert [len(readings) for readings in found] == [1, 1, 1]
    assert all(percent > 0 for readings in found for percent in readings)
