"""A mass join: guilds a second from credentials to first packet, CPU per join, memory per connected guild.

    python -m tests.bench.mass_join --guilds 1000

Some guilds play already; then the jobs of all others are sent at once. For each of these: the time from the sending of
the jobs to the arrival of its first packet. What limits the pace is the machine first (the local Discord does its half
of each handshake on it), then the worker's turns (`worker/voice/turns.py`), then the coordinator, which gives a worker
100 guilds a second.

CPU per join is that of worker and sender from the jobs to the last first packet. Subtracted is what it costs to play:
the rate of both before the join, for the whole time, and for each guild that joined what it adds to that rate (as
found after the join), from its first packet on.
Memory per guild is what the proportional sizes of worker and sender grew by, so the rows that both map count once;
memory that the kernel holds for sockets is not in it. With end-to-end encryption each guild is a voice channel with one
other member, of whom there is no more than a key package.

The reference is what libdave alone takes for about its part of such a join, again and again in one process: so much of
the cost is out of our hands, and it tells how fast the machine is just now.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from shared.clock import NS_PER_MS, NS_PER_S
from tests.bench.lateness import fresh_stats
from tests.bench.pool import BenchPool
from tests.bench.processes import Memory, exact_cpu_ns
from tests.bench.results import Median, save, table
from tests.emulator.dave.external_sender import ExternalSender
from tests.emulator.dave.ghosts import make_key_package
from tests.emulator.dave.group import DaveGroup, DaveOp, Outgoing
from tests.emulator.records import ChannelKind, Voice
from tests.libdave_member import LibdaveMember, Reply

KINDS: dict[str, ChannelKind] = {"with DAVE": "voice", "without DAVE": "stage"}
SETTLED_AFTER_S = 1.0
"""Answers to the last handshakes, and the first reports."""


class Joined(NamedTuple):
    """One mass join."""

    guilds: int
    first_packet_ms: list[float]
    """Per guild, since the jobs were sent; in order."""
    cpu_ms: float
    """Of worker and sender, per join."""
    memory_kib: float
    """Per guild: worker and sender."""
    worker_kib: float
    """Per guild: what only the worker holds."""
    play_us: float
    """CPU of worker and sender per playing guild and second."""
    missed: int
    """Sequence gaps, and ticks that were skipped, meanwhile."""

    @property
    def per_s(self) -> float:
        return self.guilds / self.first_packet_ms[-1] * 1_000


def libdave_ms(joins: int = 100) -> float:
    """CPU of libdave's part of a join: a group with one other member, of whom there is no more than a key package.

    A median over so many in a row, which find libdave in the caches.
    """
    us, ghost, channel = "1", "2", 3
    key_package = make_key_package(int(ghost))
    all_spent_ns: list[int] = []
    for _ in range(joins):
        group = DaveGroup(channel, ExternalSender(), lambda: 0.0)
        group.add_ghosts([(ghost, key_package)])
        outgoing = group.join(us)
        began_ns = time.thread_time_ns()
        member = LibdaveMember(us, channel)
        member.connected({ghost})
        said = member.start()
        spent_ns = time.thread_time_ns() - began_ns
        outgoing += _answers(group, us, said)
        while outgoing:
            one = outgoing.pop(0)
            began_ns = time.thread_time_ns()
            said = member.hear(one.op, one.body)
            spent_ns += time.thread_time_ns() - began_ns
            outgoing += _answers(group, us, said)
        assert member.ready
        all_spent_ns.append(spent_ns)
    return statistics.median(all_spent_ns) / NS_PER_MS


def _answers(group: DaveGroup, user: str, said: Sequence[Reply]) -> list[Outgoing]:
    """What the gateway says to what a member said."""
    answers: list[Outgoing] = []
    for op, body in said:
        if isinstance(body, dict):
            answers += group.transition_ready(user, body["transition_id"])
        else:
            answers += (group.key_package if op == DaveOp.KEY_PACKAGE else group.commit_welcome)(user, body)
    return answers


async def _first_packets_ns(pool: BenchPool, voices: Sequence[Voice]) -> list[int]:
    """When the first packet of each guild came, on the clock of the day; in order."""
    rows = {row.guild: row for row in (await pool.discord.report(guilds=True)).guild_rows or []}
    arrivals = [
        session.first_arrival_ns
        for voice in voices
        for session in rows[voice.guild].sessions[:1]
        if session.first_arrival_ns is not None
    ]
    return sorted(arrivals)


def _cpu_ns(pids: Sequence[int]) -> int:
    return sum(exact_cpu_ns(pid) for pid in pids)


async def _cpu_rate(pids: Sequence[int], window_s: float) -> float:
    """Cores that processes take together."""
    before_ns, began_ns = _cpu_ns(pids), time.monotonic_ns()
    await asyncio.sleep(window_s)
    return (_cpu_ns(pids) - before_ns) / (time.monotonic_ns() - began_ns)


async def measure(guilds: int, kind: ChannelKind, *, before: int = 100, window_s: float = 5.0) -> Joined:
    """Join so many guilds at once.

    Args:
        before: guilds that play already.
        window_s: over which the cost of play is measured, before and after.
    """
    async with BenchPool(before + guilds, sample=0) as pool:
        await pool.play(before, kind)
        (both,) = pool.fanout()
        voices = await pool.voices(guilds, kind, first=before)
        await asyncio.sleep(SETTLED_AFTER_S)
        rate_before = await _cpu_rate(both, window_s)
        memory_before = [Memory.of(pid) for pid in both]
        skipped_before = (await fresh_stats(pool))[0].ticks_skipped

        cpu_before_ns, began_ns = _cpu_ns(both), time.time_ns()
        await pool.join(voices)
        await pool.until_heard(before + guilds)
        spent_ns, took_ns = _cpu_ns(both) - cpu_before_ns, time.time_ns() - began_ns

        await asyncio.sleep(SETTLED_AFTER_S)
        rate_after = await _cpu_rate(both, window_s)
        memory_after = [Memory.of(pid) for pid in both]
        arrivals_ns = await _first_packets_ns(pool, voices)
        report, stats = await pool.discord.report(), (await fresh_stats(pool))[0]
    rate_per_guild = (rate_after - rate_before) / guilds
    played_ns = sum(began_ns + took_ns - arrival_ns for arrival_ns in arrivals_ns)
    grown_kib = [
        after.proportional - earlier.proportional for after, earlier in zip(memory_after, memory_before, strict=True)
    ]
    return Joined(
        guilds,
        [(arrival_ns - began_ns) / NS_PER_MS for arrival_ns in arrivals_ns],
        (spent_ns - rate_before * took_ns - rate_per_guild * played_ns) / guilds / NS_PER_MS,
        sum(grown_kib) / guilds,
        (memory_after[0].private - memory_before[0].private) / guilds,
        rate_per_guild * NS_PER_S / 1_000,
        report.lost + stats.ticks_skipped - skipped_before,
    )


def _show(found: dict[str, list[Joined]]) -> None:
    rows = []
    for name, all_of_it in found.items():
        last = np.percentile(all_of_it[-1].first_packet_ms, [50, 99, 100]) / 1_000
        rows.append(
            (
                name,
                Median.of([one.per_s for one in all_of_it]),
                *(float(seconds) for seconds in last),
                Median.of([one.cpu_ms for one in all_of_it]),
                Median.of([one.memory_kib for one in all_of_it]),
                Median.of([one.worker_kib for one in all_of_it]),
                sum(one.missed for one in all_of_it),
            )
        )
    table(
        f"mass join of {next(iter(found.values()))[0].guilds} guilds",
        (
            *("", "guilds/s", "p50 s", "p99 s", "last s", "CPU ms a join"),
            *("KiB a guild", "of that worker only", "lost or skipped"),
        ),
        rows,
    )


def _draw(found: dict[str, list[Joined]], figure: Figure) -> None:
    axes = figure.subplots()
    for name, all_of_it in found.items():
        for number, one in enumerate(all_of_it):
            seconds = np.array(one.first_packet_ms) / 1_000
            (line,) = axes.plot(seconds, np.arange(1, len(seconds) + 1), label=None if number else name)
            line.set_color("C0" if name == "with DAVE" else "C1")
    axes.set_xlabel("s since the jobs were sent")
    axes.set_ylabel("guilds heard")
    axes.set_title("Mass join: guilds whose first packet came")
    axes.legend()
    axes.grid(alpha=0.3)


def _figures(found: dict[str, list[Joined]]) -> dict[str, object]:
    return {
        name: {
            "guilds": all_of_it[0].guilds,
            "guilds_per_s": Median.of([one.per_s for one in all_of_it]),
            "cpu_ms_per_join": Median.of([one.cpu_ms for one in all_of_it]),
            "memory_kib_per_guild": Median.of([one.memory_kib for one in all_of_it]),
            "worker_kib_per_guild": Median.of([one.worker_kib for one in all_of_it]),
            "play_cpu_us_per_guild_and_s": Median.of([one.play_us for one in all_of_it]),
            "first_packet_ms": [np.percentile(one.first_packet_ms, range(101)).tolist() for one in all_of_it],
            "lost_or_skipped": sum(one.missed for one in all_of_it),
        }
        for name, all_of_it in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guilds", type=int, default=1_000)
    parser.add_argument("--before", type=int, default=100, help="guilds that play already")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    found: dict[str, list[Joined]] = {name: [] for name in KINDS}
    alone_ms: list[float] = []
    # In turns: what else a machine does drifts over minutes, and must fall on both alike.
    for name in list(KINDS) * options.rounds:
        found[name].append(asyncio.run(measure(options.guilds, KINDS[name], before=options.before)))
        alone_ms.append(libdave_ms())
        sys.stdout.write(f"  {name}: {found[name][-1].per_s:.0f} guilds a second\n")
    alone = Median.of(alone_ms)
    _show(found)
    sys.stdout.write(f"libdave alone: {alone} ms of CPU a join\n")
    save("mass_join", {**_figures(found), "libdave_ms_per_join": alone}, lambda figure: _draw(found, figure))


if __name__ == "__main__":
    main()
