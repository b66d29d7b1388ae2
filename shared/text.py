"""Texts that go out: into events, statuses, logs and dead letters, where somebody else's text must not grow."""

from __future__ import annotations

import re

MOST_CHARS = 500
_BETWEEN_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
"""Of a class name."""


def cut(text: str) -> str:
    """The text, or its beginning and how much there was."""
    if len(text) <= MOST_CHARS:
        return text
    rest = f" .. ({len(text)} characters)"
    return text[: MOST_CHARS - len(rest)] + rest


def in_words(error: BaseException) -> str:
    """What an exception says, or its class in words: time-outs, resets and cancellations often say nothing."""
    return str(error).strip() or _BETWEEN_WORDS.sub(" ", type(error).__name__).lower()
