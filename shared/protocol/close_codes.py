"""What to do after each close code of the voice gateway.

Source: voice protocol reference, section 2.6.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Action(StrEnum):
    """What may follow a closed voice connection; back-off and limits are the caller's."""

    RESUME = "resume"
    """Resume on the same endpoint; when that fails, new credentials."""
    NEW_CREDENTIALS = "new_credentials"
    """The session is gone: get new credentials, then Identify."""
    WAIT = "wait"
    """Kicked, moved or re-hosted: wait for the main gateway's word, which says whether to come back."""
    FIX_ONCE = "fix_once"
    """Probably a mistake of this side: log it, try once with new credentials, stop when the code repeats."""
    STOP = "stop"
    """Trying again makes it worse or cannot help."""


class CloseCode(NamedTuple):
    """One row of the table."""

    name: str
    action: Action


CLOSE_CODES: dict[int, CloseCode] = {
    1000: CloseCode("normal", Action.NEW_CREDENTIALS),
    4001: CloseCode("unknown opcode", Action.FIX_ONCE),
    4002: CloseCode("failed to decode payload", Action.FIX_ONCE),
    4003: CloseCode("not authenticated", Action.FIX_ONCE),
    4004: CloseCode("authentication failed", Action.NEW_CREDENTIALS),
    4005: CloseCode("already authenticated", Action.NEW_CREDENTIALS),
    4006: CloseCode("session no longer valid", Action.NEW_CREDENTIALS),
    4009: CloseCode("session timeout", Action.NEW_CREDENTIALS),
    4011: CloseCode("server not found", Action.FIX_ONCE),
    4012: CloseCode("unknown protocol", Action.STOP),
    4013: CloseCode("media server crashed", Action.RESUME),
    4014: CloseCode("disconnected", Action.WAIT),
    4015: CloseCode("voice server crashed", Action.RESUME),
    4016: CloseCode("unknown encryption mode", Action.STOP),
    4017: CloseCode("end-to-end encryption required", Action.STOP),
    4020: CloseCode("bad request", Action.FIX_ONCE),
    4021: CloseCode("disconnected: rate limited", Action.STOP),
    4022: CloseCode("disconnected: call terminated", Action.WAIT),
}

_FIRST_VOICE_CODE = 4000


def action_for(code: int | None) -> Action:
    """Say what may follow a close.

    Args:
        code: WebSocket close code; None when the connection broke without one.
    Returns: RESUME for network trouble (None, below 4000), NEW_CREDENTIALS for a voice code that is not in the table.
    Source: voice protocol reference, section 2.6.
    """
    if code is None:
        return Action.RESUME
    if code in CLOSE_CODES:
        return CLOSE_CODES[code].action
    return Action.RESUME if code < _FIRST_VOICE_CODE else Action.NEW_CREDENTIALS
