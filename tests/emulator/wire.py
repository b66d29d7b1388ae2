"""Numbers and byte layouts of the voice server side. Pure.

Source: reference sections 2.2 (opcodes), 2.6 (close codes), 3 (UDP), 4 (RTP and transport modes).
"""

import struct
from enum import IntEnum

from tests.emulator.dave.frame import OVERHEAD_BYTES


class Op(IntEnum):
    """Voice gateway opcodes without those of DAVE, which are in `dave/group.py`."""

    IDENTIFY = 0
    SELECT_PROTOCOL = 1
    READY = 2
    HEARTBEAT = 3
    SESSION_DESCRIPTION = 4
    SPEAKING = 5
    HEARTBEAT_ACK = 6
    RESUME = 7
    HELLO = 8
    RESUMED = 9
    CLIENTS_CONNECT = 11
    VIDEO = 12
    CLIENT_DISCONNECT = 13
    SESSION_UPDATE = 14
    MEDIA_SINK_WANTS = 15
    BACKEND_VERSION = 16
    CLIENT_FLAGS = 18
    CLIENT_PLATFORM = 20
    NO_ROUTE = 32


class Close(IntEnum):
    """WebSocket close codes the server sends."""

    GOING_AWAY = 1001
    UNKNOWN_OPCODE = 4001
    UNDECODABLE = 4002
    NOT_AUTHENTICATED = 4003
    AUTHENTICATION_FAILED = 4004
    ALREADY_AUTHENTICATED = 4005
    SESSION_INVALID = 4006
    SESSION_TIMEOUT = 4009
    DISCONNECTED = 4014
    UNKNOWN_PROTOCOL = 4012
    UNKNOWN_MODE = 4016
    DAVE_REQUIRED = 4017
    BAD_REQUEST = 4020
    RATE_LIMITED = 4021


ABNORMAL_CLOSURE = 1006
RESUMABLE_SERVER_CLOSES = frozenset({4013, 4015})
"""Closes from the server's side after which a client resumes; so do all codes below 4000."""

MODE_AES = "aead_aes256_gcm_rtpsize"
MODE_XCHACHA = "aead_xchacha20_poly1305_rtpsize"
LIVE_MODES = (MODE_AES, MODE_XCHACHA)
MODE_FROM_THE_FUTURE = "aead_mode_of_tomorrow_rtpsize"
"""Offered so that a client is seen to pass over what it does not know."""

SILENCE_FRAME = b"\xf8\xff\xfe"
SAMPLES_PER_TICK = 960
RTP_HEADER_BYTES = 12
TAG_BYTES = 16
NONCE_BYTES = 4
SMALLEST_RTP_BYTES = RTP_HEADER_BYTES + TAG_BYTES + NONCE_BYTES
SILENT_RTP_BYTES = SMALLEST_RTP_BYTES + len(SILENCE_FRAME)
SILENT_DAVE_RTP_BYTES = tuple(SILENT_RTP_BYTES + overhead for overhead in OVERHEAD_BYTES)
"""Fewest and most bytes of a packet whose silence is encrypted end to end, too."""
OPUS_PAYLOAD_TYPE = 120
KEEPALIVE_BYTES = 8
PING_WORD, _PONG_WORD = 0x1337CAFE, 0x1337F00D

DISCOVERY_BYTES = 74
_DISCOVERY = struct.Struct(">HHI64sH")
_DISCOVERY_REQUEST = 1
_DISCOVERY_RESPONSE = 2
_DISCOVERY_LENGTH = 70
DISCOVERY_REQUEST_WORD = _DISCOVERY_REQUEST << 16 | _DISCOVERY_LENGTH
"""First four bytes of a discovery request, big endian."""


def pong(ping: bytes) -> bytes:
    """The answer to a ping: another word, the same counter."""
    return _PONG_WORD.to_bytes(4, "big") + ping[4:8]


def discovery_ssrc(request: bytes) -> int | None:
    """The ssrc of a well-formed IP discovery request, else None.

    A request whose address or port field is not zero is ignored, as newer servers do.
    Source: reference section 3.1.
    """
    if len(request) != DISCOVERY_BYTES:
        return None
    kind, length, ssrc, address, port = _DISCOVERY.unpack(request)
    if kind != _DISCOVERY_REQUEST or length != _DISCOVERY_LENGTH or any(address) or port:
        return None
    return int(ssrc)


def discovery_response(ssrc: int, address: str, port: int) -> bytes:
    """IP discovery response that tells the observed address. Source: reference section 3.1."""
    return _DISCOVERY.pack(_DISCOVERY_RESPONSE, _DISCOVERY_LENGTH, ssrc, address.encode(), port)


def legacy_discovery_response(ssrc: int, address: str, port: int) -> bytes:
    """The response of 70 bytes, without type and length, that was abolished in 2023."""
    return discovery_response(ssrc, address, port)[4:]
