"""Measure a peer, or our own pool, in a local Discord of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec

from shared.errors import GuildcastError
from shared.process import parent_death_signal
from shared.schema.job import OpusOptions
from tests.bench.peers.programs import Absent, Peer
from tests.bench.pool import BenchPool
from tests.bench.processes import exact_cpu_ns
from tests.bench.results import Median
from tests.emulator.client import EmulatorClient, EmulatorError, EmulatorProcess
from tests.emulator.main.records import Bot
from tests.emulator.records import ChannelKind, Report, Voice
from tests.media.audio import FRAME_SAMPLES, PROGRAMME, decode_file
from worker.encode.opus import OpusEncoder

OURS = "guildcast"
_OUR_SETTING = "a worker and its sender; coordinator, supervisor, encode worker and Redis are told as the rest"
_FRAMES_PER_S = 50
_SAMPLED_GUILDS = 8
_PLAYING_WITHIN_S = 60.0
_POLL_S = 0.25
_SETTLE_S = 1.5
_END_WITHIN_S = 5.0


_FAILURES = (OSError, EmulatorError, aiohttp.ClientError)
"""What a peer, or the local Discord it is in, can bring about; time-outs are of the first kind."""


class PeerError(Exception):
    """The peer ended or did not get to play; the text ends with what it said last."""


class PeerFigures(NamedTuple):
    """What was measured of one peer, or of us, in calls of one kind.

    Attributes:
        kind: a stage has no end-to-end encryption, a voice channel has.
        mode: the transport encryption that it chose.
        cpu_us: microseconds of CPU time per packet sent: that arrived, or that the kernel dropped on arrival.
        rest_us: the same of processes that `cpu_us` leaves out; only our pool has them.
        cores: CPU time of `cpu_us` per time.
        packets_per_s: packets sent, as above.
        lost: sequence gaps; `kernel_drops` are packets that the local Discord was too slow for, and among them.
        late_*: departures from each guild's own 20 ms grid, as listeners see it; medians of the windows, but for `max`.
        in_the_clear: packets of sampled guilds that should have been encrypted end to end.
    """

    name: str
    version: str
    setting: str
    kind: ChannelKind
    mode: str
    guilds: int
    cpu_us: Median
    rest_us: Median
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
    guilds: int
    reason: str


class _Cpu(NamedTuple):
    """CPU time so far: of what plays, and of what else belongs to it."""

    own_ns: int
    rest_ns: int


class _Player(NamedTuple):
    """What is measured while it plays; `cpu` raises PeerError when it has ended."""

    name: str
    version: str
    setting: str
    discord: EmulatorClient
    cpu: Callable[[], _Cpu]


async def measure_all(
    guilds: int,
    peers: Sequence[Peer],
    kinds: Sequence[ChannelKind] = ("stage", "voice"),
    *,
    ours: Sequence[int] = (),
    windows: int = 4,
    window_s: float = 5.0,
    keep: Callable[[Sequence[PeerFigures], Sequence[Missing]], None] = lambda _, __: None,
) -> tuple[list[PeerFigures], list[Missing]]:
    """We first, then one peer after the other; those that are absent or fail are named with the reason.

    Args:
        ours: numbers of guilds that we play to ourselves.
        keep: called after each measurement with all that there is so far.
    """
    found: list[PeerFigures] = []
    missing: list[Missing] = []
    runs: list[tuple[str, int, Callable[[int, ChannelKind], Awaitable[PeerFigures]]]] = [
        (OURS, number, functools.partial(measure_ours, windows=windows, window_s=window_s)) for number in ours
    ]
    runs += [
        (peer.name, guilds, functools.partial(measure, peer, windows=windows, window_s=window_s)) for peer in peers
    ]
    for name, number, run in runs:
        for kind in kinds:
            try:
                found.append(await run(number, kind))
            except (Absent, PeerError) as error:
                missing.append(Missing(name, kind, number, str(error)))
            keep(found, missing)
    return found, missing


async def measure(
    peer: Peer, guilds: int, kind: ChannelKind = "stage", *, windows: int = 4, window_s: float = 5.0
) -> PeerFigures:
    """Let a peer play to so many guilds; readings are medians over windows of steady play.

    Raises: Absent: it is not here, or not able to; PeerError: it failed.
    """
    peer.demand(kind)
    try:
        async with _playing(peer, guilds, kind) as player:
            return await _watch(player, guilds, kind, windows, window_s)
    except _FAILURES as error:
        raise PeerError(_told(error)) from error


async def measure_ours(
    guilds: int, kind: ChannelKind = "stage", *, windows: int = 4, window_s: float = 5.0
) -> PeerFigures:
    """The same of our own pool: one fan-out worker, in a local Discord with the same settings.

    Raises: PeerError: it failed.
    """
    try:
        async with BenchPool(guilds, sample=_SAMPLED_GUILDS) as pool:
            await pool.play(guilds, kind)
            await _until_all_heard(pool.discord)
            player = _Player(OURS, version(OURS), _OUR_SETTING, pool.discord, functools.partial(_pool_cpu, pool))
            return await _watch(player, guilds, kind, windows, window_s)
    except (*_FAILURES, GuildcastError) as error:
        raise PeerError(_told(error)) from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _pool_cpu(pool: BenchPool) -> _Cpu:
    """Raises: PeerError: its worker or sender ended."""
    try:
        (processes,) = pool.fanout()
    except (ValueError, IndexError) as error:
        raise PeerError(f"has not one worker with its sender: {pool.log_end()}") from error
    own_ns = sum(exact_cpu_ns(pid) for pid in processes)
    others = [pool.processes.processes[name].pid for name in ("coordinator", "supervisor")]
    return _Cpu(own_ns, sum(map(tree_cpu_ns, [*others, pool.redis.pid])) - own_ns)


def _peer_cpu(process: asyncio.subprocess.Process) -> _Cpu:
    """Raises: PeerError: it ended."""
    if process.returncode is not None:
        raise PeerError(f"ended with {process.returncode} while it was measured")
    return _Cpu(tree_cpu_ns(process.pid), 0)


async def _watch(player: _Player, guilds: int, kind: ChannelKind, windows: int, window_s: float) -> PeerFigures:
    """Windows of steady play, each between a reset and a report. Raises: PeerError."""
    await asyncio.sleep(_SETTLE_S)
    reports: list[Report] = []
    cpu_us, rest_us, cores, packets_per_s = [], [], [], []
    for _ in range(windows):
        await player.discord.reset()
        before, began_ns = player.cpu(), time.monotonic_ns()
        await asyncio.sleep(window_s)
        report = await player.discord.report()
        after, passed_ns = player.cpu(), time.monotonic_ns() - began_ns
        sent = report.packets + report.kernel_drops
        if not sent:
            raise PeerError("fell silent while it was measured")
        # With thousands of guilds the report was counted a while before it came: both are taken as rates.
        per_s = sent * 1e9 / (report.at_ns - began_ns)
        cpu_us.append((after.own_ns - before.own_ns) * 1e6 / passed_ns / per_s)
        rest_us.append((after.rest_ns - before.rest_ns) * 1e6 / passed_ns / per_s)
        cores.append((after.own_ns - before.own_ns) / passed_ns)
        packets_per_s.append(per_s)
        reports.append(report)
    late = [report.lateness_ms for report in reports]
    return PeerFigures(
        name=player.name,
        version=player.version,
        setting=player.setting,
        kind=kind,
        mode=await _mode(player.discord),
        guilds=guilds,
        cpu_us=Median.of(cpu_us),
        rest_us=Median.of(rest_us),
        cores=Median.of(cores),
        packets_per_s=Median.of(packets_per_s),
        wanted_per_s=float(guilds * _FRAMES_PER_S),
        lost=sum(report.lost for report in reports),
        kernel_drops=sum(report.kernel_drops for report in reports),
        late_p50_ms=statistics.median(each.p50 or 0.0 for each in late),
        late_p99_ms=statistics.median(each.p99 or 0.0 for each in late),
        late_p999_ms=statistics.median(each.p999 or 0.0 for each in late),
        late_max_ms=max(each.max or 0.0 for each in late),
        decrypt_failed=sum(report.decrypt_failed for report in reports),
        in_the_clear=sum(report.in_the_clear for report in reports),
    )


@asynccontextmanager
async def _playing(peer: Peer, guilds: int, kind: ChannelKind) -> AsyncIterator[_Player]:
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
                yield _Player(peer.name, peer.version(), peer.setting, discord, functools.partial(_peer_cpu, process))
            except (PeerError, *_FAILURES) as error:
                said = log.read_text(errors="replace")[-2_000:]
                reason = str(error) if isinstance(error, PeerError) else _told(error)
                raise PeerError(f"{reason}\n{said}") from error
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
    """Hand out the credentials and wait until every guild is heard. Raises: PeerError, TimeoutError, OSError."""
    assert process.stdin is not None
    assert process.stdout is not None
    async with asyncio.timeout(_PLAYING_WITHIN_S):
        process.stdin.write(msgspec.json.encode(voices) + b"\n")
        with contextlib.suppress(ConnectionError):  # it ended: its exit status says more
            await process.stdin.drain()
        if await process.stdout.readline() != b"playing\n":
            raise PeerError(f"ended with {await process.wait()} before it played")
    await _until_all_heard(discord)


async def _until_all_heard(discord: EmulatorClient) -> None:
    """Wait until every guild is heard, and in its DAVE group where it has one. Raises: TimeoutError."""
    async with asyncio.timeout(_PLAYING_WITHIN_S):
        while not _all_heard(await discord.report(guilds=True)):  # noqa: ASYNC110 - a report wakes nobody
            await asyncio.sleep(_POLL_S)


def _all_heard(report: Report) -> bool:
    rows = report.guild_rows or []
    seen = [(row.sessions[-1].user, channel) for row in rows if row.sessions for channel in row.channels]
    grouped = all(channel.dave_version == 0 or user in channel.group for user, channel in seen)
    return report.heard == report.guilds and grouped and not any(channel.in_transition for _, channel in seen)


async def _mode(discord: EmulatorClient) -> str:
    """The transport mode of all guilds' sessions. Raises: PeerError: they have none, or several."""
    report = await discord.report(guilds=True)
    modes = {row.sessions[-1].mode if row.sessions else None for row in report.guild_rows or []}
    if len(modes) != 1 or not (mode := modes.pop()):
        raise PeerError("not every guild has a session with the same transport mode")
    return mode


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


def tree_cpu_ns(pid: int) -> int:
    """CPU time, user and system, of a process and of all that live below it; 0 when it is gone."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        own_ns = exact_cpu_ns(pid)
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
