"""What other voice libraries spend per packet, and what we do, side by side:

    python -m tests.bench.peers --guilds 200 [--ours-guilds 200,2000] [--peers songbird,disgo] [--kind voice]

Each peer is a process of its own with a voice connection for each guild, all of them playing the same Opus frames to a
local Discord of their own; we are a pool that plays the same programme to one with the same settings. Measured over
windows of steady play: CPU time of the peer (user and system, all of its threads and processes), or of our worker and
its sender, per packet sent; packets a second, loss, lateness. The rest of our pool, which does not grow with its
workers, is a figure beside it. What we spend falls with the number of guilds, so we are measured at the peers' number
and at a larger one. One after the other; without end-to-end encryption (stages) and with it (voice channels with one
other member, of whom there is no more than a key package). What cannot be measured here is named with the reason. Takes
about 40 s for each peer and kind, and is saved after each.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from matplotlib.figure import Figure

from shared.logs import configure
from shared.process import raise_file_limit
from tests.bench.peers.measure import OURS, Missing, PeerFigures, measure_all
from tests.bench.peers.programs import PEERS
from tests.bench.results import save, table
from tests.emulator.records import ChannelKind

_KINDS: dict[ChannelKind, str] = {"stage": "without DAVE", "voice": "with DAVE"}
_OUR_LARGER_SIZE = 2_000
_CIPHERS = {"aead_aes256_gcm_rtpsize": "AES-GCM", "aead_xchacha20_poly1305_rtpsize": "XChaCha20"}


def ratios(found: Sequence[PeerFigures]) -> dict[str, dict[ChannelKind, dict[int, float]]]:
    """CPU per packet of each peer by ours, for each kind and number of guilds that we were measured at."""
    ours = [each for each in found if each.name == OURS]
    peers: dict[str, dict[ChannelKind, dict[int, float]]] = {}
    for peer in found:
        if peer.name != OURS:
            peers.setdefault(peer.name, {})[peer.kind] = {
                each.guilds: peer.cpu_us.median / each.cpu_us.median for each in ours if each.kind == peer.kind
            }
    return peers


def _label(each: PeerFigures) -> str:
    return f"{each.name}\n{each.guilds} guilds"


def draw(figure: Figure, found: Sequence[PeerFigures]) -> None:
    """Bars of CPU per packet, with the spread of the windows."""
    axes = figure.subplots()
    names = list(dict.fromkeys(_label(each) for each in found))
    for number, (kind, label) in enumerate(_KINDS.items()):
        bars = [each for each in found if each.kind == kind]
        if not bars:
            continue
        medians = [each.cpu_us.median for each in bars]
        spread = [
            [each.cpu_us.median - each.cpu_us.least for each in bars],
            [each.cpu_us.most - each.cpu_us.median for each in bars],
        ]
        places = [names.index(_label(each)) + (number - 0.5) * 0.38 for each in bars]
        drawn = axes.bar(places, medians, width=0.36, yerr=spread, capsize=3, label=label)
        axes.bar_label(drawn, fmt="%.1f", padding=2)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xlabel("50 packets a second for each guild")
    axes.set_ylabel("µs of CPU per packet")
    axes.legend()


def show(found: Sequence[PeerFigures], missing: Sequence[Missing]) -> None:
    """The tables, and what is missing from them."""
    columns = ["peer", "guilds", "DAVE", "cipher", "µs/packet", "rest", "cores", "packets/s"]
    columns += ["lost", "drops", "failed", "clear", "p50 ms", "p99", "p99.9"]
    rows = [
        (
            *(each.name, each.guilds, "yes" if each.kind == "voice" else "no", _CIPHERS.get(each.mode, each.mode)),
            *(each.cpu_us, each.rest_us.median if each.name == OURS else "", each.cores.median),
            *(f"{each.packets_per_s.median:.0f} of {each.wanted_per_s:.0f}", each.lost, each.kernel_drops),
            *(each.decrypt_failed, each.in_the_clear, each.late_p50_ms, each.late_p99_ms, each.late_p999_ms),
        )
        for each in found
    ]
    table("peers: CPU per packet", columns, rows)
    if sizes := list(dict.fromkeys(each.guilds for each in found if each.name == OURS)):
        compared = [
            (name, _KINDS[kind], *(by_size.get(size, "") for size in sizes))
            for name, by_kind in ratios(found).items()
            for kind, by_size in by_kind.items()
        ]
        table(
            "peers: times our CPU per packet", ["peer", "kind", *(f"ours at {size} guilds" for size in sizes)], compared
        )
    sys.stdout.write(
        "lost: gaps in sequence; drops: of the kernel, at the listeners; failed: not decrypted; clear: without the DAVE"
        " that was due; ms: late\n"
    )
    for setting in dict.fromkeys(f"{each.name} {each.version}: {each.setting}" for each in found):
        sys.stdout.write(f"{setting}\n")
    for each in missing:
        sys.stdout.write(f"{each.name}, {each.guilds} guilds, {_KINDS[each.kind]}: not measured: {each.reason}\n")


def keep(found: Sequence[PeerFigures], missing: Sequence[Missing]) -> None:
    """Save all that there is so far."""
    if found:
        save(
            "peers",
            {
                "peers": [each.described() for each in found],
                "times_ours": ratios(found),
                "missing": [each._asdict() for each in missing],
            },
            lambda figure: draw(figure, found),
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers")
    parser.add_argument("--guilds", type=int, default=200)
    parser.add_argument(
        "--ours-guilds", help="our numbers of guilds, with commas between; the peers' and 1000 if not given"
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="some of " + ", ".join(PEERS))
    parser.add_argument("--kind", choices=list(_KINDS), default=None, help="only without (stage) or with DAVE (voice)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of steady play")
    parser.add_argument("--windows", type=int, default=4, help="that these seconds are divided into")
    options = parser.parse_args()
    names = options.peers.split(",")
    if unknown := set(names) - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    configure("error", "console")
    raise_file_limit()  # the peers inherit it
    kinds: list[ChannelKind] = [options.kind] if options.kind else list(_KINDS)
    sizes = map(int, options.ours_guilds.split(",")) if options.ours_guilds else (options.guilds, _OUR_LARGER_SIZE)
    found, missing = asyncio.run(
        measure_all(
            options.guilds,
            [PEERS[name] for name in names],
            kinds,
            ours=list(dict.fromkeys(sizes)),
            windows=options.windows,
            window_s=options.seconds / options.windows,
            keep=keep,
        )
    )
    show(found, missing)
    if any(each.name == OURS for each in missing):
        sys.exit(1)


if __name__ == "__main__":
    main()
