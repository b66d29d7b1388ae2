"""What can go wrong between a bot and the main gateway, on demand."""

from typing import Literal

import msgspec

CloseOrder = Literal["events_first", "close_first", "events_only", "close_only"]


class _GuildFault(msgspec.Struct, tag_field="kind", forbid_unknown_fields=True):
    guild: str


class _MemberFault(_GuildFault, kw_only=True):
    """`user_id` may be left out where one bot only is in the guild's calls."""

    user_id: str | None = None


class JoinFault(_GuildFault, tag="join"):
    """Answer the next `times` joins of the guild another way (0: all until the next such fault).

    `delay_ms` comes before the first event; with `null_ms` the endpoint is null first and told so much later.
    """

    answer: Literal["both", "swapped", "state_only", "server_only", "nothing"] = "both"
    delay_ms: int = 0
    null_ms: int | None = None
    times: int = 1


class FullFault(_GuildFault, tag="full"):
    """The channel has no room for anybody else until `on` is false."""

    channel: str
    on: bool = True


class IgnoreRejoinFault(_GuildFault, tag="ignore_rejoin"):
    """A join of the channel one is in already does nothing until `on` is false, even without a voice session."""

    on: bool = True


class KickFault(_MemberFault, tag="kick"):
    """Disconnect a bot from its call; `gap_ms` lies between the event and the close.

    Without a code it is 4014, or 4022 for who was alone (reference section 11, 8).
    """

    order: CloseOrder = "events_first"
    code: int | None = None
    gap_ms: int = 50


class MoveFault(_MemberFault, tag="move"):
    """Put a bot into another channel of the guild."""

    channel: str
    order: CloseOrder = "events_first"
    code: int = 4014
    gap_ms: int = 50


class ServerFault(_GuildFault, tag="server"):
    """The guild's calls go to another voice server; with `null_ms` there is none for so long."""

    null_ms: int | None = None
    code: int = 4014


class TokenFault(_MemberFault, tag="token"):
    """A new token on the same voice server; the older one is void."""

    code: int = 4006


class GuildGoneFault(_MemberFault, tag="guild_gone"):
    """The guild is unavailable, or has thrown the bot out; `on` false brings it back."""

    unavailable: bool = False
    on: bool = True


class _SessionFault(msgspec.Struct, tag_field="kind", forbid_unknown_fields=True, kw_only=True):
    user_id: str
    shard: int = 0


class CloseFault(_SessionFault, tag="close"):
    """Close the WebSocket with a code."""

    code: int


class DropFault(_SessionFault, tag="drop"):
    """Abort the TCP connection without a close frame."""


class ReconnectFault(_SessionFault, tag="reconnect"):
    """Ask for a reconnect (op 7)."""


class InvalidateFault(_SessionFault, tag="invalidate"):
    """Tell that the session is invalid (op 9); it ends unless it is `resumable`."""

    resumable: bool = False


class HeartbeatFault(_SessionFault, tag="heartbeat"):
    """Ask for a heartbeat at once (op 1)."""


class NoAckFault(_SessionFault, tag="no_ack"):
    """Acknowledge no heartbeat until `on` is false, on any connection of the session."""

    on: bool = True


class RefuseResumeFault(_SessionFault, tag="refuse_resume"):
    """The session cannot be resumed when its client next asks: it is invalid then (op 9)."""


GuildFault = (
    JoinFault | FullFault | IgnoreRejoinFault | KickFault | MoveFault | ServerFault | TokenFault | GuildGoneFault
)
SessionFault = (
    CloseFault | DropFault | ReconnectFault | InvalidateFault | HeartbeatFault | NoAckFault | RefuseResumeFault
)
MainFault = GuildFault | SessionFault


def read_fault(body: bytes) -> MainFault:
    """Decode the body of `POST /gateway/faults`. Raises: msgspec.DecodeError: says which kind or field is wrong."""
    fault: MainFault = msgspec.json.decode(body, type=MainFault)
    code = getattr(fault, "code", None)
    if code is not None and not (code == 1000 or 3000 <= code <= 4999):
        raise msgspec.ValidationError("Expected a close code: 1000 or 3000..4999 - at `$.code`")
    return fault
