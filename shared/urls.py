"""What of a URL may be seen: its host and path. User, password, query and fragment may be what lets one in."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

HIDDEN = "http://(hidden)/"
"""Of a URL that cannot be told apart into what may be seen and what may not."""


def shown(url: str) -> str:
    """A URL as it may stand in a message or a record. A path stays as it is."""
    if url.lower().startswith("file:"):
        return url
    if "://" not in url:
        return HIDDEN if "@" in url and ":" in url.partition("@")[0] else url
    try:
        parts = urlsplit(url)
    except ValueError:
        return HIDDEN
    # A password with a slash, a question mark or a # in it looks as if host and port came before it.
    doubtful = parts.path if "@" in parts.netloc else parts.path + parts.query + parts.fragment
    if "@" in doubtful and ("@" in parts.netloc or ":" in parts.netloc):
        return HIDDEN
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
