"""From a sample of live input to the packet on the wire that makes it heard.

    python -m tests.bench.latency

A radio station (`radio.py`) sends in real time; its programme has a mark each second. The local Discord notes when each
packet of a guild arrived; the one with which a decoder gives out the beginning of a mark ends the way of that sample.
All of it counts: the station's codec, HTTP, decoder, resampler, libopus, the batches of the frame stream, the packets
built ahead, the slot. Live input shall be late by `lead_ms`: so long may the source break off without being missed.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from shared.clock import NS_PER_MS
from tests.bench.pool import BenchPool
from tests.bench.results import Median, save, table
from tests.emulator.records import SessionPackets
from tests.media.audio import decode_opus
from tests.media.radio import BITRATE, BLOCK, FORMATS, Radio, find_marks

LEADS_MS = (200, 1_000)
BURST_BYTES = 64 * 1024
"""What Icecast sends a listener at once unless it is told otherwise."""
FIRST_SOUNDS = 5


class Found(NamedTuple):
    """One station under one lead.

    Attributes:
        late_ms: per mark: made to on the wire.
        on_air_ms: from the job to the first packet with sound.
        underruns: frames that were due and not there.
    """

    late_ms: list[float]
    on_air_ms: float
    underruns: int


def late_ms(session: SessionPackets, payloads: dict[int, bytes], radio: Radio) -> list[float]:
    """How long ago each mark that is heard in a recording was made when it left."""
    known = [number for number, payload in enumerate(session.payload) if payload in payloads]
    pcm = decode_opus(payloads[session.payload[number]] for number in known)
    found = []
    for onset, second in find_marks(pcm):
        arrival_ns = session.arrival_ns[known[onset // BLOCK]]
        found.append((arrival_ns - radio.mark_made_ns(second, arrival_ns)) / NS_PER_MS)
    return found


async def measure(format_name: str, lead_ms: int, *, seconds: float, burst_s: float = 0.0) -> Found:
    """Listen so long to a station, from the first sound on."""
    async with Radio(format_name, burst_s) as radio, BenchPool(64, sample=1) as pool:
        (voice,) = await pool.voices(1, "stage")
        asked_ns = time.time_ns()
        await pool.broadcast("bench", {"url": radio.url, "lead_ms": lead_ms})
        await pool.join([voice])
        await pool.until_heard(1)
        await asyncio.sleep(seconds)
        recorded = await pool.discord.packets(voice.guild)
        underruns = sum(stats.underruns for stats in await pool.stats())
    (session,) = recorded.sessions
    return Found(
        late_ms(session, recorded.payloads, radio),
        (session.arrival_ns[0] - asked_ns) / NS_PER_MS,
        underruns,
    )


async def first_sounds_ms(format_name: str) -> list[float]:
    """From the job to the first packet with sound, of a station that begins with Icecast's burst."""
    burst_s = BURST_BYTES * 8 / BITRATE
    return [(await measure(format_name, 1_000, seconds=0.5, burst_s=burst_s)).on_air_ms for _ in range(FIRST_SOUNDS)]


def _show(found: dict[tuple[str, int], Found]) -> None:
    table(
        "live input sample to packet on the wire, ms",
        ("station", "lead", "late by", "above the lead", "first sound after", "underruns"),
        [
            (
                *(name, lead_ms, Median.of(one.late_ms), Median.of(one.late_ms).median - lead_ms),
                *(one.on_air_ms, one.underruns),
            )
            for (name, lead_ms), one in found.items()
        ],
    )


def _draw(found: dict[tuple[str, int], Found], figure: Figure) -> None:
    axes = figure.subplots()
    for (name, lead_ms), one in found.items():
        axes.plot(np.arange(len(one.late_ms)), one.late_ms, marker=".", label=f"{name}, lead {lead_ms} ms")
    axes.set_title("Live input: from sample to packet")
    axes.set_xlabel("mark, one each second")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)


async def _measure_all(names: Sequence[str], seconds: float) -> dict[tuple[str, int], Found]:
    return {(name, lead_ms): await measure(name, lead_ms, seconds=seconds) for name in names for lead_ms in LEADS_MS}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    found = asyncio.run(_measure_all(options.formats, options.seconds))
    _show(found)
    first = {name: asyncio.run(first_sounds_ms(name)) for name in options.formats}
    table(
        f"first sound after the job, ms, with a burst of {BURST_BYTES // 1_024} KB, lead 1000",
        ("station", "first sound after"),
        [(name, Median.of(some)) for name, some in first.items()],
    )
    figures = {
        f"{name}, lead {lead_ms} ms": {
            "late_ms": Median.of(one.late_ms)._asdict(),
            "first_sound_after_ms": one.on_air_ms,
            "underruns": one.underruns,
            "marks": len(one.late_ms),
        }
        for (name, lead_ms), one in found.items()
    } | {f"{name}, with a burst": {"first_sound_after_ms": Median.of(some)._asdict()} for name, some in first.items()}
    save("latency", figures, lambda figure: _draw(found, figure))


if __name__ == "__main__":
    main()
