"""Texts that go out: into events, statuses, logs and dead letters, where somebody else's text must not grow."""

from __future__ import annotations

MOST_CHARS = 500


def cut(text: str) -> str:
    """The text, or its beginning and how much there was."""
    if len(text) <= MOST_CHARS:
        return text
    rest = f" .. ({len(text)} characters)"
    return text[: MOST_CHARS - len(rest)] + rest
