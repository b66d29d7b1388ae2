"""What a source is taken for: said, shown when it is opened, or by how it comes."""

from __future__ import annotations

import pytest

from worker.encode.nature import BLOCK_FRAMES, Nature

TICK_NS = 20_000_000
BLOCK_S = BLOCK_FRAMES / 50


def comes(nature: Nature, seconds: float, share: float) -> None:
    """So much sound, waited for by this share of its length."""
    for _ in range(round(seconds * 50)):
        nature.arrived(round(share * TICK_NS))


def test_what_was_never_open_may_be_live() -> None:
    """It is opened as what it turns out to be."""
    nature = Nature("auto", is_local=False)
    assert (nature.live, nature.known, nature.kind) == (True, False, "auto")


@pytest.mark.parametrize(("kind", "live"), [("live", True), ("file", False)])
def test_what_is_said_holds_whatever_comes(kind: str, live: bool) -> None:
    """Neither a burst without end nor sound at its own pace changes it."""
    nature = Nature(kind, is_local=False)
    for looks_live in (True, False):
        nature.opened(live=looks_live, certain=False)
        for share in (0.0, 1.0):
            comes(nature, 60, share)
            nature.ended()
            assert nature.live is live


@pytest.mark.parametrize("kind", ["auto", "live", "file"])
def test_a_local_file_is_no_live_input_unless_it_names_a_station(kind: str) -> None:
    """A list on disk may lead to the web; one that was said to be a file stays one."""
    nature = Nature(kind, is_local=True)
    assert nature.live is False
    nature.opened(live=True, certain=True)
    assert nature.live is (kind != "file")


def test_a_kind_of_a_later_version_is_found_out() -> None:
    """As if nothing had been said."""
    assert Nature("wireless", is_local=False).kind == "auto"


@pytest.mark.parametrize("burst_s", [0.0, 2.0, 8.0, 10.0])
def test_a_burst_is_no_file(burst_s: float) -> None:
    """Servers begin with some seconds; what comes then decides."""
    nature = Nature("auto", is_local=False)
    nature.opened(live=True, certain=False)
    comes(nature, burst_s, 0.0)
    comes(nature, 30, 1.0)
    assert nature.live
    assert nature.paced


def test_what_goes_on_coming_faster_is_a_file() -> None:
    """At once, or through a slow network."""
    for share in (0.0, 0.5, 0.9):
        nature = Nature("auto", is_local=False)
        nature.opened(live=True, certain=False)
        comes(nature, 3 * BLOCK_S, share)
        assert not nature.live
        assert not nature.paced


def test_a_burst_that_seemed_to_be_a_file_is_over_some_time() -> None:
    """It may change its mind, and does so by what came last."""
    nature = Nature("auto", is_local=False)
    nature.opened(live=True, certain=False)
    comes(nature, 32, 0.0)
    assert not nature.live
    comes(nature, 3 * BLOCK_S, 1.0)
    assert nature.live


@pytest.mark.parametrize(
    ("parts", "live"),
    [
        ([(0.3, 0.0)], False),
        ([(8.0, 0.0)], False),
        ([(60.0, 0.0)], False),
        ([(60.0, 0.77)], False),
        ([(0.3, 1.0)], True),
        ([(4.0, 0.0), (4.0, 1.0)], True),
        ([(32.0, 0.0), (4.0, 1.0)], True),
        ([(3_600.0, 1.0)], True),
    ],
)
def test_an_end_is_believed_where_nobody_had_to_wait(parts: list[tuple[float, float]], live: bool) -> None:
    """A file is there when it is asked for; live input that ends has been waited for."""
    nature = Nature("auto", is_local=False)
    nature.opened(live=True, certain=False)
    for seconds, share in parts:
        comes(nature, seconds, share)
    nature.ended()
    assert nature.live is live


def test_what_it_was_found_to_be_it_stays_when_it_is_opened_again() -> None:
    """How it looks then changes nothing: a station may answer with something else while it is away."""
    nature = Nature("auto", is_local=False)
    nature.opened(live=True, certain=False)
    comes(nature, 20, 1.0)
    nature.opened(live=False, certain=True)
    assert (nature.live, nature.kind) == (True, "live")


def test_what_was_live_for_long_does_not_end() -> None:
    """A server that answers with a little and hangs up while it is restarted takes nobody off the air."""
    nature = Nature("auto", is_local=False)
    nature.opened(live=True, certain=False)
    comes(nature, 60, 1.0)
    nature.opened(live=True, certain=False)
    comes(nature, 2, 0.0)
    nature.ended()
    assert nature.live
