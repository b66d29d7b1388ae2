"""Voice credentials at rest: sealed with AES-256-GCM before they are stored.

A sealed value is the text `sealed:` + base64(nonce 12 bytes | ciphertext | tag 16 bytes).
Without a key, values are stored in clear; the coordinator warns of it once at its start.
"""

from __future__ import annotations

import base64
import binascii
import os

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shared.errors import ErrorCode, VoiceError
from shared.schema.records import VoiceRecord, kept

_MARK = "sealed:"
_NONCE_BYTES = 12
_AAD = b"guildcast voice credentials"


class VoiceSeal:
    """Seals and opens voice credentials with the operator's key, or passes them where there is none."""

    def __init__(self, key_base64: str | None) -> None:
        self._aead = AESGCM(base64.b64decode(key_base64)) if key_base64 else None

    def seal(self, voice: VoiceRecord | str) -> VoiceRecord | str:
        """Form in which credentials are stored; what came sealed stays as it is."""
        if isinstance(voice, str):
            return voice
        if self._aead is None:
            return kept(voice, VoiceRecord)
        nonce = os.urandom(_NONCE_BYTES)
        return _MARK + base64.b64encode(nonce + self._aead.encrypt(nonce, msgspec.json.encode(voice), _AAD)).decode()

    def open(self, stored: VoiceRecord | str) -> VoiceRecord:
        """Credentials in clear.

        Raises: VoiceError (`voice_credentials_rejected`) when the key is missing or not the one that sealed them.
        """
        if not isinstance(stored, str):
            return stored
        if self._aead is not None:
            try:
                sealed = base64.b64decode(stored.removeprefix(_MARK), validate=True)
                clear = self._aead.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _AAD)
                return msgspec.json.decode(clear, type=VoiceRecord)
            except (InvalidTag, binascii.Error, ValueError, msgspec.MsgspecError):
                pass  # one message for all ways in which it cannot be opened
        raise VoiceError(
            "voice credentials are sealed with another key than GUILDCAST_SEAL_KEY of this process",
            code=ErrorCode.VOICE_CREDENTIALS_REJECTED,
        )
