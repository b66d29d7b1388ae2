"""What passes over the control interface."""

from typing import Annotated, Literal

import msgspec

ChannelKind = Literal["voice", "stage"]
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
    """A guild that shall be joined, by the bot or by another user.

    `kind` of a channel not seen before: a stage has no end-to-end encryption. `members` and `ghosts`: at least so many
    are in the channel; with neither, one ghost listens.
    """

    guild: str
    channel: str
    user: str | None = None
    kind: ChannelKind | None = None
    members: Annotated[int, msgspec.Meta(ge=0, le=100)] | None = None
    ghosts: Annotated[int, msgspec.Meta(ge=0, le=1000)] | None = None


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


class WantedMember(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /guilds/{guild}/members`.

    `channel` None: where the bot was sent last. A member answers the gateway after `delay_ms`; with 0 its commits come
    before those of any client.
    """

    user: Annotated[str, msgspec.Meta(pattern="^[0-9]{1,19}$")] | None = None
    channel: str | None = None
    delay_ms: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 10


class JoinedMember(msgspec.Struct):
    """Answer of `POST /guilds/{guild}/members`."""

    user: str
    ssrc: int


class WantedSpeech(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /guilds/{guild}/members/{user}/speech`: Opus frames of 20 ms, or seconds of a tone."""

    frames: list[bytes] = []
    seconds: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0
    hertz: Annotated[int, msgspec.Meta(ge=20, le=20_000)] = 440


class WantedGhosts(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `PUT /guilds/{guild}/ghosts`: let exactly so many be there."""

    n: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    channel: str | None = None


class HearingReport(msgspec.Struct, kw_only=True):
    """What a member got of one sender, counted from the member's op 22 on; what came before is `early`.

    `failed_at_start` are those of `failed` before the first decrypted one after that op 22.
    """

    received: int
    decrypted: int
    failed: int
    failed_at_start: int
    early: int
    first_decrypted_ns: int | None
    last_decrypted_ns: int | None
    last_failed_ns: int | None
    longest_gap_ms: float


class MemberReport(msgspec.Struct, kw_only=True):
    """One member. `since_ns`: since when it is in a group that is in force; `executed_ns`: its last op 22."""

    user: str
    ssrc: int
    gone: bool
    since_ns: int | None
    executed_ns: int | None
    mls_epoch: int | None
    group_size: int
    privacy_code: str | None
    said: int
    speaking: bool
    hearing: dict[str, HearingReport]


class ChannelReport(msgspec.Struct, kw_only=True):
    """One channel. `group` are the users of its MLS group as the gateway knows them.

    `codes_equal`: all members that are in force have the same privacy code; None where there is none.
    """

    channel: str
    kind: ChannelKind
    users: list[str]
    ghosts: int
    dave_version: int
    mls_epoch: int | None
    in_transition: bool
    group: list[str]
    commits_dropped: int
    codes_equal: bool | None
    members: list[MemberReport]


class ToldReport(msgspec.Struct, kw_only=True):
    """What a client said about its group: op 26, 28, 28 that were announced, 23, 31."""

    key_packages: int
    commits: int
    commits_announced: int
    ready: int
    invalid: int


class SessionReport(msgspec.Struct, kw_only=True):
    """One voice session; a resumed one is one session.

    `close_code` is that of its latest WebSocket to close (1006: no close frame), `close_clean` tells whether both
    sides sent a close frame. `trailing_silence` counts the silence frames at the end of what was received.
    `in_the_clear` are frames that should have been encrypted end to end (sampled guilds only), `audible_after_ms` is
    the time from op 4 to the first frame that a member could decrypt, `forwarded` are packets sent to this client,
    `not_taken` those that this machine had no room for. `silent_ticks` lie between two packets with sound, whatever was
    sent in them.
    """

    user: str
    channel: str
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
    in_the_clear: int
    silent_ticks: int
    forwarded: int
    not_taken: int
    heartbeats: int
    dave_version: int
    told: ToldReport | None
    audible_after_ms: float | None
    first_arrival_ns: int | None
    last_arrival_ns: int | None
    first_sound_ns: int | None
    last_sound_ns: int | None
    speaking: list[tuple[int, int]]
    close_code: int | None
    close_by: CloseSide | None
    close_clean: bool | None
    trailing_silence: int


class GuildReport(msgspec.Struct, kw_only=True):
    """One guild with its channels, and its sessions, oldest first; `channel` is where its bot was sent last."""

    guild: str
    channel: str
    endpoint: str
    sampled: bool
    connected: bool
    heard: bool
    sessions: list[SessionReport]
    channels: list[ChannelReport]


class Report(msgspec.Struct, kw_only=True):
    """Answer of `GET /report`.

    `gap_ms` are times between successive packets of one session, but for pauses that five silence frames announced.
    `unknown_ssrc` are RTP packets of no live session, `unreadable` short datagrams of unknown kind or sender,
    `kernel_drops` datagrams the emulator itself was too slow for: where there are any, `lost` is not the sender's.
    """

    at_ns: int
    """Monotonic time up to which packets are counted."""
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
    in_the_clear: int
    silent_ticks: int
    unknown_ssrc: int
    unreadable: int
    kernel_drops: int
    skew_ms: Percentiles
    spread_ms: Percentiles
    lateness_ms: Percentiles
    gap_ms: Percentiles
    guild_rows: list[GuildReport] | None = None


class SessionPackets(msgspec.Struct, kw_only=True):
    """The recording of one session of a sampled guild, oldest packet first; all lists are of one length."""

    ssrc: int
    sequence: list[int]
    timestamp: list[int]
    nonce: list[int]
    arrival_ns: list[int]
    payload: list[int]
    after_pause: list[bool]
    """Ticks are missing before it, and five silence frames announced that."""


class GuildPackets(msgspec.Struct, kw_only=True):
    """Answer of `GET /guilds/{guild}/packets`: sessions, and the Opus frames their `payload` ids stand for.

    A frame that the shared table had to forget is missing from `payloads`. Id 0 is silence, -1 a frame that no member
    could decrypt. Frames are Opus: where they were encrypted end to end, as a member decrypted them.
    """

    guild: str
    sessions: list[SessionPackets]
    payloads: dict[int, bytes]


class Listening(msgspec.Struct):
    """Answer of `GET /guilds/{guild}/channels`."""

    channels: list[ChannelReport]


class Failure(msgspec.Struct):
    """Body of every refusal."""

    error: str
