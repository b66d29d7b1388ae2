"""The peers of the fan-out benchmark are run once, short, so that none rots; their figures mean nothing here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.peers.measure import OURS, measure, measure_all
from tests.bench.peers.programs import PEERS, Absent, Peer
from tests.emulator.records import ChannelKind

GUILDS = 3
CALLS: list[tuple[Peer, ChannelKind]] = [
    *((peer, "stage") for peer in PEERS.values()),
    *((peer, "voice") for peer in PEERS.values() if not peer.no_dave),
]


@pytest.mark.parametrize(("peer", "kind"), CALLS, ids=[f"{peer.name}-{kind}" for peer, kind in CALLS])
async def test_a_peer_plays_to_all_guilds(peer: Peer, kind: ChannelKind) -> None:
    """Its voice client is let in, heard in every guild without loss, and encrypts where it has to."""
    try:
        peer.demand(kind)
    except Absent as reason:
        pytest.skip(f"{peer.name}: {reason}")
    found = await measure(peer, GUILDS, kind, windows=1, window_s=1.0)
    assert found.version
    assert found.packets_per_s.median > 0
    assert found.cpu_us.median > 0
    assert (found.lost, found.decrypt_failed, found.in_the_clear) == (0, 0, 0)


async def test_we_are_measured_beside_the_peers_and_kept_at_once() -> None:
    """Our pool is one more row, with the CPU time of its other processes apart, and is kept before the next row."""
    kept: list[int] = []
    found, missing = await measure_all(
        GUILDS, [], ["voice"], ours=[GUILDS], windows=1, window_s=1.0, keep=lambda rows, _: kept.append(len(rows))
    )
    assert not missing
    (ours,) = found
    assert (ours.name, ours.guilds, kept) == (OURS, GUILDS, [1])
    assert min(ours.cpu_us.median, ours.rest_us.median, ours.packets_per_s.median) > 0
    assert (ours.lost, ours.decrypt_failed, ours.in_the_clear) == (0, 0, 0)


async def test_a_peer_that_does_not_start_is_named_and_the_next_is_measured(tmp_path: Path) -> None:
    """What the kernel refuses to run, and what ends before it played, are rows of what is missing."""
    program = tmp_path / "program"
    program.write_text("no program")
    broken = [
        Peer("unrunnable", program, (), "", lambda: "1", lambda _: [program]),
        Peer("short-lived", program, (), "", lambda: "1", lambda _: ["false"]),
    ]
    found, missing = await measure_all(GUILDS, broken, ["stage"])
    assert not found
    assert [each.name for each in missing] == ["unrunnable", "short-lived"]
    assert "PermissionError" in missing[0].reason
    assert "ended with 1 before it played" in missing[1].reason


async def test_a_peer_that_cannot_take_part_is_named() -> None:
    """A peer without end-to-end encryption is missing from encrypted calls, and the reason is told."""
    found, missing = await measure_all(GUILDS, [PEERS["disgo"]], ["voice"])
    assert not found
    assert [(each.name, each.kind, each.reason) for each in missing] == [("disgo", "voice", PEERS["disgo"].no_dave)]
