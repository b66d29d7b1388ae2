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
    cause: str


CLOSE_CODES: dict[int, CloseCode] = {
    1000: CloseCode("normal", Action.RESUME, "sometimes without a reason; where the session is over a resume tells"),
    4001: CloseCode("unknown opcode", Action.FIX_ONCE, "a mistake of this side"),
    4002: CloseCode("failed to decode payload", Action.FIX_ONCE, "a mistake of this side, often in Identify"),
    4003: CloseCode("not authenticated", Action.FIX_ONCE, "something came before Identify, or Identify as binary"),
    4004: CloseCode("authentication failed", Action.NEW_CREDENTIALS, "the token is stale or of another server"),
    4005: CloseCode("already authenticated", Action.NEW_CREDENTIALS, "a second Identify, or one after Resume"),
    4006: CloseCode(
        "session no longer valid",
        Action.NEW_CREDENTIALS,
        "session or token is stale, the port was dropped from the endpoint, the channel was emptied or left",
    ),
    4009: CloseCode("session timeout", Action.NEW_CREDENTIALS, "heartbeats were missed, or Resume came too late"),
    4011: CloseCode("server not found", Action.FIX_ONCE, "the guild is gone, or its id wrong"),
    4012: CloseCode("unknown protocol", Action.STOP, "a mistake of this side in Select Protocol"),
    4013: CloseCode("media server crashed", Action.RESUME, "a fault of the server"),
    4014: CloseCode("disconnected", Action.WAIT, "kicked, moved, region changed, channel deleted, main session lost"),
    4015: CloseCode("voice server crashed", Action.RESUME, "a fault of the server"),
    4016: CloseCode("unknown encryption mode", Action.STOP, "the server took back what it had offered in Ready"),
    4017: CloseCode("end-to-end encryption required", Action.STOP, "Identify announced no DAVE version"),
    4020: CloseCode("bad request", Action.FIX_ONCE, "a mistake of this side, often in a heartbeat"),
    4021: CloseCode("disconnected: rate limited", Action.STOP, "this side reconnected in a loop"),
    4022: CloseCode(
        "disconnected: call terminated",
        Action.WAIT,
        "channel deleted, bot moved, voice server changed, all others left",
    ),
}

_FIRST_VOICE_CODE = 4000
_UNKNOWN_VOICE_ACTION = Action.NEW_CREDENTIALS
_NETWORK_ACTION = Action.RESUME

_WHEN_IT_REPEATS = {
    Action.RESUME: f"a fresh Identify, then `{Action.NEW_CREDENTIALS}`",
    Action.NEW_CREDENTIALS: f"`{Action.NEW_CREDENTIALS}`, backing off",
    Action.WAIT: f"`{Action.WAIT}`",
    Action.FIX_ONCE: f"`{Action.STOP}`",
    Action.STOP: "not tried again",
}


def action_for(code: int | None) -> Action:
    """Say what may follow a close.

    Args:
        code: WebSocket close code; None when the connection broke without one.
    Returns: RESUME for network trouble (None, below 4000), NEW_CREDENTIALS for a voice code that is not in the table.
    Source: voice protocol reference, section 2.6.
    """
    if code is None:
        return _NETWORK_ACTION
    if code in CLOSE_CODES:
        return CLOSE_CODES[code].action
    return _NETWORK_ACTION if code < _FIRST_VOICE_CODE else _UNKNOWN_VOICE_ACTION


def close_code_table() -> str:
    """The table in markdown, as it stands in `CLOSE_CODES.md`."""
    rows = [
        ("code", "name", "cause", "what follows", "when it repeats"),
        ("---",) * 5,
        *(_row(str(code), known) for code, known in CLOSE_CODES.items()),
        _row("none, other below 4000", CloseCode("network", _NETWORK_ACTION, "the connection broke")),
        _row("other", CloseCode("unknown", _UNKNOWN_VOICE_ACTION, "a code of a later day")),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(code: str, known: CloseCode) -> tuple[str, ...]:
    return code, known.name, known.cause, f"`{known.action}`", _WHEN_IT_REPEATS[known.action]
