"""What passes over the control interface."""

from typing import Literal

import msgspec

SessionState = Literal["live", "lost", "ended"]
CloseSide = Literal["client", "server"]


class Percentiles(msgspec.Struct, kw_only=True):
    """Milliseconds; None when `count` is 0."""

    count: int
    p50: float | None = None
    p99: float | None = None
    p999: float | None = None
    max: float | None = None


class WantedVoice(msgspec.Struct, forbid_unknown_fields=True):
    """A guild that shall be joined."""

    guild: str
    channel: str


class VoiceRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /voice`."""

    guilds: list[WantedVoice]


class Voice(msgspec.Struct):
    """Voice credentials of one guild; `endpoint` is host:port."""

    guild: str
    channel: str
    user_id: str
    session_id: str
    token: str
    endpoint: str


class VoiceAnswer(msgspec.Struct):
    """Answer of `POST /voice`, in the order asked."""

    voices: list[Voice]


class SessionReport(msgspec.Struct, kw_only=True):
    """One voice session; a resumed one is one session.

    `close_code` is that of its latest WebSocket to close (1006: no close frame), `close_clean` tells whether both
    sides sent a close frame. `trailing_silence` counts the silence frames at the end of what was received.
    """

    ssrc: int
    state: SessionState
    mode: str | None
    resumed: int
    packets: int
    audio_packets: int
    lost: int
    duplicated: int
    out_of_order: int
    nonce_reused: int
    decrypt_failed: int
    wrong_header: int
    wrong_timestamp: int
    rtp_before_speaking: int
    keepalives: int
    first_arrival_ns: int | None
    last_arrival_ns: int | None
    speaking: list[tuple[int, int]]
    close_code: int | None
    close_by: CloseSide | None
    close_clean: bool | None
    trailing_silence: int


class GuildReport(msgspec.Struct, kw_only=True):
    """One guild with its sessions, oldest first."""

    guild: str
    channel: str
    endpoint: str
    sampled: bool
    connected: bool
    heard: bool
    sessions: list[SessionReport]


class Report(msgspec.Struct, kw_only=True):
    """Answer of `GET /report`.

    `unknown_ssrc` are RTP packets of no live session, `unreadable` short datagrams of unknown kind or sender,
    `kernel_drops` datagrams the emulator itself was too slow for: where there are any, `lost` is not the sender's.
    """

    guilds: int
    connected: int
    heard: int
    packets: int
    audio_packets: int
    lost: int
    duplicated: int
    out_of_order: int
    nonce_reused: int
    decrypt_failed: int
    wrong_header: int
    wrong_timestamp: int
    rtp_before_speaking: int
    keepalives: int
    unknown_ssrc: int
    unreadable: int
    kernel_drops: int
    skew_ms: Percentiles
    spread_ms: Percentiles
    lateness_ms: Percentiles
    guild_rows: list[GuildReport] | None = None


class SessionPackets(msgspec.Struct, kw_only=True):
    """The recording of one session of a sampled guild, oldest packet first; all lists are of one length."""

    ssrc: int
    sequence: list[int]
    timestamp: list[int]
    nonce: list[int]
    arrival_ns: list[int]
    payload: list[int]


class GuildPackets(msgspec.Struct, kw_only=True):
    """Answer of `GET /guilds/{guild}/packets`: sessions, and the Opus frames their `payload` ids stand for.

    A frame that the shared table had to forget is missing from `payloads`. Id 0 is silence.
    """

    guild: str
    sessions: list[SessionPackets]
    payloads: dict[int, bytes]


class Failure(msgspec.Struct):
    """Body of every refusal."""

    error: str
