"""Benchmarks are run once, short, so that none rots; their figures mean nothing here."""

from __future__ import annotations

import pytest

from shared.protocol.transport_crypto import MODES
from tests.bench import breaks, broadcasts, fanout, receive, seal


@pytest.mark.parametrize("listen_every", [1, 2])
async def test_fanout_bench_gives_figures_for_product_and_floor(listen_every: int) -> None:
    """The fan-out benchmark measures worker, sender and bare sendmmsg at each size of a pool that grows."""
    cells = await fanout.measure("XChaCha20", [2, 4], sharing=2, windows=1, window_s=0.5, listen_every=listen_every)
    assert [cell.guilds for cell in cells] == [2, 4]
    for cell in cells:
        assert min(cell.worker_us[0], cell.sender_us[0], cell.floor_inside_us[0]) > 0
        assert cell.floor_us[0] >= cell.floor_inside_us[0]


async def test_broadcasts_bench_gives_figures_for_worker_and_sender() -> None:
    """Guilds that hear two broadcasts in turns are all heard, and cost both processes something."""
    cost = await broadcasts.measure(3, 2, windows=2, window_s=0.5, settle_s=0)
    assert len(cost.both_us) == 2
    assert min(*cost.worker_us, *cost.sender_us) > 0


async def test_breaks_bench_resumes_each_guild_that_breaks() -> None:
    """Each guild breaks as often as the others, each break is resumed, and memory is read along the way."""
    broken = await breaks.measure(2, 4, stands_s=1.0, looked_at_after_s=0)
    assert broken.resumed == 4
    assert [reading.breaks for reading in broken.readings] == [0, 1, 2, 3, 4, 4]
    assert min(reading.private_kib for reading in broken.readings) > 0


async def test_receive_bench_gives_figures_for_each_mode() -> None:
    """Every packet of the receiving benchmark is heard; two modes, DAVE and not, decoded and not."""
    figures = await receive.run(rounds=1, number=100)
    assert len(figures) == 8
    assert min(figures) > 0


def test_seal_bench_gives_figures_for_every_fast_mode() -> None:
    """The benchmark of transport modes builds and sends in each of them."""
    figures = seal.measure(guilds=4, ticks=2)
    assert figures.keys() == set(MODES)
    assert all(0 < build_us < total_us for build_us, total_us in figures.values())
