"""What a process asks of the kernel at its start. Light: the sender imports it."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, by: signal.Signals) -> None:
    """Have the kernel send `by` to this process when its parent ends, whichever way it ends.

    Exits at once if the parent is gone already. Source: prctl(2), PR_SET_PDEATHSIG.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(by), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        sys.exit(0)


def no_core_dump() -> None:
    """Leave nothing behind in a crash: a core holds keys and credentials. Source: getrlimit(2), RLIMIT_CORE."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def raise_file_limit() -> int:
    """Raise the limit of open files to the hard one and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def usable_cores(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores that this process may use: its affinity, or less where a control group limits its CPU.

    Source: sched_getaffinity(2); Linux, admin-guide/cgroup-v2, `cpu.max`.
    """
    cores = float(len(os.sched_getaffinity(0)))
    try:
        own = (proc / "self" / "cgroup").read_text().rpartition("0::/")[2].strip()
    except OSError:
        return cores
    group = groups / own
    for one in (group, *group.parents):
        if not one.is_relative_to(groups):
            break
        try:
            quota, period = (one / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue  # not limited, or a group of version 1
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
    return cores


def cpu_ns(pid: int) -> int:
    """CPU time of a process, user and system; 0 when it is gone. Source: proc(5), /proc/pid/stat fields 14 and 15."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return (int(fields[11]) + int(fields[12])) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def parent_death_signal() -> None:
    """For `preexec_fn`: have the kernel send SIGTERM to a child that is no program of ours when this process ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
