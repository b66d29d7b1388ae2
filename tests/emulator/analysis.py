"""Lateness, skew and spread from recorded arrivals. Pure numpy; times in are nanoseconds, times out milliseconds.

Source: design section 0 (glossary).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tests.emulator.payloads import SILENCE_ID
from tests.emulator.records import Percentiles

_SAMPLES_PER_SECOND = 48_000
_NS_PER_SAMPLE = 1e9 / _SAMPLES_PER_SECOND
_NS_PER_MS = 1e6

Floats = NDArray[np.float64]


def unwrap_timestamps(timestamp: NDArray[np.generic]) -> NDArray[np.int64]:
    """RTP timestamps (32 bit, wrapping) as samples since the first record, in the order given."""
    if not len(timestamp):
        return np.zeros(0, np.int64)
    raw = timestamp.astype(np.int64)
    steps = (np.diff(raw, prepend=raw[0]) + 2**31) % 2**32 - 2**31
    samples: NDArray[np.int64] = np.cumsum(steps)
    return samples


def lateness_ms(timestamp: NDArray[np.generic], arrival_ns: NDArray[np.generic], window_s: float = 10.0) -> Floats:
    """Arrival minus the session's own 20 ms grid, one value per record of one session.

    The grid is laid through the earliest arrival of each window of `window_s` seconds of timestamps; a last window
    shorter than half is joined to the one before.
    """
    if not len(timestamp):
        return np.zeros(0)
    samples = unwrap_timestamps(timestamp)
    samples -= samples.min()
    arrival = arrival_ns.astype(np.int64)
    beyond_ns = (arrival - arrival.min()).astype(np.float64) - samples * _NS_PER_SAMPLE
    window_samples = window_s * _SAMPLES_PER_SECOND
    last = max(int(samples.max() / window_samples + 0.5) - 1, 0)
    window = np.minimum((samples / window_samples).astype(np.int64), last)
    earliest = np.full(last + 1, np.inf)
    np.minimum.at(earliest, window, beyond_ns)
    late: Floats = (beyond_ns - earliest[window]) / _NS_PER_MS
    return late


def gaps_ms(
    timestamp: NDArray[np.generic], arrival_ns: NDArray[np.generic], after_pause: NDArray[np.generic]
) -> Floats:
    """Times between the arrivals of successive packets of one session; a tick that is missing makes a long one.

    Args:
        after_pause: which packets came after an announced pause: what is before those is no gap.
    """
    played_on = (np.diff(unwrap_timestamps(timestamp)) > 0) & (after_pause[1:] == 0)
    gaps: Floats = np.diff(arrival_ns.astype(np.int64))[played_on] / _NS_PER_MS
    return gaps


def arrivals_ms(
    heard: Sequence[tuple[NDArray[np.generic], NDArray[np.generic]]], slot_ms: Sequence[float] | None = None
) -> Floats:
    """When each payload arrived at each listener: a table of payloads by listeners, NaN where it was not heard.

    Args:
        heard: for each listener its payload ids and arrival times (ns).
        slot_ms: for each listener what to subtract from its arrivals.
    Silence, what nobody could decrypt, and payloads that any listener heard twice are left out. Zero is the earliest
    arrival of all.
    """
    listeners = len(heard)
    if not sum(len(payload) for payload, _ in heard):
        return np.zeros((0, listeners))
    payload = np.concatenate([ids.astype(np.int64) for ids, _ in heard])
    arrival = np.concatenate([times.astype(np.int64) for _, times in heard])
    listener = np.repeat(np.arange(listeners), [len(ids) for ids, _ in heard])
    values = (arrival - arrival.min()) / _NS_PER_MS
    if slot_ms is not None:
        values -= np.asarray(slot_ms, np.float64)[listener]
    pairs, times_heard = np.unique(payload * listeners + listener, return_counts=True)
    repeated = np.unique(pairs[times_heard > 1] // listeners)
    keep = (payload > SILENCE_ID) & ~np.isin(payload, repeated)
    names, line = np.unique(payload[keep], return_inverse=True)
    table = np.full((len(names), listeners), np.nan)
    table[line, listener[keep]] = values[keep]
    return table


def spread_ms(table: Floats) -> Floats:
    """Latest minus earliest arrival of each payload that two or more listeners heard."""
    shared = table[(~np.isnan(table)).sum(axis=1) >= 2]
    if not len(shared):
        return np.zeros(0)
    spread: Floats = np.nanmax(shared, axis=1) - np.nanmin(shared, axis=1)
    return spread


def skew_ms(table: Floats, max_pairs: int = 2_000_000) -> Floats:
    """Difference of arrival of one payload at two listeners, for all pairs of listeners.

    When there would be more than `max_pairs` values, evenly chosen payloads stand for all.
    """
    shared = table[(~np.isnan(table)).sum(axis=1) >= 2]
    left, right = np.triu_indices(table.shape[1], 1)
    if not len(shared):
        return np.zeros(0)
    every = max(-(-len(shared) * len(left) // max_pairs), 1)
    chosen = shared[::every]
    difference = np.abs(chosen[:, left] - chosen[:, right]).ravel()
    skew: Floats = difference[~np.isnan(difference)]
    return skew


def percentiles(values: Floats) -> Percentiles:
    """p50, p99, p99.9 and the largest value; all None when there is none."""
    if not len(values):
        return Percentiles(count=0)
    p50, p99, p999 = (float(value) for value in np.percentile(values, (50, 99, 99.9)))
    return Percentiles(count=len(values), p50=p50, p99=p99, p999=p999, max=float(values.max()))


def skew_percentiles(table: Floats, max_pairs: int = 2_000_000) -> Percentiles:
    """Percentiles of `skew_ms`; the largest is that of all payloads, chosen or not."""
    found = percentiles(skew_ms(table, max_pairs))
    if found.count:
        found.max = float(spread_ms(table).max())
    return found
