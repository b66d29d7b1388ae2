"""What a packet costs by number of broadcasts: the same guilds on one worker, tuned to more and more of them in turns.

    python -m tests.bench.broadcasts --guilds 1000

CPU of worker and sender over windows of steady play, divided by the packets that left, with end-to-end encryption.
Each broadcast is another source with a child that encodes it, on the same cores. Each number has a pool of its own, and
one broadcast is measured before and after the others: how fast a machine is drifts meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from tests.bench.lateness import SenderFigures
from tests.bench.pool import BenchPool
from tests.bench.processes import exact_cpu_ns
from tests.bench.results import Median, save, table

BROADCASTS = (1, 4, 16)
_SETTLED_AFTER_S = 6.0
"""By then the leads are full, and the sources are encoded at the pace at which they are played."""


@dataclass
class Cost:
    """Microseconds of CPU per packet, one a window."""

    worker_us: list[float] = field(default_factory=list)
    sender_us: list[float] = field(default_factory=list)

    @property
    def both_us(self) -> list[float]:
        return [worker + sender for worker, sender in zip(self.worker_us, self.sender_us, strict=True)]

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.worker_us + other.worker_us, self.sender_us + other.sender_us)


async def measure(
    guilds: int, broadcasts: int, *, windows: int, window_s: float, settle_s: float = _SETTLED_AFTER_S
) -> Cost:
    """The cost of a packet where so many guilds hear so many broadcasts."""
    names = [f"bench-{number}" for number in range(broadcasts)]
    cost = Cost()
    async with BenchPool(max(guilds, broadcasts), sample=0) as pool:
        for name in names:
            await pool.broadcast(name)
        await pool.join(await pool.voices(guilds), *names)
        await pool.until_heard(guilds)
        await asyncio.sleep(settle_s)
        (processes,) = pool.fanout()
        sender = SenderFigures(processes.worker_pid)
        for _ in range(windows):
            packets, before = sender.sent, [exact_cpu_ns(pid) for pid in processes]
            await asyncio.sleep(window_s)
            packets, after = sender.sent - packets, [exact_cpu_ns(pid) for pid in processes]
            cost.worker_us.append((after[0] - before[0]) / 1e3 / packets)
            cost.sender_us.append((after[1] - before[1]) / 1e3 / packets)
    return cost


def _draw(costs: dict[int, Cost], guilds: int, figure: Figure) -> None:
    axes = figure.subplots()
    for label, readings in (
        ("worker and sender", [cost.both_us for cost in costs.values()]),
        ("worker", [cost.worker_us for cost in costs.values()]),
    ):
        axes.plot(list(costs), [Median.of(one).median for one in readings], "o-", label=label)
    axes.set(xscale="log", xlabel=f"broadcasts heard by {guilds} guilds", ylabel="us of CPU per packet", ylim=(0, None))
    axes.set_xticks(list(costs), [str(number) for number in costs])
    axes.legend()


def _rows(costs: dict[int, Cost]) -> Sequence[Sequence[object]]:
    base = Median.of(next(iter(costs.values())).both_us).median
    return [
        (
            *(number, str(Median.of(cost.worker_us)), str(Median.of(cost.sender_us)), str(Median.of(cost.both_us))),
            Median.of(cost.both_us).median / base,
        )
        for number, cost in costs.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guilds", type=int, default=1_000)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    costs = {number: Cost() for number in BROADCASTS}
    for number in (*BROADCASTS, BROADCASTS[0]):
        costs[number] += asyncio.run(measure(options.guilds, number, windows=options.windows, window_s=options.seconds))
    table(
        f"{options.guilds} guilds with DAVE: us of CPU per packet",
        ("broadcasts", "worker", "sender", "both", f"x {BROADCASTS[0]}"),
        _rows(costs),
    )
    figures = {
        str(number): {"worker_us": Median.of(cost.worker_us), "sender_us": Median.of(cost.sender_us)}
        for number, cost in costs.items()
    }
    save("broadcasts", figures, lambda figure: _draw(costs, options.guilds, figure))


if __name__ == "__main__":
    main()
