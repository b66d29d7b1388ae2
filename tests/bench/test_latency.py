"""The benchmark of latency is run once, short, so that it does not rot; its figures mean nothing here."""

from __future__ import annotations

from tests.bench.latency import measure


async def test_latency_bench_hears_the_marks_of_a_station() -> None:
    """A mark a second is found in what was decoded; none of them came before it was made."""
    found = await measure("ogg", 200, seconds=2.5)
    assert len(found.late_ms) >= 1
    assert min(found.late_ms) > 0
