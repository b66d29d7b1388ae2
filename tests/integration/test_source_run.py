"""A source on air: where its frames stand in time, and how a run begins, fails, is taken over and ends."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from shared.clock import NS_PER_S, NS_PER_US
from shared.errors import ErrorCode
from shared.schema.frame_entry import TICK_US, Flags, FrameEntry
from shared.schema.records import BroadcastStatus, SourceWant
from shared.store.client import Store
from shared.store.keys import Keys
from tests.media.audio import PROGRAMME, decode_file, decode_opus, write_audio
from tests.media.on_air import PATIENCE_S, Air, on_air
from tests.media.radio import HangUp, Radio, find_marks
from tests.media.web import served
from worker.encode.publish import Publisher
from worker.encode.records import SILENT_DB
from worker.encode.run import SourceRun
from worker.encode.source import SourceChild

_runs = iter(range(1_000, 1_000_000))


@pytest.fixture
async def air(store: Store, raw_store: Store, keys: Keys, tmp_path: Path) -> AsyncIterator[Air]:
    async with on_air(store, raw_store, keys, tmp_path) as air:
        yield air


def clip(folder: Path, seconds: float, name: str = "clip.wav") -> str:
    music = decode_file(PROGRAMME)[: round(seconds * 48_000)]
    write_audio(folder / name, music, rate=48_000, layout="stereo", codec="pcm_s16le", container_format="wav")
    return name


def assert_contiguous(entries: list[FrameEntry]) -> None:
    for before, after in itertools.pairwise(entries):
        assert after.first_index == before.next_index


async def test_frames_stand_in_a_row_from_an_epoch_on_the_grid(air: Air) -> None:
    """A source's frames have consecutive indices, positions that say where in the source they are, and one epoch."""
    want = air.want(clip(air.media, 3.0), run=next(_runs), term=10)
    air.start(want)
    entries = await air.until_frames(want, 150)
    assert_contiguous(entries)
    assert entries[0].first_index == 0
    assert {entry.epoch_us for entry in entries} == {entries[0].epoch_us}
    assert entries[0].epoch_us % TICK_US == 0
    assert [entry.position_samples for entry in entries] == [entry.first_index * 960 for entry in entries]


async def test_the_level_of_what_is_on_air_is_told(air: Air) -> None:
    """Within seconds, and anew when it has become another one; nothing is an event."""
    loud = np.full((8 * 48_000, 2), 0.5, np.float32)
    write_audio(air.media / "a.wav", np.concatenate([loud, loud * 0]))
    run = air.start(air.want("a.wav", run=next(_runs), term=10, lead_ms=500))
    assert run.level_db is None
    await air.until(lambda: run.level_db == -6)
    await air.until(lambda: run.level_db == SILENT_DB)
    assert [word.is_event for word in air.words] == [True, False, False]


async def test_a_source_shorter_than_the_start_is_played_whole(air: Air) -> None:
    """300 ms of sound go on air although a run waits for 500 ms, and end with a mark."""
    want = air.want(clip(air.media, 0.3), run=next(_runs), term=10)
    air.start(want)
    await air.until(lambda: ("ended", "finished", "") in air.told)
    entries = await air.entries(want)
    assert 15 <= sum(len(entry.packets) for entry in entries) <= 17
    assert entries[-1].flags == Flags.ENDED
    assert ("playing", "", "") in air.told


async def test_the_lead_of_a_file_is_filled_up_a_tenth_at_a_time(air: Air) -> None:
    """A publisher sleeps while a second of 10 is used up, then publishes that second at once; never beyond the lead.

    It is looked for until it was seen: from one pause to the next at least a second was published.
    """
    want = air.want(clip(air.media, 20.0), run=next(_runs), term=10, lead_ms=10_000)
    run = air.start(want)
    entries = await air.until_frames(want, 500)
    after_pause: list[int] = []
    async with asyncio.timeout(PATIENCE_S):
        while not any(later - sooner >= 50 for sooner, later in itertools.pairwise(after_pause)):
            before_ns, before = time.monotonic_ns(), sum(len(entry.packets) for entry in entries)
            entries = await air.until_frames(want, before + 1)
            assert run.epoch_us + entries[-1].first_index * TICK_US <= air.clock.now_us() + 10_000_000
            if time.monotonic_ns() - before_ns > NS_PER_S // 2:
                after_pause.append(before)
    assert_contiguous(entries)


async def test_a_takeover_goes_on_where_the_last_entry_ended(air: Air) -> None:
    """Another encoder under a higher term continues index, position and epoch, and voids nothing."""
    name = clip(air.media, 8.0)
    run = next(_runs)
    first = air.want(name, run=run, term=10, lead_ms=2_000)
    runner = air.start(first)
    before = await air.until_frames(first, 60)
    await runner.close()
    second = air.want(name, run=run, term=11, lead_ms=2_000)
    air.start(second)
    entries = await air.until_frames(second, sum(len(entry.packets) for entry in before) + 40)
    assert_contiguous(entries)
    assert {entry.epoch_us for entry in entries} == {before[0].epoch_us}
    taken_over = next(entry for entry in entries if entry.term == 11)
    assert taken_over.position_samples == taken_over.first_index * 960


async def test_the_old_publisher_of_a_taken_over_run_stops(air: Air) -> None:
    """Once a higher term stands in the stream, the lower one publishes nothing more and its child is gone."""
    name = clip(air.media, 8.0)
    run = next(_runs)
    old_want = air.want(name, run=run, term=10, lead_ms=1_000)
    old = air.start(old_want)
    await air.until_frames(old_want, 30)
    await air.until(lambda: old.epoch_us != 0)
    mark = FrameEntry(99, 10_000, old.epoch_us, 0, 0, ())
    await Publisher(air.raw, air.key(old_want), 1_000).publish(mark)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.wait([old.task])
    assert old.child_pid is None
    assert (await air.entries(old_want))[-1].term == 99


async def test_stop_cuts_what_was_published_ahead(air: Air) -> None:
    """A stop ends the run just ahead of now although many seconds lie in the stream."""
    want = air.want(clip(air.media, 8.0), run=next(_runs), term=10, loop=True)
    run = air.start(want)
    entries = await air.until_frames(want, 25)
    async with asyncio.timeout(PATIENCE_S):
        while (entries[-1].next_index * TICK_US + entries[0].epoch_us) < air.clock.now_us() + 10_000_000:
            await asyncio.sleep(0.02)
            entries = await air.entries(want)
    run.update(SourceWant(generation=10, term=12, spec=want.spec, stop=True))
    await air.until(lambda: ("ended", "stopped", "") in air.told)
    last = (await air.entries(want))[-1]
    assert last.term == 12
    assert last.flags == Flags.ENDED
    assert not last.packets
    assert last.first_index < entries[-1].next_index


async def test_stop_before_the_first_frame_ends_the_run(air: Air) -> None:
    """A stop that comes while the source is still silent is told as the end, and nothing is published."""

    async def silent(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.sleep(PATIENCE_S)
        return response

    async with served(("/silent", silent)) as base:
        want = air.want(f"{base}/silent", run=next(_runs), term=10)
        run = air.start(want)
        await air.until(lambda: run.child_pid is not None)
        run.update(SourceWant(generation=10, term=12, spec=want.spec, stop=True))
        await air.until(lambda: ("ended", "stopped", "") in air.told)
        assert not await air.entries(want)
        assert run.child_pid is None


async def test_a_file_that_cannot_be_opened_is_tried_five_times(air: Air) -> None:
    """Each failure is told as stalled with its code, the first, second and fourth as events; the fifth is the end."""
    want = air.want("nothing.wav", run=next(_runs), term=10)
    run = air.start(want)
    await air.until(lambda: bool(air.told) and air.told[-1][0] == "ended")
    assert air.told == [("stalled", "", ErrorCode.SOURCE_NOT_FOUND)] * 3 + [
        ("ended", "source_failed", ErrorCode.SOURCE_NOT_FOUND)
    ]
    assert [(word.attempt, word.is_event) for word in air.words[:-1]] == [(1, True), (2, True), (3, False), (4, True)]
    assert run.encodes == 5


async def test_a_source_outside_the_media_folder_is_tried_once(air: Air) -> None:
    """What trying again cannot mend is not tried again."""
    want = air.want("/etc/hostname", run=next(_runs), term=10)
    air.start(want)
    await air.until(lambda: bool(air.told) and air.told[-1][0] == "ended")
    assert air.told == [("ended", "source_failed", ErrorCode.SOURCE_FORBIDDEN)]


async def test_a_source_that_runs_dry_flags_the_gap_and_returns_ahead_of_now(air: Air) -> None:
    """Listeners are told of a gap before they run dry; the sound that comes later starts above the mark."""
    go_on = asyncio.Event()
    wav = air.media / clip(air.media, 6.0)
    body = wav.read_bytes()
    first = 44 + 48_000 * 4  # one second of sound

    async def halting(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(body[:first])
        await go_on.wait()
        await response.write(body[first:])
        return response

    async with served(("/halting.wav", halting)) as base:
        want = air.want(f"{base}/halting.wav", run=next(_runs), term=10, lead_ms=2_000, kind="file")
        run = air.start(want)
        try:
            async with asyncio.timeout(PATIENCE_S):
                entries = await air.entries(want)
                while not any(Flags.GAP in entry.flags for entry in entries):
                    await asyncio.sleep(0.02)
                    entries = await air.entries(want)
            go_on.set()
            entries = await air.until_frames(want, 200)
        finally:
            go_on.set()
            await run.close()
    marked = next(number for number, entry in enumerate(entries) if Flags.GAP in entry.flags)
    assert_contiguous(entries[: marked + 1])
    assert entries[marked + 1].first_index > entries[marked].next_index
    assert np.all(np.diff([entry.first_index for entry in entries]) > 0)


async def test_a_takeover_after_the_end_was_published_cuts_nothing(air: Air) -> None:
    """Who takes over a run that is published to its end lets the rest be heard, and tells that it finished."""
    name = clip(air.media, 2.0)
    run = next(_runs)
    first = air.want(name, run=run, term=10)
    runner = air.start(first)
    entries = await air.until_frames(first, 100)
    async with asyncio.timeout(PATIENCE_S):
        while Flags.ENDED not in entries[-1].flags:
            await asyncio.sleep(0.02)
            entries = await air.entries(first)
    await runner.close()
    air.told.clear()
    second = air.start(air.want(name, run=run, term=11))
    await air.until(lambda: bool(air.told))
    assert air.told == [("ended", "finished", "")]
    assert await air.entries(first) == entries
    assert second.encodes == 0


async def test_a_child_that_cannot_be_started_is_a_stall_like_any_other(
    air: Air, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When no process is to be had just now, the source is told as stalled and tried again."""
    tries = 0
    start = SourceChild.start

    async def no_process_at_first(*arguments: Any, **options: Any) -> SourceChild:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise BlockingIOError("no process to be had")
        return await start(*arguments, **options)

    monkeypatch.setattr(SourceChild, "start", no_process_at_first)
    want = air.want(clip(air.media, 1.0), run=next(_runs), term=10)
    air.start(want)
    await air.until_frames(want, 50)
    assert air.told[0] == ("stalled", "", ErrorCode.SOURCE_BROKEN)


async def test_live_input_is_late_by_its_lead(air: Air) -> None:
    """Each frame of a station is played its lead after it was made, and not before."""
    async with Radio("ogg") as radio:
        want = air.want(radio.url, run=next(_runs), term=10, lead_ms=2_500)
        run = air.start(want)
        entries = await air.until_frames(want, 150)
        await run.close()
    assert_contiguous(entries)
    for entry in entries:
        made_us = radio.made_ns(radio.listened_from[0] + entry.position_samples + 960) // 1_000
        assert entry.epoch_us + entry.first_index * TICK_US - made_us >= (2_500 - 20) * 1_000


BURST_S = 6.0
SLACK_S = 3.0
"""Half a burst: a run that plays a burst is late by more, and a slow machine by less."""


def delays_s(radio: Radio, entries: list[FrameEntry]) -> list[float]:
    """From when the marks in frames that stand in a row were made to when they are heard."""
    assert_contiguous(entries)
    heard = decode_opus(packet for entry in entries for packet in entry.packets)
    first_us = entries[0].epoch_us + entries[0].first_index * TICK_US
    delays = []
    for onset, second in find_marks(heard):
        heard_ns = first_us * NS_PER_US + onset * 1_000_000 // 48
        delays.append((heard_ns - radio.mark_made_ns(second, heard_ns)) / 1e9)
    return delays


async def until_gap(air: Air, want: SourceWant) -> int:
    """Wait for the mark of a gap; returns how many entries there are up to it."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            entries = await air.entries(want)
            if entries and Flags.GAP in entries[-1].flags:
                return len(entries)
            await asyncio.sleep(0.02)


async def until_late_as_told(radio: Radio, air: Air, run: SourceRun, count: int) -> None:
    """Wait until the latest marks behind the first entries are as late as the run says.

    On a busy machine a burst may pause and seem to be over: then that is only noticed after some seconds.
    """
    delays: list[float] = []
    for _ in range(round(PATIENCE_S / 0.2)):
        row: list[FrameEntry] = []
        for entry in (await air.entries(run.want))[count:]:
            row = [*row[-40:], entry] if row and entry.first_index == row[-1].next_index else [entry]
        delays = delays_s(radio, row)[-2:] if row else []
        if len(delays) == 2 and 0 < statistics.median(delays) < run.delay_ms / 1_000 + 1.0 + radio.behind_s:
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"late by {delays}, told is {run.delay_ms} ms")


async def test_live_input_that_was_gone_is_late_by_its_lead_again(air: Air) -> None:
    """What a station sends at once when it is opened anew is not played from its beginning."""
    async with Radio("mp3", BURST_S) as radio:
        want = air.want(radio.url, run=next(_runs), term=10, lead_ms=1_000)
        run = air.start(want)
        await air.until_frames(want, 100)
        radio.sending.clear()
        count = await until_gap(air, want)
        radio.sending.set()
        await until_late_as_told(radio, air, run, count)
        await run.close()
    assert run.encodes > 1


@pytest.mark.parametrize(("hang_up", "away_status"), [("polite", 404), ("polite", 503), ("reset", 404)])
async def test_live_input_goes_off_air_by_order_alone(air: Air, hang_up: HangUp, away_status: int) -> None:
    """However a station leaves and whatever it says while it is away, it is heard again; the silence is told."""
    async with Radio("ogg", hang_up=hang_up, away_status=away_status) as radio:
        want = air.want(radio.url, run=next(_runs), term=10, lead_ms=1_000)
        run = air.start(want)
        await air.until_frames(want, 75)
        radio.sending.clear()
        count = await until_gap(air, want)
        await air.until(lambda: ("stalled", "", ErrorCode.SOURCE_HTTP_STATUS) in air.told)
        assert run.silent_ms >= 0
        radio.sending.set()
        frames = sum(len(entry.packets) for entry in (await air.entries(want))[:count])
        entries = await air.until_frames(want, frames + 50)
        await run.close()
    left = ErrorCode.SOURCE_ENDED if hang_up == "polite" else ErrorCode.SOURCE_BROKEN
    assert air.told[:3] == [
        ("playing", "", ""), ("stalled", "", left), ("stalled", "", ErrorCode.SOURCE_HTTP_STATUS)
    ]  # fmt: skip
    assert air.told[-1] == ("playing", "", "")
    assert air.words[-1].attempt == 0
    missing = entries[count].first_index - entries[count - 1].next_index
    assert run.silent_ms == missing * 20
    assert missing > 0


async def test_live_input_that_stands_still_is_told_as_stalled(air: Air) -> None:
    """The connection stands and nothing comes: no failure yet, and silence all the same."""
    async with Radio("ogg") as radio:
        want = air.want(radio.url, run=next(_runs), term=10, lead_ms=500)
        run = air.start(want)
        await air.until_frames(want, 75)
        radio.flowing.clear()
        await air.until(lambda: air.told[-1] == ("stalled", "", ErrorCode.SOURCE_STALLED))
        await air.until(lambda: run.silent_ms > 200)
        radio.flowing.set()
        await air.until(lambda: air.told[-1] == ("playing", "", ""))
        await run.close()
    assert run.encodes == 1
    assert run.silent_ms > 200


async def test_silence_between_two_encoders_is_counted(air: Air) -> None:
    """Who takes over counts on from what was told before, and what was not heard meanwhile as well."""
    name, run = clip(air.media, 8.0), next(_runs)
    first = air.want(name, run=run, term=10, lead_ms=1_000)
    runner = air.start(first)
    await air.until_frames(first, 50)
    await runner.close()
    last = (await air.entries(first))[-1]
    air.before = BroadcastStatus(state="playing", at=1, epoch_us=last.epoch_us, encodes=3, silent_ms=5_000)
    await air.until(lambda: air.clock.now_us() > last.epoch_us + (last.next_index + 10) * TICK_US)
    second = air.start(air.want(name, run=run, term=11, lead_ms=1_000))
    count = len(await air.entries(first))
    entries = await air.until_frames(first, sum(len(entry.packets) for entry in await air.entries(first)) + 25)
    await second.close()
    missing = entries[count].first_index - last.next_index
    assert missing >= 10
    assert second.silent_ms == 5_000 + missing * 20
    assert second.encodes == 4


async def test_live_input_that_stood_still_is_heard_whole_and_late_by_more(air: Air) -> None:
    """What a station kept back is heard, and the next pause of that length is not any more."""
    async with Radio("mp3") as radio:
        want = air.want(radio.url, run=next(_runs), term=10, lead_ms=1_000)
        run = air.start(want)
        await air.until_frames(want, 100)
        radio.flowing.clear()
        stood_ns = time.monotonic_ns()
        count = await until_gap(air, want)
        await air.until(lambda: time.monotonic_ns() - stood_ns > 5_500_000_000)  # below the time-out of a read
        radio.flowing.set()
        await until_late_as_told(radio, air, run, count)
        await run.close()
    assert run.encodes == 1
    assert run.delay_ms > 5_000


async def test_live_input_that_gets_ahead_is_late_by_its_lead_again(air: Air) -> None:
    """A burst that seemed to be over, a fast clock, an outage: it is not played late for ever."""
    async with Radio("mp3") as radio:
        want = air.want(radio.url, run=next(_runs), term=10, lead_ms=None)
        run = air.start(want)
        await air.until_frames(want, 100)
        count = len(await air.entries(want))
        radio.began_ns -= 8 * NS_PER_S
        await until_late_as_told(radio, air, run, count)
        entries = await air.entries(want)
        await run.close()
    assert run.encodes == 1
    newest = entries[-1]
    assert newest.epoch_us + newest.next_index * TICK_US - air.clock.now_us() < 3_000_000  # the lead of live input


async def test_live_input_opened_anew_within_its_lead_is_not_later_than_it(air: Air) -> None:
    """Nobody hears that it was gone, and nothing that is too old follows what was published."""
    lead_s = 8.0
    async with Radio("mp3", BURST_S) as radio:
        want = air.want(radio.url, run=next(_runs), term=10, lead_ms=round(lead_s * 1_000))
        run = air.start(want)
        await air.until_frames(want, 350)
        radio.sending.clear()
        await air.until(lambda: any(state == "stalled" for state, _, _ in air.told))
        radio.sending.set()
        before = sum(len(entry.packets) for entry in await air.entries(want))
        entries = await air.until_frames(want, before + 200)
        await run.close()
    assert len(radio.listened_from) == 2
    assert not any(Flags.GAP in entry.flags for entry in entries)
    delays = delays_s(radio, entries)[-3:]
    assert len(delays) == 3
    assert statistics.median(delays) < lead_s + SLACK_S + radio.behind_s, delays


async def test_live_input_taken_over_is_late_by_its_lead(air: Air) -> None:
    """Another encoder is sent a burst of its own, and plays no more of it than the lead allows."""
    run = next(_runs)
    async with Radio("mp3", BURST_S) as radio:
        first = air.want(radio.url, run=run, term=10, lead_ms=1_000)
        runner = air.start(first)
        await air.until_frames(first, 100)
        await runner.close()
        last = (await air.entries(first))[-1]
        await air.until(lambda: air.clock.now_us() > last.epoch_us + last.next_index * TICK_US)
        second = air.start(air.want(radio.url, run=run, term=11, lead_ms=1_000))
        count = len(await air.entries(first))
        await until_late_as_told(radio, air, second, count)
        returned = (await air.entries(first))[count:]
        await second.close()
    assert {entry.term for entry in returned} == {11}


@asynccontextmanager
async def chunked(body: bytes) -> AsyncIterator[str]:
    """An HTTP server that does not tell how long a file is; gives the URL of it."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(body)
        return response

    async with served(("/chunked", answer)) as base:
        yield f"{base}/chunked"


def untold(folder: Path, seconds: float) -> bytes:
    """MP3 that does not tell its own length either."""
    music = decode_file(PROGRAMME)[: round(seconds * 48_000)]
    return write_audio(folder / "clip.mp3", music, codec="libmp3lame", options={"write_xing": "0"}).read_bytes()


async def test_a_file_of_unknown_length_is_played_whole(air: Air) -> None:
    """It looks like live input, but comes faster: nothing of it is left out, and it has the lead of a file."""
    async with chunked(untold(air.media, 25.0)) as url:
        want = air.want(url, run=next(_runs), term=10, lead_ms=None)
        run = air.start(want)
        entries = await air.until_frames(want, 1_240)
        ahead_us = entries[-1].epoch_us + entries[-1].next_index * TICK_US - air.clock.now_us()
        await run.close()
    assert_contiguous(entries)
    assert (entries[0].first_index, entries[0].position_samples) == (0, 0)
    assert ahead_us > 5_000_000


async def test_a_short_loop_of_unknown_length_goes_on_air(air: Air) -> None:
    """It never comes at its own pace, and each pass of it is shorter than what is taken for a burst."""
    async with chunked(untold(air.media, 6.0)) as url:
        want = air.want(url, run=next(_runs), term=10, loop=True, lead_ms=None)
        run = air.start(want)
        entries = await air.until_frames(want, 700)
        await run.close()
    assert_contiguous(entries)
