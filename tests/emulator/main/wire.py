"""Numbers and messages of the main gateway, version 10 in JSON. Pure.

Source: reference section 1.
"""

from enum import IntEnum, IntFlag

import msgspec

API_VERSION = 10
ANY_INTENT = (1 << 26) - 1
"""All bits that were ever an intent."""


class Op(IntEnum):
    """Opcodes."""

    DISPATCH = 0
    HEARTBEAT = 1
    IDENTIFY = 2
    PRESENCE_UPDATE = 3
    VOICE_STATE_UPDATE = 4
    RESUME = 6
    RECONNECT = 7
    REQUEST_GUILD_MEMBERS = 8
    INVALID_SESSION = 9
    HELLO = 10
    HEARTBEAT_ACK = 11
    REQUEST_SOUNDBOARD_SOUNDS = 31


class Close(IntEnum):
    """WebSocket close codes; 4014 means something else on the voice gateway."""

    GOING_AWAY = 1001
    UNKNOWN_ERROR = 4000
    UNKNOWN_OPCODE = 4001
    UNDECODABLE = 4002
    NOT_AUTHENTICATED = 4003
    AUTHENTICATION_FAILED = 4004
    ALREADY_AUTHENTICATED = 4005
    INVALID_SEQUENCE = 4007
    RATE_LIMITED = 4008
    SESSION_TIMEOUT = 4009
    INVALID_SHARD = 4010
    SHARDING_REQUIRED = 4011
    INVALID_VERSION = 4012
    INVALID_INTENTS = 4013
    DISALLOWED_INTENTS = 4014


SERVER_CLOSES_THAT_END = frozenset(
    {
        Close.AUTHENTICATION_FAILED,
        Close.INVALID_SEQUENCE,
        Close.SESSION_TIMEOUT,
        *(code for code in Close if code >= Close.INVALID_SHARD),
    }
)
CLIENT_CLOSES_THAT_END = frozenset({1000, 1001})
"""Closes after which there is nothing left to resume (reference section 1.3)."""


class Intent(IntFlag):
    """What is looked at here; other bits are accepted."""

    GUILDS = 1 << 0
    GUILD_MEMBERS = 1 << 1
    GUILD_VOICE_STATES = 1 << 7
    GUILD_PRESENCES = 1 << 8
    MESSAGE_CONTENT = 1 << 15


PRIVILEGED = Intent.GUILD_MEMBERS | Intent.GUILD_PRESENCES | Intent.MESSAGE_CONTENT


class ChannelType(IntEnum):
    """Channels with voice."""

    VOICE = 2
    STAGE = 13


class Identify(msgspec.Struct):
    """Op 2."""

    token: str
    properties: dict[str, object]
    intents: int
    shard: tuple[int, int] = (0, 1)


class Resume(msgspec.Struct):
    """Op 6."""

    token: str
    session_id: str
    seq: int


class VoiceStateUpdate(msgspec.Struct):
    """Op 4; `channel_id` null means leave. Ids may come as numbers."""

    guild_id: str | int
    channel_id: str | int | None
    self_mute: bool = False
    self_deaf: bool = False


class RequestGuildMembers(msgspec.Struct):
    """Op 8, as far as it is answered."""

    guild_id: str | int
    nonce: str | None = None


def write(op: Op, data: object = None) -> str:
    """One message that is no event."""
    return msgspec.json.encode({"op": int(op), "d": data, "s": None, "t": None}).decode()


def write_event(name: str, data: object, sequence: int) -> str:
    """One event."""
    return msgspec.json.encode({"op": int(Op.DISPATCH), "d": data, "s": sequence, "t": name}).decode()


def shard_of(guild: str, shards: int) -> int:
    """The shard that a guild belongs to."""
    return (int(guild) >> 22) % shards
