"""The matrix: which stations there are, and what may happen to them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from enum import Flag, auto
from pathlib import Path
from typing import NamedTuple

from tests.system.stations.play import (
    Bounds,
    Happening,
    away,
    begun_anew,
    lie_and_reset,
    not_found,
    pause,
    polite_end,
    reset,
)
from tests.system.stations.senders import Station, hls_station, icecast_station, radio_station

DEFAULT_BURST_BYTES = 65_535
LARGE_BURST_BYTES = 480_000
"""Half a minute of 128 kbit/s."""


class Kind(Flag):
    """What a station is made of, as far as it says what may happen to it."""

    ICECAST = auto()
    HLS = auto()
    CHUNKS = auto()


ANY = Kind.ICECAST | Kind.HLS | Kind.CHUNKS


class Column(NamedTuple):
    """Attributes: open: with a folder of its own, and the port of an Icecast."""

    fits: Kind
    open: Callable[[Path, int], AbstractAsyncContextManager[Station]]
    chunk_s: float = 0.0


class Row(NamedTuple):
    happening: Happening
    fits: Kind = ANY
    burst_bytes: int = DEFAULT_BURST_BYTES
    may_grow_ms: int = 0

    def bounds(self, column: Column) -> Bounds:
        """What is allowed for in a cell."""
        return Bounds(column.chunk_s, self.may_grow_ms)


def _icecast(name: str, chunk_s: float = 0.0) -> Column:
    return Column(Kind.ICECAST, lambda _, port: icecast_station(name, port), chunk_s)


def _hls(kind: str, segment_s: int) -> Column:
    def opened(folder: Path, _: int) -> AbstractAsyncContextManager[Station]:
        return hls_station(folder / f"{kind}-{segment_s}", kind, segment_s)

    return Column(Kind.HLS, opened, float(segment_s))


COLUMNS: dict[str, Column] = {
    "Icecast MP3": _icecast("mp3"),
    "Icecast Ogg Opus": _icecast("opus", 1.0),  # ffmpeg's pages
    "Icecast AAC": _icecast("aac", 1.0),  # a block of Icecast's: the programme is mostly silence, and so small
    "Icecast Ogg FLAC": _icecast("flac", 1.0),
    "HLS TS 2 s": _hls("mpegts", 2),
    "HLS TS 6 s": _hls("mpegts", 6),
    "HLS TS 10 s": _hls("mpegts", 10),
    "HLS fMP4 2 s": _hls("fmp4", 2),
    "chunked MP3": Column(Kind.CHUNKS, lambda _, __: radio_station("mp3")),
    "chunked Ogg Opus": Column(Kind.CHUNKS, lambda _, __: radio_station("ogg")),
}
HAPPENINGS: dict[str, Row] = {
    "polite end": Row(polite_end),
    "reset": Row(reset),
    "away 60 s": Row(away(60)),
    "404 for 30 s": Row(not_found(30)),
    "begun anew otherwise": Row(begun_anew),
    "pause 5 s": Row(pause(5), may_grow_ms=5_500),
    "burst 30 s": Row(reset, Kind.ICECAST, LARGE_BURST_BYTES),
    "a length that is a lie": Row(lie_and_reset, Kind.ICECAST),
}
