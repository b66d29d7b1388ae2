"""Measure a peer in a local Discord of its own."""

from __future__ import annotations

import asyncio
import functools
import os
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from shared.process import parent_death_signal
from shared.schema.job import OpusOptions
from tests.bench.peers.programs import Absent, Peer
from tests.bench.results import Median
from tests.emulator.client import EmulatorClient, EmulatorProcess
from tests.emulator.main.records import Bot
from tests.emulator.records import ChannelKind, Report, Voice
from tests.media.audio import FRAME_SAMPLES, PROGRAMME, decode_file
from worker.encode.opus import OpusEncoder

_FRAMES_PER_S = 50
_SAMPLED_GUILDS = 8
_PLAYING_WITHIN_S = 60.0
_POLL_S = 0.25
_SETTLE_S = 1.5
_END_WITHIN_S = 5.0


class PeerError(Exception):
    """The peer ended or did not get to play; the text ends with what it said last."""


class PeerFigures(NamedTuple):
    """What was measured of one peer in calls of one kind.

    Attributes:
        kind: a stage has no end-to-end encryption, a voice channel has.
        mode: the transport encryption that it chose.
        cpu_us: microseconds of CPU time per packet that arrived.
        cores: CPU time per time.
        lost: sequence gaps; `kernel_drops` are packets that the local Discord was too slow for, and among them.
        late_*: departures from each guild's own 20 ms grid, as listeners see it.
        in_the_clear: packets of sampled guilds that should have been encrypted end to end.
    """

    name: str
    version: str
    setting: str
    kind: ChannelKind
    mode: str
    guilds: int
    cpu_us: Median
    cores: Median
    packets_per_s: Median
    wanted_per_s: float
    lost: int
    kernel_drops: int
    late_p50_ms: float
    late_p99_ms: float
    late_p999_ms: float
    late_max_ms: float
    decrypt_failed: int
    in_the_clear: int

    def described(self) -> dict[str, object]:
        """For JSON."""
        fields = self._asdict()
        return {name: each._asdict() if isinstance(each, Median) else each for name, each in fields.items()}


class Missing(NamedTuple):
    """What was not measured, and why."""

    name: str
    kind: ChannelKind
    reason: str


class _Reading(NamedTuple):
    packets: int
    cpu_ns: int
    at_ns: int


async def measure_all(
    guilds: int,
    peers: Sequence[Peer],
    kinds: Sequence[ChannelKind] = ("stage", "voice"),
    *,
    windows: int = 4,
    window_s: float = 2.0,
) -> tuple[list[PeerFigures], list[Missing]]:
    """One peer after the other; those that are absent or fail are named with the reason."""
    found, missing = [], []
    for peer in peers:
        for kind in kinds:
            try:
                found.append(await measure(peer, guilds, kind, windows=windows, window_s=window_s))
            except (Absent, PeerError) as error:
                missing.append(Missing(peer.name, kind, str(error)))
    return found, missing


async def measure(
    peer: Peer, guilds: int, kind: ChannelKind = "stage", *, windows: int = 4, window_s: float = 2.0
) -> PeerFigures:
    """Let a peer play to so many guilds; readings are medians over windows of steady play.

    Raises: Absent: it is not here, or not able to; PeerError: it failed.
    """
    peer.demand(kind)
    async with _playing(peer, guilds, kind) as (process, discord):
        await asyncio.sleep(_SETTLE_S)
        await discord.reset()
        cpu_us, cores, packets_per_s = [], [], []
        before, _ = await _read(process, discord)
        for _ in range(windows):
            await asyncio.sleep(window_s)
            after, report = await _read(process, discord)
            packets, spent_ns, passed_ns = (now - then for now, then in zip(after, before, strict=True))
            cpu_us.append(spent_ns / 1e3 / max(packets, 1))
            cores.append(spent_ns / passed_ns)
            packets_per_s.append(packets * 1e9 / passed_ns)
            before = after
        (mode,) = await _modes(discord)
        if process.returncode is not None:
            raise PeerError("ended while it was measured")
    lateness = report.lateness_ms
    return PeerFigures(
        name=peer.name,
        version=peer.version(),
        setting=peer.setting,
        kind=kind,
        mode=mode,
        guilds=guilds,
        cpu_us=Median.of(cpu_us),
        cores=Median.of(cores),
        packets_per_s=Median.of(packets_per_s),
        wanted_per_s=float(guilds * _FRAMES_PER_S),
        lost=report.lost,
        kernel_drops=report.kernel_drops,
        late_p50_ms=lateness.p50 or 0.0,
        late_p99_ms=lateness.p99 or 0.0,
        late_p999_ms=lateness.p999 or 0.0,
        late_max_ms=lateness.max or 0.0,
        decrypt_failed=report.decrypt_failed,
        in_the_clear=report.in_the_clear,
    )


@asynccontextmanager
async def _playing(
    peer: Peer, guilds: int, kind: ChannelKind
) -> AsyncIterator[tuple[asyncio.subprocess.Process, EmulatorClient]]:
    """The peer and its local Discord, while all guilds are heard."""
    async with (
        EmulatorProcess("--sample", str(_SAMPLED_GUILDS)) as emulator,
        EmulatorClient(emulator.control_url) as discord,
    ):
        bot = await discord.bot()
        names = [(str(3 * 10**17 + number), str(4 * 10**17 + number)) for number in range(guilds)]
        voices = await discord.issue(names, user=bot.user_id, kind=kind, ghosts=1)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            process = await _start(peer, bot, emulator.ca_file, Path(folder) / "frames", log)
            try:
                await _until_playing(process, discord, voices)
                yield process, discord
            except (PeerError, TimeoutError, ConnectionError) as error:
                said = log.read_text(errors="replace")[-2_000:]
                raise PeerError(f"{str(error) or 'silent for too long'}\n{said}") from error
            finally:
                await _end(process)


async def _start(peer: Peer, bot: Bot, ca_file: Path, frames: Path, log: Path) -> asyncio.subprocess.Process:
    _write_frames(frames)
    login = [bot.token, bot.api_url] if peer.logs_in else []
    with log.open("wb") as output:
        return await asyncio.create_subprocess_exec(
            *(*peer.command(frames), *login),
            env=os.environ | peer.environment | {peer.ca_variable: str(ca_file)},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
            preexec_fn=parent_death_signal,
        )


async def _until_playing(process: asyncio.subprocess.Process, discord: EmulatorClient, voices: list[Voice]) -> None:
    """Hand out the credentials and wait until every guild is heard, and in its DAVE group where it has one.

    Raises: PeerError; TimeoutError; ConnectionError.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    async with asyncio.timeout(_PLAYING_WITHIN_S):
        process.stdin.write(msgspec.json.encode(voices) + b"\n")
        await process.stdin.drain()
        if await process.stdout.readline() != b"playing\n":
            raise PeerError(f"ended with {await process.wait()} before it played")
        while not _all_heard(await discord.report(guilds=True)):  # noqa: ASYNC110 - a report wakes nobody
            await asyncio.sleep(_POLL_S)


def _all_heard(report: Report) -> bool:
    rows = report.guild_rows or []
    seen = [(row.sessions[-1].user, channel) for row in rows if row.sessions for channel in row.channels]
    grouped = all(channel.dave_version == 0 or user in channel.group for user, channel in seen)
    return report.heard == report.guilds and grouped and not any(channel.in_transition for _, channel in seen)


async def _modes(discord: EmulatorClient) -> set[str]:
    """The transport modes that the guilds' sessions have."""
    report = await discord.report(guilds=True)
    return {row.sessions[-1].mode or "" for row in report.guild_rows or []}


async def _end(process: asyncio.subprocess.Process) -> None:
    """Its input ends, and so does it; one that does not obey is killed."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(_END_WITHIN_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _read(process: asyncio.subprocess.Process, discord: EmulatorClient) -> tuple[_Reading, Report]:
    # The report counts at its end: what is read right after it is of the same moment.
    report = await discord.report()
    return _Reading(report.packets, tree_cpu_ns(process.pid), time.monotonic_ns()), report


def tree_cpu_ns(pid: int) -> int:
    """CPU time, user and system, of a process and of all that live below it; 0 when it is gone.

    Finer than /proc/pid/stat, which tells it in steps of 10 ms. Source: clock_getcpuclockid(3); the number of a
    process's clock is the complement of its id, shifted by 3, and 2.
    """
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        own_ns = time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return 0
    return own_ns + sum(tree_cpu_ns(int(child)) for child in children)


def _write_frames(path: Path) -> None:
    path.write_bytes(b"".join(len(frame).to_bytes(2, "big") + frame for frame in programme_frames()))


@functools.cache
def programme_frames() -> list[bytes]:
    """The test programme as the product encodes it by default: what every peer plays."""
    pcm = decode_file(PROGRAMME)
    encoder = OpusEncoder(OpusOptions())
    frames = [encoder.encode(pcm[at : at + FRAME_SAMPLES]) for at in range(0, len(pcm) - FRAME_SAMPLES, FRAME_SAMPLES)]
    encoder.flush()
    return frames
