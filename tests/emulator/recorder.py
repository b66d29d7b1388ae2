"""Reads all UDP sockets in batches and accounts every datagram to its session."""

import select
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tests.emulator.datagrams import DATAGRAM_BYTES, Batch
from tests.emulator.dave.frame import is_protocol_frame
from tests.emulator.endpoint import Endpoint
from tests.emulator.ledger import Ints, Ledger, Packets
from tests.emulator.payloads import SILENCE_ID, PayloadTable
from tests.emulator.session import VoiceSession
from tests.emulator.transport import DecryptFailedError, Opener, open_rtp
from tests.emulator.wire import (
    DISCOVERY_BYTES,
    DISCOVERY_REQUEST_WORD,
    KEEPALIVE_BYTES,
    NONCE_BYTES,
    OPUS_PAYLOAD_TYPE,
    PING_WORD,
    SILENCE_FRAME,
    SILENT_DAVE_RTP_BYTES,
    SILENT_RTP_BYTES,
    SMALLEST_RTP_BYTES,
)

_BATCH_DATAGRAMS = 4096
_NO_PAYLOAD = -1


class Listener(Protocol):
    """Whoever acts on what the recorder sees; it must not call the recorder back at once."""

    def discovery_asked(self, endpoint: Endpoint, request: bytes, peer: int) -> None:
        """A datagram that looks like an IP discovery request came from `peer`."""

    def pinged(self, session: VoiceSession, endpoint: Endpoint, ping: bytes, peer: int) -> None:
        """A ping came from where the session sends from."""

    def moved(self, session: VoiceSession, peer: int) -> None:
        """The session's RTP comes from another address than before."""

    def spoke_early(self, session: VoiceSession) -> None:
        """RTP came before the first Speaking message."""

    def spoke_from_elsewhere(self, session: VoiceSession) -> None:
        """RTP came to another endpoint, or from the address of another session."""


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
        self._opened: NDArray[np.bool_] = np.zeros(ledger.rows, np.bool_)
        self._heard: NDArray[np.bool_] = np.zeros(ledger.rows, np.bool_)
        self._encrypted: NDArray[np.bool_] = np.zeros(ledger.rows, np.bool_)
        self._listened: NDArray[np.bool_] = np.zeros(ledger.rows, np.bool_)
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

    def watch_again(self, endpoint: Endpoint) -> None:
        """Read the socket of an endpoint that may have been replaced."""
        with suppress(FileExistsError):
            self._poll.register(endpoint.udp.fileno(), select.EPOLLIN)

    def add(self, session: VoiceSession) -> None:
        """Account for a session; nothing may come from it until `select_peer`."""
        self.ledger.clear(session.row)
        self._sessions[session.row] = session
        self._source[session.row] = session.endpoint.number
        self._peer[session.row] = 0
        self._speaking[session.row] = False
        self._listened[session.row] = session.endpoint.listened
        self._stale = True
        self.watch_session(session, channel_hears=False)

    def watch_session(self, session: VoiceSession, *, channel_hears: bool) -> None:
        """How far to look into a session's packets.

        Those of sampled guilds are decrypted always, others only where somebody in the channel hears them.
        """
        self._opened[session.row] = channel_hears or session.row < self.ledger.sampled_rows
        self._heard[session.row] = channel_hears
        self._encrypted[session.row] = session.dave_version > 0

    def remove(self, session: VoiceSession) -> None:
        """Account no longer; what was recorded stays until the row is used again."""
        self._sessions[session.row] = None
        self._rows_of_peers.pop((session.endpoint.number, int(self._peer[session.row])), None)
        self._stale = True

    def select_peer(self, session: VoiceSession, peer: int) -> None:
        """The client chose its address and was given a key."""
        number = session.endpoint.number
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
        for source, drops in batch.kernel_drops().items():
            if self._by_number[source].listened:
                self._drops[source] = drops
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
        listened = self._listened[row]
        if not listened.all():
            barely, sizes = row[~listened], length[place[~listened]]
            self.ledger.note_heard(barely, batch.arrival_ns()[place[~listened]], self._silent(barely, sizes))
            place, row = place[listened], row[listened]
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
            silent=self._silent(row, length),
            payload=np.full(len(place), _NO_PAYLOAD, np.int64),
        )
        opened = np.flatnonzero(self._opened[row])
        if len(opened):
            failed = self._open(packets, opened, place[opened], length[opened])
            if failed:
                np.add.at(self.ledger.counts["decrypt_failed"], row[failed], 1)
                packets = packets.take(np.delete(np.arange(len(row)), failed))
        self.ledger.account(packets)

    def _silent(self, row: Ints, length: Ints) -> NDArray[np.bool_]:
        """Silence as its length tells: in the clear, or encrypted where that is in use."""
        silent: NDArray[np.bool_] = length == SILENT_RTP_BYTES
        encrypted = self._encrypted[row]
        if encrypted.any():
            fewest, most = SILENT_DAVE_RTP_BYTES
            silent |= encrypted & (length >= fewest) & (length <= most)
        return silent

    def _open(self, packets: Packets, opened: Ints, place: Ints, length: Ints) -> list[int]:
        """Decrypt packets, let their channels hear them, and fill in payloads; gives those that cannot be decrypted."""
        failed: list[int] = []
        for index, at, size, owner in zip(
            opened.tolist(), place.tolist(), length.tolist(), packets.row[opened].tolist(), strict=True
        ):
            session = self._sessions[owner]
            start = at * DATAGRAM_BYTES
            packet = bytes(self._batch.raw[start : start + size])
            try:
                if session is None or session.opener is None:
                    raise DecryptFailedError
                frame = _opened(session.opener, session.former_opener, packet)
            except DecryptFailedError:
                failed.append(index)
                continue
            payload: bytes | None = frame
            if session.dave_version:
                payload = self._judge(session, frame, int(packets.arrival_ns[index]))
            if self._heard[owner]:
                sequence, timestamp = int(packets.sequence[index]), int(packets.timestamp[index])
                opus = session.channel.hear(session, sequence, timestamp, frame, int(packets.arrival_ns[index]))
                payload = payload if opus is None else opus
            if payload is not None:
                packets.payload[index] = self.payloads.intern(payload)
                packets.silent[index] = packets.payload[index] == SILENCE_ID
        return failed

    def _judge(self, session: VoiceSession, frame: bytes, arrival_ns: int) -> bytes | None:
        """The frame, if it came in the clear; that counts where it should not have."""
        if is_protocol_frame(frame):
            return None
        since_ns = session.encrypted_from_ns
        if since_ns is not None and arrival_ns >= since_ns and frame != SILENCE_FRAME:
            self.ledger.counts["in_the_clear"][session.row] += 1
        return frame

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
        if foreign.any():
            for at in np.flatnonzero(foreign).tolist():
                foreign[at] = not self._follow(
                    int(row[at]), int(self._batch.source[place[at]]), int(self._batch.peer[place[at]])
                )
        if not foreign.any():
            return place, row
        np.add.at(self.ledger.counts["rtp_before_speaking"], row[foreign], 1)
        self._tell(row[foreign], self._listener.spoke_from_elsewhere)
        return place[~foreign], row[~foreign]

    def _follow(self, row: int, source: int, peer: int) -> bool:
        """Take an address that is nobody else's for the session's own from now on."""
        session = self._sessions[row]
        owner = self._rows_of_peers.get((source, peer))
        if session is None or session.opener is None or source != self._source[row] or owner not in (None, row):
            return False
        if owner is None:
            self._rows_of_peers.pop((source, int(self._peer[row])), None)
            self._peer[row] = peer
            self._rows_of_peers[source, peer] = row
            self._listener.moved(session, peer)
        return True

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
        session = None if owner is None else self._sessions[owner]
        if size == KEEPALIVE_BYTES and session is not None and int(batch.words[place, 0]) == PING_WORD:
            start = place * DATAGRAM_BYTES
            self._listener.pinged(session, self._by_number[source], bytes(batch.raw[start : start + size]), peer)
        elif size == KEEPALIVE_BYTES and owner is not None:
            self.ledger.counts["keepalives"][owner] += 1
        else:
            self.unreadable += 1


def _opened(opener: Opener, former: Opener | None, packet: bytes) -> bytes:
    """Raises: DecryptFailedError."""
    try:
        return open_rtp(opener, packet)
    except DecryptFailedError:
        if former is None:
            raise
        return open_rtp(former, packet)
