"""Voice credentials at rest: sealed, opened with the same key only."""

from __future__ import annotations

import base64

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ErrorCode, VoiceError
from shared.schema.records import VoiceRecord
from shared.seal import VoiceSeal

KEY = base64.b64encode(bytes(range(32))).decode()
OTHER = base64.b64encode(bytes(range(1, 33))).decode()
VOICE = VoiceRecord(user_id="123456789012345678", session_id="the-session", token="the-token", endpoint="voice.example")


def sealed_by(key: str) -> str:
    sealed = VoiceSeal(key).seal(VOICE)
    assert isinstance(sealed, str)
    return sealed


def test_what_is_sealed_is_opened_with_the_same_key() -> None:
    """Credentials survive the store, on any process that has the key."""
    assert VoiceSeal(KEY).open(sealed_by(KEY)) == VOICE


def test_a_sealed_value_shows_nothing() -> None:
    """Neither token nor session can be read in what is stored."""
    sealed = sealed_by(KEY)
    inner = base64.b64decode(sealed.removeprefix("sealed:"))
    assert b"the-token" not in inner
    assert b"the-session" not in inner


def test_the_form_is_the_agreed_one() -> None:
    """`sealed:` + base64(nonce 12 | ciphertext | tag 16): a user's own bot can seal, too."""
    inner = base64.b64decode(sealed_by(KEY).removeprefix("sealed:"), validate=True)
    clear = AESGCM(bytes(range(32))).decrypt(inner[:12], inner[12:], b"guildcast voice credentials")
    assert msgspec.json.decode(clear, type=VoiceRecord) == VOICE


def test_no_two_sealed_values_are_alike() -> None:
    """A nonce is never used twice."""
    assert len({sealed_by(KEY) for _ in range(50)}) == 50


@pytest.mark.parametrize("key", [OTHER, None])
def test_another_key_or_none_does_not_open(key: str | None) -> None:
    """The guild fails with its own code; trying again would not help."""
    with pytest.raises(VoiceError) as caught:
        VoiceSeal(key).open(sealed_by(KEY))
    assert caught.value.code == ErrorCode.VOICE_CREDENTIALS_REJECTED


@given(st.binary(max_size=60).map(lambda data: "sealed:" + base64.b64encode(data).decode()) | st.text(max_size=40))
def test_garbage_does_not_open_and_raises_one_error(stored: str) -> None:
    """Whatever is stored in the place of credentials fails one guild."""
    with pytest.raises(VoiceError):
        VoiceSeal(KEY).open(stored)


@pytest.mark.parametrize("place", [0, 12, -1])
def test_a_changed_value_does_not_open(place: int) -> None:
    """Nonce, ciphertext and tag are all authenticated."""
    inner = bytearray(base64.b64decode(sealed_by(KEY).removeprefix("sealed:")))
    inner[place] ^= 1
    with pytest.raises(VoiceError):
        VoiceSeal(KEY).open("sealed:" + base64.b64encode(inner).decode())


def test_sealed_authentic_text_that_is_no_credentials_does_not_open() -> None:
    """The right key over the wrong record is refused all the same."""
    inner = bytes(12) + AESGCM(bytes(range(32))).encrypt(bytes(12), b"{}", b"guildcast voice credentials")
    with pytest.raises(VoiceError):
        VoiceSeal(KEY).open("sealed:" + base64.b64encode(inner).decode())


def test_without_a_key_credentials_pass_in_clear() -> None:
    """An operator without a key gets what was warned of."""
    assert VoiceSeal(None).seal(VOICE) == VOICE
    assert VoiceSeal(None).open(VOICE) == VOICE


def test_what_came_sealed_is_not_sealed_again() -> None:
    """A user's bot may seal what it sends."""
    sealed = sealed_by(KEY)
    assert VoiceSeal(KEY).seal(sealed) == sealed
    assert VoiceSeal(None).seal(sealed) == sealed


def test_a_key_opens_what_was_stored_in_clear_before() -> None:
    """Introducing a key does not lock out what is stored already."""
    assert VoiceSeal(KEY).open(VOICE) == VOICE
