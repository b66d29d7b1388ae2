"""A worker's identity on its command line."""

from __future__ import annotations

import re
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.identity import Identity, host_name, read_identity

_words = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
_ports = st.just(range(0)) | st.builds(
    lambda first, number: range(first, first + number), st.integers(1_024, 65_000), st.integers(1, 500)
)


@given(
    st.builds(Identity, id=_words, name=_words, parent=st.integers(1, 2**22), ports=_ports, life=st.integers(3, 999))
)
def test_an_identity_is_read_as_it_was_given(identity: Identity) -> None:
    """What the supervisor says is what the child reads."""
    assert read_identity(identity.arguments()) == identity


def test_the_command_line_is_readable() -> None:
    """Who looks at a host's processes sees who they are."""
    identity = Identity("h-fanout-0-ab", "h-fanout-0", 7, range(50_000, 50_004), 5)
    assert identity.arguments() == [
        *("--id", "h-fanout-0-ab", "--name", "h-fanout-0", "--parent", "7", "--ports", "50000-50003"),
        *("--life", "5"),
    ]


@pytest.mark.parametrize("host", ["a host", "ümläut", "x" * 80, "-", "", "._-", "a/b{c}:d", "-x"])
def test_a_hosts_name_has_the_letters_of_names(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Whatever a host is called, its workers' names are fit for keys and jobs."""
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", host_name())
