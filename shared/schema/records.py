"""Records that the coordinator and the workers keep on Redis. Readers ignore fields they do not know.

What a job holds strictly stands here once more without limits: a field, a word or a larger number that only the next
version knows must not keep this one from reading the rest.

Source: design section 4, "State" and "What a worker shall do".
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

_Kept = TypeVar("_Kept", bound=msgspec.Struct)


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A record that ignores unknown fields, so that two versions can run side by side."""


class OpusRecord(Record, frozen=True, kw_only=True):
    """`OpusOptions` of a job, as they are kept."""

    bitrate: int = 96_000
    vbr: bool = True
    fec: bool = False
    expected_loss: int = 0
    ladder: tuple[int, ...] = ()


FILE_LEAD_MS, LIVE_LEAD_MS = 30_000, 1_000


class SourceRecord(Record, frozen=True, kw_only=True):
    """`SourceSpec` of a job, as it is kept. A `kind` that is not known here counts as `auto`."""

    url: str | None = None
    playlist: tuple[str, ...] = ()
    kind: str = "auto"
    loop: bool = False
    shuffle: bool = False
    seed: int | None = None
    crossfade_ms: int = 0
    gain_db: float = 0.0
    loudness_lufs: float | None = None
    fallback: tuple[str, ...] = ()
    lead_ms: int | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    """Sent with each request. Stored here only where there is no key to seal them with."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(kind={self.kind!r}, loop={self.loop})"

    def lead_ms_of(self, *, live: bool) -> int:
        """The lead in force."""
        return self.lead_ms or (LIVE_LEAD_MS if live else FILE_LEAD_MS)


class VoiceRecord(Record, frozen=True, kw_only=True):
    """`Voice` of a job, as it is kept, where there is no key to seal it with."""

    user_id: str
    session_id: str
    token: str
    endpoint: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}(user_id={self.user_id!r}, endpoint={self.endpoint!r})"


def kept(value: msgspec.Struct, kind: type[_Kept]) -> _Kept:
    """The copy that is kept of what a job holds strictly."""
    return msgspec.convert(value, kind, from_attributes=True)


class GuildSpec(Record, frozen=True, kw_only=True):
    """What a guild shall hear, and with which credentials (`voice` may be sealed)."""

    bot: str
    guild: str
    channel: str
    broadcast: str
    speaking: tuple[str, ...] = ("microphone",)
    on_kick: str = "stay_out"
    voice: VoiceRecord | str | None = None
    job: str = ""


GuildState = Literal[
    "wanted",
    "connecting",
    "playing",
    "idle",
    "alone",
    "suppressed",
    "reconnecting",
    "voice_wanted",
    "stopped",
    "failed",
]


class GuildStatus(Record, frozen=True, kw_only=True):
    """How a guild is doing, as told by the worker that holds it, or by the coordinator where none does."""

    state: GuildState
    at: int
    worker: str = ""
    slot: int | None = None
    code: str = ""
    message: str = ""
    close_code: int | None = None
    retry_at: int | None = None
    """Unix ms: when a failed guild is tried, or asked for, again."""
    final: bool = False
    """Nothing more is tried until a new `guild.join` or `guild.voice`."""
    listeners: int | None = None
    """Other users in the channel; None where that is not known."""
    dave_protocol_version: int | None = None
    """0: transport encryption only; None: not known yet."""
    privacy_code: str = ""
    """Of the DAVE group, as Discord's clients show it; empty without a group."""
    mls_epoch: int | None = None
    gateway_version: int = 0
    backend_version: str = ""
    """Versions of the voice server's parts, `voice/rtc_worker`, such as `0.11.0/0.4.9`."""


class BroadcastSpec(Record, frozen=True, kw_only=True):
    """A programme and its one run on air. `run` names the life from start to stop."""

    broadcast: str
    run: int
    source: SourceRecord
    opus: OpusRecord
    job: str = ""
    sealed: str = ""
    """The source's whole URL and its headers, where there is a key; `source` shows the rest."""


BroadcastState = Literal["starting", "playing", "paused", "stalled", "ended"]


class BroadcastStatus(Record, frozen=True, kw_only=True):
    """How a broadcast is doing, as told by the encode worker that holds its source."""

    state: BroadcastState
    at: int
    worker: str = ""
    epoch_us: int = 0
    encodes: int = 0
    """Encoders started for this run so far, takeovers and retries of the source included."""
    silent_ms: int = 0
    """For how long listeners heard nothing since the run began, although something should have played."""
    title: str = ""
    """What is on air, as the source says."""
    delay_ms: int = 0
    """How late live input is heard; 0 of a file."""
    level_db: int | None = None
    """Peak of the sound of the last seconds, in dB of full scale; -128: zeros alone, None: there was none yet."""
    attempt: int = 0
    """How often in a row the source could not be opened or read, while it is stalled."""
    code: str = ""
    message: str = ""


WorkerRole = Literal["fanout", "encode"]


class WorkerStats(Record, frozen=True, kw_only=True):
    """Figures of a worker since its start, renewed with its lease."""

    at_ns: int = 0
    """When they were read, on the worker's own monotonic clock."""
    guilds: int = 0
    sources: int = 0
    held: int | None = None
    """Guilds that the headroom told with this counts already; None: as many as it lacks to the capacity."""
    packets_sent: int = 0
    packets_dropped: int = 0
    ticks_skipped: int = 0
    underruns: int = 0
    dave_epochs: int = 0
    """Epochs that groups entered."""
    dave_failures: int = 0
    """Messages of encrypted groups that could not be used, or did not come."""
    dave_downgrades: int = 0
    """Orders of a server to fall back from end-to-end encryption."""
    dave_ready_ms_max: int = 0
    """Longest time from somebody else in the channel to a group that can send."""
    clear_frames_refused: int = 0
    """Frames that were not sent because they could not be encrypted end to end."""
    udp_paths_lost: int = 0
    """Sessions whose sound did not leave, or did not arrive, any more."""
    messages_malformed: int = 0
    """Messages of voice gateways that could not be read."""
    clock_error_us: int = 0
    """By how much the common clock that it lives by is off what it measured, which it slews."""
    lateness_p999_us: int = 0
    cpu_ns: int = 0
    """Worker and its children, user and system."""


class WorkerRecord(Record, frozen=True, kw_only=True):
    """A worker process. `id` is new at every start, `name` is stable."""

    id: str
    name: str
    role: WorkerRole
    host: str
    region: str = ""
    capacity: int
    headroom: int
    stats: WorkerStats = WorkerStats()
    gone: bool = False
    """Set by the supervisor that saw the process end."""


class GuildWant(Record, frozen=True, kw_only=True):
    """Entry of a fan-out worker's `want`: hold this guild under this generation."""

    generation: int
    spec: GuildSpec


class SourceWant(Record, frozen=True, kw_only=True):
    """Entry of an encode worker's `want`: publish this run with `term`; `stop` asks for the end of the run."""

    generation: int
    term: int
    spec: BroadcastSpec
    stop: bool = False


class JobStatus(Record, frozen=True, kw_only=True):
    """State of a job, kept for 24 h."""

    state: Literal["queued", "done", "failed"]
    at: int
    code: str = ""
    message: str = ""
