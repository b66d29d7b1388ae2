"""The peers of the fan-out benchmark are run once, short, so that none rots; their figures mean nothing here."""

from __future__ import annotations

import pytest

from tests.bench.peers.measure import measure, measure_all
from tests.bench.peers.programs import PEERS, Peer
from tests.emulator.records import ChannelKind

GUILDS = 3
CALLS: list[tuple[Peer, ChannelKind]] = [
    *((peer, "stage") for peer in PEERS.values()),
    *((peer, "voice") for peer in PEERS.values() if not peer.no_dave),
]


@pytest.mark.parametrize(("peer", "kind"), CALLS, ids=[f"{peer.name}-{kind}" for peer, kind in CALLS])
async def test_a_peer_plays_to_all_guilds(peer: Peer, kind: ChannelKind) -> None:
    """Its voice client is let in, heard in every guild without loss, and encrypts where it has to."""
    if lacking := peer.lacking_tools():
        pytest.skip(f"{peer.name} is not built without {' and '.join(lacking)}")
    found = await measure(peer, GUILDS, kind, windows=1, window_s=1.0)
    assert found.version
    assert found.packets_per_s.median > 0
    assert found.cpu_us.median > 0
    assert (found.lost, found.decrypt_failed, found.in_the_clear) == (0, 0, 0)


async def test_a_peer_that_cannot_take_part_is_named() -> None:
    """A peer without end-to-end encryption is missing from encrypted calls, and the reason is told."""
    found, missing = await measure_all(GUILDS, [PEERS["disgo"]], ["voice"])
    assert not found
    assert [(each.name, each.kind, each.reason) for each in missing] == [("disgo", "voice", PEERS["disgo"].no_dave)]
