"""What other voice libraries spend per packet, side by side:

    python -m tests.bench.peers --guilds 200 [--peers songbird,disgo] [--kind voice] [--seconds 8]

Each peer is a process of its own with a voice connection for each guild, all of them playing the same Opus frames to a
local Discord of their own. Measured over windows of steady play: CPU time of the peer (user and system, all of its
threads and processes) per packet that arrived, packets a second, loss, lateness. One peer after the other; without end-
to-end encryption (stages) and with it (voice channels with one other member, of whom there is no more than a key
package). What cannot be measured here is named with the reason. Takes about 20 s for each peer and kind.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from matplotlib.figure import Figure

from shared.logs import configure
from tests.bench.peers.measure import Missing, PeerFigures, measure_all
from tests.bench.peers.programs import PEERS
from tests.bench.results import save, table
from tests.emulator.records import ChannelKind

_KINDS: dict[ChannelKind, str] = {"stage": "without DAVE", "voice": "with DAVE"}
_CIPHERS = {"aead_aes256_gcm_rtpsize": "AES-GCM", "aead_xchacha20_poly1305_rtpsize": "XChaCha20"}


def draw(figure: Figure, found: Sequence[PeerFigures]) -> None:
    """Bars of CPU per packet, with the spread of the windows."""
    axes = figure.subplots()
    names = list(dict.fromkeys(each.name for each in found))
    for number, (kind, label) in enumerate(_KINDS.items()):
        bars = [each for each in found if each.kind == kind]
        if not bars:
            continue
        medians = [each.cpu_us.median for each in bars]
        spread = [
            [each.cpu_us.median - each.cpu_us.least for each in bars],
            [each.cpu_us.most - each.cpu_us.median for each in bars],
        ]
        places = [names.index(each.name) + (number - 0.5) * 0.38 for each in bars]
        drawn = axes.bar(places, medians, width=0.36, yerr=spread, capsize=3, label=label)
        axes.bar_label(drawn, fmt="%.1f", padding=2)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xlabel(f"{found[0].guilds} guilds, 50 packets a second each")
    axes.set_ylabel("µs of CPU per packet")
    axes.legend()


def show(found: Sequence[PeerFigures], missing: Sequence[Missing]) -> None:
    """The table, and what is missing from it."""
    columns = ["peer", "version", "kind", "cipher", "µs/packet", "cores", "packets/s", "wanted", "lost"]
    columns += ["late p50", "p99", "p99.9 ms"]
    rows = [
        (
            *(each.name, each.version, _KINDS[each.kind], _CIPHERS[each.mode], each.cpu_us, each.cores.median),
            *(f"{each.packets_per_s.median:.0f}", f"{each.wanted_per_s:.0f}", each.lost),
            *(each.late_p50_ms, each.late_p99_ms, each.late_p999_ms),
        )
        for each in found
    ]
    table(f"peers, {found[0].guilds} guilds" if found else "peers", columns, rows)
    for setting in dict.fromkeys(f"{each.name}: {each.setting}" for each in found):
        sys.stdout.write(f"{setting}\n")
    for each in missing:
        sys.stdout.write(f"{each.name}, {_KINDS[each.kind]}: not measured: {each.reason}\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers")
    parser.add_argument("--guilds", type=int, default=200)
    parser.add_argument("--peers", default=",".join(PEERS), help="some of " + ", ".join(PEERS))
    parser.add_argument("--kind", choices=list(_KINDS), default=None, help="only without (stage) or with DAVE (voice)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of steady play")
    parser.add_argument("--windows", type=int, default=4, help="that these seconds are divided into")
    options = parser.parse_args()
    names = options.peers.split(",")
    if unknown := set(names) - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    configure("error", "console")
    kinds: list[ChannelKind] = [options.kind] if options.kind else list(_KINDS)
    window_s = options.seconds / options.windows
    found, missing = asyncio.run(
        measure_all(options.guilds, [PEERS[name] for name in names], kinds, windows=options.windows, window_s=window_s)
    )
    show(found, missing)
    if not found:
        sys.exit(1)
    save(
        "peers",
        {"peers": [each.described() for each in found], "missing": [each._asdict() for each in missing]},
        lambda figure: draw(figure, found),
    )


if __name__ == "__main__":
    main()
