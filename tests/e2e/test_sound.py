"""What listeners hear is the source: whole, in order, once, and encoded once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from aiohttp import web

from shared.errors import Fenced
from shared.schema.frame_entry import FRAMES_PER_ENTRY, TICK_US, Flags, FrameEntry
from shared.schema.job import OpusOptions
from tests.e2e.stack import Stack, gone, until
from tests.emulator.analysis import unwrap_timestamps
from tests.emulator.payloads import SILENCE_ID
from tests.emulator.records import GuildPackets
from tests.media.audio import (
    FRAME_SAMPLES,
    RATE,
    Pcm,
    align,
    border_clicks,
    decode_file,
    decode_opus,
    resampled,
    write_audio,
)
from worker.encode.decode import decode
from worker.encode.opus import OpusEncoder
from worker.encode.publish import Publisher

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONGEST_DIFFERENCE_S = 0.040


def encoded(path: Path) -> list[bytes]:
    """The file as one encoder makes it, without anything of the pool in between."""
    encoder = OpusEncoder(OpusOptions())
    return [*(encoder.encode(block.pcm) for block in decode(str(path))), *encoder.flush()]


def encoded_tone(tone: Pcm) -> list[bytes]:
    encoder = OpusEncoder(OpusOptions())
    blocks = tone[: len(tone) // FRAME_SAMPLES * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES, 2)
    return [encoder.encode(np.ascontiguousarray(block)) for block in blocks]


def frames_heard(packets: GuildPackets) -> list[bytes]:
    """Opus frames of a guild's one session, silence left out."""
    (session,) = packets.sessions
    return [packets.payloads[payload] for payload in session.payload if payload != SILENCE_ID]


def assert_no_gap(packets: GuildPackets) -> None:
    """Every packet of the one session follows 20 ms after the one before."""
    (session,) = packets.sessions
    steps = np.diff(unwrap_timestamps(np.asarray(session.timestamp, np.uint32)))
    assert set(steps.tolist()) == {FRAME_SAMPLES}


@pytest_asyncio.fixture(loop_scope="module")
async def web_server(running: Stack) -> AsyncIterator[str]:
    """Serves the media folder at http://127.0.0.1."""
    application = web.Application()
    application.add_routes([web.static("/", running.media)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{site.port}"
    await runner.cleanup()


async def assert_heard_by_all(stack: Stack, source: str | Path, file: Path) -> None:
    """Play a source to its end for guilds on both workers, and compare what each got with the file."""
    broadcast = stack.new_id("radio")
    guilds = await stack.join(8, broadcast, state="idle")
    held = await stack.by_worker(guilds)
    assert len(held) == 2
    await stack.start(source, broadcast=broadcast)
    run = await stack.run_of(broadcast)
    playing = await stack.wait_event("broadcast.playing", run=run)
    ended = await stack.wait_event("broadcast.ended", 30, run=run)
    assert (ended.reason, ended.code) == ("finished", "")
    assert len(await stack.events("broadcast.playing", run=run)) == 1
    assert not await stack.events("broadcast.stalled", run=run)
    assert playing.worker == ended.worker

    async def all_silent() -> bool:
        return all(row.sessions[-1].trailing_silence == 5 for row in (await stack.heard(guilds)).values())

    await until(all_silent, "five frames of silence at the end")
    for guild, row in (await stack.heard(guilds)).items():
        (session,) = row.sessions
        assert not await stack.faults(session), guild
        assert session.state == "live"
    reference = decode_file(file)
    direct = encoded(file)
    recordings = [await stack.packets(guild) for guild in guilds]
    for recording in recordings:
        assert_no_gap(recording)
        assert frames_heard(recording) == frames_heard(recordings[0])
    for worker_guilds in held.values():
        frames = frames_heard(recordings[guilds.index(worker_guilds[0])])
        heard = decode_opus(frames)
        assert abs(len(heard) - len(reference)) <= LONGEST_DIFFERENCE_S * RATE
        _, likeness = align(reference, heard)
        assert likeness > 0.98
        by_encoder_alone = decode_opus(direct)
        assert _clicks(heard, reference) <= 1.05 * _clicks(by_encoder_alone, reference)


def _clicks(heard: Pcm, reference: Pcm) -> float:
    offset, _ = align(reference, heard)
    begin, end = max(0, -offset), min(len(heard), len(reference) - offset)
    begin = -(-begin // FRAME_SAMPLES) * FRAME_SAMPLES  # a packet begins where the comparison does
    return border_clicks(heard[begin:end], reference[begin + offset : end + offset]).at_borders


async def test_guilds_of_both_workers_hear_a_file_as_one_encoder_made_it(stack: Stack, clip: Path) -> None:
    """Every guild on every worker hears the whole file once, without loss, click or second encode."""
    await assert_heard_by_all(stack, clip, clip)


async def test_guilds_hear_a_mono_mp3_of_another_rate_from_the_web(
    stack: Stack, web_server: str, programme: Pcm
) -> None:
    """A source of 44.1 kHz, one channel and a lossy format, fetched over HTTP, is heard like any other."""
    sound = resampled(programme[20 * RATE : 23 * RATE], 44_100, "mono")
    file = write_audio(stack.media / "mono.mp3", sound, rate=44_100, layout="mono", codec="libmp3lame", bitrate=128_000)
    await assert_heard_by_all(stack, f"{web_server}/{file.name}", file)


async def test_a_cut_is_heard_from_its_index_on_and_stops_the_publisher_before(
    stack: Stack, music: Path, tone: Pcm
) -> None:
    """A higher term replaces published frames from its first index on; the publisher before is refused and ends.

    As where the source was given to another encoder: its generation is another one then, too.
    """
    broadcast = await stack.start(music)
    guilds = await stack.join(6, broadcast)
    run = await stack.run_of(broadcast)
    await stack.wait_lead(run, 5)
    children = stack.children("worker.encode.child")
    assert len(children) == 1
    await stack.hear_more(guilds, 50)
    stored = int(await stack.store.command("GET", stack.keys.term))
    seconds, microseconds = map(int, await stack.store.command("TIME"))
    term = max(stored + 1, seconds * 1_000 + microseconds // 1_000)
    await stack.store.command("SET", stack.keys.term, term)
    await stack.store.command("HSET", stack.keys.broadcast(broadcast), "generation", term)
    epoch_us = (await stack.broadcast(broadcast)).epoch_us
    index = -(-(seconds * 1_000_000 + microseconds + 200_000 - epoch_us) // TICK_US)
    frames = encoded_tone(tone)
    publisher = Publisher(stack.frames, stack.keys.frames(run), 30_000)
    for first in range(0, len(frames), FRAMES_PER_ENTRY):
        some = frames[first : first + FRAMES_PER_ENTRY]
        flags = Flags.ENDED if first + FRAMES_PER_ENTRY >= len(frames) else Flags.NONE
        await publisher.publish(FrameEntry(term, index + first, epoch_us, 0, first * FRAME_SAMPLES, some, flags))
    await gone(children)

    async def all_silent() -> bool:
        return all(row.sessions[-1].trailing_silence == 5 for row in (await stack.heard(guilds)).values())

    await until(all_silent, "the end of the tone")
    entries = await stack.published(run)
    assert max(entry.term for entry in entries) == term
    before = {
        entry.first_index + place: frame
        for entry in entries
        if entry.term < term
        for place, frame in enumerate(entry.packets)
    }
    assert max(before) > index, "what was replaced had been published"
    with pytest.raises(Fenced):
        await publisher.publish(FrameEntry(term - 1, max(before) + 1, epoch_us, 0, 0, frames[:1]))
    for guild, row in (await stack.heard(guilds)).items():
        assert not await stack.faults(row.sessions[-1]), guild
        recording = await stack.packets(guild)
        assert_no_gap(recording)
        heard = frames_heard(recording)
        begin = index - (len(heard) - len(frames))
        assert heard == [*(before[number] for number in range(begin, index)), *frames]
