"""Reads all UDP sockets in batches and accounts every datagram to its session."""

import select
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tests.emulator.datagrams import DATAGRAM_BYTES, Batch
from tests.emulator.endpoint import Endpoint
from tests.emulator.ledger import Ints, Ledger, Packets
from tests.emulator.payloads import SILENCE_ID, PayloadTable
from tests.emulator.session import VoiceSession
from tests.emulator.transport import DecryptFailedError, open_rtp
from tests.emulator.wire import (
    DISCOVERY_BYTES,
    DISCOVERY_REQUEST_WORD,
    KEEPALIVE_BYTES,
    NONCE_BYTES,
    OPUS_PAYLOAD_TYPE,
    SILENT_RTP_BYTES,
    SMALLEST_RTP_BYTES,
)

_BATCH_DATAGRAMS = 4096
_NO_PAYLOAD = -1


class Listener(Protocol):
    """Whoever acts on what the recorder sees; it must not call the recorder back at once."""

    def discovery_asked(self, endpoint: Endpoint, request: bytes, peer: int) -> None:
        """A datagram that looks like an IP discovery request came from `peer`."""

    def spoke_early(self, session: VoiceSession) -> None:
        """RTP came before the first Speaking message."""

    def spoke_from_elsewhere(self, session: VoiceSession) -> None:
        """RTP came to another endpoint, or from another address than the one selected."""


class Recorder:
    """All UDP sockets, and the ledger of what came over them."""

    def __init__(self, ledger: Ledger, payloads: PayloadTable, listener: Listener) -> None:
        self.ledger = ledger
        self.payloads = payloads
        self.unknown_ssrc = 0
        self.unreadable = 0
        self._listener = listener
        self._batch = Batch(_BATCH_DATAGRAMS)
        self._poll = select.epoll()
        self._by_descriptor: dict[int, Endpoint] = {}
        self._by_number: dict[int, Endpoint] = {}
        self._drops: dict[int, int] = {}
        self._drops_forgotten = 0
        self._sessions: list[VoiceSession | None] = [None] * ledger.rows
        self._peer: NDArray[np.uint64] = np.zeros(ledger.rows, np.uint64)
        self._source: Ints = np.zeros(ledger.rows, np.int64)
        self._speaking: NDArray[np.bool_] = np.zeros(ledger.rows, np.bool_)
        self._rows_of_peers: dict[tuple[int, int], int] = {}
        self._known_ssrc: Ints = np.zeros(0, np.int64)
        self._known_row: Ints = np.zeros(0, np.int64)
        self._stale = False

    @property
    def kernel_drops(self) -> int:
        """Datagrams the kernel dropped since the last reset because this process was too slow."""
        return sum(self._drops.values()) - self._drops_forgotten

    def watch(self, endpoint: Endpoint) -> None:
        """Read the socket of an endpoint, if it is not read already."""
        if endpoint.number in self._by_number:
            return
        self._by_descriptor[endpoint.udp.fileno()] = endpoint
        self._by_number[endpoint.number] = endpoint
        self._poll.register(endpoint.udp.fileno(), select.EPOLLIN)

    def add(self, session: VoiceSession) -> None:
        """Account for a session; nothing may come from it until `select_peer`."""
        self.ledger.clear(session.row)
        self._sessions[session.row] = session
        self._source[session.row] = session.guild.endpoint.number
        self._peer[session.row] = 0
        self._speaking[session.row] = False
        self._stale = True

    def remove(self, session: VoiceSession) -> None:
        """Account no longer; what was recorded stays until the row is used again."""
        self._sessions[session.row] = None
        self._rows_of_peers.pop((session.guild.endpoint.number, int(self._peer[session.row])), None)
        self._stale = True

    def select_peer(self, session: VoiceSession, peer: int) -> None:
        """The client chose its address and was given a new key."""
        number = session.guild.endpoint.number
        self._rows_of_peers.pop((number, int(self._peer[session.row])), None)
        self._peer[session.row] = peer
        self._rows_of_peers[number, peer] = session.row
        self.ledger.renew_key(session.row)

    def allow(self, session: VoiceSession) -> None:
        """The client announced its ssrc: RTP may come."""
        self._speaking[session.row] = True

    def forget(self) -> None:
        """Drop all measurements; sessions go on."""
        self.drain()
        self.ledger.clear(slice(None))
        self.unknown_ssrc = self.unreadable = 0
        self._drops_forgotten = sum(self._drops.values())

    def close(self) -> None:
        """Stop reading. The sockets are not closed."""
        self._poll.close()

    def drain(self) -> None:
        """Account for everything that waits in the sockets."""
        batch = self._batch
        while True:
            for descriptor, _ in self._poll.poll(0, max(len(self._by_descriptor), 1)):
                if batch.full:
                    break
                batch.receive(descriptor, self._by_descriptor[descriptor].number)
            again = batch.full
            if batch.count:
                self._account()
                batch.clear()
            if not again:
                return

    def _account(self) -> None:
        batch = self._batch
        count = batch.count
        drops = batch.kernel_drops()
        if drops:
            self._drops.update(drops)
        length = batch.length[:count].astype(np.int64)
        first = batch.words[:count, 0].astype(np.int64)
        kind = (first >> 16) & 0x7F
        rtcp = (kind >= 64) & (kind < 96) & (first >> 30 == 2)
        asks = (length == DISCOVERY_BYTES) & (first == DISCOVERY_REQUEST_WORD)
        media = (length >= SMALLEST_RTP_BYTES) & ~asks & ~rtcp
        if not media.all():
            for other in np.flatnonzero(~media & ~rtcp).tolist():
                self._note_other(other, bool(asks[other]))
        place: Ints = np.flatnonzero(media)
        row = self._rows(batch.words[place, 2].astype(np.int64))
        unknown = row < 0
        if unknown.any():
            self.unknown_ssrc += int(unknown.sum())
            place, row = place[~unknown], row[~unknown]
        place, row = self._from_their_peers(place, row)
        right = ((first[place] >> 30) == 2) & (kind[place] == OPUS_PAYLOAD_TYPE)
        if not right.all():
            np.add.at(self.ledger.counts["wrong_header"], row[~right], 1)
            place, row = place[right], row[right]
        self._note_early(row)
        if len(place):
            self._measure(place, row, length[place], first[place])

    def _measure(self, place: Ints, row: Ints, length: Ints, first: Ints) -> None:
        batch = self._batch
        suffix = batch.data[place[:, None], (length - NONCE_BYTES)[:, None] + np.arange(NONCE_BYTES)]
        packets = Packets(
            row=row,
            sequence=first & 0xFFFF,
            timestamp=batch.words[place, 1].astype(np.int64),
            nonce=np.ascontiguousarray(suffix).view(">u4")[:, 0].astype(np.int64),
            arrival_ns=batch.arrival_ns()[place],
            silent=length == SILENT_RTP_BYTES,
            payload=np.full(len(place), _NO_PAYLOAD, np.int64),
        )
        sampled = np.flatnonzero(row < self.ledger.sampled_rows)
        if not len(sampled):
            self.ledger.account(packets)
            return
        failed: list[int] = []
        opened: list[int] = []
        for index, at, size, owner in zip(
            sampled.tolist(), place[sampled].tolist(), length[sampled].tolist(), row[sampled].tolist(), strict=True
        ):
            session = self._sessions[owner]
            start = at * DATAGRAM_BYTES
            try:
                if session is None or session.opener is None:
                    raise DecryptFailedError
                frame = open_rtp(session.opener, bytes(batch.raw[start : start + size]))
            except DecryptFailedError:
                failed.append(index)
                opened.append(_NO_PAYLOAD)
            else:
                opened.append(self.payloads.intern(frame))
        packets.payload[sampled] = opened
        packets.silent[sampled] = packets.payload[sampled] == SILENCE_ID
        if failed:
            np.add.at(self.ledger.counts["decrypt_failed"], row[failed], 1)
            packets = packets.take(np.delete(np.arange(len(row)), failed))
        self.ledger.account(packets)

    def _rows(self, ssrc: Ints) -> Ints:
        """Ledger rows of live sessions, -1 where there is none."""
        if self._stale:
            live = [(session.ssrc, session.row) for session in self._sessions if session is not None]
            table = np.array(sorted(live), np.int64).reshape(-1, 2)
            self._known_ssrc, self._known_row = table[:, 0].copy(), table[:, 1].copy()
            self._stale = False
        if not len(self._known_ssrc):
            return np.full(len(ssrc), -1)
        found = np.minimum(np.searchsorted(self._known_ssrc, ssrc), len(self._known_ssrc) - 1)
        return np.where(self._known_ssrc[found] == ssrc, self._known_row[found], -1)

    def _from_their_peers(self, place: Ints, row: Ints) -> tuple[Ints, Ints]:
        foreign = (self._batch.peer[place] != self._peer[row]) | (self._batch.source[place] != self._source[row])
        if not foreign.any():
            return place, row
        np.add.at(self.ledger.counts["rtp_before_speaking"], row[foreign], 1)
        self._tell(row[foreign], self._listener.spoke_from_elsewhere)
        return place[~foreign], row[~foreign]

    def _note_early(self, row: Ints) -> None:
        early = ~self._speaking[row]
        if early.any():
            self._tell(row[early], self._listener.spoke_early)

    def _tell(self, row: Ints, what: Callable[[VoiceSession], None]) -> None:
        for owner in np.unique(row).tolist():
            session = self._sessions[owner]
            if session is not None:
                what(session)

    def _note_other(self, place: int, asks: bool) -> None:
        """A datagram that is no RTP: IP discovery, keepalive or rubbish."""
        batch = self._batch
        size = int(batch.length[place])
        source, peer = int(batch.source[place]), int(batch.peer[place])
        if asks:
            start = place * DATAGRAM_BYTES
            self._listener.discovery_asked(self._by_number[source], bytes(batch.raw[start : start + size]), peer)
            return
        owner = self._rows_of_peers.get((source, peer))
        if size == KEEPALIVE_BYTES and owner is not None:
            self.ledger.counts["keepalives"][owner] += 1
        else:
            self.unreadable += 1
