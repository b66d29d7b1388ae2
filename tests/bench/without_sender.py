"""What a storm does with the sender as a process of its own, and without: its code in a thread of the worker.

    python -m tests.bench.without_sender --guilds 400

The same weather as in `pace.py` on the same machine, one round of each in turns. For the thread the worker's class of
the sender is replaced at its start by `inside/sender_thread.py`; the product has no such setting. The thread is given
the priority that the process has, and so is the bare loop beside either. It takes some four minutes.
"""

from __future__ import annotations

import argparse
import asyncio

import numpy as np
from matplotlib.figure import Figure

from tests.bench.lateness import BIN_MS, QUANTILES, medians, quantiles_ms
from tests.bench.pace import Size, Weather, Window, check_seconds, figures_of, measure, usual_size
from tests.bench.results import save, table

SENDING = ("process", "thread")

Found = dict[str, dict[Weather, list[Window]]]


def show(size: Size, found: Found) -> None:
    """Print the table."""
    rows: list[list[object]] = []
    for weather in ("quiet", "storm"):
        for sending, windows_of in found.items():
            windows = windows_of[weather]
            late = medians([quantiles_ms(window.sender) for window in windows])
            bare = medians([quantiles_ms(window.bare) for window in windows])
            longest_ms = max(window.report.gap_ms.max or 0.0 for window in windows)
            skipped = sum(window.ticks_skipped for window in windows)
            rows.append([f"{weather}: sender is a {sending}", *late.values(), longest_ms, skipped])
            rows.append(["bare loop", *bare.values(), "", ""])
    columns = ["", *QUANTILES, "longest gap", "skipped"]
    table(f"lateness of each slot's first packet in ms, {size}", columns, rows)


def draw(size: Size, found: Found, figure: Figure) -> None:
    """Share of slots that left later than so much, under storm."""
    axes = figure.subplots()
    for (sending, windows_of), colour in zip(found.items(), ("tab:blue", "tab:red"), strict=True):
        windows = windows_of["storm"]
        for name, style, histograms in (
            (f"sender is a {sending}", "-", [window.sender for window in windows]),
            (f"bare loop beside the {sending}", ":", [window.bare for window in windows]),
        ):
            counts = np.sum(histograms, axis=0)
            later = 1 - np.cumsum(counts) / max(1, int(counts.sum()))
            axes.plot((np.arange(len(counts)) + 1) * BIN_MS, later, label=name, linestyle=style, color=colour)
    axes.set(title=f"a storm, {size}", xlabel="ms", ylabel="share of slots later than that")
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = usual_size()
    parser.add_argument("--guilds", type=int, default=usual.guilds)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each window; two windows make a round")
    options = parser.parse_args()
    check_seconds(parser, options.seconds)
    size = usual._replace(guilds=options.guilds)
    found: Found = {sending: {"quiet": [], "storm": []} for sending in SENDING}
    for sending in list(SENDING) * options.rounds:  # in turns: what else the machine does falls on both
        for weather, windows in asyncio.run(measure(size.guilds, 1, options.seconds, sending=sending)).items():
            found[sending][weather] += windows
    show(size, found)
    figures = {sending: figures_of(windows) for sending, windows in found.items()}
    save("without_sender", {**size.told(), **figures}, lambda figure: draw(size, found, figure))


if __name__ == "__main__":
    main()
