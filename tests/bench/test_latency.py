"""The benchmark of latency is run once, short, so that it does not rot; its figures mean nothing here."""

from __future__ import annotations

from tests.bench.latency import measure


async def test_latency_bench_hears_the_marks_of_a_station() -> None:
    """A mark is found in what was decoded, and the programme began after it was asked for."""
    found = await measure("ogg", 200, seconds=2.5)
    assert len(found.late_ms) >= 1
    assert found.on_air_ms > 0
