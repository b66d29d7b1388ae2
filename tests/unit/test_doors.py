"""How many handshakes a worker has in flight at each voice server, and who knocks at a closed door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from worker.voice import doors as module
from worker.voice.doors import HANDSHAKES, HANDSHAKES_EACH, KNOCK_EVERY_S, OPENS_PER_S, Doors, Place


class Crowd:
    """Those who want in."""

    def __init__(self, doors: Doors) -> None:
        self.doors = doors
        self.tasks: list[asyncio.Task[Place]] = []

    def come(self, server: str, count: int = 1) -> list[asyncio.Task[Place]]:
        tasks = [asyncio.create_task(self.doors.enter(server)) for _ in range(count)]
        self.tasks += tasks
        return tasks

    def inside(self) -> list[Place]:
        return [task.result() for task in self.tasks if task.done() and not task.cancelled()]


async def passes(seconds: float = 0.0) -> None:
    """Let all run that can, until a moment of the loop's clock."""
    await asyncio.sleep(seconds)
    for _ in range(50):
        await asyncio.sleep(0)


def shut(place: Place) -> None:
    """End a handshake before the server said a word."""
    with pytest.raises(ConnectionError), place:
        raise ConnectionError


@pytest.fixture
async def crowd(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Crowd]:
    """At doors that open as fast as one likes."""
    monkeypatch.setattr(module, "OPENS_PER_S", 1e9)
    one = Crowd(Doors())
    yield one
    for task in one.tasks:
        task.cancel()
    await asyncio.gather(*one.tasks, return_exceptions=True)


async def test_a_server_sees_so_many_handshakes_at_once(crowd: Crowd) -> None:
    """The next goes in when one is done, in the order of their coming."""
    crowd.come("a", HANDSHAKES_EACH + 2)
    await passes()
    assert len(crowd.inside()) == HANDSHAKES_EACH
    crowd.inside()[0].leave()
    await passes()
    assert [task.done() for task in crowd.tasks] == [True] * (HANDSHAKES_EACH + 1) + [False]


async def test_a_worker_has_so_many_handshakes_in_flight(crowd: Crowd) -> None:
    """At all servers together, and one more at each that has none: full ones keep nobody out."""
    servers = HANDSHAKES // HANDSHAKES_EACH
    for number in range(servers):
        crowd.come(f"s{number}", HANDSHAKES_EACH)
    await passes()
    assert len(crowd.inside()) == HANDSHAKES
    crowd.come("another", 3)
    await passes()
    assert len(crowd.inside()) == HANDSHAKES + 1
    for place in crowd.inside():
        place.leave()
    await passes()
    assert all(task.done() for task in crowd.tasks)


async def test_a_full_server_holds_up_no_other(crowd: Crowd) -> None:
    """Who waits at one door stands in nobody's way to another."""
    crowd.come("a", HANDSHAKES)
    (other,) = crowd.come("b")
    await passes()
    assert other.done()


async def test_one_connection_knocks_at_a_closed_door(crowd: Crowd) -> None:
    """Each half second; the others wait for what it finds."""
    (first,) = crowd.come("a")
    await passes()
    shut(first.result())
    assert crowd.doors.away == ["a"]
    crowd.come("a", 5)
    await passes()
    assert len(crowd.inside()) == 1 + 1
    await passes(KNOCK_EVERY_S)
    assert len(crowd.inside()) == 1 + 1
    shut(crowd.inside()[-1])
    await passes()
    assert len(crowd.inside()) == 1 + 2


async def test_who_is_answered_opens_the_door_for_all(crowd: Crowd) -> None:
    """At once, as many as fit."""
    (first,) = crowd.come("a")
    await passes()
    shut(first.result())
    crowd.come("a", 5)
    await passes()
    crowd.inside()[-1].answered()
    await passes()
    assert all(task.done() for task in crowd.tasks)
    assert crowd.doors.away == []


async def test_an_end_that_says_nothing_about_the_server_closes_no_door(crowd: Crowd) -> None:
    """A guild that leaves in mid-handshake, one that closes, and a handshake that failed after a word."""
    one, two, three = crowd.come("a", 3)
    await passes()
    with three.result():
        pass
    with pytest.raises(asyncio.CancelledError), one.result():
        raise asyncio.CancelledError
    two.result().answered()
    shut(two.result())
    assert crowd.doors.away == []


async def test_who_gives_up_takes_no_place_along(crowd: Crowd) -> None:
    """Waiting, knocking, or let in a moment ago."""
    crowd.come("a", HANDSHAKES_EACH + 1)
    await passes()
    crowd.tasks[-1].cancel()
    for place in crowd.inside():
        place.leave()
    late = crowd.come("a", HANDSHAKES_EACH)
    late[0].cancel()
    await passes()
    assert all(task.done() for task in late)
    for task in late[1:]:
        task.result().leave()
    assert crowd.doors._doors == {}
    assert crowd.doors._inside == 0


async def test_a_closed_door_is_forgotten_when_nobody_comes(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers come and go for months."""
    monkeypatch.setattr(module, "_FORGOTTEN_AFTER_S", 0.02)
    (one,) = crowd.come("a")
    await passes()
    shut(one.result())
    assert crowd.doors.away == ["a"]
    await passes(0.05)
    assert crowd.doors._doors == {}


async def test_doors_are_opened_at_the_rate_of_the_host() -> None:
    """Its workers share one local address, so they share the rate: each opens its part of it."""
    workers = 4
    crowd = Crowd(Doors(workers))
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    crowd.come("a", HANDSHAKES_EACH)
    await asyncio.gather(*crowd.tasks)
    assert loop.time() - began_s >= (HANDSHAKES_EACH - 1) * workers / OPENS_PER_S - 0.01
