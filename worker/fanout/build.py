"""Builds the packets of a tick, ahead of time, straight into the shared rows.

What is the same for many is done for all of them at once in numpy; per guild remain its encryptions. A packet is made
in a place of its own that stays in the cache, then all of a tick are copied into the shared rows.
Building a tick creates nothing that outlives it. Source: design section 3, "Building"; RFC 3550 section 5.1.
"""

from __future__ import annotations

import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.errors import ErrorCode, VoiceError
from shared.protocol import rtp
from shared.protocol.opus import FRAME_SAMPLES, MAX_FRAME_BYTES, SILENCE_FRAME
from shared.protocol.packet_seal import NULL, Encrypt, Pointer, encrypt_function, pointer
from shared.protocol.transport_crypto import KEY_BYTES, NONCE_SUFFIX_BYTES, TAG_BYTES, suffix_bytes
from worker.fanout.grid import SLOTS, choose_slot
from worker.fanout.rows import ADDRESS_BYTES, HEAD, LAYOUT, PACKET_BYTES, RING_TICKS, RowTable

SILENCE_FRAMES = 5
"""Frames of silence before packets stop, so that receivers do not conceal the end as a loss."""
_NONCE_FIELD_BYTES = 24
_LAST_NONCE = 2**32 - 2**20
_SUFFIX = np.arange(NONCE_SUFFIX_BYTES)
_LONGEST_SUFFIX_BYTES = 24
_REST_TICKS = 50
"""A row given back rests for a second, so that the sender cannot mix its old and its next connection."""

FrameAt = Callable[[int], bytes | None]
"""The frame that a lane plays at a tick, or None."""
Protect = Callable[[bytes], bytes | None]
"""End-to-end encryption of one frame; None when it failed."""


class _Work(NamedTuple):
    """What sealing the packets of one row takes."""

    encrypt: Encrypt
    out: Pointer
    header: Pointer
    nonce: Pointer
    key: Pointer
    protect: Protect | None


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
    """Rows that play the same frames.

    Attributes:
        frame_at: what is played when.
    """

    frame_at: FrameAt
    rows: set[int] = field(default_factory=set)
    changed: bool = True
    numbers: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))
    work: list[_Work] = field(default_factory=list)
    """In the order of `numbers`."""


class Builder:
    """Owns the counters of all rows and fills the shared memory.

    Three counters have three rules: sequence +1 per packet, timestamp +960 per tick, nonce +1 per seal.
    """

    def __init__(self, table: RowTable) -> None:
        self._table = table
        rows = table.rows
        self._work: dict[int, _Work] = {}
        self._modes: dict[int, str] = {}
        self._protects: dict[int, Protect] = {}
        self._packets = np.zeros((rows, PACKET_BYTES), np.uint8)
        self._head = np.ndarray(rows, HEAD, self._packets, 0, (PACKET_BYTES,))
        self._nonces = np.zeros((rows, _NONCE_FIELD_BYTES), np.uint8)
        self._keys = np.zeros((rows, KEY_BYTES), np.uint8)
        self._suffix_bytes = np.zeros(rows, np.uint32)
        self._nonce_counters = self._nonces.view(">u4")[:, 0]
        self._sequences = np.zeros(rows, np.uint16)
        self._timestamp_bases = np.zeros(rows, np.uint32)
        self._owed_silence = np.zeros(rows, np.uint8)
        self._lane_of: dict[int, Lane] = {}
        self._free = deque(range(rows))
        self._resting: deque[tuple[int, int]] = deque()
        self._slot_loads = [0] * SLOTS
        self._socket_slot_loads: dict[int, list[int]] = {}
        self.lanes: list[Lane] = []
        self._leaving = Lane(frame_at=lambda _tick: None)
        self.last_tick = 0
        self.unprotected = 0
        """Frames that end-to-end encryption failed on: silence went out instead."""

    # rows come and go

    def open(self, target: Target) -> int:
        """Give a connection a row; it is silent until it is tuned.

        Raises: VoiceError when all rows are in use.
        """
        if not self._free:
            raise VoiceError("all rows of this worker are in use", code=ErrorCode.INTERNAL_ERROR)
        row = self._free.popleft()
        slot_loads = self._socket_slot_loads.setdefault(target.socket_number, [0] * SLOTS)
        slot = choose_slot(self._slot_loads, slot_loads)
        self._slot_loads[slot] += 1
        slot_loads[slot] += 1
        table = self._table
        table.due[:, row] = 0
        table.slot[row] = slot
        table.socket[row] = target.socket_number
        host, port = target.remote
        address = struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(host) + bytes(8)
        table.address[row] = np.frombuffer(address, np.uint8, ADDRESS_BYTES)
        self._head["flags"][row] = rtp.VERSION_FLAGS << 8 | rtp.PAYLOAD_TYPE
        self._head["ssrc"][row] = target.ssrc
        self._sequences[row] = secrets.randbelow(2**15)
        self._timestamp_bases[row] = secrets.randbits(32)
        self._owed_silence[row] = 0
        self._nonces[row] = 0
        self._key(row, target)
        table.active[row] = 1
        table.head[LAYOUT] += 1
        return row

    def _key(self, row: int, target: Target) -> None:
        self._modes[row] = target.mode
        self._suffix_bytes[row] = suffix_bytes(target.mode)
        self._keys[row] = np.frombuffer(target.key, np.uint8, KEY_BYTES)
        self._plan(row)

    def _plan(self, row: int) -> None:
        """Make ready what sealing a row's packets takes."""
        header = pointer(self._packets[row])
        self._work[row] = _Work(
            encrypt_function(self._modes[row]),
            header + rtp.HEADER_BYTES,
            header,
            pointer(self._nonces[row]),
            pointer(self._keys[row]),
            self._protects.get(row),
        )
        if row in self._lane_of:
            self._lane_of[row].changed = True

    def protect(self, row: int, protect: Protect | None) -> None:
        """From the next tick built on, encrypt a row's frames end to end; None: send them as they are.

        What is built in the clear and not sent yet is void, what is encrypted goes out: receivers keep the keys before
        for 10 s. Silence frames are never encrypted, and a frame that cannot be is replaced by one.
        """
        before = self._protects.get(row)
        if protect is before:
            return
        if protect is None:
            del self._protects[row]
        else:
            self._protects[row] = protect
            if before is None:
                self._take_back(row)
        self._plan(row)

    def rekey(self, row: int, target: Target) -> None:
        """Go on under a new transport key: what is built under the old one and not sent yet is void."""
        self._take_back(row)
        self._key(row, target)

    def _take_back(self, row: int) -> None:
        """Void what is built and not sent, and go on in its place."""
        voided = self._void(row)
        self._sequences[row] = (int(self._sequences[row]) - voided) % 2**16
        # Silence that was voided is owed again; a row that is on the air owes all of it anyway.
        self._owed_silence[row] = min(SILENCE_FRAMES, int(self._owed_silence[row]) + voided)

    def _void(self, row: int) -> int:
        """Take back what is built and not sent; returns how many packets.

        What the sender has in hand this very moment goes out: nobody takes that back.
        """
        due = self._table.due[:, row]
        waiting = due > self._table.taken_tick[self._table.slot[row]]
        due[waiting] = 0
        return int(waiting.sum())

    def slot_of(self, row: int) -> int:
        return int(self._table.slot[row])

    def tune(self, row: int, lane: Lane | None) -> None:
        """Have a row play a lane; None ends it with silence frames."""
        before = self._lane_of.get(row)
        after = self._leaving if lane is None else lane
        if before is after:
            return
        if before is not None:
            before.rows.discard(row)
            before.changed = True
        after.rows.add(row)
        after.changed = True
        self._lane_of[row] = after

    def silent(self, row: int) -> bool:
        """Whether the row owes no silence frame and all that was built for it has been sent."""
        sent = self._table.sent_tick[self._table.slot[row]]
        return not self._owed_silence[row] and not bool((self._table.due[:, row] > sent).any())

    def close(self, row: int) -> None:
        """Take a row back at once; what is built and not sent yet is void."""
        lane = self._lane_of.pop(row, None)
        if lane is not None:
            lane.rows.discard(row)
            lane.changed = True
        self._void(row)
        slot, number = self.slot_of(row), int(self._table.socket[row])
        self._slot_loads[slot] -= 1
        self._socket_slot_loads[number][slot] -= 1
        del self._work[row]
        self._protects.pop(row, None)
        self._keys[row] = 0
        self._table.active[row] = 0
        self._table.head[LAYOUT] += 1
        self._resting.append((self.last_tick + _REST_TICKS, row))

    def worn_out(self) -> list[int]:
        """Rows whose nonce counter nears its end: their sessions must be made anew."""
        return [int(row) for row in np.flatnonzero(self._nonce_counters > _LAST_NONCE)]

    # a tick

    def build(self, tick: int) -> None:
        """Build the packets of all rows for one tick. Ticks come in rising order; skipped ones stay skipped."""
        self.last_tick = tick
        while self._resting and self._resting[0][0] <= tick:
            self._free.append(self._resting.popleft()[1])
        for lane in (*self.lanes, self._leaving):
            if lane.changed:
                self._arrange(lane)
            frame = lane.frame_at(tick)
            rows = lane.numbers
            if not len(rows):
                continue
            if frame is not None:
                self._owed_silence[rows] = SILENCE_FRAMES
                self._fill(tick, rows, lane.work, frame)
                continue
            owing = rows[self._owed_silence[rows] > 0]
            if len(owing):
                self._owed_silence[owing] -= np.uint8(1)
                self._fill(tick, owing, [self._work[row] for row in owing.tolist()], SILENCE_FRAME)

    def _arrange(self, lane: Lane) -> None:
        """Lay the rows of a lane out for its next ticks."""
        rows = sorted(lane.rows)
        lane.numbers = np.fromiter(rows, np.intp, len(rows))
        lane.work = [self._work[row] for row in rows]
        lane.changed = False

    def _fill(self, tick: int, rows: NDArray[np.intp], work: list[_Work], frame: bytes) -> None:
        """Write one packet of `frame` for each row: header, ciphertext, nonce; `due` last."""
        if len(frame) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {len(frame)} bytes does not fit a row")
        self._sequences[rows] += np.uint16(1)
        self._nonce_counters[rows] += np.uint32(1)
        self._head["sequence"][rows] = self._sequences[rows]
        self._head["timestamp"][rows] = self._timestamp_bases[rows] + np.uint32(tick * FRAME_SAMPLES & 0xFFFFFFFF)
        ends = rtp.HEADER_BYTES + TAG_BYTES + np.array(self._seal(work, frame), np.intp)
        packets, ring, table = self._packets, tick % RING_TICKS, self._table
        suffix = ends[:, np.newaxis] + _SUFFIX
        packets[rows[:, np.newaxis], suffix] = self._nonces[rows, :NONCE_SUFFIX_BYTES]
        longest = int(ends.max()) + _LONGEST_SUFFIX_BYTES
        table.packets[ring][rows, :longest] = packets[rows, :longest]
        table.length[ring][rows] = ends + self._suffix_bytes[rows]
        table.due[ring][rows] = tick

    def _seal(self, work: list[_Work], frame: bytes) -> list[int]:
        """Encrypt a frame for each row, in place; returns the bytes of each before the tag."""
        sizes = []
        silence = frame == SILENCE_FRAME
        for encrypt, out, header, nonce, key, protect in work:
            body = frame
            if protect is not None and not silence:
                protected = protect(frame)
                if protected is None:
                    self.unprotected += 1
                body = SILENCE_FRAME if protected is None else protected
            size = len(body)
            encrypt(out, NULL, body, size, header, rtp.HEADER_BYTES, NULL, nonce, key)
            sizes.append(size)
        return sizes
