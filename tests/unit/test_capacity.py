"""Guilds that fit: by the processor of each process, and by the cores that both share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.capacity import Cost, guilds_within, limits

_us = st.floats(0.1, 100)


def test_the_dearer_process_decides_where_each_has_a_core() -> None:
    """50 packets a second of 10 us are half a thousandth of a core."""
    assert guilds_within(Cost(10.0, 5.0), cores=2, share=1.0) == 2_000
    assert guilds_within(Cost(5.0, 10.0), cores=2, share=1.0) == 2_000
    assert guilds_within(Cost(10.0, 5.0), cores=2, share=0.5) == 1_000


def test_processes_on_one_core_share_it() -> None:
    """Where cores are fewer than processes, their costs add up."""
    assert guilds_within(Cost(15.0, 5.0), cores=1, share=1.0) == 1_000
    assert guilds_within(Cost(15.0, 5.0), cores=0.5, share=1.0) == 500


def test_a_worker_takes_at_least_one_guild() -> None:
    """However slow the machine: a worker without any would only wait."""
    assert guilds_within(Cost(1e6, 1e6), cores=1, share=0.7) == 1


@given(_us, _us, st.floats(2, 64), st.floats(0.1, 1))
def test_more_cores_than_two_make_no_worker_faster(worker_us: float, sender_us: float, cores: float, s: float) -> None:
    """It is two processes, each on one core."""
    cost = Cost(worker_us, sender_us)
    assert guilds_within(cost, cores, s) == guilds_within(cost, 2, s)


@given(_us, _us, st.floats(0.1, 8), st.floats(0.1, 1))
def test_no_limit_fills_a_core_beyond_its_share(worker_us: float, sender_us: float, cores: float, share: float) -> None:
    """Whatever packets cost: neither process, nor both on their cores."""
    guilds = min(limits(Cost(worker_us, sender_us), cores, share).values())
    of_a_core = pytest.approx(share, rel=1e-9)
    for load in (guilds * 50 * worker_us / 1e6, guilds * 50 * sender_us / 1e6):
        assert load <= share or load == of_a_core
    both = guilds * 50 * (worker_us + sender_us) / 1e6 / cores
    assert both <= share or both == of_a_core
