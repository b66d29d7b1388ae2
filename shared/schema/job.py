"""Jobs: what a user asks for, as strict JSON. An unknown type, a missing or an extra field fails that job alone.

The records have their final form; `unserved` names what this version does not do yet.
Source: design section 4, "Jobs in".
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from shared.errors import ErrorCode, JobError
from shared.schema.records import OpusRecord, SourceRecord, VoiceRecord
from shared.text import in_words
from shared.voice_servers import ENDPOINT_PATTERN

Snowflake = Annotated[
    str, Meta(pattern=r"^[1-9][0-9]{14,19}$(?!\n)", description="Discord id: 15 to 20 decimal digits")
]
Name = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$(?!\n)", description="1 to 64 of A-Z a-z 0-9 . _ -")
]
JobId = Annotated[str, Meta(min_length=1, max_length=128, description="chosen by the sender; done once within 24 h")]
Url = Annotated[str, Meta(min_length=1, max_length=2048, description="http(s) URL, or a file below the media folder")]
HeaderName = Annotated[str, Meta(pattern=r"^(Authorization|Cookie|User-Agent|Referer|Accept|Icy-MetaData)$(?!\n)")]
HeaderValue = Annotated[
    str, Meta(min_length=1, max_length=4096, pattern=r"^[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?$(?!\n)")
]
Endpoint = Annotated[str, Meta(pattern=ENDPOINT_PATTERN, description="a host, or host:port with a port of 1 to 65535")]
SourceKind = Literal["auto", "live", "file"]
UnixMs = Annotated[int, Meta(ge=0, description="unix milliseconds")]


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A record that refuses fields it does not know."""


class OpusOptions(OpusRecord, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a rendition is encoded. The rest is fixed: 48 kHz, stereo, 20 ms, audio application."""

    bitrate: Annotated[int, Meta(ge=16_000, le=512_000, description="bits per second")] = 96_000
    vbr: bool = True
    fec: bool = False
    expected_loss: Annotated[int, Meta(ge=0, le=100, description="percent, used by in-band FEC")] = 0
    ladder: tuple[int, ...] = ()


class SourceSpec(SourceRecord, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a broadcast plays: one `url`, or a `playlist`."""

    url: Url | None = None
    playlist: tuple[Url, ...] = ()
    kind: Annotated[
        SourceKind,
        Meta(description="live: opened again for ever; file: an end is an end; auto: told apart by what comes"),
    ] = "auto"
    loop: bool = False
    shuffle: bool = False
    seed: int | None = None
    crossfade_ms: Annotated[int, Meta(ge=0, le=30_000)] = 0
    gain_db: Annotated[float, Meta(ge=-60, le=20)] = 0.0
    loudness_lufs: Annotated[float, Meta(ge=-50, le=-5)] | None = None
    fallback: tuple[Url, ...] = ()
    lead_ms: (
        Annotated[
            int,
            Meta(
                ge=200,
                le=60_000,
                description="how far ahead frames are published, and by how much live input is late; "
                "if not given, 30,000 and 1,000",
            ),
        ]
        | None
    ) = None

    headers: Annotated[
        dict[HeaderName, HeaderValue],
        Meta(max_length=8, description="sent with each request; Authorization and Cookie to the URL's own host alone"),
    ] = msgspec.field(default_factory=dict)


class Voice(VoiceRecord, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Voice credentials as Discord gave them to the bot that holds the gateway."""

    user_id: Snowflake
    session_id: Annotated[str, Meta(min_length=1, max_length=256)]
    token: Annotated[str, Meta(min_length=1, max_length=256)]
    endpoint: Endpoint


SealedVoice = Annotated[
    str,
    Meta(pattern=r"^sealed2?:", max_length=4096, description="`Voice` sealed with GUILDCAST_SEAL_KEY: guildcast seal"),
]
SpeakingFlag = Literal["microphone", "soundshare", "priority"]
OnKick = Literal["stay_out", "rejoin"]


class _Job(Strict, tag_field="type", frozen=True, kw_only=True):
    v: Literal[1]
    id: JobId
    at: UnixMs | None = None


class BroadcastStart(_Job, tag="broadcast.start", frozen=True, kw_only=True):
    broadcast: Name
    source: SourceSpec
    opus: OpusOptions = OpusOptions()


class BroadcastUpdate(_Job, tag="broadcast.update", frozen=True, kw_only=True):
    broadcast: Name
    source: SourceSpec | None = None
    opus: OpusOptions | None = None


class BroadcastSkip(_Job, tag="broadcast.skip", frozen=True, kw_only=True):
    broadcast: Name


class BroadcastPause(_Job, tag="broadcast.pause", frozen=True, kw_only=True):
    broadcast: Name


class BroadcastResume(_Job, tag="broadcast.resume", frozen=True, kw_only=True):
    broadcast: Name


class BroadcastStop(_Job, tag="broadcast.stop", frozen=True, kw_only=True):
    broadcast: Name
    leave: bool = False


class _GuildJob(_Job, frozen=True, kw_only=True):
    guild: Snowflake
    bot: Name = "main"


class GuildJoin(_GuildJob, tag="guild.join", frozen=True, kw_only=True):
    channel: Snowflake
    broadcast: Name
    on_kick: OnKick = "stay_out"
    speaking: Annotated[
        tuple[SpeakingFlag, ...], Meta(min_length=1, max_length=3, description="sound without a flag is not heard")
    ] = ("microphone",)
    voice: Voice | SealedVoice | None = None


class GuildVoice(_GuildJob, tag="guild.voice", frozen=True, kw_only=True):
    channel: Snowflake
    voice: Voice | SealedVoice


class GuildTune(_GuildJob, tag="guild.tune", frozen=True, kw_only=True):
    broadcast: Name


class GuildMove(_GuildJob, tag="guild.move", frozen=True, kw_only=True):
    channel: Snowflake


class GuildPause(_GuildJob, tag="guild.pause", frozen=True, kw_only=True):
    pass


class GuildResume(_GuildJob, tag="guild.resume", frozen=True, kw_only=True):
    pass


class GuildLeave(_GuildJob, tag="guild.leave", frozen=True, kw_only=True):
    pass


class AnnounceTo(Strict, frozen=True, kw_only=True):
    guilds: tuple[Snowflake, ...] = ()
    broadcast: Name | None = None


class Announce(_Job, tag="announce", frozen=True, kw_only=True):
    announce: Name
    source: SourceSpec
    to: AnnounceTo
    mode: Literal["interrupt", "duck"] = "interrupt"
    underneath: Literal["pause", "continue"] = "continue"
    priority: int = 0


class AnnounceCancel(_Job, tag="announce.cancel", frozen=True, kw_only=True):
    announce: Name


class WorkerDrain(_Job, tag="worker.drain", frozen=True, kw_only=True):
    worker: Name
    deadline_ms: Annotated[int, Meta(ge=0)] | None = None


class WorkerUndrain(_Job, tag="worker.undrain", frozen=True, kw_only=True):
    worker: Name


ServedJob = BroadcastStart | BroadcastStop | GuildJoin | GuildVoice | GuildLeave
Job = (
    ServedJob
    | BroadcastUpdate
    | BroadcastSkip
    | BroadcastPause
    | BroadcastResume
    | GuildTune
    | GuildMove
    | GuildPause
    | GuildResume
    | Announce
    | AnnounceCancel
    | WorkerDrain
    | WorkerUndrain
)

_decoder: msgspec.json.Decoder[Job] = msgspec.json.Decoder(Job)
_MEANINGS: tuple[Meta, ...] = tuple(kind.__metadata__[0] for kind in (Snowflake, Name, Endpoint))  # type: ignore[attr-defined]
"""What a text shall be, for people, in place of the pattern that it has to match."""


class _JobHead(msgspec.Struct):
    id: Any = None
    type: Any = None


_head_decoder = msgspec.json.Decoder(_JobHead)
UNREADABLE = (msgspec.MsgspecError, RecursionError)
"""What decoding raises for a text that is no JSON, or is nested without end."""


def job_id_of(body: str) -> str | None:
    """The id of a job that may be wrong otherwise; None where there is no usable one."""
    try:
        found = _head_decoder.decode(body).id
    except UNREADABLE:
        return None
    return found if isinstance(found, str) and 0 < len(found) <= 128 else None


def decode_job(body: str) -> Job:
    """Read one job.

    Raises: JobError with `job_unreadable` (no JSON object) or `job_invalid`; the message names the field.
    """
    try:
        msgspec.json.decode(body, type=dict[str, Any])
    except UNREADABLE as error:
        raise JobError(f"not a JSON object: {in_words(error)}", code=ErrorCode.JOB_UNREADABLE) from None
    try:
        return _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise JobError(_explain(str(error), body)) from None


def _explain(text: str, body: str) -> str:
    if text.endswith("`$.type`"):
        allowed = ", ".join(sorted(str(kind.__struct_config__.tag) for kind in Job.__args__))
        return f"type: {_head_decoder.decode(body).type!r} is unknown, allowed: {allowed}"
    for meaning in _MEANINGS:
        text = text.replace(f"`str` matching regex {meaning.pattern!r}", str(meaning.description))
    return text.replace("$.", "").replace("`$`", "the job")


def unserved(job: Job) -> str | None:
    """The type or field of a well-formed job that this version does not serve, or None.

    Where a field is served with its default value only, asking for the default is fine.
    """
    if not isinstance(job, ServedJob):
        return f"type: {job.__struct_config__.tag}"
    fields: dict[str, bool] = {"at": job.at is not None}
    if isinstance(job, BroadcastStart):
        source = job.source
        fields |= {
            "source.playlist": bool(source.playlist),
            "source.shuffle": source.shuffle,
            "source.seed": source.seed is not None,
            "source.crossfade_ms": source.crossfade_ms != 0,
            "source.gain_db": source.gain_db != 0,
            "source.loudness_lufs": source.loudness_lufs is not None,
            "source.fallback": bool(source.fallback),
            "opus.ladder": bool(job.opus.ladder),
        }
    return next((name for name, used in fields.items() if used), None)


def check_sense(job: Job) -> None:
    """Rules that types cannot say.

    Raises: JobError naming the field.
    """
    if isinstance(job, BroadcastStart | Announce) and (job.source.url is None) == (not job.source.playlist):
        raise JobError("source: give either url or playlist")
    if isinstance(job, BroadcastStart) and not job.opus.vbr and job.opus.bitrate > 510_000:
        raise JobError("opus.bitrate: constant bit rate goes up to 510000")


def digest(body: str) -> str:
    """Digest of what a job says, not of how it is spaced or ordered; two bodies that mean the same are the same."""
    try:
        said = msgspec.json.encode(msgspec.json.decode(body), order="deterministic")
    except UNREADABLE:
        said = body.encode()
    return hashlib.sha256(said).hexdigest()


def _fields(kind: type[msgspec.Struct]) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(kind)}


JOB_FIELDS = frozenset({"type"}).union(
    *(_fields(kind) for kind in Job.__args__), *(_fields(kind) for kind in (SourceSpec, OpusOptions, AnnounceTo))
)
"""Names of all fields that a job may have, but for those of credentials."""
