"""RTP towards one client: its own key and counter over what others sent, and what may go wrong on the way."""

import socket
from dataclasses import dataclass

from tests.emulator.transport import Sealer
from tests.emulator.wire import NONCE_BYTES, OPUS_PAYLOAD_TYPE

_COUNTER_MODULUS = 1 << 8 * NONCE_BYTES
_VERSION = 0x80
_PADDING = 0x20
_EXTENSION = 0x10
_EXTENSION_PROFILE = b"\xbe\xde"
_AUDIO_LEVEL_ELEMENT = b"\x10\xff\0\0"
"""One word of elements: audio level, then padding."""
_RECEIVER_REPORT = 201
UNKNOWN_PAYLOAD_TYPE = 111


@dataclass(slots=True)
class Bends:
    """How RTP towards a client is bent; zeros bend nothing. `every` counts packets: 3 means each third."""

    lose_every: int = 0
    swap_every: int = 0
    repeat_every: int = 0
    extension: bool = False
    padding: int = 0
    csrc: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """One packet of audio as its sender sent it."""

    ssrc: int
    sequence: int
    timestamp: int
    frame: bytes


class Downlink:
    """Seals and sends. What a full socket does not take is counted and lost, as on any network."""

    def __init__(self, udp: socket.socket, peer: tuple[str, int], sealer: Sealer) -> None:
        self.sent = 0
        self.not_taken = 0
        self._udp = udp
        self.peer = peer
        self._sealer = sealer
        self._counter = 0
        self._held: bytes | None = None

    def send(self, source: Source, bends: Bends) -> None:
        """Send one packet with ssrc, sequence and timestamp as they are."""
        self.sent += 1
        if bends.lose_every and self.sent % bends.lose_every == 0:
            return
        packet = self._packet(source, bends)
        if bends.swap_every and self.sent % bends.swap_every == 0 and self._held is None:
            self._held = packet
            return
        self._put(packet)
        if bends.repeat_every and self.sent % bends.repeat_every == 0:
            self._put(packet)
        if self._held is not None:
            held, self._held = self._held, None
            self._put(held)

    def send_unknown(self, source: Source) -> None:
        """Send a packet of a payload type that no audio has."""
        self._put(self._sealed(self._header(_VERSION, UNKNOWN_PAYLOAD_TYPE, source), source.frame))

    def send_report(self, ssrc: int) -> None:
        """Send an RTCP receiver report; its first 8 bytes are in the clear."""
        self._put(self._sealed(bytes((_VERSION | 1, _RECEIVER_REPORT, 0, 7)) + ssrc.to_bytes(4, "big"), bytes(24)))

    def _packet(self, source: Source, bends: Bends) -> bytes:
        first, plain, beyond = _VERSION, source.frame, b""
        for number in range(bends.csrc):
            beyond += (number + 1).to_bytes(4, "big")
        first |= bends.csrc
        if bends.extension:
            first |= _EXTENSION
            beyond += _EXTENSION_PROFILE + (len(_AUDIO_LEVEL_ELEMENT) // 4).to_bytes(2, "big")
            plain = _AUDIO_LEVEL_ELEMENT + plain
        if bends.padding:
            first |= _PADDING
            plain += bytes(bends.padding - 1) + bytes((bends.padding,))
        return self._sealed(self._header(first, OPUS_PAYLOAD_TYPE, source) + beyond, plain)

    @staticmethod
    def _header(first: int, kind: int, source: Source) -> bytes:
        return (
            bytes((first, kind))
            + source.sequence.to_bytes(2, "big")
            + source.timestamp.to_bytes(4, "big")
            + source.ssrc.to_bytes(4, "big")
        )

    def _sealed(self, header: bytes, plain: bytes) -> bytes:
        nonce = self._counter.to_bytes(NONCE_BYTES, "big")
        self._counter = (self._counter + 1) % _COUNTER_MODULUS
        return header + self._sealer.seal(header, plain, nonce) + nonce

    def _put(self, packet: bytes) -> None:
        try:
            self._udp.sendto(packet, self.peer)
        except BlockingIOError:
            self.not_taken += 1
