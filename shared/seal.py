"""Secrets at rest: voice credentials, and those of sources, sealed with AES-256-GCM before they are stored.

    sealed:   voice credentials
    sealed2:  what a source's URL and headers hold, bound to its broadcast

Behind the mark stands base64(nonce 12 bytes | ciphertext | tag 16 bytes). Without a key, values are stored in clear;
the coordinator warns of it once at its start.
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

_VOICE_MARK, _SOURCE_MARK = "sealed:", "sealed2:"
_NONCE_BYTES = 12
_VOICE = b"guildcast voice credentials"
_SOURCE = b"guildcast source credentials of "
_Secret = TypeVar("_Secret", bound=msgspec.Struct)


class _SourceSecrets(msgspec.Struct, frozen=True):
    """What is sealed of a source."""

    url: str | None
    headers: dict[str, str]


class Seal:
    """Seals and opens secrets with the operator's key, or passes them where there is none."""

    def __init__(self, key_base64: str | None) -> None:
        self._aead = AESGCM(base64.b64decode(key_base64)) if key_base64 else None

    def seal_voice(self, voice: VoiceRecord | str) -> VoiceRecord | str:
        """Form in which credentials are stored; what came sealed stays as it is."""
        if isinstance(voice, str):
            return voice
        if self._aead is None:
            return kept(voice, VoiceRecord)
        return _VOICE_MARK + self._sealed(self._aead, voice, _VOICE)

    def open_voice(self, stored: VoiceRecord | str) -> VoiceRecord:
        """Credentials in clear.

        Raises: VoiceError (`voice_credentials_rejected`) when the key is missing or not the one that sealed them.
        """
        if not isinstance(stored, str):
            return stored
        voice = self._opened(stored.removeprefix(_VOICE_MARK), VoiceRecord, _VOICE)
        if voice is None:
            raise VoiceError(
                "voice credentials are sealed with another key than GUILDCAST_SEAL_KEY of this process",
                code=ErrorCode.VOICE_CREDENTIALS_REJECTED,
            )
        return voice

    def is_same_voice(self, one: VoiceRecord | str | None, other: VoiceRecord | str | None) -> bool:
        """Whether both are the same credentials, however they are stored; what cannot be opened is the same as none."""
        if one is None or other is None or one == other:
            return one == other and one is not None
        try:
            return self.open_voice(one) == self.open_voice(other)
        except VoiceError:
            return False

    def seal_source(self, spec: BroadcastSpec) -> BroadcastSpec:
        """Form in which a broadcast is stored: its source's URL shows host and path, and no headers."""
        source = spec.source
        bare = shown(source.url) if source.url is not None else None
        if self._aead is None or (bare == source.url and not source.headers):
            return spec
        secrets = _SourceSecrets(source.url, source.headers)
        sealed = _SOURCE_MARK + self._sealed(self._aead, secrets, _SOURCE + spec.broadcast.encode())
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
        secrets = self._opened(spec.sealed.removeprefix(_SOURCE_MARK), _SourceSecrets, bound)
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
