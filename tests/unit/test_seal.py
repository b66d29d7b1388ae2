"""Secrets at rest: sealed, opened with the same key only."""

from __future__ import annotations

import base64

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ErrorCode, SourceError, VoiceError
from shared.schema.records import BroadcastSpec, OpusRecord, SourceRecord, VoiceRecord
from shared.seal import Seal

KEY = base64.b64encode(bytes(range(32))).decode()
OF = ("main", "123456789012345678")
"""Bot and guild."""
OTHER = base64.b64encode(bytes(range(1, 33))).decode()
VOICE = VoiceRecord(user_id="123456789012345678", session_id="the-session", token="the-token", endpoint="voice.example")


def sealed_by(key: str) -> str:
    sealed = Seal(key).seal_voice(VOICE, *OF)
    assert isinstance(sealed, str)
    return sealed


def test_what_is_sealed_is_opened_with_the_same_key() -> None:
    """Credentials survive the store, on any process that has the key."""
    assert Seal(KEY).open_voice(sealed_by(KEY), *OF) == VOICE


def test_a_sealed_value_shows_nothing() -> None:
    """Neither token nor session can be read in what is stored."""
    sealed = sealed_by(KEY)
    inner = base64.b64decode(sealed.removeprefix("sealed2:"))
    assert b"the-token" not in inner
    assert b"the-session" not in inner


def test_the_form_is_the_agreed_one() -> None:
    """`sealed2:` + base64(nonce 12 | ciphertext | tag 16): a user's own bot can seal, too."""
    inner = base64.b64decode(sealed_by(KEY).removeprefix("sealed2:"), validate=True)
    clear = AESGCM(bytes(range(32))).decrypt(
        inner[:12], inner[12:], b"guildcast voice credentials of main:123456789012345678"
    )
    assert msgspec.json.decode(clear, type=VoiceRecord) == VOICE


def test_no_two_sealed_values_are_alike() -> None:
    """A nonce is never used twice."""
    assert len({sealed_by(KEY) for _ in range(50)}) == 50


@pytest.mark.parametrize("key", [OTHER, None])
def test_another_key_or_none_does_not_open(key: str | None) -> None:
    """The guild fails with its own code; trying again would not help."""
    with pytest.raises(VoiceError) as caught:
        Seal(key).open_voice(sealed_by(KEY), *OF)
    assert caught.value.code == ErrorCode.VOICE_CREDENTIALS_REJECTED


@given(st.binary(max_size=60).map(lambda data: "sealed:" + base64.b64encode(data).decode()) | st.text(max_size=40))
def test_garbage_does_not_open_and_raises_one_error(stored: str) -> None:
    """Whatever is stored in the place of credentials fails one guild."""
    with pytest.raises(VoiceError):
        Seal(KEY).open_voice(stored, *OF)


@pytest.mark.parametrize("place", [0, 12, -1])
def test_a_changed_value_does_not_open(place: int) -> None:
    """Nonce, ciphertext and tag are all authenticated."""
    inner = bytearray(base64.b64decode(sealed_by(KEY).removeprefix("sealed2:")))
    inner[place] ^= 1
    with pytest.raises(VoiceError):
        Seal(KEY).open_voice("sealed2:" + base64.b64encode(inner).decode(), *OF)


def test_sealed_authentic_text_that_is_no_credentials_does_not_open() -> None:
    """The right key over the wrong record is refused all the same."""
    inner = bytes(12) + AESGCM(bytes(range(32))).encrypt(
        bytes(12), b"{}", b"guildcast voice credentials of main:123456789012345678"
    )
    with pytest.raises(VoiceError):
        Seal(KEY).open_voice("sealed2:" + base64.b64encode(inner).decode(), *OF)


def test_without_a_key_credentials_pass_in_clear() -> None:
    """An operator without a key gets what was warned of."""
    assert Seal(None).seal_voice(VOICE, *OF) == VOICE
    assert Seal(None).open_voice(VOICE, *OF) == VOICE


def test_what_came_sealed_is_not_sealed_again() -> None:
    """A user's bot may seal what it sends."""
    sealed = sealed_by(KEY)
    assert Seal(KEY).seal_voice(sealed, *OF) == sealed
    assert Seal(None).seal_voice(sealed, *OF) == sealed


def sealed_before() -> str:
    """As the version before did it."""
    nonce = bytes(12)
    sealed = AESGCM(bytes(range(32))).encrypt(nonce, msgspec.json.encode(VOICE), b"guildcast voice credentials")
    return "sealed:" + base64.b64encode(nonce + sealed).decode()


def test_what_is_in_clear_is_refused_where_there_is_a_key() -> None:
    """Nobody who may write to Redis has a worker connect somewhere by that alone."""
    with pytest.raises(VoiceError) as caught:
        Seal(KEY).open_voice(VOICE, *OF)
    assert caught.value.code == ErrorCode.VOICE_CREDENTIALS_REJECTED


@pytest.mark.parametrize("of", [("main", "223456789012345678"), ("other", OF[1])])
def test_credentials_are_bound_to_bot_and_guild(of: tuple[str, str]) -> None:
    """What was sealed for one is worth nothing in another's record."""
    with pytest.raises(VoiceError):
        Seal(KEY).open_voice(sealed_by(KEY), *of)


@pytest.mark.parametrize("stored", [VOICE, sealed_before()], ids=["in clear", "bound to nothing"])
def test_what_a_version_before_stored_is_sealed_anew(stored: VoiceRecord | str) -> None:
    """By the leader, at its start; then workers open it."""
    anew = Seal(KEY).seal_anew(stored, *OF)
    assert isinstance(anew, str)
    assert anew.startswith("sealed2:")
    assert Seal(KEY).open_voice(anew, *OF) == VOICE
    assert Seal(KEY).seal_anew(anew, *OF) == anew
    assert Seal(None).seal_anew(stored, *OF) == stored


def test_what_a_version_before_sealed_is_opened() -> None:
    """Two versions run side by side."""
    assert Seal(KEY).open_voice(sealed_before(), *OF) == VOICE


def test_the_same_credentials_are_the_same_however_they_are_stored() -> None:
    """And what cannot be opened is the same as nothing."""
    seal = Seal(KEY)
    other = msgspec.structs.replace(VOICE, token="another")
    assert seal.is_same_voice(sealed_by(KEY), sealed_by(KEY), *OF)
    assert seal.is_same_voice(sealed_by(KEY), sealed_before(), *OF)
    assert not seal.is_same_voice(sealed_by(KEY), seal.seal_voice(other, *OF), *OF)
    assert not seal.is_same_voice(sealed_by(OTHER), sealed_by(KEY), *OF)
    assert not seal.is_same_voice(None, None, *OF)


# sources


HEADERS = {"Authorization": "Bearer cret", "Referer": "https://station.example/"}


def broadcast(url: str | None, headers: dict[str, str] | None = None, name: str = "news") -> BroadcastSpec:
    source = SourceRecord(url=url, loop=True, headers=headers or {})
    return BroadcastSpec(broadcast=name, run=1, source=source, opus=OpusRecord())


WITH_SECRETS: list[tuple[BroadcastSpec, str]] = [
    (broadcast("https://us:cret@host.example:8000/live.mp3"), "https://host.example:8000/live.mp3"),
    (broadcast("HTTP://cret@host.example/a"), "http://host.example/a"),
    (broadcast("https://host.example/live?token=cret#cret"), "https://host.example/live"),
    (broadcast("https://host.example/live", HEADERS), "https://host.example/live"),
    (broadcast("http://user:a/cret@host.example/"), "http://(hidden)/"),
    (broadcast("http://user:p#cret@host.example/"), "http://(hidden)/"),
    (broadcast("http://cret:12#34@host.example/"), "http://(hidden)/"),
    (broadcast("http://u:p?cret@host.example/"), "http://(hidden)/"),
    (broadcast("http://u:p@ss/cret@host.example/"), "http://(hidden)/"),
    (broadcast("HTTP:/user:cret@host.example/x"), "http://(hidden)/"),
    (broadcast("user:cret@host.example/x"), "http://(hidden)/"),
    (broadcast("http://[cret/"), "http://(hidden)/"),
    (broadcast("ftp://us:cret@host.example/a"), "ftp://host.example/a"),
]


@pytest.mark.parametrize(("spec", "shown"), WITH_SECRETS, ids=[spec.source.url for spec, _ in WITH_SECRETS])
def test_a_stored_source_shows_host_and_path(spec: BroadcastSpec, shown: str) -> None:
    """What may let somebody in is sealed, and is all there again for whoever has the key."""
    stored = Seal(KEY).seal_source(spec)
    assert b"cret" not in msgspec.json.encode(stored)
    assert (stored.source.url, stored.source.loop, stored.source.headers) == (shown, True, {})
    assert stored.sealed.startswith("sealed2:")
    assert Seal(KEY).open_source(stored) == spec.source


@pytest.mark.parametrize("url", ["https://host.example/@user/live", "music/a?b@c.mp3", "file:///srv/a@b.mp3", None])
def test_a_source_without_secrets_is_stored_as_it_is(url: str | None) -> None:
    """Nothing is sealed that anybody may read."""
    assert Seal(KEY).seal_source(broadcast(url)) == broadcast(url)


def test_without_a_key_sources_are_stored_in_clear() -> None:
    """The coordinator warns of it at its start."""
    spec = broadcast("https://us:cret@host.example/", HEADERS)
    assert Seal(None).seal_source(spec) == spec
    assert Seal(None).open_source(spec) == spec.source


@pytest.mark.parametrize("key", [OTHER, None])
def test_another_key_or_none_does_not_open_a_source(key: str | None) -> None:
    """It is tried again: the worker that has the key may be the next one."""
    stored = Seal(KEY).seal_source(broadcast("https://us:cret@host.example/"))
    with pytest.raises(SourceError) as caught:
        Seal(key).open_source(stored)
    assert caught.value.code == ErrorCode.SOURCE_SEALED
    assert caught.value.retryable


def test_what_is_sealed_for_one_broadcast_opens_for_no_other() -> None:
    """Whoever may write records cannot hand one station's password to another address."""
    stored = Seal(KEY).seal_source(broadcast("https://us:cret@host.example/"))
    with pytest.raises(SourceError):
        Seal(KEY).open_source(msgspec.structs.replace(stored, broadcast="other"))


def test_a_source_shows_no_secret_when_it_is_printed() -> None:
    """A record that lands in a trace says nothing."""
    assert "cret" not in repr(broadcast("https://us:cret@host.example/", HEADERS))
