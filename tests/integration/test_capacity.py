"""Measuring this machine: real building, real end-to-end encryption, real sending; nothing leaves it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from shared.capacity import Measured
from shared.cli import bench
from shared.errors import EXIT_CONFIG
from shared.protocol.transport_crypto import AES_GCM, XCHACHA
from shared.settings import Settings
from worker.fanout.capacity import admission_of, measure

FILES = 100_000
FRAME_AND_HEADERS_BYTES = 240 + 12 + 16 + 4
"""Frame, RTP header, tag and nonce."""
PATIENCE_S = 60.0


def check(one: Measured) -> None:
    """Every figure is there."""
    for spread in (one.build_us, one.send_us):
        assert 0 < spread.least <= spread.median <= spread.most
    assert one.worker_us > one.build_us.median
    assert one.sender_us > one.send_us.median


def test_packets_are_really_built_encrypted_and_sent() -> None:
    """What is measured is what a worker does: a frame that is encrypted end to end is longer."""
    plain, with_dave = measure([(AES_GCM, False), (AES_GCM, True)], 0.1, 4)
    assert (plain.dave, with_dave.dave) == (False, True)
    assert plain.packet_bytes == FRAME_AND_HEADERS_BYTES
    assert plain.packet_bytes + 11 <= with_dave.packet_bytes <= plain.packet_bytes + 16
    check(plain)
    check(with_dave)


async def test_a_worker_that_was_told_no_capacity_measures_it() -> None:
    """And says what it found."""
    with capture_logs() as logs:
        admission = await admission_of(Settings(fanout_workers=1), FILES)
    (told,) = [entry for entry in logs if entry["event"] == "capacity.measured"]
    assert told["capacity"] == admission.capacity > 1
    assert told["worker_us"] > 0
    assert told["sender_us"] > 0
    assert told["cores"] > 0
    assert told["limit"] in ("worker", "sender", "cores")
    assert admission.headroom(0) == admission.capacity


async def test_a_capacity_that_is_set_is_not_measured() -> None:
    """The operator's word holds, within what open files allow."""
    with capture_logs() as logs:
        assert (await admission_of(Settings(worker_capacity=64), FILES)).capacity == 64
        assert not logs
        assert (await admission_of(Settings(worker_capacity=64), 128 + 2 * 20)).capacity == 20
    assert [entry["event"] for entry in logs] == ["capacity.limited"]


@pytest.fixture
def no_more_files() -> Iterator[None]:
    """A process that cannot open anything."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("no_more_files")
async def test_a_worker_starts_although_it_could_measure_nothing() -> None:
    """With a capacity that suits a small machine, and a warning."""
    with capture_logs() as logs:
        admission = await admission_of(Settings(), FILES)
    assert admission.capacity == 1_000
    assert [entry["event"] for entry in logs] == ["capacity.unmeasured"]


def test_the_test_of_a_machine_tells_each_mode_with_and_without_dave() -> None:
    """What `guildcast bench --here` prints comes from a process of its own."""
    found = bench.measure(0.5)
    assert [(one.mode, one.dave) for one in found.measured] == [
        *((AES_GCM, False), (AES_GCM, True)),
        *((XCHACHA, False), (XCHACHA, True)),
    ]
    for one in found.measured:
        check(one)
    assert min(found.cores, found.files, found.send_buffer_bytes) > 0


def bench_here(*arguments: str, shell: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the command as an operator does."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GUILDCAST_")}
    command = [sys.executable, "-m", "shared.cli", "bench", *arguments]
    if shell:
        command = ["sh", "-c", f'{shell}; exec "$@"', "sh", *command]
    return subprocess.run(command, env=kept | settings, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_an_operator_is_told_guilds_per_core_and_what_limits_them() -> None:
    """One table of costs, one of limits."""
    done = bench_here("--here", "--seconds", "1", GUILDCAST_WORKER_CAPACITY="7")
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("guilds a core", "aes256_gcm", "xchacha20_poly1305", "DAVE", "UDP send buffer", "network"):
        assert word in done.stdout
    assert "14 in all, by GUILDCAST_WORKER_CAPACITY" in done.stdout


def test_a_machine_that_cannot_be_measured_says_so() -> None:
    """In one line, and with the exit status of a failure."""
    done = bench_here("--here", "--seconds", "1", shell="ulimit -n 16")
    assert done.returncode == 1
    assert "nothing could be measured" in done.stdout
    assert "Too many open files" in done.stdout


def test_a_wrong_setting_ends_the_test_before_it_begins() -> None:
    """As it does every other command."""
    done = bench_here("--here", GUILDCAST_WORKER_CAPACITY="0")
    assert done.returncode == EXIT_CONFIG
    assert len(done.stderr.splitlines()) == 1
