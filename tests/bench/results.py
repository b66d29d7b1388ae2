"""What a benchmark leaves behind: a table on the terminal, JSON and a plot under `.run/bench/`."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from shared.cli.pool import ROOT

RESULTS = ROOT / ".run" / "bench"


class Median(NamedTuple):
    """Several readings of one figure."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, readings: Sequence[float]) -> Median:
        return cls(statistics.median(readings), min(readings), max(readings))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def machine() -> dict[str, str]:
    """What the figures were measured on, and when."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()  # not every architecture has one
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": f"{os.cpu_count()} x {name}",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: names to the left, figures to the right."""
    printed = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        printed.add_column(column, justify="right" if number else "left")
    for row in rows:
        printed.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(printed)


def _named(figures: Mapping[str, object]) -> dict[str, object]:
    """Figures with each median as an object; JSON would make a list of it."""
    return {name: _told(value) for name, value in figures.items()}


def _told(value: object) -> object:
    if isinstance(value, Median):
        return value._asdict()
    if isinstance(value, Mapping):
        return _named(value)
    return [_told(one) for one in value] if isinstance(value, list | tuple) else value


def save(item: str, figures: Mapping[str, object], draw: Callable[[Figure], None]) -> None:
    """Write `.run/bench/<item>.json` and `.png`; what is shown of the machine is the same in both."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    where = machine()
    (RESULTS / f"{item}.json").write_text(json.dumps({"machine": where, **_named(figures)}, indent=1) + "\n")
    figure = Figure(figsize=(9, 5))
    draw(figure)
    figure.set_layout_engine("constrained", rect=(0, 0.03, 1, 0.97))  # room for the line below
    figure.text(0.99, 0.005, "  ".join(where.values()), ha="right", va="bottom", fontsize=6, color="gray")
    figure.savefig(RESULTS / f"{item}.png", dpi=110)
