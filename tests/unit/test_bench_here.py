"""`guildcast bench --here`: what it makes of the figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.capacity import Capability, Measured, Spread
from shared.cli.bench import Port, bits_per_s, default_port, port_limit, worker_limits
from shared.settings import Settings

ONE = Measured(
    mode="aead_aes256_gcm_rtpsize",
    dave=True,
    build_us=Spread(3.0, 2.0, 4.0),
    send_us=Spread(4.0, 3.0, 5.0),
    worker_us=7.0,
    sender_us=5.0,
    packet_bytes=284,
)
FOUND = Capability(cores=2.0, files=500, send_buffer_bytes=1_280 * 100, measured=[ONE])


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A system with a route to its own network alone."""
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "route").write_text(
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\nens3\t0000A8C0\t00000000\t0001\t0\t0\t0\t0\n"
    )
    (tmp_path / "class" / "ens3").mkdir(parents=True)
    return tmp_path


def port(system: Path, speed: str | None) -> Port | None:
    """What is found once ens3 has the default route and tells a speed."""
    with (system / "net" / "route").open("a") as routes:
        routes.write("ens3\t00000000\t0100A8C0\t0003\t0\t0\t0\t0\n")
    if speed is not None:
        (system / "class" / "ens3" / "speed").write_text(speed)
    return default_port(system, system / "class")


def test_packets_leave_by_the_default_route(system: Path) -> None:
    """Its interface tells the speed of its port."""
    assert default_port(system, system / "class") is None
    assert port(system, "1000\n") == Port("ens3", 1_000)


@pytest.mark.parametrize("speed", ["-1\n", "", None])
def test_an_interface_may_tell_no_speed(system: Path, speed: str | None) -> None:
    """Virtual ones do not; that is no reason to guess."""
    found = port(system, speed)
    assert found == Port("ens3", None)
    assert port_limit(found, ONE).guilds is None


def test_a_machine_without_a_network_has_no_port(tmp_path: Path) -> None:
    """There is nothing to be read."""
    assert default_port(tmp_path / "nothing", tmp_path) is None
    assert port_limit(None, ONE).guilds is None


def test_a_port_is_full_by_all_that_a_packet_takes_of_it() -> None:
    """284 bytes of UDP payload take 350 on the wire: 140 kbit/s at 50 a second."""
    assert bits_per_s(284) == 140_000
    assert port_limit(Port("ens3", 1_000), ONE).guilds == pytest.approx(7_142.86, abs=0.01)


def test_each_limit_of_a_worker_is_named() -> None:
    """70 % of each core, 50 packets a second and guild; both workers of the host share its two cores."""
    found = {one.name: one.guilds for one in worker_limits(FOUND, ONE, Settings(fanout_workers=2))}
    assert found["CPU of the worker"] == pytest.approx(2_000)
    assert found["CPU of its sender"] == pytest.approx(2_800)
    assert found["cores of both"] == pytest.approx(0.7 * 1e6 / 50 / 12)
    assert found["open files"] == 500
    assert found["UDP send buffer"] == 100 * 20
    assert "GUILDCAST_WORKER_CAPACITY" not in found


def test_a_capacity_that_is_set_is_a_limit_too() -> None:
    """It holds, whatever the machine could do."""
    found = {one.name: one.guilds for one in worker_limits(FOUND, ONE, Settings(worker_capacity=64))}
    assert found["GUILDCAST_WORKER_CAPACITY"] == 64
