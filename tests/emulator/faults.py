"""Faults on demand, one guild at a time."""

from dataclasses import dataclass

import msgspec

from tests.emulator.messages import Refused


class _Fault(msgspec.Struct, tag_field="kind", forbid_unknown_fields=True):
    guild: str


class CloseFault(_Fault, tag="close"):
    """Close the guild's WebSocket with a code."""

    code: int


class DropFault(_Fault, tag="drop"):
    """Abort the guild's TCP connection without a close frame."""


class DiscoverySilentFault(_Fault, tag="discovery_silent"):
    """Answer no IP discovery until `on` is false."""

    on: bool = True


class DiscoveryLoseFirstFault(_Fault, tag="discovery_lose_first"):
    """Leave the next `n` discovery requests unanswered."""

    n: int


class ModesFault(_Fault, tag="modes"):
    """Offer these modes on the next Identify."""

    modes: list[str]


class RejectFault(_Fault, tag="reject"):
    """Close the next Identify with a code."""

    code: int


class NoAckFault(_Fault, tag="no_ack"):
    """Acknowledge no heartbeat until `on` is false."""

    on: bool = True


Fault = CloseFault | DropFault | DiscoverySilentFault | DiscoveryLoseFirstFault | ModesFault | RejectFault | NoAckFault


def read_fault(body: bytes) -> Fault:
    """Decode the body of `POST /faults`. Raises: msgspec.DecodeError: says which kind or field is wrong."""
    fault: Fault = msgspec.json.decode(body, type=Fault)
    if isinstance(fault, CloseFault | RejectFault) and not (fault.code == 1000 or 3000 <= fault.code <= 4999):
        raise msgspec.ValidationError("Expected a close code: 1000 or 3000..4999 - at `$.code`")
    if isinstance(fault, DiscoveryLoseFirstFault) and fault.n < 0:
        raise msgspec.ValidationError("Expected `int` >= 0 - at `$.n`")
    return fault


@dataclass(slots=True)
class PendingFaults:
    """What still waits to go wrong in one guild."""

    discovery_silent: bool = False
    discovery_lose: int = 0
    modes: list[str] | None = None
    reject: int | None = None
    no_ack: bool = False

    def loses_discovery(self) -> bool:
        """Whether the request at hand stays unanswered."""
        if self.discovery_lose > 0:
            self.discovery_lose -= 1
            return True
        return self.discovery_silent

    def take_modes(self, usual: list[str]) -> list[str]:
        """Modes to offer on this Identify."""
        modes, self.modes = self.modes, None
        return usual if modes is None else modes

    def check_identify(self) -> None:
        """Raises: Refused: this Identify was to be refused."""
        code, self.reject = self.reject, None
        if code is not None:
            raise Refused(code, "refused on demand")
