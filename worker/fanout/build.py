"""Builds the packets of all rows ahead of time, straight into the shared memory.

A row is built a block of ticks at a time, and at each tick it is the turn of other groups of rows: so a connection's
state is fetched from memory once for several packets. What is the same for many is done for all of them at once in
numpy; per packet remain its encryptions. Building creates nothing that outlives it.

Source: design section 3, "Building"; RFC 3550 section 5.1.
"""

from __future__ import annotations

import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from shared.errors import ErrorCode, VoiceError
from shared.protocol.opus import FRAME_SAMPLES, MAX_FRAME_BYTES, SILENCE_FRAME
from shared.protocol.packet_seal import encrypt_function
from shared.protocol.transport_crypto import KEY_BYTES, MODES, suffix_bytes
from worker.fanout.grid import SLOTS, choose_slot
from worker.fanout.known_answers import seals_rightly
from worker.fanout.rows import ADDRESS_BYTES, RING_TICKS, RowTable, fence
from worker.fanout.scratch import BLOCK_TICKS, ROWS_AT_ONCE, Protect, Scratch

SILENCE_FRAMES = 5
"""Frames of silence before packets stop, so that receivers do not conceal the end as a loss."""
_LAST_NONCE = 2**32 - 2**20
_LONGEST_SUFFIX_BYTES = 24
_LONGEST_SPAN = 2 * RING_TICKS
_REST_TICKS = 50
"""A row given back rests for a second, so that the sender cannot mix its old and its next connection."""

FrameAt = Callable[[int], bytes | None]
"""The frame that a lane plays at a tick, or None."""


@dataclass(slots=True)
class Target:
    """Where a row's packets go and how they are sealed."""

    ssrc: int
    remote: tuple[str, int]
    socket_number: int
    mode: str
    key: bytes = field(repr=False)


@dataclass(eq=False)
class Lane:
    """Rows that play the same frames, in groups of 256 that have their turn at one tick of a block.

    A row takes the lowest free place of its lane and keeps it: so groups are few, however the rows of several lanes lie
    among each other, and whoever leaves moves nobody to another group.

    Attributes:
        frame_at: what is played when.
        known_until: of the ticks from one to another, the last up to which it is certain what is played; the first one
            is played in any case.
        places: of its rows.
        rows: sorted, as of the last `settle`.
        turns: of each of `rows`: its blocks end at ticks of this remainder.
    """

    frame_at: FrameAt
    known_until: Callable[[int, int], int] = lambda first, _last: first
    places: dict[int, int] = field(default_factory=dict)
    rows: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))
    turns: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))
    _free: list[int] = field(default_factory=list)
    _groups: list[_Group] = field(default_factory=list)
    _changed: bool = False

    def add(self, row: int, turn_loads: list[int]) -> None:
        """Take a row; a group that was empty has the turn at which the fewest rows are built."""
        place = heappop(self._free) if self._free else len(self.places)
        self.places[row] = place
        if place // ROWS_AT_ONCE == len(self._groups):
            self._groups.append(_Group())
        group = self._groups[place // ROWS_AT_ONCE]
        if not group.rows:
            group.turn = turn_loads.index(min(turn_loads))
        group.rows += 1
        turn_loads[group.turn] += 1
        self._changed = True

    def remove(self, row: int, turn_loads: list[int]) -> None:
        place = self.places.pop(row)
        heappush(self._free, place)
        group = self._groups[place // ROWS_AT_ONCE]
        group.rows -= 1
        turn_loads[group.turn] -= 1
        self._changed = True

    def settle(self) -> None:
        """Bring `rows` and `turns` up to date."""
        if self._changed:
            self._changed = False
            rows = np.fromiter(self.places, np.intp, len(self.places))
            places = np.fromiter(self.places.values(), np.intp, len(self.places))
            order = np.argsort(rows)
            self.rows = rows[order]
            self.turns = np.array([group.turn for group in self._groups], np.intp)[places[order] // ROWS_AT_ONCE]


@dataclass(slots=True)
class _Group:
    rows: int = 0
    turn: int = 0


class Builder:
    """Owns the counters of all rows and fills the shared memory.

    Three counters have three rules: sequence +1 per packet, timestamp +960 per tick, nonce +1 per seal.
    """

    def __init__(self, table: RowTable) -> None:
        self._table = table
        rows = table.rows
        self._protects: dict[int, Protect] = {}
        self._protected = np.zeros(rows, np.bool_)
        self._modes = np.zeros(rows, np.uint8)
        self._ssrcs = np.zeros(rows, np.uint32)
        self._keys = np.zeros((rows, KEY_BYTES), np.uint8)
        self._suffix_bytes = np.zeros(rows, np.uint32)
        self._nonces = np.zeros(rows, np.uint32)
        self._sequences = np.zeros(rows, np.uint16)
        self._timestamp_bases = np.zeros(rows, np.uint32)
        self._owed_silence = np.zeros(rows, np.uint8)
        self._built_until = np.zeros(rows, np.int64)
        self._begins = np.zeros(rows, np.bool_)
        self._on_air = np.zeros(rows, np.bool_)
        """Something was built for it before: what it goes without now is heard."""
        self._over_ticks = self._late_ticks = 0
        """Of one call: ticks that were over when it began, and when their packets were put in place."""
        self._redo: dict[int, int] = {}
        """Rows that are built again from a tick on, as soon as there is time for that."""
        self._scratch = Scratch()
        self._encrypts = [encrypt_function(mode) for mode in MODES]
        self.modes = tuple(
            mode
            for mode, encrypt in zip(MODES, self._encrypts, strict=True)
            if seals_rightly(mode, encrypt, self._scratch)
        )
        """Those that seal rightly on this machine, the best first."""
        self._lane_of: dict[int, Lane] = {}
        self._free = list(range(rows))
        """The lowest is taken first: what memory was never touched stays so."""
        self._resting: deque[tuple[int, int]] = deque()
        self._turn_loads = [0] * BLOCK_TICKS
        """Rows that are built at each tick of a block."""
        self._slot_loads = [0] * SLOTS
        self._socket_slot_loads: dict[int, list[int]] = {}
        self.lanes: list[Lane] = []
        self._leaving = Lane(frame_at=lambda _tick: None, known_until=lambda _first, last: last)
        self.rows_opened = 0
        """Since the start."""
        self._begin_tick = 0
        self.last_tick = 0
        """Every row is built up to here, many are further."""
        self.playing_until = 0
        """What is on the air goes on up to here, however long nothing is built."""
        self.ticks_skipped = 0
        """Ticks that some row went without, because they were over, or the sender was through with them."""

    @property
    def unprotected(self) -> int:
        """Frames that end-to-end encryption failed on: silence went out instead."""
        return self._scratch.unprotected

    # rows come and go

    def open(self, target: Target) -> int:
        """Give a connection a row; it is silent until it is tuned.

        Raises: VoiceError when all rows are in use, or where the mode seals wrongly.
        """
        if target.mode not in self.modes:
            raise VoiceError(
                f"{target.mode} seals wrongly here", code=ErrorCode.VOICE_MODE_UNSUPPORTED, retryable=False
            )
        if not self._free:
            raise VoiceError("all rows of this worker are in use", code=ErrorCode.INTERNAL_ERROR)
        row = heappop(self._free)
        self.rows_opened += 1
        slot_loads = self._socket_slot_loads.setdefault(target.socket_number, [0] * SLOTS)
        slot = choose_slot(self._slot_loads, slot_loads)
        self._slot_loads[slot] += 1
        slot_loads[slot] += 1
        table = self._table
        table.due[:, row] = 0
        table.error[row] = 0
        table.slot[row] = slot
        table.socket[row] = target.socket_number
        host, port = target.remote
        address = struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(host) + bytes(8)
        table.address[row] = np.frombuffer(address, np.uint8, ADDRESS_BYTES)
        self._ssrcs[row] = target.ssrc
        self._sequences[row] = secrets.randbelow(2**15)
        self._timestamp_bases[row] = secrets.randbits(32)
        self._owed_silence[row] = 0
        self._nonces[row] = 0
        self._key(row, target)
        table.active[row] = 1
        fence()
        table.layout[slot] += 1
        return row

    def _key(self, row: int, target: Target) -> None:
        self._modes[row] = MODES.index(target.mode)
        self._suffix_bytes[row] = suffix_bytes(target.mode)
        self._keys[row] = np.frombuffer(target.key, np.uint8, KEY_BYTES)

    def protect(self, row: int, protect: Protect | None) -> None:
        """From now on, encrypt a row's frames end to end; None: send them as they are.

        What is built in the clear and not sent yet is void. What is encrypted under the keys before is built again
        from the first tick on for which there is time; the rest goes out: who was there before keeps those keys for
        10 s, and a newcomer has none of them. Silence frames are never encrypted, and a frame that cannot be is
        replaced by one.
        """
        before = self._protects.get(row)
        if protect is before:
            return
        self._protected[row] = protect is not None
        if protect is None:
            del self._protects[row]
        else:
            self._protects[row] = protect
            if before is None:
                self._take_back(row, 0)
            else:
                self._redo[row] = 0

    def revise(self, lane: Lane, first_tick: int) -> None:
        """What a lane plays from a tick on is not what it was: build again what is built of that and not sent yet."""
        rows = lane.rows[self._built_until[lane.rows] >= first_tick]
        for row in rows.tolist():
            self._redo[row] = min(first_tick, self._redo.get(row, first_tick))

    def rekey(self, row: int, target: Target) -> None:
        """Go on under a new transport key: what is built under the old one and not sent yet is void."""
        self._take_back(row, 0)
        self._key(row, target)

    def _take_back(self, row: int, first_tick: int) -> None:
        """Void what is built from a tick on and not sent, to build it again."""
        voided = self._void(row, first_tick)
        self._begin(row)
        self._sequences[row] = (int(self._sequences[row]) - voided) % 2**16
        # Silence that was voided is owed again; a row that is on the air owes all of it anyway.
        self._owed_silence[row] = min(SILENCE_FRAMES, int(self._owed_silence[row]) + voided)

    def _begin(self, row: int) -> None:
        """Build a row anew behind the last packet that is built for it: ticks on which it is silent are free."""
        self._built_until[row] = self._table.due[:, row].max()
        self._begins[row] = True

    def _void(self, row: int, first_tick: int = 0) -> int:
        """Take back what is built and not sent; returns how many packets.

        What the sender has in hand this very moment goes out: nobody takes that back.
        """
        due, slot = self._table.due[:, row], self._table.slot[row]
        waiting = due >= max(first_tick, int(self._table.taken_tick[slot]) + 1)
        ticks = due[waiting]
        due[waiting] = 0
        fence()
        # what the sender took in this very moment has left, or is about to
        return int((ticks > self._table.taken_tick[slot]).sum())

    def slot_of(self, row: int) -> int:
        return int(self._table.slot[row])

    def tune(self, row: int, lane: Lane | None) -> None:
        """Have a row play a lane; None ends it with silence frames."""
        before = self._lane_of.get(row)
        after = self._leaving if lane is None else lane
        if before is after:
            return
        if before is not None:
            before.remove(row, self._turn_loads)
        after.add(row, self._turn_loads)
        self._lane_of[row] = after
        if lane is None:
            self._redo[row] = 0  # the end begins as soon as there is time for it
        else:
            self._begin(row)

    def silent(self, row: int) -> bool:
        """Whether the row owes no silence frame and all that was built for it has been sent."""
        sent = self._table.sent_tick[self._table.slot[row]]
        return not self._owed_silence[row] and not bool((self._table.due[:, row] > sent).any())

    def close(self, row: int) -> None:
        """Take a row back at once; what is built and not sent yet is void."""
        lane = self._lane_of.pop(row, None)
        if lane is not None:
            lane.remove(row, self._turn_loads)
        self._void(row)
        self._redo.pop(row, None)
        slot, number = self.slot_of(row), int(self._table.socket[row])
        self._slot_loads[slot] -= 1
        self._socket_slot_loads[number][slot] -= 1
        self._protects.pop(row, None)
        self._protected[row] = False
        self._keys[row] = 0
        self._table.active[row] = 0
        fence()
        self._table.layout[slot] += 1
        self._resting.append((self.last_tick + _REST_TICKS, row))

    @property
    def rows_free(self) -> int:
        """Rows that a connection could have now; those given back rest for a second."""
        return len(self._free)

    def worn_out(self) -> list[int]:
        """Rows whose nonce counter nears its end: their sessions must be made anew."""
        return [int(row) for row in np.flatnonzero(self._nonces > _LAST_NONCE)]

    # ticks

    def build(
        self, first_tick: int, last_tick: int | None = None, begin_tick: int | None = None, far_tick: int = 0
    ) -> None:
        """Build what is missing of all rows up to `last_tick`, and whole blocks where what is played is known.

        Args:
            first_tick: the first that is not over; rows that lack an earlier one go without.
            last_tick: not below that of the call before; `first_tick` if not given.
            begin_tick: the first for rows that begin, or begin anew; `first_tick` if not given.
            far_tick: where there shall be more than blocks: up to here at least, as far as it is known what is played.
        """
        last_tick = first_tick if last_tick is None else last_tick
        self._begin_tick, self.last_tick = first_tick if begin_tick is None else begin_tick, last_tick
        while self._resting and self._resting[0][0] <= last_tick:
            heappush(self._free, self._resting.popleft()[1])
        for row, tick in self._redo.items():
            self._take_back(row, max(tick, self._begin_tick))
        self._redo.clear()
        self._over_ticks = self._late_ticks = 0
        goals: list[int] = []
        for lane in (*self.lanes, self._leaving):
            lane.settle()
            known = lane.known_until(last_tick, max(last_tick, far_tick) + BLOCK_TICKS - 1)
            goal = max(last_tick, min(far_tick, known))
            behind = self._built_until[lane.rows] < goal
            if behind.any():
                begins = self._begins[lane.rows]
                for some in (behind & begins, behind & ~begins):  # who begins has the least time
                    if some.any():
                        self._build_lane(lane, some, first_tick, goal, known)
            if lane is not self._leaving and (self._owed_silence[lane.rows] > 0).any():
                goals.append(goal)
        self.playing_until = min(goals, default=last_tick)
        self.ticks_skipped += self._over_ticks + self._late_ticks

    def _build_lane(self, lane: Lane, behind: NDArray[np.bool_], first_tick: int, goal: int, known: int) -> None:
        """Build those of a lane's rows that are behind the goal."""
        rows = lane.rows[behind]
        frames = [lane.frame_at(tick) for tick in range(first_tick, known + 1)]
        begins, goes_on = self._begins[rows], self._built_until[rows] + 1
        starts = np.maximum(goes_on, np.where(begins, self._begin_tick, first_tick))
        # Groups of rows end their blocks at ticks of their own: of thousands each tick has its share, and few rows make
        # no more than one piece of work. Such a piece finds nothing in the caches: to begin costs a hundred packets.
        ends = np.minimum(goal + (lane.turns[behind] - goal) % BLOCK_TICKS, known)
        possible = starts <= ends
        if not possible.all():  # who begins does so later than it is known what is played
            if possible.any():
                behind = behind.copy()
                behind[behind] = possible
                self._build_lane(lane, behind, first_tick, goal, known)
            return
        on_air = self._owed_silence[rows] > 0  # where nothing is heard, nothing is skipped
        self._built_until[rows] = ends
        self._begins[rows] = False
        if first_tick > goes_on.min():
            self._over_ticks = max(self._over_ticks, int(np.where(begins | ~on_air, 0, starts - goes_on).max()))
        spans = (starts - first_tick) * _LONGEST_SPAN + (ends - first_tick)
        self._on_air[rows] = on_air
        for span in np.unique(spans).tolist():
            start, end = divmod(span, _LONGEST_SPAN)
            self._build_span(rows[spans == span], first_tick + start, frames[start : end + 1])

    def _build_span(self, rows: NDArray[np.intp], tick: int, frames: list[bytes | None]) -> None:
        """Frames for rows that lack the same ticks; five frames of silence where there is nothing more."""
        on_air = [frame for frame in frames if frame is not None]
        if len(on_air) == len(frames):
            self._owed_silence[rows] = SILENCE_FRAMES
            self._fill(rows, tick, on_air)
            return
        for number, frame in enumerate(frames):
            if frame is not None:
                self._owed_silence[rows] = SILENCE_FRAMES
                self._fill(rows, tick + number, [frame])
                continue
            owing = rows[self._owed_silence[rows] > 0]
            if len(owing):
                self._owed_silence[owing] -= np.uint8(1)
                self._fill(owing, tick + number, [SILENCE_FRAME])

    def _fill(self, rows: NDArray[np.intp], tick: int, frames: list[bytes]) -> None:
        """Write packets of successive ticks for each row."""
        longest = max(map(len, frames))
        if longest > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {longest} bytes does not fit a row")
        ways = self._modes[rows] * 2 + self._protected[rows]
        for way in np.unique(ways):
            alike = rows[ways == way]
            for first in range(0, len(alike), ROWS_AT_ONCE):
                # A row that begins anew may lack more than a block.
                for number in range(0, len(frames), BLOCK_TICKS):
                    some = frames[number : number + BLOCK_TICKS]
                    self._fill_scratch(alike[first : first + ROWS_AT_ONCE], tick + number, some)

    def _fill_scratch(self, rows: NDArray[np.intp], tick: int, frames: list[bytes]) -> None:
        """Header, ciphertext, nonce, then into the shared memory; `due` last. The rows are sealed in the same way."""
        scratch, table, count = self._scratch, self._table, len(rows)
        ticks = len(frames)
        steps = np.arange(1, ticks + 1)[:, np.newaxis]
        head = scratch.head[:ticks, :count]
        head["ssrc"] = self._ssrcs[rows]
        head["sequence"] = self._sequences[rows] + steps.astype(np.uint16)
        timestamps = (tick - 1 + steps) * FRAME_SAMPLES & 0xFFFFFFFF
        head["timestamp"] = self._timestamp_bases[rows] + timestamps.astype(np.uint32)
        scratch.nonces[:ticks, :count] = self._nonces[rows] + steps.astype(np.uint32)
        self._sequences[rows] += np.uint16(ticks)
        self._nonces[rows] += np.uint32(ticks)
        scratch.keys[:count] = self._keys[rows]
        encrypt = self._encrypts[self._modes[rows[0]]]
        if self._protected[rows[0]]:
            ends = scratch.protect_and_seal(encrypt, frames, [self._protects[row] for row in rows.tolist()])
        else:
            ends = scratch.seal(encrypt, frames, count)
        taken = table.taken_tick[table.slot[rows]]  # of ticks that come too late now
        late_ticks = np.where(self._on_air[rows], np.clip(taken - tick + 1, 0, ticks), 0)
        self._late_ticks = max(self._late_ticks, int(late_ticks.max()))
        longest = ends.max(axis=1) + _LONGEST_SUFFIX_BYTES
        for number, size in enumerate(longest.tolist()):
            ring = (tick + number) % RING_TICKS
            table.packets[:, ring, :size][rows] = scratch.packets[number, :count, :size]
            table.length[ring][rows] = ends[number] + self._suffix_bytes[rows]
        fence()
        for number in range(ticks):
            table.due[(tick + number) % RING_TICKS][rows] = tick + number
