"""What a process may use: its cores, fewer where its control group is limited."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.process import usable_cores

AFFINITY = len(os.sched_getaffinity(0))


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A process in group /pods/one, which is not limited."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/pods/one\n")
    (tmp_path / "groups" / "pods" / "one").mkdir(parents=True)
    (tmp_path / "groups" / "pods" / "one" / "cpu.max").write_text("max 100000\n")
    return tmp_path


def cores(machine: Path) -> float:
    return usable_cores(machine / "proc", machine / "groups")


def test_without_a_limit_there_are_as_many_cores_as_it_may_run_on(machine: Path) -> None:
    """Nor where no control groups are to be seen."""
    assert cores(machine) == AFFINITY
    (machine / "proc" / "self" / "cgroup").unlink()
    assert cores(machine) == AFFINITY


@pytest.mark.parametrize("group", ["pods/one", "pods", "."])
def test_the_narrowest_group_counts(machine: Path, group: str) -> None:
    """Its own, one above it, or the root that a container sees."""
    (machine / "groups" / group / "cpu.max").write_text("25000 100000\n")
    assert cores(machine) == 0.25


def test_a_wide_limit_makes_no_cores(machine: Path) -> None:
    """A quota above what there is limits nothing."""
    (machine / "groups" / "pods" / "cpu.max").write_text("100000000 100000\n")
    assert cores(machine) == AFFINITY


def test_what_cannot_be_read_limits_nothing(machine: Path) -> None:
    """Groups of another version, or of a later one."""
    (machine / "groups" / "pods" / "one" / "cpu.max").write_text("a few\nmore words")
    (machine / "proc" / "self" / "cgroup").write_text("4:cpu,cpuacct:/old\n0::/pods/one\n")
    assert cores(machine) == AFFINITY
