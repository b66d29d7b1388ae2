"""What passes over the control interface about bots and their guilds."""

import msgspec

from tests.emulator.records import ChannelKind


class GatewayLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bot may do, and how patient the main gateway is.

    Defaults are Discord's, as far as they are known. `shards` is what `/gateway/bot` recommends. `replay_events` is
    kept for a resume, `resume_window_s` how long a session without a connection lives.
    """

    max_concurrency: int = 1
    identify_every_s: float = 5.0
    identifies_per_day: int = 1000
    commands: int = 120
    commands_every_s: float = 60.0
    payload_bytes: int = 4096
    requests_per_s: int = 50
    shards: int = 1
    guilds_per_shard: int = 2500
    heartbeat_interval_ms: int = 41_250
    resume_window_s: float = 60.0
    replay_events: int = 8192


class ChannelPlan(msgspec.Struct, forbid_unknown_fields=True):
    """A channel of a guild.

    `user_limit` 0 means any number. `connect` and `speak` are what bots are allowed there: without the first a join is
    passed over in silence, without the second the bot stays suppressed on a stage. `members` and `ghosts` are there at
    least, as in `WantedVoice`.
    """

    channel: str
    kind: ChannelKind = "stage"
    user_limit: int = 0
    connect: bool = True
    speak: bool = True
    members: int | None = None
    ghosts: int | None = None


class GuildPlan(msgspec.Struct, forbid_unknown_fields=True):
    """A guild that a bot is a member of; channels it has already are changed."""

    guild: str
    channels: list[ChannelPlan] = []


class BotRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /bots`; a bot that exists keeps its token and joins more guilds.

    `intents` are the privileged ones it may ask for.
    """

    user_id: str | None = None
    guilds: list[GuildPlan] = []
    intents: int = 0


class Bot(msgspec.Struct):
    """Answer of `POST /bots`: how to log in. `api_url` is the base of the REST interface."""

    user_id: str
    token: str
    api_url: str
    gateway_url: str


class VoiceStateRow(msgspec.Struct, kw_only=True):
    """Where one user is."""

    guild: str
    channel: str
    user_id: str
    self_mute: bool
    self_deaf: bool
    suppress: bool


class MainSessionRow(msgspec.Struct, kw_only=True):
    """One main session that has not ended; `commands` counts what its present connection sent."""

    user_id: str
    shard: tuple[int, int]
    connected: bool
    intents: int
    sequence: int
    resumed: int
    commands: int


class MainReport(msgspec.Struct, kw_only=True):
    """Answer of `GET /gateway`.

    `identifies` and `resumes` were accepted, `refused` are closes and invalid sessions for which a client is to blame.
    """

    sessions: list[MainSessionRow]
    voice_states: list[VoiceStateRow]
    channel_status: dict[str, str]
    identifies: int
    resumes: int
    refused: dict[str, int]
