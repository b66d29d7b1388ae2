"""Where packets are made: memory for a few rows times a block of ticks, small enough to stay in the cache.

A row's key and end-to-end encryption are fetched once and used for all ticks of the block: of a thousand connections
each has its state in memory that is cold by then, and to fetch it costs more than to seal a packet with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

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
_NONCE_FIELD_BYTES = 24

Protect = Callable[[bytes], bytes | None]
"""End-to-end encryption of one frame; None when it failed."""


class _Place(NamedTuple):
    """Pointers to a packet's header, to what follows it, to its nonce and to its row's key."""

    header: Pointer
    out: Pointer
    nonce: Pointer
    key: Pointer


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
        places = [[self._place(tick, row) for tick in range(BLOCK_TICKS)] for row in range(ROWS_AT_ONCE)]
        self._places = [list(chain.from_iterable(row[:ticks] for row in places)) for ticks in range(BLOCK_TICKS + 1)]
        """Per number of ticks, row after row."""

    def _place(self, tick: int, row: int) -> _Place:
        header = pointer(self.packets[tick, row])
        nonce = pointer(self._nonce_fields[tick, row])
        return _Place(header, header + rtp.HEADER_BYTES, nonce, pointer(self.keys[row]))

    def seal(self, encrypt: Encrypt, frames: Sequence[bytes], rows: int) -> NDArray[np.intp]:
        """Encrypt one frame per tick for each row, behind the headers and with the nonces and keys that stand here.

        Returns: (tick, row): bytes of each packet without its nonce.
        """
        sized = [(frame, len(frame)) for frame in frames]
        for (header, out, nonce, key), (frame, size) in zip(self._places[len(frames)], sized * rows, strict=False):
            encrypt(out, NULL, frame, size, header, rtp.HEADER_BYTES, NULL, nonce, key)
        ends = np.empty((len(frames), rows), np.intp)
        ends[:] = np.array([size for _, size in sized])[:, np.newaxis]
        return self._finished(ends)

    def protect_and_seal(
        self, encrypt: Encrypt, frames: Sequence[bytes], protects: Sequence[Protect]
    ) -> NDArray[np.intp]:
        """As `seal`, of frames that each row encrypts end to end first."""
        silent = [frame == SILENCE_FRAME for frame in frames]
        places = iter(self._places[len(frames)])
        sizes: list[int] = []
        add = sizes.append
        for protect in protects:
            for frame, silence, (header, out, nonce, key) in zip(frames, silent, places, strict=False):
                body = frame if silence else protect(frame)
                if body is None:
                    self.unprotected += 1
                    body = SILENCE_FRAME
                size = len(body)
                encrypt(out, NULL, body, size, header, rtp.HEADER_BYTES, NULL, nonce, key)
                add(size)
        return self._finished(np.array(sizes, np.intp).reshape(-1, len(frames)).T)

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
