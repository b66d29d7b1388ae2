"""Bounded recordings of many sessions, written a batch at a time."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Rings:
    """`rows` rings of `depth` records each; every column is one array, touched memory grows with use only."""

    def __init__(self, rows: int, depth: int, columns: Mapping[str, DTypeLike]) -> None:
        self.depth = depth
        self._columns = {name: np.zeros((rows, depth), kind) for name, kind in columns.items()}
        self._written: NDArray[np.int64] = np.zeros(rows, np.int64)

    def append(self, row: NDArray[np.int64], values: Mapping[str, NDArray[np.generic]]) -> None:
        """One record for each row; no row may occur twice."""
        place = self._written[row] % self.depth
        for name, column in self._columns.items():
            column[row, place] = values[name]
        self._written[row] += 1

    def read(self, row: int) -> dict[str, NDArray[np.generic]]:
        """Copies of the columns of one ring, oldest record first."""
        written = int(self._written[row])
        if written <= self.depth:
            return {name: column[row, :written].copy() for name, column in self._columns.items()}
        first = written % self.depth
        return {name: np.roll(column[row], -first) for name, column in self._columns.items()}

    def clear(self, row: int | slice) -> None:
        """Forget the records of one row, or of several."""
        self._written[row] = 0
