"""Faults on demand, one user of one guild at a time.

Source: reference sections 6.9 (fault injection list) and 8 (right column).
"""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from tests.emulator.dave.codec import Reader
from tests.emulator.dave.group import DaveOp
from tests.emulator.downlink import Bends
from tests.emulator.messages import Refused

Step = Literal["ready", "select", "description", "speaking", "heartbeat", "resume"]
PathState = Literal["open", "swallow", "refuse"]
Response = Literal["type", "ssrc", "legacy", "port"]
MlsOp = Literal[25, 27, 29, 30]
_LARGEST = {"n": 10_000, "ms": 600_000, "seq": 2**16 - 1, "size": 10_000, "padding": 255, "csrc": 15}


class _Fault(msgspec.Struct, tag_field="kind", forbid_unknown_fields=True, kw_only=True):
    guild: str
    user: str | None = None
    """Whom it befalls; None: the bot, or else whoever was there first."""


# the WebSocket


class CloseFault(_Fault, tag="close"):
    """Close the WebSocket with a code."""

    code: int


class DropFault(_Fault, tag="drop"):
    """Abort the TCP connection without a close frame."""


class KickFault(_Fault, tag="kick"):
    """Close the WebSocket and make the credentials void."""

    code: int = 4014


class AwayFault(_Fault, tag="away"):
    """The guild's voice server cannot be reached for `ms`: its edge answers 503, or nobody listens at its port.

    Who is connected stays so.
    """

    ms: int
    how: Literal["503", "refused"] = "503"


class RedirectFault(_Fault, tag="redirect"):
    """Send the next WebSocket to the guild's voice server elsewhere."""

    to: str


class SeveredFault(_Fault, tag="severed"):
    """Take the client out of the MLS group when its WebSocket is lost next, and tell it in the replay, or not."""

    told: bool = True


class ListingLateFault(_Fault, tag="listing_late"):
    """Tell this client of newcomers (op 11) so late, after all else about them; 0: at once."""

    ms: int


class HelloLateFault(_Fault, tag="hello_late"):
    """Say Hello so late on the next WebSocket to the guild's voice server."""

    ms: int


class HelloIntervalFault(_Fault, tag="hello_interval"):
    """Tell this heartbeat interval on the next WebSocket to the guild's voice server."""

    ms: int


class CloseOnConnectFault(_Fault, tag="close_on_connect"):
    """Close the next WebSocket to the guild's voice server before anything is said."""

    code: int


class RejectFault(_Fault, tag="reject"):
    """Close the next Identify with a code."""

    code: int


class CredentialsOnceFault(_Fault, tag="credentials_once"):
    """Refuse an Identify with credentials that had a session already, until `on` is false: they are to be resumed."""

    on: bool = True


class CloseAtFault(_Fault, tag="close_at"):
    """Close with a code when the client next does something, op 1, 5, 3 or 7, or after the next op 2 or 4."""

    step: Step
    code: int


class NoAckFault(_Fault, tag="no_ack"):
    """Acknowledge no heartbeat until `on` is false."""

    on: bool = True


class ServerHeartbeatFault(_Fault, tag="server_heartbeat"):
    """Send op 3 as some servers do; the client is to answer at once."""


class SayFault(_Fault, tag="say"):
    """Say this `n` times: a text frame as it stands, or a binary one of a number and these bytes."""

    text: str | None = None
    data: bytes = b""
    n: int = 1


class FirstSeqFault(_Fault, tag="first_seq"):
    """Number the first sequenced message after the next Identify so."""

    seq: int


# handshake


class PathFault(_Fault, tag="path"):
    """What becomes of datagrams on their way to the guild's media server, until the next such fault."""

    how: PathState


class PingSilentFault(_Fault, tag="ping_silent"):
    """Answer no ping until `on` is false, as some servers do."""

    on: bool = True


class DiscoverySilentFault(_Fault, tag="discovery_silent"):
    """Answer no IP discovery until `on` is false."""

    on: bool = True


class DiscoveryLoseFirstFault(_Fault, tag="discovery_lose_first"):
    """Leave the next `n` discovery requests unanswered."""

    n: int


class DiscoveryWrongFault(_Fault, tag="discovery_wrong"):
    """Answer the next `n` requests wrongly: another type, a foreign ssrc, 70 bytes, or another port.

    With `port` the client has to select what it was told, and is heard from where it sends.
    """

    response: Response
    n: int = 1


class ModesFault(_Fault, tag="modes"):
    """Offer these modes on the next Identify."""

    modes: list[str]


class ReadyFault(_Fault, tag="ready"):
    """Name this as the media server's address on the next Identify, whatever it is."""

    ip: str


class NewKeyFault(_Fault, tag="new_key"):
    """Send another op 4 with a new key; what was under way under the old one is still heard for a moment."""


class ClientsUnlistedFault(_Fault, tag="clients_unlisted"):
    """Send no op 11 until `on` is false."""

    on: bool = True


class SpeakingRelayFault(_Fault, tag="speaking_relay"):
    """Tell this client of others' op 5 so late; None: never."""

    ms: int | None = None


class RtpFault(_Fault, tag="rtp"):
    """Bend the RTP towards this client until the next such fault; without fields it goes straight again.

    Every n-th packet is lost, swapped with the next, or sent twice; packets carry an extension, padding, CSRC entries.
    """

    lose_every: int = 0
    swap_every: int = 0
    repeat_every: int = 0
    extension: bool = False
    padding: int = 0
    csrc: int = 0


class StrayFault(_Fault, tag="stray"):
    """Send this client so many packets of an unknown payload type, or RTCP."""

    what: Literal["payload_type", "rtcp"]
    n: int = 1


# DAVE


class ExternalSenderFirstFault(_Fault, tag="external_sender_first"):
    """Send op 25 before op 4, until `on` is false."""

    on: bool = True


class ProposalFault(_Fault, tag="proposal"):
    """Send op 27 now with an Add that must not be followed: of a user nobody knows, or for another epoch."""

    wrong: Literal["user", "epoch"]


class BatchFault(_Fault, tag="batch"):
    """Have proposals of the channel's group (op 27) wait so long for others, until the next such fault."""

    ms: int


class TwoProposalsFault(_Fault, tag="two_proposals"):
    """Add two ghosts by two op 27 in one epoch."""


class CommitTwiceFault(_Fault, tag="commit_twice"):
    """Send the next op 29 twice."""


class DamageFault(_Fault, tag="damage"):
    """Turn one bit in each of the next `n` messages of an opcode: 29 is a commit, 30 a Welcome."""

    op: MlsOp
    n: int = 1


class ForeignWelcomeFault(_Fault, tag="foreign_welcome"):
    """Let the next Welcome be for an older key package than the client's newest."""


class ExecuteFault(_Fault, tag="execute"):
    """What happens to op 22: one of an unknown transition now, or the next one lost, or late by `ms`."""

    how: Literal["unknown", "lost", "late"]
    ms: int = 2_000


class DowngradeFault(_Fault, tag="downgrade"):
    """Turn end-to-end encryption off in the channel."""


class UpgradeFault(_Fault, tag="upgrade"):
    """Turn end-to-end encryption on again in the channel."""


class EpochRestartFault(_Fault, tag="epoch_restart"):
    """Send op 24 to everybody in the channel: the group begins anew."""


class GarbageFault(_Fault, tag="garbage"):
    """Send a binary message of rubbish."""

    op: MlsOp
    size: int = 100


class SaidFault(_Fault, tag="said"):
    """Let `user`, a member, say `n` frames as they should not be: plain, silence made by the server, or, once a later
    transition is in force, frames encrypted before it.
    """

    how: Literal["plain", "silence", "stale"]
    n: int = 10


Fault = (
    CloseFault
    | DropFault
    | KickFault
    | AwayFault
    | RedirectFault
    | SeveredFault
    | ListingLateFault
    | HelloLateFault
    | HelloIntervalFault
    | CloseOnConnectFault
    | RejectFault
    | CredentialsOnceFault
    | CloseAtFault
    | NoAckFault
    | ServerHeartbeatFault
    | SayFault
    | FirstSeqFault
    | PathFault
    | PingSilentFault
    | DiscoverySilentFault
    | DiscoveryLoseFirstFault
    | DiscoveryWrongFault
    | ModesFault
    | ReadyFault
    | NewKeyFault
    | ClientsUnlistedFault
    | SpeakingRelayFault
    | RtpFault
    | StrayFault
    | ExternalSenderFirstFault
    | ProposalFault
    | BatchFault
    | TwoProposalsFault
    | CommitTwiceFault
    | DamageFault
    | ForeignWelcomeFault
    | ExecuteFault
    | DowngradeFault
    | UpgradeFault
    | EpochRestartFault
    | GarbageFault
    | SaidFault
)


def read_fault(body: bytes) -> Fault:
    """Decode the body of `POST /faults`. Raises: msgspec.DecodeError: says which kind or field is wrong."""
    fault: Fault = msgspec.json.decode(body, type=Fault)
    code = getattr(fault, "code", None)
    if code is not None and not (code == 1000 or 3000 <= code <= 4999):
        raise msgspec.ValidationError("Expected a close code: 1000 or 3000..4999 - at `$.code`")
    for name, most in _LARGEST.items():
        value = getattr(fault, name, None)
        if value is not None and not 0 <= value <= most:
            raise msgspec.ValidationError(f"Expected `int` >= 0 and <= {most} - at `$.{name}`")
    return fault


@dataclass(slots=True)
class ConnectFaults:
    """What still waits to go wrong on the next WebSocket to a voice server."""

    away_until_s: float = 0.0
    """Of the loop's clock."""
    redirect: str = ""
    hello_late_ms: int = 0
    interval_ms: int | None = None
    close: int | None = None

    def take(self) -> "ConnectFaults":
        """What goes wrong on this one, once it is open."""
        taken = ConnectFaults(hello_late_ms=self.hello_late_ms, interval_ms=self.interval_ms, close=self.close)
        self.hello_late_ms, self.interval_ms, self.close = 0, None, None
        return taken

    def take_redirect(self) -> str:
        """Where the request at hand is sent to; empty: nowhere else."""
        to, self.redirect = self.redirect, ""
        return to


@dataclass(slots=True)
class PendingFaults:
    """What still waits to go wrong for one user of a guild."""

    ping_silent: bool = False
    discovery_silent: bool = False
    discovery_lose: int = 0
    discovery_wrong: list[Response] = field(default_factory=list)
    modes: list[str] | None = None
    ready_ip: str | None = None
    reject: int | None = None
    credentials_once: bool = False
    close_at: dict[Step, int] = field(default_factory=dict)
    no_ack: bool = False
    first_seq: int = 1
    clients_unlisted: bool = False
    listing_late_ms: int = 0
    severed_told: bool | None = None
    """None: nothing befalls the group."""
    untold: bool = False
    """What the group has to say is not kept for the resume."""
    speaking_late_ms: int | None = 0
    bends: Bends = field(default_factory=Bends)
    external_sender_first: bool = False
    commit_twice: bool = False
    damage: dict[int, int] = field(default_factory=dict)
    foreign_welcome: bool = False
    execute_lost: bool = False
    execute_late_ms: int | None = None

    def loses_discovery(self) -> bool:
        """Whether the request at hand stays unanswered."""
        if self.discovery_lose > 0:
            self.discovery_lose -= 1
            return True
        return self.discovery_silent

    def take_discovery(self) -> Response | None:
        """How this response is wrong."""
        return self.discovery_wrong.pop(0) if self.discovery_wrong else None

    def take_modes(self, usual: list[str]) -> list[str]:
        """Modes to offer on this Identify."""
        modes, self.modes = self.modes, None
        return usual if modes is None else modes

    def take_ready_ip(self, usual: str) -> str:
        """Address to name in this Ready."""
        told, self.ready_ip = self.ready_ip, None
        return usual if told is None else told

    def take_first_seq(self) -> int:
        """Number of the first sequenced message of this session."""
        seq, self.first_seq = self.first_seq, 1
        return seq

    def check_identify(self) -> None:
        """Raises: Refused: this Identify was to be refused."""
        code, self.reject = self.reject, None
        if code is not None:
            raise Refused(code, "refused on demand")

    def check(self, step: Step) -> None:
        """Raises: Refused: this step was to be refused."""
        code = self.close_at.pop(step, None)
        if code is not None:
            raise Refused(code, "closed on demand")

    def bend(self, op: DaveOp, body: bytes) -> list[bytes]:
        """A binary message as it really goes out: bent, or more than once."""
        if self.damage.get(op, 0) > 0:
            self.damage[op] -= 1
            body = damaged(body)
        if op is DaveOp.WELCOME and self.foreign_welcome:
            self.foreign_welcome = False
            body = for_nobody(body)
        if op is DaveOp.ANNOUNCE_COMMIT and self.commit_twice:
            self.commit_twice = False
            return [body, body]
        return [body]


def damaged(body: bytes) -> bytes:
    """The bytes with one bit turned: in the last tag of a commit, in the group info of a Welcome."""
    at = max(len(body) - 20, 0)
    return body[:at] + bytes((body[at] ^ 1,)) + body[at + 1 :]


def for_nobody(body: bytes) -> bytes:
    """Op 30 with its first secret under the name of a key package that nobody has any more."""
    reader = Reader(body)
    reader.take(4)  # transition id and cipher suite
    secrets = reader.vector()
    start = reader.at - len(secrets) + 1
    return body[:start] + bytes(32) + body[start + 32 :]
