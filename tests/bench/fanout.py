"""What a packet costs: CPU of a fan-out worker with its sender, by number of guilds, by encryption and by guilds per
voice address, beside bare `sendmmsg` of prebuilt packets in the same run.

    python -m tests.bench.fanout --guilds 250,500,1000,2000

Measured: user and system time of worker and sender over windows of steady play, everything included (stream reader,
building, encryption, WebSockets, timers, sending), divided by the packets that the sender handed to the kernel. In
turns with these windows, while the same pool is connected and idle, the floor: a process that wakes for the same slots
and sends prebuilt packets of the same size to as many addresses, in batches of the same size. With end-to-end
encryption each guild is a voice channel with one other member, of whom there is no more than a key package.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from matplotlib.figure import Figure

from shared.process import raise_file_limit
from shared.protocol.transport_crypto import AES_GCM, XCHACHA
from tests.bench.lateness import SenderFigures, quantiles_ms
from tests.bench.pool import BenchPool
from tests.bench.processes import exact_cpu_ns
from tests.bench.results import Median, save, table

Way = Literal["AES-GCM", "XChaCha20", "AES-GCM and DAVE"]
WAYS: tuple[Way, ...] = ("AES-GCM", "XChaCha20", "AES-GCM and DAVE")
SIZES = (250, 500, 1_000, 2_000)
FAR_SIZES = (2_000, 4_000)
"""Where most listeners are deaf."""
FAR_LISTEN_EVERY = 32
FAR_LIMIT = 1.1
"""The cost of a packet at the larger number of guilds over that at the smaller one."""
USUAL_SHARING = 8
"""Guilds that share a voice address, where that is not what is varied."""
LIMITS: dict[Way, float] = {"AES-GCM": 1.7, "XChaCha20": 1.8, "AES-GCM and DAVE": 2.1}
"""Times the floor."""
LIMITS_AT = 2_000
_COLUMNS = (
    *("encryption", "guilds", "per address", "worker", "sender", "both", "floor", "x floor", "within"),
    *("p99.9 ms", "skipped", "lost"),
)
_AT_ONCE = 100
_SETTLE_S = 1.5
_QUIET_WITHIN_S = 30.0
_TOLD_EVERY_S = 0.6
_QUIET_S = 0.5


@dataclass
class Cell:
    """Figures at one number of guilds, one a window: microseconds of CPU per packet."""

    way: Way
    guilds: int
    sharing: int
    worker_us: list[float] = field(default_factory=list)
    sender_us: list[float] = field(default_factory=list)
    floor_us: list[float] = field(default_factory=list)
    floor_inside_us: list[float] = field(default_factory=list)
    p999_ms: list[float] = field(default_factory=list)
    ticks_skipped: int = 0
    listeners_lost: int = 0
    """Packets that never came to the listeners, less those that the listening process had no room for."""

    @property
    def both_us(self) -> list[float]:
        return [worker + sender for worker, sender in zip(self.worker_us, self.sender_us, strict=True)]

    @property
    def total_us(self) -> float:
        return Median.of(self.both_us).median

    @property
    def ratio(self) -> Median:
        """Times the floor, window by window."""
        return Median.of([both / floor for both, floor in zip(self.both_us, self.floor_us, strict=True)])

    @property
    def within(self) -> str:
        """Whether it is at most as many times the floor as it may be; empty where nothing is said of that."""
        if self.guilds != LIMITS_AT or self.sharing != USUAL_SHARING:
            return ""
        return f"{'yes' if self.ratio.median <= LIMITS[self.way] else 'no'}, {LIMITS[self.way]}"

    def told(self) -> dict[str, object]:
        return asdict(self) | {"total_us": self.total_us, "ratio": self.ratio._asdict()}


async def measure(
    way: Way,
    sizes: Sequence[int],
    *,
    sharing: int = USUAL_SHARING,
    windows: int = 3,
    window_s: float = 4.0,
    listen_every: int = 1,
) -> list[Cell]:
    """One pool that grows from size to size, as far as it gets: what it cannot carry is named and left out.

    Args:
        way: encryption of all guilds.
        sizes: numbers of guilds, rising.
        sharing: guilds per voice address.
        listen_every: of so many voice addresses one is listened to.
    """
    cells: list[Cell] = []
    async with BenchPool(sizes[-1], sample=4, endpoint_guilds=sharing, listen_every=listen_every) as pool:
        joined = 0
        for guilds in sizes:
            cell = Cell(way, guilds, sharing)
            try:
                await pool.broadcast()
                await _join(pool, way, joined, guilds)
                joined = guilds
                for window in range(windows):
                    if window:
                        await pool.broadcast()
                        await pool.until_playing(guilds)
                    await _play(pool, cell, window_s)
                    await pool.jobs([{"type": "broadcast.stop", "broadcast": "bench"}])
                    await _until_quiet(pool)
                    await _floor(pool, cell, window_s, deaf=listen_every > 1)
            except TimeoutError as error:
                sys.stdout.write(f"{way}, {guilds} guilds: not measured, {error or 'they never all played'}\n")
                break
            cells.append(cell)
    return cells


async def _join(pool: BenchPool, way: Way, first: int, last: int) -> None:
    voices = await pool.voices(last - first, "voice" if way == "AES-GCM and DAVE" else "stage", first=first)
    if way == "XChaCha20":
        for at in range(0, len(voices), _AT_ONCE):
            await asyncio.gather(
                *(pool.discord.fault(voice.guild, "modes", modes=[XCHACHA]) for voice in voices[at : at + _AT_ONCE])
            )
    await pool.join(voices)
    await pool.until_heard(last)
    report = await pool.discord.report(guilds=True)
    modes = {session.mode for row in report.guild_rows or [] for session in row.sessions if session.state == "live"}
    wanted = XCHACHA if way == "XChaCha20" else AES_GCM
    if modes != {wanted} or report.in_the_clear:
        raise RuntimeError(f"{way}: guilds are in {modes}, {report.in_the_clear} frames in the clear")


async def _play(pool: BenchPool, cell: Cell, window_s: float) -> None:
    (processes,) = pool.fanout()
    sender = SenderFigures(processes.worker_pid)
    await asyncio.sleep(_SETTLE_S)
    await pool.discord.reset()
    lateness, skipped = sender.lateness(), await _skipped(pool)
    packets, before = sender.sent, [exact_cpu_ns(pid) for pid in processes]
    await asyncio.sleep(window_s)
    packets, after = sender.sent - packets, [exact_cpu_ns(pid) for pid in processes]
    cell.worker_us.append((after[0] - before[0]) / 1e3 / packets)
    cell.sender_us.append((after[1] - before[1]) / 1e3 / packets)
    cell.p999_ms.append(quantiles_ms(sender.lateness() - lateness)["p99.9"])
    cell.ticks_skipped += await _skipped(pool) - skipped
    report = await pool.discord.report()
    cell.listeners_lost += max(0, report.lost - report.kernel_drops)


async def _skipped(pool: BenchPool) -> int:
    """Ticks skipped until now: workers tell it twice a second."""
    await asyncio.sleep(_TOLD_EVERY_S)
    return sum(stats.ticks_skipped for stats in await pool.stats())


async def _until_quiet(pool: BenchPool) -> None:
    """Wait until no packet leaves. Raises: TimeoutError."""
    (processes,) = pool.fanout()
    sender = SenderFigures(processes.worker_pid)
    async with asyncio.timeout(_QUIET_WITHIN_S):
        before = -1
        while before != (before := sender.sent):  # noqa: ASYNC110 - shared memory wakes nobody
            await asyncio.sleep(_QUIET_S)


async def _floor(pool: BenchPool, cell: Cell, window_s: float, *, deaf: bool) -> None:
    line = await pool.processes.start(
        *("floor", "tests.bench.bare_sendmmsg"),
        *("--guilds", str(cell.guilds), "--addresses", str(-(-cell.guilds // cell.sharing))),
        *("--seconds", str(window_s)),
        *(("--deaf",) if deaf else ()),
        ready_line=True,
    )
    await pool.processes.stop("floor")
    found = json.loads(line)
    cell.floor_us.append(found["all_us"])
    cell.floor_inside_us.append(found["inside_us"])


def _draw(cells: list[Cell], sharing: list[Cell]) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        by_size, by_sharing = figure.subplots(1, 2, width_ratios=(2, 1))
        for way in WAYS:
            some = [cell for cell in cells if cell.way == way]
            by_size.plot([cell.guilds for cell in some], [cell.total_us for cell in some], "o-", label=way)
        sizes = sorted({cell.guilds for cell in cells})
        floors = [
            Median.of([us for cell in cells if cell.guilds == size for us in cell.floor_us]).median for size in sizes
        ]
        by_size.plot(sizes, floors, "k:", label="bare sendmmsg")
        by_size.set(xscale="log", xlabel="guilds of one worker", ylabel="us of CPU per packet", ylim=(0, None))
        by_size.set_xticks(sizes, [str(size) for size in sizes])
        by_size.legend()
        by_size.set_title("worker and sender")
        names = [_sharing_name(cell) for cell in sharing]
        by_sharing.bar(names, [cell.total_us for cell in sharing], color="tab:blue")
        by_sharing.plot(names, [Median.of(cell.floor_us).median for cell in sharing], "k_", markersize=40)
        by_sharing.set_title(f"AES-GCM, {sharing[0].guilds} guilds" if sharing else "")
        by_sharing.set_xlabel("guilds per voice address (line: bare)")

    return draw


def _save(cells: list[Cell], sharing: list[Cell], far: list[Cell]) -> None:
    figures = {
        name: [cell.told() for cell in some] for name, some in (("cells", cells), ("sharing", sharing), ("far", far))
    }
    save("fanout", figures, _draw(cells, sharing))


def _sharing_name(cell: Cell) -> str:
    return "all" if cell.sharing >= cell.guilds else str(cell.sharing)


def _row(cell: Cell) -> list[object]:
    return [
        *(cell.way, cell.guilds, _sharing_name(cell)),
        *(Median.of(cell.worker_us).median, Median.of(cell.sender_us).median, str(Median.of(cell.both_us))),
        *(str(Median.of(cell.floor_us)), str(cell.ratio), cell.within, Median.of(cell.p999_ms).median),
        *(cell.ticks_skipped, cell.listeners_lost),
    ]


def _far_rows(far: list[Cell], sizes: Sequence[int]) -> list[list[object]]:
    """Each encryption with more guilds beside fewer; also what one worker could not carry here."""
    rows: list[list[object]] = []
    for way in WAYS:
        some = [cell for cell in far if cell.way == way]
        for cell in some:
            times = cell.total_us / some[0].total_us
            within = "" if cell is some[0] else f"{'yes' if times <= FAR_LIMIT else 'no'}, {FAR_LIMIT}"
            rows.append([*_row(cell)[:-4], f"{times:.2f}", within, *_row(cell)[-3:]])
        rows += [[way, size, "", "", "", "not carried", "", "", "", "no", "", "", ""] for size in sizes[len(some) :]]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guilds", default=",".join(map(str, SIZES)), help="numbers of guilds, with commas between")
    parser.add_argument("--sharing-guilds", type=int, default=2_000, help="at which guilds per address are varied")
    parser.add_argument(
        "--far-guilds", default=",".join(map(str, FAR_SIZES)), help="numbers of guilds that are hardly listened to"
    )
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    sizes = sorted(map(int, options.guilds.split(",")))
    began_s = time.monotonic()
    raise_file_limit()
    cells: list[Cell] = []
    for way in WAYS:
        cells += asyncio.run(measure(way, sizes, windows=options.windows, window_s=options.seconds))
        _save(cells, [], [])
    sharing = [cell for cell in cells if cell.way == "AES-GCM" and cell.guilds == options.sharing_guilds]
    for shared_by in (1, options.sharing_guilds) if options.sharing_guilds else ():
        sharing += asyncio.run(
            measure(
                *("AES-GCM", [options.sharing_guilds]),
                sharing=shared_by,
                windows=options.windows,
                window_s=options.seconds,
            )
        )
    sharing.sort(key=lambda cell: cell.sharing)
    table(
        f"fan-out: us of CPU per packet, medians of {options.windows} windows of {options.seconds:g} s"
        f" ({time.monotonic() - began_s:.0f} s in all)",
        _COLUMNS,
        [_row(cell) for cell in [*cells, *(cell for cell in sharing if cell.sharing != USUAL_SHARING)]],
    )
    _save(cells, sharing, [])
    far: list[Cell] = []
    far_sizes = sorted(map(int, options.far_guilds.split(","))) if options.far_guilds else []
    for way in WAYS if far_sizes else ():
        far += asyncio.run(
            measure(
                *(way, far_sizes),
                windows=options.windows,
                window_s=options.seconds,
                listen_every=FAR_LISTEN_EVERY,
            )
        )
    if far_sizes:
        table(
            f"fan-out: the same where one voice address of {FAR_LISTEN_EVERY} is listened to",
            (*_COLUMNS[:8], f"x {far_sizes[0]}", "within", *_COLUMNS[-3:-1], "lost to those"),
            _far_rows(far, far_sizes),
        )
        _save(cells, sharing, far)


if __name__ == "__main__":
    main()
