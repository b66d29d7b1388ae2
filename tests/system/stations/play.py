"""Plays a station through one thing that happens to it, and judges what a listener heard.

station ─▶ between ─▶ a source on air (feeder, child, timeline, Redis) ─▶ packets by their time ─▶ verdict
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from shared.schema.frame_entry import TICK_US, FrameEntry
from tests.media.audio import FRAME_SAMPLES, decode_opus
from tests.media.on_air import Air
from tests.media.radio import RATE, Pcm, find_marks
from tests.system.stations.between import Between
from tests.system.stations.senders import Station
from worker.encode.retries import OFTEN_FOR_S, OPENED_EVERY_S
from worker.encode.run import SourceRun

BEFORE_S = 12.0
AFTER_S = 20.0
RECOVERS_WITHIN_S = 60.0
_LATER_BACKOFF_S = 2.0
"""The first pause after a minute away."""
_AGAIN_S = 8.0
_MORE_S = 1.0
_DELAY_WITHIN_MS = 400
_runs = iter(range(2_000_000, 3_000_000))
_TURN = 40
_EARLY = 5
"""A mark from before anything happened."""
_CLICK_FRAMES = 2
_QUIET = 0.05
"""Between two bursts, that is silence."""
_BURST_SAMPLES = RATE // 5
_SMEAR_SAMPLES = RATE // 20
"""So far from a burst its codec may be heard, and from the edge of what was heard a decoder that has just begun."""

Happening = Callable[[Between, Station], Awaitable[None]]


async def polite_end(between: Between, _: Station) -> None:
    between.hang_up(reset=False)


async def reset(between: Between, _: Station) -> None:
    between.hang_up(reset=True)


def away(seconds: float) -> Happening:
    async def happening(between: Between, _: Station) -> None:
        await between.go_away()
        await asyncio.sleep(seconds)
        await between.come_back()

    return happening


def not_found(seconds: float) -> Happening:
    async def happening(between: Between, _: Station) -> None:
        between.status = 404
        between.hang_up(reset=False)
        await asyncio.sleep(seconds)
        between.status = 0

    return happening


def pause(seconds: float) -> Happening:
    async def happening(between: Between, _: Station) -> None:
        between.flowing.clear()
        await asyncio.sleep(seconds)
        between.flowing.set()

    return happening


async def begun_anew(_: Between, station: Station) -> None:
    await station.begin_anew()


async def lie_and_reset(between: Between, _: Station) -> None:
    """From its next answer on the station says that it is a file of two gigabytes."""
    between.length = 2_000_000_000
    between.hang_up(reset=True)
    await asyncio.sleep(8)
    between.hang_up(reset=True)


class Bounds(NamedTuple):
    """What is allowed for.

    Attributes:
        chunk_s: it comes in pieces of this length: just before one comes so much less of the delay is at hand, and how
            old the newest one was is not known when it is begun.
        may_grow_ms: so much later it may be heard from now on: a pause may come again.
    """

    chunk_s: float = 0.0
    may_grow_ms: int = 0


class Verdict(NamedTuple):
    """What was heard.

    Attributes:
        missing_s: for how long nothing came to the listener's side, at most.
        silent_s: so much was not heard, and `told_silent_s` was said of it.
        before_ms, after_ms: how late the run says that it is.
        later_s: by how much later it is really heard than before.
        twice: what was heard again.
        lost: seconds of the programme that are not heard between its first and last.
        clicks: sound where the programme has none.
        told: states and codes.
    """

    missing_s: float
    silent_s: float
    told_silent_s: float
    before_ms: int
    after_ms: int
    later_s: float
    twice: list[int]
    lost: int
    clicks: int
    told: list[tuple[str, str]]

    def faults(self, bounds: Bounds) -> list[str]:
        """What is not as it should be."""
        return [*self.faults_on_any_machine(), *self._faults_of_time(bounds)]

    def faults_on_any_machine(self) -> list[str]:
        """Those that no busy machine explains."""
        states = [state for state, _ in self.told]
        untold_s = abs(self.silent_s - self.told_silent_s)
        found = [
            (untold_s > _MORE_S, f"{self.told_silent_s:.1f} s of {self.silent_s:.1f} s of silence were told"),
            (self.silent_s > _MORE_S and "stalled" not in states, "silence, and no word of it"),
            (bool(self.twice), f"heard twice: {self.twice}"),
            (self.clicks > 0, f"{self.clicks} clicks"),
            (states[-1:] != ["playing"], f"does not play: {self.told}"),
        ]
        return [text for is_so, text in found if is_so]

    def _faults_of_time(self, bounds: Bounds) -> list[str]:
        backoff_s = _LATER_BACKOFF_S if self.missing_s >= OFTEN_FOR_S else OPENED_EVERY_S
        held_s = max(0.0, self.before_ms / 1_000 - bounds.chunk_s)
        allowed_s = max(0.0, self.missing_s - held_s) + _MORE_S + backoff_s
        grown_ms = self.after_ms - self.before_ms
        most_grown_ms = bounds.may_grow_ms + bounds.chunk_s * 1_000 + _DELAY_WITHIN_MS
        # A second is one mark, and a mark that is cut is none: two at each end of what was missing.
        most_lost = self.missing_s + self.silent_s + bounds.chunk_s + 4
        not_as_told_s = abs(self.later_s - grown_ms / 1_000)
        found = [
            (self.silent_s > allowed_s, f"silent for {self.silent_s:.1f} s, allowed are {allowed_s:.1f} s"),
            (self.lost > most_lost, f"{self.lost} s of the programme are not heard, allowed are {most_lost:.0f} s"),
            (grown_ms > most_grown_ms, f"told to be later by {grown_ms} ms"),
            (not_as_told_s > _MORE_S + bounds.chunk_s, f"later by {self.later_s:.1f} s, told are {grown_ms} ms"),
        ]
        return [text for is_so, text in found if is_so]


async def play(air: Air, station: Station, happening: Happening, bounds: Bounds) -> Verdict:
    """Listen, let it happen, and listen on until all is as before, for a minute at most."""
    async with Between(station.port) as between:
        want = air.want(f"http://127.0.0.1:{between.port}{station.path}", run=next(_runs), term=1, lead_ms=None)
        run = air.start(want)
        await air.until(lambda: ("playing", "", "") in air.told_of(run))
        await asyncio.sleep(BEFORE_S)
        before_ms, begun_s = run.delay_ms, time.monotonic()
        await happening(between, station)
        missing_s = time.monotonic() - begun_s
        wait_s, recovers_s = AFTER_S, time.monotonic() + RECOVERS_WITHIN_S
        while True:
            await asyncio.sleep(wait_s)
            verdict = _judged(air, run, await air.entries(want), missing_s, before_ms)
            if not verdict.faults(bounds) or time.monotonic() + _AGAIN_S > recovers_s:
                break
            wait_s = _AGAIN_S
        await run.close()
    return verdict


def _judged(air: Air, run: SourceRun, entries: list[FrameEntry], missing_s: float, before_ms: int) -> Verdict:
    rows = _rows(entries)
    made = _made_s([mark for row in rows for mark in row.marks])
    return Verdict(
        missing_s,
        _silent_s(entries),
        run.silent_ms / 1_000,
        before_ms,
        run.delay_ms,
        made[-1].late_s - made[_EARLY].late_s,
        [mark.second for earlier, mark in pairwise(made) if mark.made_s <= earlier.made_s + 0.5],
        round(made[-1].made_s - made[0].made_s) + 1 - len(made),
        sum(row.clicks for row in rows),
        [(state, code) for state, _, code in air.told_of(run)],
    )


class _Mark(NamedTuple):
    """A mark that was heard: when, which second it names, when that was by the first one, and how late it is by it."""

    heard_s: float
    second: int
    made_s: float = 0.0
    late_s: float = 0.0


def _made_s(marks: list[_Mark]) -> list[_Mark]:
    """The marks with when they were made: between any two, the sound that lies between them, give or take its delay."""
    first, found = marks[0], []
    for mark in marks:
        late_s = (mark.heard_s - first.heard_s - (mark.second - first.second) + _TURN / 2) % _TURN - _TURN / 2
        found.append(mark._replace(made_s=mark.heard_s - late_s, late_s=late_s))
    return found


class _Row(NamedTuple):
    """What was heard without a break."""

    marks: list[_Mark]
    clicks: int


def _rows(entries: list[FrameEntry]) -> list[_Row]:
    rows: list[list[FrameEntry]] = []
    for entry in entries:
        if not entry.packets:
            continue
        if rows and entry.first_index == rows[-1][-1].next_index:
            rows[-1].append(entry)
        else:
            rows.append([entry])
    found = []
    for row in rows:
        pcm = decode_opus(packet for entry in row for packet in entry.packets)
        marks = find_marks(pcm)
        begin_s = row[0].first_index * TICK_US / 1e6
        found.append(
            _Row([_Mark(begin_s + at / RATE, second) for at, second in marks], _clicks(pcm, [at for at, _ in marks]))
        )
    return found


def _clicks(pcm: Pcm, onsets: list[int]) -> int:
    """Short sounds where the programme has none; a longer one is a burst whose other half is missing."""
    quiet = np.ones(len(pcm), bool)
    quiet[: RATE // 2] = quiet[-_SMEAR_SAMPLES:] = False
    for at in onsets:
        quiet[max(0, at - _SMEAR_SAMPLES) : at + _BURST_SAMPLES + _SMEAR_SAMPLES] = False
    if not onsets:
        return 0
    quiet[: onsets[0]] = quiet[onsets[-1] :] = False
    loud = np.add.reduceat(np.abs(pcm[:, 0]) * quiet > _QUIET, np.arange(0, len(pcm), FRAME_SAMPLES)) > 0
    edges = np.flatnonzero(np.diff(loud, prepend=False, append=False))
    return sum(end - begin <= _CLICK_FRAMES for begin, end in zip(edges[::2], edges[1::2], strict=True))


def _silent_s(entries: list[FrameEntry]) -> float:
    """Ticks between the first and the last packet in which there was none."""
    begun = [entry for entry in entries if entry.packets]
    packets = sum(len(entry.packets) for entry in begun)
    return (begun[-1].next_index - begun[0].first_index - packets) * TICK_US / 1e6
