"""The supervisor's ports: dealt in equal parts, looked at before they are used."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError, ErrorCode
from worker.supervisor import check_ports, deal_ports

LOOPBACK = "127.0.0.1"


def test_ports_are_dealt_in_equal_parts() -> None:
    """Each worker gets as many as the others, none of them twice."""
    assert deal_ports(range(50_000, 50_010), 3) == [
        range(50_000, 50_003),
        range(50_003, 50_006),
        range(50_006, 50_009),
    ]


@given(st.integers(1_024, 60_000), st.integers(1, 500), st.integers(1, 64))
def test_no_port_is_dealt_twice_or_from_outside(first: int, number: int, workers: int) -> None:
    """Whatever the range: equal parts of it, or one line that says that it is too small."""
    ports = range(first, first + number)
    if number < workers:
        with pytest.raises(ConfigError):
            deal_ports(ports, workers)
        return
    dealt = deal_ports(ports, workers)
    flat = [port for share in dealt for port in share]
    assert len({len(share) for share in dealt}) == 1
    assert len(flat) == len(set(flat))
    assert set(flat) <= set(ports)
    assert number - len(flat) < workers


def test_too_few_ports_are_a_wrong_setting() -> None:
    """The line names the setting, its value and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        deal_ports(range(50_000, 50_002), 3)
    assert caught.value.code == ErrorCode.UDP_PORTS_TOO_FEW
    assert caught.value.message.startswith("GUILDCAST_UDP_PORTS: 50000-50001 has 2 ports")
    assert "3 fan-out workers" in caught.value.message


def test_any_port_is_any_for_each() -> None:
    """Without a range the system picks, for each worker."""
    assert deal_ports(range(0), 2) == [range(0), range(0)]


def test_a_host_without_fanout_workers_needs_no_ports() -> None:
    """A host that only encodes deals nothing."""
    assert deal_ports(range(50_000, 50_010), 0) == []
    assert deal_ports(range(0), 0) == []


def test_a_port_in_use_is_named() -> None:
    """Who starts a host learns which port of the range somebody else has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind((LOOPBACK, 0))
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            check_ports(LOOPBACK, range(port, port + 1))
        assert caught.value.code == ErrorCode.UDP_PORTS_IN_USE
        assert f"GUILDCAST_UDP_PORTS: {port}-{port}: port {port} on {LOOPBACK} is in use" in caught.value.message
        assert "allowed:" in caught.value.message
    check_ports(LOOPBACK, range(port, port + 1))


def test_an_address_of_another_host_is_named() -> None:
    """A port that cannot be bound for another reason says the reason."""
    with pytest.raises(ConfigError, match=r"on 192\.0\.2\.1 cannot be bound"):
        check_ports("192.0.2.1", range(50_000, 50_001))


def test_no_range_is_no_look() -> None:
    """Where the system picks there is nothing to look at."""
    check_ports("192.0.2.1", range(0))
