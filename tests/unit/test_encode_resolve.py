"""What may be opened: http(s), and files inside the media folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import ErrorCode, SourceError
from worker.encode.resolve import resolve_source


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    (folder / "a song.mp3").touch()
    (tmp_path / "secret.mp3").touch()
    (folder / "way out").symlink_to(tmp_path)
    (folder / "alias.mp3").symlink_to(folder / "a song.mp3")
    return folder


@pytest.mark.parametrize("url", ["http://radio.example/live", "https://user:pw@h:8443/a?b=c", "HTTPS://H/x"])
def test_web_addresses_pass_as_they_are(url: str, media: Path) -> None:
    """http and https need no media folder."""
    assert resolve_source(url, media) == url
    assert resolve_source(url, None) == url


@pytest.mark.parametrize(
    "spelling",
    [
        "a song.mp3",
        "./sub/../a song.mp3",
        "{media}/a song.mp3",
        "file://{media}/a%20song.mp3",
        "file:{media}/a%20song.mp3",
        "file://localhost{media}/a%20song.mp3",
        "file:a%20song.mp3",
        "FILE:a%20song.mp3",
        "alias.mp3",
    ],
)
def test_every_spelling_of_a_file_in_the_folder_gives_its_real_path(spelling: str, media: Path) -> None:
    """Relative, absolute, file: URL and symbolic link all lead to one path."""
    assert resolve_source(spelling.format(media=media), media) == str((media / "a song.mp3").resolve())


def test_a_missing_file_is_no_matter_of_permission(media: Path) -> None:
    """Whether it exists is found out when it is opened."""
    assert resolve_source("later.mp3", media) == str(media.resolve() / "later.mp3")


@pytest.mark.parametrize(
    "url",
    [
        "../secret.mp3",
        "/etc/passwd",
        "way out/secret.mp3",
        "file:///etc/passwd",
        "file:%2e%2e/secret.mp3",
        "file://elsewhere/a.mp3",
        "file:a.mp3?x",
        "",
        "a\0b",
        "rtmp://h/x",
        "concat:a|b",
        "data:audio/mpeg;base64,AAAA",
        "http:///no-host",
        "http://h/with blank",
        "http://h/x\r\nX-Evil: 1",
        "http://[::1",
    ],
)
def test_everything_else_is_forbidden_and_says_what_is_allowed(url: str, media: Path) -> None:
    """A way out of the folder, another scheme or a crooked URL is refused for good."""
    with pytest.raises(SourceError, match="allowed are http:// and https:// URLs") as caught:
        resolve_source(url, media)
    assert caught.value.code is ErrorCode.SOURCE_FORBIDDEN
    assert not caught.value.retryable


def test_without_a_media_folder_no_file_is_allowed(media: Path) -> None:
    """The message names the setting that is missing."""
    with pytest.raises(SourceError, match="GUILDCAST_MEDIA_DIR is not set"):
        resolve_source(str(media / "a song.mp3"), None)


def test_a_folder_that_is_itself_a_link_works(media: Path, tmp_path: Path) -> None:
    """The folder is resolved as its files are."""
    (tmp_path / "link").symlink_to(media)
    assert resolve_source("a song.mp3", tmp_path / "link") == str((media / "a song.mp3").resolve())
