"""Placement: even, within room, and never counting on room that is spoken for."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from coordinator.placement import Pace, Room, place

_rooms = st.lists(
    st.builds(
        lambda headroom, held, assigned: (headroom, held, assigned),
        st.integers(0, 40),
        st.integers(0, 40),
        st.integers(0, 50),
    ),
    max_size=6,
).map(lambda found: [Room(f"w{number}", *values) for number, values in enumerate(found)])


def empty(worker: str, capacity: int) -> Room:
    return Room(worker, headroom=capacity, held=0, assigned=0)


def test_items_are_spread_evenly_over_equal_workers() -> None:
    """Equal workers carry the same, one more or less."""
    placed = place(range(100), [empty(name, 1_000) for name in "abc"])
    assert sorted(Counter(placed.values()).values()) == [33, 33, 34]


def test_the_emptiest_worker_is_filled_first() -> None:
    """The next item goes where most room is, until rooms are level."""
    placed = place(range(6), [Room("full", 2, 8, 8), Room("empty", 6, 4, 4)])
    assert Counter(placed.values()) == {"empty": 5, "full": 1}


def test_items_that_fit_nowhere_are_left_out() -> None:
    """A worker is never given more than it has room for."""
    placed = place(range(10), [empty("a", 3), empty("b", 2)])
    assert Counter(placed.values()) == {"a": 3, "b": 2}


def test_what_was_assigned_and_not_counted_yet_takes_room() -> None:
    """Between two renewals a worker's headroom is old: what was given to it meanwhile counts at once."""
    assert Room("w", headroom=10, held=0, assigned=0).free == 10
    assert Room("w", headroom=10, held=0, assigned=7).free == 3
    assert Room("w", headroom=3, held=7, assigned=7).free == 3


def test_headroom_is_believed_whatever_the_number_of_guilds() -> None:
    """A worker whose guilds cost more than they were thought to gets what it offers, less what is on its way."""
    assert Room("w", headroom=1, held=2, assigned=2).free == 1
    assert Room("w", headroom=10, held=50, assigned=58).free == 2


def test_guilds_that_leave_make_no_room_before_they_are_gone() -> None:
    """A worker may hold more than it is assigned; its headroom counts those, and nothing is added for them."""
    assert Room("w", headroom=3, held=7, assigned=5).free == 3


def test_nobody_is_given_anything_without_workers() -> None:
    """Without workers all items wait."""
    assert place(range(3), []) == {}
    assert place([], [empty("a", 3)]) == {}


@given(_rooms, st.integers(0, 300))
def test_no_room_is_overfilled_and_no_item_waits_while_there_is_room(rooms: list[Room], number: int) -> None:
    """Whatever the rooms: within each, and as many as fit."""
    placed = place(range(number), rooms)
    load = Counter(placed.values())
    for room in rooms:
        assert load[room.worker] <= max(0, room.free)
        assert load[room.worker] <= room.headroom
    assert len(placed) == min(number, sum(max(0, room.free) for room in rooms))


@given(_rooms, st.integers(0, 60), st.integers(0, 60))
def test_two_passes_before_a_renewal_fill_no_more_than_one(rooms: list[Room], first: int, second: int) -> None:
    """What the first pass gave counts in the second, though no worker has told of it."""
    fresh = [room._replace(assigned=room.held) for room in rooms]
    load = Counter(place(range(first), fresh).values())
    later = [room._replace(assigned=room.assigned + load[room.worker]) for room in fresh]
    load += Counter(place(range(second), later).values())
    for room in fresh:
        assert load[room.worker] <= room.headroom


@given(_rooms, st.integers(0, 100))
def test_what_is_left_is_level(rooms: list[Room], number: int) -> None:
    """A worker that was given something has no smaller part of its room left than another, but for one item."""
    load = Counter(place(range(number), rooms).values())
    open_rooms = {room.worker: room for room in rooms if room.free > 0}
    left = {name: (room.free - load[name]) / room.whole for name, room in open_rooms.items()}
    for worker in load:
        assert left[worker] + 1 / open_rooms[worker].whole >= max(left.values()) - 1e-9


def test_workers_that_differ_a_little_are_given_the_same() -> None:
    """A few guilds do not all go to the one that measured itself best."""
    placed = place(range(60), [empty("a", 1_247), empty("b", 1_326)])
    assert sorted(Counter(placed.values()).values()) == [29, 31]


def test_a_larger_worker_is_given_more() -> None:
    """All are filled to the same part."""
    placed = place(range(110), [empty("small", 100), empty("large", 1_000)])
    assert Counter(placed.values()) == {"small": 10, "large": 100}


def test_a_worker_is_given_no_more_than_its_share_at_once() -> None:
    """Room is one thing, pace another: the rest of the items goes to others, or waits."""
    rooms = [empty("a", 100), empty("b", 50), empty("c", 10)]
    placed = place(range(40), rooms, {"a": 5, "b": 7, "c": 0})
    assert Counter(placed.values()) == {"a": 5, "b": 7}


def test_a_pace_gives_its_share_and_then_as_much_as_time_brings() -> None:
    """A bucket is full at first, and fills again by the second, never beyond its size."""
    pace = Pace(per_s=10.0, most=20)
    assert pace.left("a", 100.0) == 20
    pace.take("a", 20, 100.0)
    assert pace.left("a", 100.0) == 0
    assert pace.left("a", 100.55) == 5
    assert pace.left("a", 1_000.0) == 20
    assert pace.left("b", 100.0) == 20


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 50)), max_size=50))
def test_nothing_is_given_faster_than_the_pace(steps: list[tuple[float, int]]) -> None:
    """However often it is asked, a bucket gives its size and what dripped into it."""
    pace = Pace(per_s=10.0, most=20)
    now_s, given_in_all = 0.0, 0
    for passed_s, wanted in steps:
        now_s += passed_s
        count = min(wanted, pace.left("a", now_s))
        pace.take("a", count, now_s)
        given_in_all += count
        assert given_in_all <= 20 + 10.0 * now_s + 1e-6


def test_a_forgotten_worker_leaves_nothing_behind() -> None:
    """Worker ids are new at every start: what is known of a lost one would stay for ever."""
    pace = Pace(per_s=10.0, most=20)
    pace.take("a", 20, 0.0)
    pace.forget("a")
    assert pace.left("a", 0.0) == 20
