"""Builds the packets of a tick, ahead of time, straight into the shared rows.

What is the same for many is done for all of them at once in numpy; per guild remains one encryption.
Building a tick creates nothing that outlives it. Source: design section 3, "Building"; RFC 3550 section 5.1.
"""

from __future__ import annotations

import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shared.errors import ErrorCode, VoiceError
from shared.protocol import rtp
from shared.protocol.opus import FRAME_SAMPLES, SILENCE_FRAME
from shared.protocol.transport_crypto import NONCE_SUFFIX_BYTES, TAG_BYTES, Buffer, Seal, nonce_bytes, seal_view
from worker.fanout.grid import SLOTS, choose_slot
from worker.fanout.rows import ADDRESS_BYTES, HEAD, LAYOUT, PACKET_BYTES, RING_TICKS, RowTable

SILENCE_FRAMES = 5
"""Frames of silence before packets stop, so that receivers do not conceal the end as a loss."""
_NONCE_FIELD_BYTES = 24
_LAST_NONCE = 2**32 - 2**20
_REST_TICKS = 50
"""A row given back rests for a second, so that the sender cannot mix its old and its next connection."""

_Work = tuple[Seal, Buffer, Buffer, list[Buffer], int]
"""Seal, nonce and header of one row, the ring's memory tick by tick, and where in it the row's ciphertext begins."""
FrameAt = Callable[[int], bytes | None]
"""The frame that a lane plays at a tick, or None."""


@dataclass(slots=True)
class Target:
    """Where a row's packets go and how they are sealed."""

    ssrc: int
    remote: tuple[str, int]
    socket_number: int
    mode: str
    seal: Seal


@dataclass(eq=False)
class Lane:
    """Rows that play the same frames.

    Attributes:
        frame_at: what is played when.
        on_air: whether the last tick had a frame.
    """

    frame_at: FrameAt
    on_air: bool = False
    rows: set[int] = field(default_factory=set)
    changed: bool = True
    numbers: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))
    work: list[_Work] = field(default_factory=list)
    """In the order of `numbers`: what sealing one packet of each row takes."""


class Builder:
    """Owns the counters of all rows and fills the shared memory.

    Three counters have three rules: sequence +1 per packet, timestamp +960 per tick, nonce +1 per seal.
    """

    def __init__(self, table: RowTable) -> None:
        self._table = table
        rows = table.rows
        self._work: list[_Work] = [_NO_WORK] * rows
        self._memory: dict[str, list[Buffer]] = {}
        """The packets of each ring tick, as the sealers of a mode take them."""
        # Headers are made once per tick in a place of their own that stays in the cache, then copied into the packets.
        self._headers = np.zeros((rows, rtp.HEADER_BYTES), np.uint8)
        self._head = self._headers.reshape(-1).view(HEAD)
        self._nonces = np.zeros((rows, _NONCE_FIELD_BYTES), np.uint8)
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

    # rows come and go

    def open(self, target: Target) -> int:
        """Give a connection a row; it is silent until it is tuned.

        Raises: VoiceError when all rows are in use.
        """
        if not self._free:
            raise VoiceError("all rows of this worker are in use", code=ErrorCode.VOICE_UNREACHABLE)
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
        self._key(row, target)
        table.active[row] = 1
        table.head[LAYOUT] += 1
        return row

    def _key(self, row: int, target: Target) -> None:
        self._nonces[row] = 0
        nonce = seal_view(target.mode, self._nonces[row, : nonce_bytes(target.mode)].data)
        header = seal_view(target.mode, self._headers[row].data)
        start = row * PACKET_BYTES + rtp.HEADER_BYTES
        self._work[row] = (target.seal, nonce, header, self._memory_for(target.mode), start)

    def _memory_for(self, mode: str) -> list[Buffer]:
        if mode not in self._memory:
            packets = self._table.packets
            self._memory[mode] = [seal_view(mode, packets[ring].reshape(-1).data) for ring in range(RING_TICKS)]
        return self._memory[mode]

    def rekey(self, row: int, target: Target) -> None:
        """Go on under a new transport key: what is built under the old one and not sent yet is void."""
        voided = self._void(row)
        self._sequences[row] = (int(self._sequences[row]) - voided) % 2**16
        # Silence that was voided is owed again; a row that is on the air owes all of it anyway.
        self._owed_silence[row] = min(SILENCE_FRAMES, int(self._owed_silence[row]) + voided)
        self._key(row, target)
        if row in self._lane_of:
            self._lane_of[row].changed = True

    def _void(self, row: int) -> int:
        """Take back what is built and not sent; returns how many packets.

        One that the sender has in hand this very moment goes out and is counted all the same: its sequence number then
        comes twice, which a receiver takes for a duplicate.
        """
        due = self._table.due[:, row]
        waiting = due > self._table.sent_tick[self._table.slot[row]]
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
        self._work[row] = _NO_WORK
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
            lane.on_air = frame is not None
            rows = lane.numbers
            if not len(rows):
                continue
            if frame is not None:
                self._owed_silence[rows] = SILENCE_FRAMES
                self._fill(tick, rows, frame, lane.work)
                continue
            owing = rows[self._owed_silence[rows] > 0]
            if len(owing):
                self._owed_silence[owing] -= np.uint8(1)
                self._fill(tick, owing, SILENCE_FRAME, [self._work[row] for row in owing.tolist()])

    def _arrange(self, lane: Lane) -> None:
        """Lay the rows of a lane out for its next ticks."""
        rows = sorted(lane.rows)
        lane.numbers = np.fromiter(rows, np.intp, len(rows))
        lane.work = [self._work[row] for row in rows]
        lane.changed = False

    def _fill(self, tick: int, rows: NDArray[np.intp], frame: bytes, work: list[_Work]) -> None:
        """Write one packet of `frame` for each row: header, nonce, ciphertext; `due` last."""
        ring = tick % RING_TICKS
        table = self._table
        sealed = len(frame) + TAG_BYTES
        end = rtp.HEADER_BYTES + sealed
        if end + NONCE_SUFFIX_BYTES > PACKET_BYTES:
            raise ValueError(f"a frame of {len(frame)} bytes does not fit a row")
        self._sequences[rows] += np.uint16(1)
        self._nonce_counters[rows] += np.uint32(1)
        self._head["sequence"][rows] = self._sequences[rows]
        self._head["timestamp"][rows] = self._timestamp_bases[rows] + np.uint32(tick * FRAME_SAMPLES & 0xFFFFFFFF)
        packets = table.packets[ring]
        packets[rows, : rtp.HEADER_BYTES] = self._headers[rows]
        packets[rows, end : end + NONCE_SUFFIX_BYTES] = self._nonces[rows, :NONCE_SUFFIX_BYTES]
        for seal, nonce, header, memory, start in work:
            seal(nonce, frame, header, memory[ring][start : start + sealed])
        table.length[ring][rows] = end + NONCE_SUFFIX_BYTES
        table.due[ring][rows] = tick


def _no_seal(*_: object) -> None:
    raise RuntimeError("a row without a connection was built for")


_NO_WORK: _Work = (_no_seal, b"", b"", [b""] * RING_TICKS, 0)
