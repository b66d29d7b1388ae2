"""`guildcast seal`: voice credentials as a job may carry them without showing them to whoever reads Redis."""

from __future__ import annotations

import msgspec

from shared.errors import ConfigError
from shared.schema.job import Voice
from shared.seal import Seal
from shared.settings import Settings
from shared.text import in_words


def seal_for_job(settings: Settings, text: str, bot: str, guild: str) -> str:
    """Seal credentials for one bot and guild.

    Args:
        text: JSON with `user_id`, `session_id`, `token`, `endpoint`.
    Returns: what goes into the field `voice` of `guild.join` or `guild.voice`.
    Raises: ConfigError: there is no key, or the text is not that.
    """
    if settings.seal_key is None:
        raise ConfigError("GUILDCAST_SEAL_KEY: (not set): needed to seal with, the same as the coordinator's")
    try:
        voice = msgspec.json.decode(text, type=Voice)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(
            f"standard input: {in_words(error)}, allowed: user_id, session_id, token and endpoint as JSON"
        ) from None
    return str(Seal(settings.seal_key.get_secret_value()).seal_voice(voice, bot, guild))
