"""Which sources may be opened: http(s) URLs, and files inside the media folder."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from shared.errors import ErrorCode, SourceError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
_ALLOWED = "allowed are http:// and https:// URLs, and files inside GUILDCAST_MEDIA_DIR"


def is_web(url: str) -> bool:
    """Whether a source comes from the web; what does not is a file of this machine, or refused."""
    match = _SCHEME.match(url)
    return match is not None and match.group(1).lower() in ("http", "https")


def resolve_source(url: str, media_dir: Path | None) -> str:
    """Turn what a job names into what a child may open.

    Args:
        url: `http://`, `https://` or `file:` URL, or a plain path; relative paths start at `media_dir`. A plain
            relative path that looks like a scheme (`a:b.mp3`) is written `./a:b.mp3`.
        media_dir: the only folder that files may come from; None: no files at all.
    Returns: the http(s) URL as it is, or an absolute path without symbolic links. The file need not exist.
    Raises: SourceError: SOURCE_FORBIDDEN, not retryable; the message says what is allowed, never more of a URL than
        its scheme.
    """
    if is_web(url):
        return _web(url)
    match = _SCHEME.match(url)
    scheme = match.group(1).lower() if match else ""
    if scheme == "file":
        return _inside(_path_of_file_url(url), media_dir)
    if scheme:
        raise _forbidden(f"a source of scheme {scheme!r}")
    return _inside(url, media_dir)


def _web(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a password with a slash in it makes a port of its beginning
    except ValueError as error:
        raise _forbidden("an unreadable URL") from error
    if not host or any(char.isspace() or not char.isprintable() for char in url):
        raise _forbidden("a URL without a host or with blanks in it")
    return url


def _path_of_file_url(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _forbidden("an unreadable file: URL") from error
    if parts.netloc not in ("", "localhost"):
        raise _forbidden("a file: URL of another host")
    if parts.query or parts.fragment:
        raise _forbidden("a file: URL with an unescaped ? or #")
    return unquote(parts.path)


def _inside(path: str, media_dir: Path | None) -> str:
    if media_dir is None:
        raise _forbidden("a file, while GUILDCAST_MEDIA_DIR is not set,")
    if not path or "\0" in path:
        raise _forbidden("an empty path or one with a NUL in it")
    root = media_dir.resolve()
    try:
        resolved = (root / path).resolve()
    except (OSError, RuntimeError) as error:
        raise _forbidden(f"{_named(path)!r}, which cannot be resolved,") from error
    if not resolved.is_relative_to(root):
        raise _forbidden(f"{_named(path)!r}, outside the media folder,")
    return str(resolved)


def _named(path: str) -> str:
    """A path as it may stand in a message: it may be a URL whose scheme was forgotten."""
    return path.partition("?")[0].rpartition("@")[2]


def _forbidden(what: str) -> SourceError:
    return SourceError(f"{what} may not be opened: {_ALLOWED}", code=ErrorCode.SOURCE_FORBIDDEN, retryable=False)
