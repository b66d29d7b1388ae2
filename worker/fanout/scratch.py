"""Where packets are made: memory for a few rows times a block of ticks, small enough to stay in the cache.

A row's key and end-to-end encryption are fetched once and used for all ticks of the block: of a thousand connections
each has its state in memory that is cold by then, and to fetch it costs more than to seal a packet with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from shared.protocol import rtp
from shared.protocol.opus import SILENCE_FRAME
from shared.protocol.packet_seal import NULL, Encrypt, Pointer, pointer
from shared.protocol.transport_crypto import KEY_BYTES, TAG_BYTES
from worker.fanout.rows import HEAD, PACKET_BYTES

BLOCK_TICKS = 4
"""Ticks of a row that are built at once."""
ROWS_AT_ONCE = 256
_ROWS_OF_PORTION = 8
"""Their frames are encrypted end to end, then their packets sealed: the frames are in the cache still, and per packet
no step of the interpreter remains but the calls."""
_NONCE_FIELD_BYTES = 24
_NULLS, _HEADERS_BYTES = repeat(NULL), repeat(rtp.HEADER_BYTES)

Protect = Callable[[bytes], bytes | None]
"""End-to-end encryption of one frame; None when it failed."""


class _Portion(NamedTuple):
    """Of successive packets, row after row: pointers to what follows the header, to header, nonce and key."""

    outs: list[Pointer]
    headers: list[Pointer]
    nonces: list[Pointer]
    keys: list[Pointer]


class Scratch:
    """Packets of at most `ROWS_AT_ONCE` rows and `BLOCK_TICKS` ticks.

    Packets of a row lie side by side; of what numpy fills in, the last axis is rows, as there are more of them.

    Attributes:
        packets: (tick, row, byte).
        head: (tick, row): their RTP headers.
        nonces: (tick, row): nonce counters.
        keys: (row, byte).
        unprotected: frames that end-to-end encryption failed on: silence took their place.
    """

    def __init__(self) -> None:
        shape = BLOCK_TICKS, ROWS_AT_ONCE
        self._packet_memory = np.zeros((ROWS_AT_ONCE, BLOCK_TICKS, PACKET_BYTES), np.uint8)
        self.packets = self._packet_memory.transpose(1, 0, 2)
        self.head = np.ndarray(shape, HEAD, self._packet_memory, 0, self.packets.strides[:2])
        self.head["flags"] = rtp.VERSION_FLAGS << 8 | rtp.PAYLOAD_TYPE
        nonce_memory = np.zeros((ROWS_AT_ONCE, BLOCK_TICKS, _NONCE_FIELD_BYTES), np.uint8)
        self._nonce_fields = nonce_memory.transpose(1, 0, 2)
        self.nonces = np.ndarray(shape, ">u4", nonce_memory, 0, self._nonce_fields.strides[:2])
        self.keys = np.zeros((ROWS_AT_ONCE, KEY_BYTES), np.uint8)
        self.unprotected = 0
        self._portions = [
            [self._portion(first, ticks) for first in range(0, ROWS_AT_ONCE, _ROWS_OF_PORTION)]
            for ticks in range(BLOCK_TICKS + 1)
        ]
        """Per number of ticks."""

    def _portion(self, first_row: int, ticks: int) -> _Portion:
        portion = _Portion([], [], [], [])
        for row in range(first_row, first_row + _ROWS_OF_PORTION):
            for tick in range(ticks):
                header = pointer(self.packets[tick, row])
                portion.outs.append(header + rtp.HEADER_BYTES)
                portion.headers.append(header)
                portion.nonces.append(pointer(self._nonce_fields[tick, row]))
                portion.keys.append(pointer(self.keys[row]))
        return portion

    def seal(self, encrypt: Encrypt, frames: Sequence[bytes], rows: int) -> NDArray[np.intp]:
        """Encrypt one frame per tick for each row, behind the headers and with the nonces and keys that stand here.

        Returns: (tick, row): bytes of each packet without its nonce.
        """
        sizes = list(map(len, frames))
        bodies, sizes_of_portion = [*frames] * _ROWS_OF_PORTION, sizes * _ROWS_OF_PORTION
        portions = self._portions[len(frames)]
        whole, left = divmod(rows, _ROWS_OF_PORTION)
        for portion in portions[:whole]:
            _encrypt_all(encrypt, portion, bodies, sizes_of_portion)
        if left:
            _encrypt_all(encrypt, portions[whole], bodies[: left * len(frames)], sizes_of_portion)
        ends = np.empty((len(frames), rows), np.intp)
        ends[:] = np.array(sizes)[:, np.newaxis]
        return self._finished(ends)

    def protect_and_seal(
        self, encrypt: Encrypt, frames: Sequence[bytes], protects: Sequence[Protect]
    ) -> NDArray[np.intp]:
        """As `seal`, of frames that each row encrypts end to end first."""
        silent = SILENCE_FRAME in frames
        sizes: list[int] = []
        for first, portion in zip(range(0, len(protects), _ROWS_OF_PORTION), self._portions[len(frames)], strict=False):
            bodies: list[bytes | None] = []
            for protect in protects[first : first + _ROWS_OF_PORTION]:
                bodies += map(_but_silence(protect) if silent else protect, frames)
            sealed = cast("list[bytes]", bodies) if all(bodies) else self._replaced(bodies)
            sizes_of_portion = list(map(len, sealed))
            _encrypt_all(encrypt, portion, sealed, sizes_of_portion)
            sizes += sizes_of_portion
        return self._finished(np.array(sizes, np.intp).reshape(-1, len(frames)).T)

    def _replaced(self, bodies: Sequence[bytes | None]) -> list[bytes]:
        """Silence where end-to-end encryption failed."""
        self.unprotected += bodies.count(None)
        return [body or SILENCE_FRAME for body in bodies]

    def _finished(self, ends: NDArray[np.intp]) -> NDArray[np.intp]:
        """Write each packet's nonce counter behind its tag; most packets of a tick are of one size."""
        ends = ends + (rtp.HEADER_BYTES + TAG_BYTES)
        rows = ends.shape[1]
        for tick, of_tick in enumerate(ends):
            for end in {*of_tick.tolist()}:
                field = np.ndarray(
                    rows, ">u4", self._packet_memory, tick * PACKET_BYTES + end, self.packets.strides[1:2]
                )
                np.copyto(field, self.nonces[tick, :rows], where=of_tick == end)
        return ends


def _encrypt_all(encrypt: Encrypt, portion: _Portion, bodies: Iterable[bytes], sizes: Iterable[int]) -> None:
    """Seal a portion, or as much of it as there are bodies."""
    outs, headers, nonces, keys = portion
    deque(map(encrypt, outs, _NULLS, bodies, sizes, headers, _HEADERS_BYTES, _NULLS, nonces, keys), maxlen=0)


def _but_silence(protect: Protect) -> Protect:
    """Silence frames are never encrypted end to end."""
    return lambda frame: frame if frame == SILENCE_FRAME else protect(frame)
