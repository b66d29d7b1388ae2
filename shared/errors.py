"""The one tree of errors and the one list of codes.

    GuildcastError(code, scope, retryable)
    ├── ConfigError            a setting is wrong: exit 78, never restarted
    ├── JobError               a job cannot be done: the job fails, the next one goes on
    ├── ProtocolError          bytes of a peer break the protocol
    │   ├── MalformedPacket        one datagram or message is dropped
    │   ├── HandshakeBroken        what a session is made of cannot be read: this one will not stand
    │   └── NonceExhausted         the key must be renewed before another packet
    ├── VoiceError             a voice connection cannot be made or kept
    │   └── VoiceClosed(close_code)
    ├── StoreError
    │   ├── StoreUnavailable       Redis cannot be reached: wait, go on with what is held
    │   ├── StaleId                a stream refused an id that is not above its last one
    │   ├── LeaseLost              somebody else leads, or the lease ran out
    │   └── Fenced                 a higher term stands in the store: stop publishing
    └── SourceError            a source of audio fails

Handlers look at the class, at ``code`` or at ``retryable``; never at the text.
"""

from __future__ import annotations

from enum import StrEnum

from shared.text import cut

EXIT_CONFIG = 78
"""Exit status of a process that was given a wrong setting (sysexits EX_CONFIG)."""
EXIT_UNAVAILABLE = 75
"""Exit status of a process that could not reach Redis at its start (sysexits EX_TEMPFAIL)."""


class Scope(StrEnum):
    """What an error breaks; everything outside that scope goes on."""

    PACKET = "packet"
    CONNECTION = "connection"
    BROADCAST = "broadcast"
    JOB = "job"
    PROCESS = "process"


class ErrorCode(StrEnum):
    """Stable codes: they stand in job statuses, events and logs, and are never renamed."""

    # settings and processes
    CONFIG_INVALID = "config_invalid"
    UDP_PORTS_IN_USE = "udp_ports_in_use"
    UDP_PORTS_TOO_FEW = "udp_ports_too_few"
    REDIS_UNREACHABLE = "redis_unreachable"
    LEASE_LOST = "lease_lost"
    FENCED = "fenced"
    INTERNAL_ERROR = "internal_error"
    # jobs
    JOB_UNREADABLE = "job_unreadable"
    JOB_INVALID = "job_invalid"
    JOB_CONFLICT = "job_conflict"
    NOT_SUPPORTED_YET = "not_supported_yet"
    BROADCAST_EXISTS = "broadcast_exists"
    BROADCAST_UNKNOWN = "broadcast_unknown"
    GUILD_UNKNOWN = "guild_unknown"
    NO_WORKER = "no_worker"
    WORKER_FULL = "worker_full"
    # sources
    SOURCE_NOT_FOUND = "source_not_found"
    SOURCE_FORBIDDEN = "source_forbidden"
    SOURCE_HTTP_STATUS = "source_http_status"
    SOURCE_UNREACHABLE = "source_unreachable"
    SOURCE_NOT_AUDIO = "source_not_audio"
    SOURCE_EMPTY = "source_empty"
    SOURCE_STALLED = "source_stalled"
    SOURCE_BROKEN = "source_broken"
    SOURCE_ENDED = "source_ended"
    SOURCE_HOST_UNKNOWN = "source_host_unknown"
    SOURCE_CERTIFICATE = "source_certificate"
    SOURCE_REDIRECTS = "source_redirects"
    SOURCE_ENCRYPTED = "source_encrypted"
    SOURCE_TOO_LARGE = "source_too_large"
    SOURCE_SEALED = "source_sealed"
    SOURCE_FAILED = "source_failed"
    # voice connections
    VOICE_UNREACHABLE = "voice_unreachable"
    VOICE_TIMEOUT = "voice_timeout"
    VOICE_CLOSED = "voice_closed"
    VOICE_MODE_UNSUPPORTED = "voice_mode_unsupported"
    VOICE_CREDENTIALS_MISSING = "voice_credentials_missing"
    VOICE_CREDENTIALS_REJECTED = "voice_credentials_rejected"
    TOO_MANY_ATTEMPTS = "too_many_attempts"
    KICKED = "kicked"
    E2EE_REQUIRED = "e2ee_required"
    E2EE_FAILED = "e2ee_failed"
    E2EE_DOWNGRADED = "e2ee_downgraded"
    VOICE_SERVER_REFUSED = "voice_server_refused"
    VOICE_FLOODED = "voice_flooded"
    UDP_BLOCKED = "udp_blocked"
    UDP_LOST = "udp_lost"
    UDP_REFUSED = "udp_refused"
    UDP_UNREACHABLE = "udp_unreachable"
    # bytes of a peer
    MALFORMED_MESSAGE = "malformed_message"
    MALFORMED_PACKET = "malformed_packet"
    NONCE_EXHAUSTED = "nonce_exhausted"


class GuildcastError(Exception):
    """Root of the tree.

    Attributes:
        code: stable, from `ErrorCode`.
        scope: what is broken.
        retryable: whether the same attempt may succeed later.
    """

    scope: Scope = Scope.PROCESS
    default_code: ErrorCode = ErrorCode.CONFIG_INVALID
    retryable: bool = False

    def __init__(self, message: str, *, code: ErrorCode | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.message = cut(message)
        self.code = code if code is not None else self.default_code
        if retryable is not None:
            self.retryable = retryable

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class TaskEnded(GuildcastError):
    """Part of a process ended, and nobody had ordered that: a defect of ours."""

    default_code = ErrorCode.INTERNAL_ERROR


class ConfigError(GuildcastError):
    """A setting is wrong. The message names the setting, its value and what is allowed."""


class JobError(GuildcastError):
    """A job cannot be done. The message names the field."""

    scope = Scope.JOB
    default_code = ErrorCode.JOB_INVALID


class ProtocolError(GuildcastError):
    """A peer's bytes break the protocol."""

    scope = Scope.CONNECTION
    default_code = ErrorCode.MALFORMED_MESSAGE


class MalformedPacket(ProtocolError):
    """One datagram is not what it should be; it is dropped and counted."""

    scope = Scope.PACKET
    default_code = ErrorCode.MALFORMED_PACKET


class HandshakeBroken(ProtocolError):
    """What a session is made of cannot be read, and does not come twice."""


class NonceExhausted(ProtocolError):
    """All nonces of a key are spent: renew the key before another packet."""

    default_code = ErrorCode.NONCE_EXHAUSTED


class VoiceError(GuildcastError):
    """A voice connection cannot be made or kept."""

    scope = Scope.CONNECTION
    default_code = ErrorCode.VOICE_UNREACHABLE
    retryable = True


class VoiceClosed(VoiceError):
    """The voice gateway closed the connection.

    Attributes:
        close_code: WebSocket close code, see `shared.protocol.close_codes`.
    """

    default_code = ErrorCode.VOICE_CLOSED

    def __init__(self, close_code: int, reason: str = "", *, code: ErrorCode | None = None) -> None:
        super().__init__(f"voice gateway closed with {close_code} {reason}".rstrip(), code=code)
        self.close_code = close_code


class StoreError(GuildcastError):
    """Redis did not do what was asked."""

    default_code = ErrorCode.REDIS_UNREACHABLE


class StoreUnavailable(StoreError):
    """Redis cannot be reached; what is held stays valid."""

    retryable = True


class StaleId(StoreError):
    """A stream refused an entry whose id is not above its last one."""

    default_code = ErrorCode.FENCED


class LeaseLost(StoreError):
    """The lease ran out or another leader holds it."""

    default_code = ErrorCode.LEASE_LOST


class Fenced(StoreError):
    """A higher term stands in the store: this publisher has been replaced."""

    scope = Scope.BROADCAST
    default_code = ErrorCode.FENCED


class SourceError(GuildcastError):
    """A source of audio cannot be opened, read or decoded."""

    scope = Scope.BROADCAST
    default_code = ErrorCode.SOURCE_BROKEN
    retryable = True
