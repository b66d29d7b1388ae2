"""What was received on each session: counters in one step per packet, vectorised over sessions. Pure.

Source: design section 0 for the words `lost` and `lateness`; reference section 4.1 for the counters on the wire.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.emulator.ring import Rings
from tests.emulator.wire import SAMPLES_PER_TICK

COUNTERS = (
    "packets",
    "audio_packets",
    "lost",
    "duplicated",
    "out_of_order",
    "nonce_reused",
    "decrypt_failed",
    "wrong_header",
    "wrong_timestamp",
    "rtp_before_speaking",
    "keepalives",
    "in_the_clear",
    "silent_ticks",
)
SILENCE_FRAMES_BEFORE_GAP = 5
_WINDOW_BITS = 64

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def modular_step(value: Ints, before: Ints, bits: int) -> Ints:
    """Signed distance from `before` to `value` on a counter that wraps after `bits` bits."""
    half = 1 << (bits - 1)
    distance: Ints = ((value - before + half) & ((1 << bits) - 1)) - half
    return distance


@dataclass(frozen=True, slots=True)
class Packets:
    """Columns over accepted packets in the order of their arrival at each session."""

    row: Ints
    sequence: Ints
    timestamp: Ints
    nonce: Ints
    arrival_ns: Ints
    silent: Bools
    payload: Ints

    def take(self, chosen: Ints | Bools) -> "Packets":
        """The chosen packets."""
        return Packets(
            self.row[chosen],
            self.sequence[chosen],
            self.timestamp[chosen],
            self.nonce[chosen],
            self.arrival_ns[chosen],
            self.silent[chosen],
            self.payload[chosen],
        )


class Ledger:
    """Counters and recordings, one row per session.

    Rows below `sampled_rows` keep full records (`full_depth` of them), the others time-stamps, arrivals and pauses only
    (`brief_depth`). A sequence that arrives late is known for 64 packets; an older one counts as out of order and
    changes no loss.
    """

    def __init__(self, sampled_rows: int, brief_rows: int, full_depth: int, brief_depth: int) -> None:
        rows = sampled_rows + brief_rows
        self.sampled_rows = sampled_rows
        self.rows = rows
        self.counts: dict[str, Ints] = {name: np.zeros(rows, np.int64) for name in COUNTERS}
        self.first_arrival_ns: Ints = np.zeros(rows, np.int64)
        self.last_arrival_ns: Ints = np.zeros(rows, np.int64)
        self.first_sound_ns: Ints = np.zeros(rows, np.int64)
        self.last_sound_ns: Ints = np.zeros(rows, np.int64)
        self.silence_run: Ints = np.zeros(rows, np.int64)
        self._sound_timestamp: Ints = np.zeros(rows, np.int64)
        self._started: Bools = np.zeros(rows, np.bool_)
        self._sequence: Ints = np.zeros(rows, np.int64)
        self._timestamp: Ints = np.zeros(rows, np.int64)
        self._nonce: Ints = np.zeros(rows, np.int64)
        self._nonce_known: Bools = np.zeros(rows, np.bool_)
        self._nonce_free: Bools = np.zeros(rows, np.bool_)
        self._above_first: Ints = np.zeros(rows, np.int64)
        self._seen: NDArray[np.uint64] = np.zeros(rows, np.uint64)  # bit n: the sequence n below the highest was seen
        full = {
            "sequence": "u2",
            "timestamp": "u4",
            "nonce": "u4",
            "arrival_ns": "i8",
            "payload": "i4",
            "after_pause": "?",
        }
        self._full = Rings(sampled_rows, full_depth, full)
        self._brief = Rings(brief_rows, brief_depth, {"timestamp": "u4", "arrival_ns": "i8", "after_pause": "?"})

    def clear(self, row: int | slice) -> None:
        """Forget a row, or all rows with `slice(None)`: its next packet counts as the first."""
        for counter in self.counts.values():
            counter[row] = 0
        self.first_arrival_ns[row] = 0
        self.last_arrival_ns[row] = 0
        self.first_sound_ns[row] = 0
        self.last_sound_ns[row] = 0
        self.silence_run[row] = 0
        self._started[row] = False
        self._nonce_known[row] = False
        self._nonce_free[row] = False
        if isinstance(row, slice):
            self._full.clear(slice(None))
            self._brief.clear(slice(None))
        elif row < self.sampled_rows:
            self._full.clear(row)
        else:
            self._brief.clear(row - self.sampled_rows)

    def renew_key(self, row: int, *, both_valid: bool = False) -> None:
        """A new key came into force: nonces start anew; they are not judged while `both_valid`."""
        self._nonce_known[row] = False
        self._nonce_free[row] = both_valid

    def recording(self, row: int) -> dict[str, NDArray[np.generic]]:
        """The records of a row, oldest first: `timestamp` and `arrival_ns`, all columns on a sampled row."""
        return self._full.read(row) if row < self.sampled_rows else self._brief.read(row - self.sampled_rows)

    def note_heard(self, row: Ints, arrival_ns: Ints, silent: Bools) -> None:
        """Count packets of sessions that are not listened to: too few of them come to judge what is missing."""
        fresh = np.flatnonzero(~self._started[row])[::-1]  # of several of one session, the first counts
        self.first_arrival_ns[row[fresh]] = arrival_ns[fresh]
        self._started[row] = True
        self.last_arrival_ns[row] = arrival_ns
        np.add.at(self.counts["packets"], row, 1)
        np.add.at(self.counts["audio_packets"], row, ~silent)

    def account(self, packets: Packets) -> None:
        """Count and record a batch."""
        total = len(packets.row)
        if not total:
            return
        order = np.argsort(packets.row, kind="stable")
        row = packets.row[order]
        starts = np.flatnonzero(np.concatenate(([True], row[1:] != row[:-1])))
        if len(starts) == total:
            self._account_round(packets)
            return
        lengths = np.diff(starts, append=total)
        rank = np.arange(total) - np.repeat(starts, lengths)
        by_rank = order[np.argsort(rank, kind="stable")]
        for chosen in np.split(by_rank, np.cumsum(np.bincount(rank))[:-1]):
            self._account_round(packets.take(chosen))

    def _account_round(self, packets: Packets) -> None:
        """Count at most one packet of each session."""
        row = packets.row
        first = ~self._started[row]
        if first.any():
            self._start(packets.take(first))
            packets = packets.take(~first)
            row = packets.row
        ahead = modular_step(packets.sequence, self._sequence[row], 16)
        forward = ahead > 0
        if not forward.all():
            late = ~forward
            self._late(packets.take(late), ahead[late])
            packets = packets.take(forward)
            ahead = ahead[forward]
        self._forward(packets, ahead)

    def _start(self, packets: Packets) -> None:
        row = packets.row
        self._started[row] = True
        self._sequence[row] = packets.sequence
        self._timestamp[row] = packets.timestamp
        self._above_first[row] = 0
        self._seen[row] = 1
        self.first_arrival_ns[row] = packets.arrival_ns
        self.silence_run[row] = packets.silent
        self._note_sound(packets)
        self._check_nonce(row, packets.nonce)
        self._record(packets, np.zeros(len(row), np.bool_))

    def _forward(self, packets: Packets, ahead: Ints) -> None:
        """Packets above the highest sequence of their session."""
        row, silent = packets.row, packets.silent
        step = modular_step(packets.timestamp, self._timestamp[row], 32)
        ticks = step // SAMPLES_PER_TICK
        gap = np.maximum(ticks - ahead, 0)
        after_pause = (gap > 0) & (self.silence_run[row] >= SILENCE_FRAMES_BEFORE_GAP)
        gap[after_pause] = 0
        self.counts["lost"][row] += ahead - 1 + gap
        self.counts["wrong_timestamp"][row] += (step % SAMPLES_PER_TICK != 0) | (ticks < ahead)
        shift = np.minimum(ahead, _WINDOW_BITS - 1).astype(np.uint64)
        moved = np.where(ahead < _WINDOW_BITS, self._seen[row] << shift, np.uint64(0))
        self._seen[row] = moved | np.uint64(1)
        self._above_first[row] += ahead
        self._sequence[row] = packets.sequence
        self._timestamp[row] = packets.timestamp
        self.silence_run[row] = np.where(silent, np.where(ahead == 1, self.silence_run[row] + 1, 1), 0)
        self._note_sound(packets)
        self._check_nonce(row, packets.nonce)
        self._record(packets, after_pause)

    def _late(self, packets: Packets, ahead: Ints) -> None:
        """Packets at or below the highest sequence: repeated, or late and then no longer lost."""
        row, behind = packets.row, -ahead
        within = behind < _WINDOW_BITS
        bit = np.uint64(1) << np.minimum(behind, _WINDOW_BITS - 1).astype(np.uint64)
        repeated = within & ((self._seen[row] & bit) != 0)
        self.counts["duplicated"][row] += repeated
        self.counts["out_of_order"][row] += ~repeated
        found = within & ~repeated
        self._seen[row] |= np.where(found, bit, np.uint64(0))
        self.counts["lost"][row] -= found & (behind < self._above_first[row])
        self.counts["silent_ticks"][row] -= found & ~packets.silent & (self.counts["silent_ticks"][row] > 0)
        self._record(packets.take(~repeated), np.zeros(int((~repeated).sum()), np.bool_))

    def _note_sound(self, packets: Packets) -> None:
        """Count the ticks without sound since the last one with it, whatever was sent in them."""
        packets = packets.take(~packets.silent)
        row = packets.row
        again = self.first_sound_ns[row] > 0
        ticks = modular_step(packets.timestamp, self._sound_timestamp[row], 32) // SAMPLES_PER_TICK
        self.counts["silent_ticks"][row] += np.where(again, np.maximum(ticks - 1, 0), 0)
        self.first_sound_ns[row] = np.where(again, self.first_sound_ns[row], packets.arrival_ns)
        self.last_sound_ns[row] = packets.arrival_ns
        self._sound_timestamp[row] = packets.timestamp

    def _check_nonce(self, row: Ints, nonce: Ints) -> None:
        risen = modular_step(nonce, self._nonce[row], 32) > 0
        above = risen | ~self._nonce_known[row] | self._nonce_free[row]
        self.counts["nonce_reused"][row] += ~above
        self._nonce[row] = np.where(above, nonce, self._nonce[row])
        self._nonce_known[row] = True

    def _record(self, packets: Packets, after_pause: Bools) -> None:
        row = packets.row
        self.counts["packets"][row] += 1
        self.counts["audio_packets"][row] += ~packets.silent
        self.last_arrival_ns[row] = packets.arrival_ns
        sampled = row < self.sampled_rows
        if sampled.any():
            some = packets if sampled.all() else packets.take(sampled)
            self._append(self._full, some, after_pause[sampled], 0)
        if not sampled.all():
            some = packets if not sampled.any() else packets.take(~sampled)
            self._append(self._brief, some, after_pause[~sampled], self.sampled_rows)

    @staticmethod
    def _append(rings: Rings, packets: Packets, after_pause: Bools, offset: int) -> None:
        values: dict[str, NDArray[np.generic]] = {
            "sequence": packets.sequence,
            "timestamp": packets.timestamp,
            "nonce": packets.nonce,
            "arrival_ns": packets.arrival_ns,
            "payload": packets.payload,
            "after_pause": after_pause,
        }
        rings.append(packets.row - offset, values)
