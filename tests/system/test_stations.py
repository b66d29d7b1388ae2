"""A sample of the matrix of stations: each one for real, with one of what may happen to it.

How long it was silent hangs on how busy the machine is, so that is judged on demand, with all else of the matrix:
`python -m tests.system.stations`.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from shared.store.client import Store
from shared.store.keys import Keys
from tests.media.on_air import on_air
from tests.system.stations.columns import COLUMNS, DEFAULT_BURST_BYTES, HAPPENINGS, Row
from tests.system.stations.play import away, begun_anew, lie_and_reset, not_found, play, polite_end, reset
from tests.system.stations.senders import icecast

SAMPLE: dict[str, Row] = {
    "Icecast MP3": Row(lie_and_reset),
    "Icecast Ogg Opus": Row(begun_anew),
    "Icecast AAC": Row(away(6)),
    "Icecast Ogg FLAC": Row(polite_end),
    "HLS TS 2 s": Row(begun_anew),
    "HLS TS 6 s": Row(not_found(8)),
    "HLS TS 10 s": HAPPENINGS["pause 5 s"],
    "HLS fMP4 2 s": Row(reset),
    "chunked MP3": HAPPENINGS["pause 5 s"],
    "chunked Ogg Opus": Row(not_found(6)),
}
"""Waiting takes no CPU, so all of it happens at once."""


async def test_every_kind_of_station_stays_on_air_whatever_happens_to_it(
    store: Store, raw_store: Store, keys: Keys, tmp_path: Path
) -> None:
    """Each plays again, by itself; silence was told, nothing is heard twice, and nothing clicks."""
    assert SAMPLE.keys() == COLUMNS.keys()
    async with AsyncExitStack() as exits:
        air = await exits.enter_async_context(on_air(store, raw_store, keys, tmp_path))
        port = await exits.enter_async_context(icecast(tmp_path, DEFAULT_BURST_BYTES))

        async def faults(column: str, row: Row) -> list[str]:
            async with COLUMNS[column].open(tmp_path, port) as station:
                verdict = await play(air, station, row.happening, row.bounds(COLUMNS[column]))
                return verdict.faults_on_any_machine()

        found = await asyncio.gather(*(faults(column, row) for column, row in SAMPLE.items()))
    assert dict(zip(SAMPLE, found, strict=True)) == {column: [] for column in SAMPLE}
