"""The JSON objects of the API that clients of voice look at, with what they cannot do without. Pure."""

from collections.abc import Iterable
from datetime import UTC, datetime

from tests.emulator.main.wire import API_VERSION, ChannelType
from tests.emulator.main.world import Account, Channel, Guild, VoiceState

Shape = dict[str, object]

_JOINED_AT = datetime(2026, 1, 1, tzinfo=UTC).isoformat()


def user(user_id: str) -> Shape:
    """A bot's user."""
    return {
        "id": user_id,
        "username": f"bot-{user_id[-4:]}",
        "discriminator": "0000",
        "global_name": None,
        "avatar": None,
        "bot": True,
        "flags": 0,
        "public_flags": 0,
        "mfa_enabled": True,
        "verified": True,
        "locale": "en-US",
        "email": None,
    }


def member(user_id: str) -> Shape:
    """A guild member without roles."""
    return {
        "user": user(user_id),
        "nick": None,
        "avatar": None,
        "roles": [],
        "joined_at": _JOINED_AT,
        "deaf": False,
        "mute": False,
        "flags": 0,
        "pending": False,
        "communication_disabled_until": None,
    }


def application(account: Account) -> Shape:
    """The application of a bot."""
    return {
        "id": account.user_id,
        "name": "local bot",
        "icon": None,
        "description": "",
        "bot_public": False,
        "bot_require_code_grant": False,
        "owner": user(account.user_id),
        "team": None,
        "verify_key": "0" * 64,
        "flags": 0,
        "tags": [],
    }


def channel(one: Channel) -> Shape:
    """A channel with voice."""
    return {
        "id": one.channel,
        "guild_id": one.guild,
        "type": int(ChannelType.STAGE if one.stage else ChannelType.VOICE),
        "name": f"{one.plan.kind}-{one.channel[-4:]}",
        "position": 0,
        "permission_overwrites": [],
        "bitrate": 64_000,
        "user_limit": one.plan.user_limit,
        "rtc_region": None,
        "video_quality_mode": 1,
        "rate_limit_per_user": 0,
        "nsfw": False,
        "parent_id": None,
        "last_message_id": None,
        "flags": 0,
    }


def guild(one: Guild, states: Iterable[VoiceState], account: Account) -> Shape:
    """A guild as `GUILD_CREATE` tells it to this bot."""
    everyone = {
        "id": one.guild,
        "name": "@everyone",
        "permissions": str(1 << 10 | 1 << 20 | 1 << 21),
        "position": 0,
        "color": 0,
        "colors": {"primary_color": 0, "secondary_color": None, "tertiary_color": None},
        "hoist": False,
        "managed": False,
        "mentionable": False,
        "flags": 0,
    }
    return {
        "id": one.guild,
        "name": f"guild-{one.guild[-4:]}",
        "icon": None,
        "owner_id": one.guild,
        "joined_at": _JOINED_AT,
        "large": False,
        "unavailable": False,
        "member_count": len(one.bots) + 1,
        "members": [member(account.user_id)],
        "roles": [everyone],
        "channels": [channel(each) for each in one.channels.values()],
        "voice_states": [_without_guild(voice_state(state)) for state in states],
        "threads": [],
        "presences": [],
        "stage_instances": [],
        "guild_scheduled_events": [],
        "emojis": [],
        "stickers": [],
        "soundboard_sounds": [],
        "features": [],
        "afk_channel_id": None,
        "afk_timeout": 300,
        "system_channel_id": None,
        "system_channel_flags": 0,
        "rules_channel_id": None,
        "public_updates_channel_id": None,
        "verification_level": 0,
        "default_message_notifications": 0,
        "explicit_content_filter": 0,
        "mfa_level": 0,
        "nsfw_level": 0,
        "premium_tier": 0,
        "preferred_locale": "en-US",
        "application_id": None,
        "vanity_url_code": None,
        "description": None,
        "banner": None,
        "splash": None,
    }


def voice_state(state: VoiceState, *, left: bool = False) -> Shape:
    """Where a user is, or that the user left."""
    return {
        "guild_id": state.guild,
        "channel_id": None if left else state.channel,
        "user_id": state.user_id,
        "member": member(state.user_id),
        "session_id": state.session_id,
        "deaf": False,
        "mute": False,
        "self_deaf": state.self_deaf,
        "self_mute": state.self_mute,
        "self_video": False,
        "suppress": state.suppress,
        "request_to_speak_timestamp": state.request_to_speak,
    }


def ready(account: Account, session_id: str, shard: tuple[int, int], guilds: Iterable[str], resume_url: str) -> Shape:
    """What `READY` tells."""
    return {
        "v": API_VERSION,
        "user": user(account.user_id),
        "guilds": [{"id": each, "unavailable": True} for each in guilds],
        "session_id": session_id,
        "session_type": "normal",
        "resume_gateway_url": resume_url,
        "shard": list(shard),
        "application": {"id": account.user_id, "flags": 0},
        "private_channels": [],
        "relationships": [],
        "geo_ordered_rtc_regions": ["local"],
        "_trace": [],
    }


def _without_guild(shape: Shape) -> Shape:
    del shape["guild_id"]
    return shape
