"""Secrets at rest: voice credentials, and those of sources, sealed with AES-256-GCM before they are stored.

    sealed2:  voice credentials, bound to their bot and guild
    sealed2:  what a source's URL and headers hold, bound to its broadcast
    sealed:   voice credentials, as they were sealed before: still opened

Behind the mark stands base64(nonce 12 bytes | ciphertext | tag 16 bytes); what it is bound to is the associated data.
Without a key, values are stored in clear; the coordinator warns of it once at its start. With one, whoever opens them
refuses what is in clear: it was put there by somebody else.
"""

from __future__ import annotations

import base64
import binascii
import os
from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shared.errors import ErrorCode, SourceError, VoiceError
from shared.schema.records import BroadcastSpec, SourceRecord, VoiceRecord, kept
from shared.urls import shown

_OLD_MARK, _MARK = "sealed:", "sealed2:"
_NONCE_BYTES = 12
_OLD_VOICE = b"guildcast voice credentials"
_SOURCE = b"guildcast source credentials of "
_Secret = TypeVar("_Secret", bound=msgspec.Struct)


class _SourceSecrets(msgspec.Struct, frozen=True):
    """What is sealed of a source."""

    url: str | None
    headers: dict[str, str]


def _bound_voice(bot: str, guild: str) -> bytes:
    return f"guildcast voice credentials of {bot}:{guild}".encode()


class Seal:
    """Seals and opens secrets with the operator's key, or passes them where there is none."""

    def __init__(self, key_base64: str | None) -> None:
        self._aead = AESGCM(base64.b64decode(key_base64)) if key_base64 else None

    def seal_voice(self, voice: VoiceRecord | str, bot: str, guild: str) -> VoiceRecord | str:
        """Form in which credentials are stored; what came sealed stays as it is."""
        if isinstance(voice, str):
            return voice
        if self._aead is None:
            return kept(voice, VoiceRecord)
        return _MARK + self._sealed(self._aead, voice, _bound_voice(bot, guild))

    def open_voice(self, stored: VoiceRecord | str, bot: str, guild: str) -> VoiceRecord:
        """Credentials in clear.

        Raises: VoiceError (`voice_credentials_rejected`) when the key is missing or not the one that sealed them, when
            they are another guild's or bot's, or are in clear although there is a key.
        """
        voice = self._opened_voice(stored, bot, guild)
        if voice is None:
            raise VoiceError(
                "voice credentials are not sealed for this bot and guild with GUILDCAST_SEAL_KEY of this process",
                code=ErrorCode.VOICE_CREDENTIALS_REJECTED,
            )
        return voice

    def seal_anew(self, stored: VoiceRecord | str, bot: str, guild: str) -> VoiceRecord | str:
        """What a version before stored, in clear or bound to nothing, in the form of this one."""
        if self._aead is None or (isinstance(stored, str) and not stored.startswith(_OLD_MARK)):
            return stored
        voice = stored if isinstance(stored, VoiceRecord) else self._opened_voice(stored, bot, guild)
        return stored if voice is None else self.seal_voice(voice, bot, guild)

    def is_same_voice(
        self, one: VoiceRecord | str | None, other: VoiceRecord | str | None, bot: str, guild: str
    ) -> bool:
        """Whether both are the same credentials, however they are stored; what cannot be opened is the same as none."""
        if one is None or other is None or one == other:
            return one == other and one is not None
        opened = self._opened_voice(one, bot, guild)
        return opened is not None and opened == self._opened_voice(other, bot, guild)

    def _opened_voice(self, stored: VoiceRecord | str, bot: str, guild: str) -> VoiceRecord | None:
        if not isinstance(stored, str):
            return stored if self._aead is None else None
        if stored.startswith(_MARK):
            return self._opened(stored.removeprefix(_MARK), VoiceRecord, _bound_voice(bot, guild))
        return self._opened(stored.removeprefix(_OLD_MARK), VoiceRecord, _OLD_VOICE)

    def seal_source(self, spec: BroadcastSpec) -> BroadcastSpec:
        """Form in which a broadcast is stored: its source's URL shows host and path, and no headers."""
        source = spec.source
        bare = shown(source.url) if source.url is not None else None
        if self._aead is None or (bare == source.url and not source.headers):
            return spec
        secrets = _SourceSecrets(source.url, source.headers)
        sealed = _MARK + self._sealed(self._aead, secrets, _SOURCE + spec.broadcast.encode())
        return msgspec.structs.replace(
            spec, source=msgspec.structs.replace(source, url=bare, headers={}), sealed=sealed
        )

    def open_source(self, spec: BroadcastSpec) -> SourceRecord:
        """The source in clear.

        Raises: SourceError (`source_sealed`) when the key is missing or not the one that sealed it.
        """
        if not spec.sealed:
            return spec.source
        bound = _SOURCE + spec.broadcast.encode()
        secrets = self._opened(spec.sealed.removeprefix(_MARK), _SourceSecrets, bound)
        if secrets is None:
            raise SourceError(
                "the source's credentials are sealed with another key than GUILDCAST_SEAL_KEY of this process",
                code=ErrorCode.SOURCE_SEALED,
            )
        return msgspec.structs.replace(spec.source, url=secrets.url, headers=secrets.headers)

    @staticmethod
    def _sealed(aead: AESGCM, secret: msgspec.Struct, bound: bytes) -> str:
        nonce = os.urandom(_NONCE_BYTES)
        return base64.b64encode(nonce + aead.encrypt(nonce, msgspec.json.encode(secret), bound)).decode()

    def _opened(self, text: str, kind: type[_Secret], bound: bytes) -> _Secret | None:
        """What was sealed; None for all ways in which it cannot be opened."""
        if self._aead is None:
            return None
        try:
            sealed = base64.b64decode(text, validate=True)
            clear = self._aead.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], bound)
            return msgspec.json.decode(clear, type=kind)
        except (InvalidTag, binascii.Error, ValueError, msgspec.MsgspecError):
            return None
