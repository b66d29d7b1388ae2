"""What a storm does with the sender as a process of its own, and without: its code in a thread of the worker.

    python -m tests.bench.without_sender --guilds 400

The same weather as in `pace.py` on the same machine, one after the other. For the second the worker's class of the
sender is replaced at its start by `inside/sender_thread.py`; the product has no such setting.
"""

from __future__ import annotations

import argparse
import asyncio

import numpy as np
from matplotlib.figure import Figure

from tests.bench.lateness import BIN_MS, QUANTILES, medians, quantiles_ms
from tests.bench.pace import Weather, Window, figures_of, measure
from tests.bench.results import save, table

SENDING = ("process", "thread")

Found = dict[str, dict[Weather, list[Window]]]


def show(guilds: int, found: Found) -> None:
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
    table(f"lateness of each slot's first packet in ms, {guilds} guilds with DAVE", columns, rows)


def draw(guilds: int, found: Found, figure: Figure) -> None:
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
    axes.set(title=f"a storm, {guilds} guilds with DAVE", xlabel="ms", ylabel="share of slots later than that")
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guilds", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each window; two windows make a round")
    options = parser.parse_args()
    found: Found = {
        sending: asyncio.run(measure(options.guilds, options.rounds, options.seconds, sending=sending))
        for sending in SENDING
    }
    show(options.guilds, found)
    figures = {sending: figures_of(windows) for sending, windows in found.items()}
    save("without_sender", {"guilds": options.guilds, **figures}, lambda figure: draw(options.guilds, found, figure))


if __name__ == "__main__":
    main()
