"""The jitter buffer: order, time, holes, pauses, and a bound on all of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.clock import NS_PER_MS, NS_PER_S
from worker.voice.receive.drops import Drop
from worker.voice.receive.jitter import DEPTH_NS, MAX_HELD, MAX_MARKED_LOST, JitterBuffer, Slot
from worker.voice.receive.replay import ReplayWindow

FRAME = 960
FRAME_NS = 20 * NS_PER_MS
START_NS = 1_000 * NS_PER_S
CYCLE = 2**32


def name(index: int) -> bytes:
    return b"%d" % index


def push(buffer: JitterBuffer, index: int, *, timestamp: int | None = None, late_ms: float = 0) -> Drop | None:
    """Packet `index` of a stream that sends one each 20 ms, with the timestamp of that time unless told otherwise."""
    arrival_ns = START_NS + index * FRAME_NS + int(late_ms * NS_PER_MS)
    return buffer.push(index, (index * FRAME if timestamp is None else timestamp) % CYCLE, name(index), arrival_ns)


def due(index: int) -> int:
    return START_NS + index * FRAME_NS + DEPTH_NS


def heard(slots: list[Slot]) -> list[tuple[int, bytes | None]]:
    return [(slot.timestamp_samples // FRAME, slot.frame) for slot in slots]


def test_a_frame_comes_out_when_it_is_due_and_not_before() -> None:
    """Each frame is held for the buffer's depth."""
    buffer = JitterBuffer()
    assert buffer.due_ns is None
    for index in range(3):
        push(buffer, index)
    assert buffer.due_ns == due(0)
    assert buffer.pop(due(0) - 1) == []
    assert heard(buffer.pop(due(0))) == [(0, b"0")]
    assert buffer.due_ns == due(1)
    assert heard(buffer.pop(due(2))) == [(1, b"1"), (2, b"2")]
    assert (len(buffer), buffer.due_ns, buffer.lost) == (0, None, 0)


def test_frames_that_overtook_come_out_in_order() -> None:
    """Order is the sender's, also of the first ones."""
    buffer = JitterBuffer()
    for index in (2, 1, 0, 3):
        push(buffer, index, late_ms=45 - 20 * index)
    assert heard(buffer.pop(due(9))) == [(0, b"0"), (1, b"1"), (2, b"2"), (3, b"3")]


def test_a_lost_frame_is_marked_in_its_place_at_its_time() -> None:
    """A hole has the length of what was lost, and is told when the missing frame was due."""
    buffer = JitterBuffer()
    for index in (0, 3):
        push(buffer, index)
    assert heard(buffer.pop(due(0))) == [(0, b"0")]
    assert buffer.due_ns == due(1)
    assert heard(buffer.pop(due(1))) == [(1, None)]
    assert heard(buffer.pop(due(3))) == [(2, None), (3, b"3")]
    assert buffer.lost == 2


def test_a_frame_after_its_turn_is_late() -> None:
    """What was given out as lost does not come a second time."""
    buffer = JitterBuffer()
    for index in (0, 2):
        push(buffer, index)
    buffer.pop(due(1))
    assert push(buffer, 1, late_ms=61) is Drop.LATE
    assert heard(buffer.pop(due(2))) == [(2, b"2")]


def test_a_late_frame_whose_turn_is_still_open_is_heard_at_once() -> None:
    """A stall longer than the buffer delays, it does not lose: nobody knew of a hole."""
    buffer = JitterBuffer()
    push(buffer, 0)
    buffer.pop(due(0))
    push(buffer, 1, late_ms=90)
    assert heard(buffer.pop(START_NS + FRAME_NS + 90 * NS_PER_MS)) == [(1, b"1")]
    push(buffer, 2, late_ms=75)
    push(buffer, 3)
    assert buffer.due_ns == due(2)
    assert heard(buffer.pop(due(3))) == [(2, b"2"), (3, b"3")]
    assert buffer.lost == 0


def test_a_pause_is_a_gap_and_no_loss() -> None:
    """A timestamp that went on over a pause leaves a gap; no packet is missing."""
    buffer = JitterBuffer()
    push(buffer, 0)
    buffer.pop(due(0))
    buffer.rebase()
    arrival_ns = START_NS + 500 * FRAME_NS
    buffer.push(1, 500 * FRAME, b"1", arrival_ns)
    assert buffer.due_ns == arrival_ns + DEPTH_NS
    assert heard(buffer.pop(arrival_ns + DEPTH_NS)) == [(500, b"1")]
    assert buffer.lost == 0


def test_a_timestamp_that_stood_still_over_a_pause_is_accepted() -> None:
    """Senders that count frames only go on where they were, and are held for the buffer's depth again."""
    buffer = JitterBuffer()
    push(buffer, 0)
    buffer.pop(due(0))
    buffer.rebase()
    arrival_ns = START_NS + 500 * FRAME_NS
    buffer.push(1, FRAME, b"1", arrival_ns)
    assert buffer.due_ns == arrival_ns + DEPTH_NS
    assert heard(buffer.pop(arrival_ns + DEPTH_NS)) == [(1, b"1")]


def test_what_is_missing_over_a_pause_is_counted_and_not_marked() -> None:
    """After an outage the stream goes on; nobody wants its holes then."""
    buffer = JitterBuffer()
    push(buffer, 0)
    buffer.pop(due(0))
    buffer.rebase()
    push(buffer, 10)
    assert heard(buffer.pop(due(10))) == [(10, b"10")]
    assert buffer.lost == 9


def test_loss_beside_a_gap_is_marked_once() -> None:
    """One packet missing, five frames of time: one lost frame behind the last, then the gap."""
    buffer = JitterBuffer()
    push(buffer, 0)
    buffer.push(2, 6 * FRAME, b"2", START_NS + 6 * FRAME_NS)
    assert heard(buffer.pop(due(6))) == [(0, b"0"), (1, None), (6, b"2")]
    assert buffer.lost == 1


def test_a_long_hole_is_not_filled_frame_by_frame() -> None:
    """Memory and time of a hole have a bound."""
    buffer = JitterBuffer()
    push(buffer, 0)
    push(buffer, MAX_MARKED_LOST + 2)
    assert heard(buffer.pop(due(99))) == [(0, b"0"), (MAX_MARKED_LOST + 2, b"27")]
    assert buffer.lost == MAX_MARKED_LOST + 1


def test_a_packet_without_a_frame_is_no_loss() -> None:
    """Padding alone takes a sequence number and no time."""
    buffer = JitterBuffer()
    push(buffer, 0)
    buffer.push(1, 0, b"", START_NS + NS_PER_MS)
    buffer.push(2, FRAME, b"2", START_NS + FRAME_NS)
    assert heard(buffer.pop(due(1))) == [(0, b"0"), (1, b"2")]
    assert buffer.lost == 0


def test_a_packet_without_a_frame_hides_no_loss() -> None:
    """A frame lost beside padding is still marked."""
    buffer = JitterBuffer()
    push(buffer, 0)
    buffer.push(2, FRAME, b"", START_NS + FRAME_NS)
    buffer.push(3, 2 * FRAME, b"3", START_NS + 2 * FRAME_NS)
    assert heard(buffer.pop(due(3))) == [(0, b"0"), (1, None), (2, b"3")]
    assert buffer.lost == 1


def test_a_packet_without_a_frame_waits_for_those_it_overtook() -> None:
    """Padding that comes early does not close the turn of a frame sent before it."""
    buffer = JitterBuffer()
    push(buffer, 0)
    buffer.push(2, FRAME, b"", START_NS + FRAME_NS)
    assert heard(buffer.pop(due(0))) == [(0, b"0")]
    assert push(buffer, 1, late_ms=50) is None
    assert heard(buffer.pop(due(1))) == [(1, b"1")]


def test_timestamps_given_out_only_grow() -> None:
    """A sender whose timestamp goes back, stands still or leaps for no reason is heard on a line of our own."""
    buffer = JitterBuffer()
    slots: list[Slot] = []
    for index, timestamp in enumerate((0, 960, 960, 1_000, 400_000_000, 400_000_960, 7, 967)):
        push(buffer, index, timestamp=timestamp)
        slots += buffer.pop(due(index))
    assert heard(slots) == [(number, name(number)) for number in range(8)]


def test_a_new_sender_goes_on_behind_the_old_one() -> None:
    """After a restart indices and timestamps begin anywhere; what is given out still grows by the time that passed."""
    buffer = JitterBuffer()
    push(buffer, 100)
    buffer.pop(due(100))
    buffer.restart()
    buffer.push(3, 5, b"new", START_NS + 110 * FRAME_NS)
    assert heard(buffer.pop(due(120))) == [(110, b"new")]


def test_the_buffer_never_holds_more_than_its_bound() -> None:
    """A flood is refused; what is held comes out within the depth and makes room."""
    buffer = JitterBuffer()
    drops = [buffer.push(index, index, b"x", START_NS) for index in range(1_000)]
    assert drops == [None] * MAX_HELD + [Drop.BUFFER_FULL] * (1_000 - MAX_HELD)
    assert len(buffer.pop(START_NS + DEPTH_NS)) == MAX_HELD


def test_a_sender_whose_clock_runs_fast_or_slow_is_followed() -> None:
    """Over an hour at 200 ppm nothing is lost and nothing is held longer than the depth."""
    for ppm in (-200, 200):
        buffer = JitterBuffer()
        given_out = 0
        for index in range(180_000):
            now_ns = START_NS + index * FRAME_NS * (1_000_000 + ppm) // 1_000_000
            assert buffer.push(index, index * FRAME % CYCLE, b"x", now_ns) is None
            given_out += len(buffer.pop(now_ns))
            assert len(buffer) in range(2, 5) or index < 4
            assert buffer.due_ns is not None
            assert buffer.due_ns - now_ns <= DEPTH_NS
        assert given_out + len(buffer) == 180_000
        assert buffer.lost == 0


@dataclass(frozen=True)
class Sent:
    """One packet of a generated stream, and what the network does to it."""

    number: int
    position: int
    sent_ns: int
    lost: bool
    delay_ns: int
    copies: int


@st.composite
def streams(draw: st.DrawFn, *, max_delay_ms: int, pauses: bool) -> list[Sent]:
    sent: list[Sent] = []
    position, now_ns = 0, START_NS
    for number in range(draw(st.integers(1, 60))):
        sent.append(
            Sent(
                number,
                position,
                now_ns,
                lost=draw(st.sampled_from([False, False, False, True])),
                delay_ns=draw(st.integers(0, max_delay_ms)) * NS_PER_MS,
                copies=draw(st.sampled_from([1, 1, 1, 2, 3])),
            )
        )
        pause_frames = draw(st.sampled_from([0, 0, 0, 0, 2, 40])) if pauses else 0
        now_ns += FRAME_NS * (1 + pause_frames)
        position += FRAME * (1 + (pause_frames if draw(st.booleans()) else 0))
    return sent


def play(sent: list[Sent], first_sequence: int, first_timestamp: int) -> tuple[list[Slot], JitterBuffer]:
    """Send a stream through the window and the buffer, popping at each arrival and at each due time."""
    window, buffer = ReplayWindow(), JitterBuffer()
    arrivals = sorted(
        (one.sent_ns + one.delay_ns * (copy + 1), one.number, one)
        for one in sent
        for copy in range(one.copies)
        if not one.lost
    )
    slots: list[Slot] = []
    heard_ns = 0
    arrived: dict[bytes, int] = {}

    def run_until(end_ns: int) -> None:
        while (due_ns := buffer.due_ns) is not None and due_ns <= end_ns:
            popped = buffer.pop(due_ns)
            assert popped, "due, and nothing given out"
            for slot in popped:
                assert slot.frame is None or due_ns <= arrived[slot.frame] + DEPTH_NS
            slots.extend(popped)

    for arrival_ns, number, one in arrivals:
        run_until(arrival_ns)
        if not len(buffer) and arrival_ns - heard_ns > 100 * NS_PER_MS:
            buffer.rebase()
        sequence = (first_sequence + number) % 65_536
        if window.seen(sequence):
            continue
        index = window.accept(sequence)
        assert index is not None
        arrived[name(number)] = arrival_ns
        heard_ns = arrival_ns
        buffer.push(index, (first_timestamp + one.position) % CYCLE, name(number), arrival_ns)
        assert len(buffer) <= MAX_HELD
    run_until(START_NS * 2)
    assert not len(buffer)
    return slots, buffer


first_sequences = st.integers(65_450, 65_535 + 50).map(lambda n: n % 65_536)
first_timestamps = st.integers(CYCLE - 80 * FRAME, CYCLE + FRAME).map(lambda n: n % CYCLE)


@settings(deadline=None, max_examples=300)
@given(streams(max_delay_ms=400, pauses=True), first_sequences, first_timestamps)
def test_whatever_the_network_does_time_only_grows(sent: list[Sent], sequence: int, timestamp: int) -> None:
    """Loss, reordering, copies, pauses, wraps: frames in the sender's order, none twice, no two in one place."""
    slots, _ = play(sent, sequence, timestamp)
    timestamps = [slot.timestamp_samples for slot in slots]
    assert all(after - before >= FRAME for before, after in pairwise(timestamps))
    numbers = [int(slot.frame) for slot in slots if slot.frame is not None]
    assert numbers == sorted(set(numbers))


@settings(deadline=None, max_examples=300)
@given(streams(max_delay_ms=55, pauses=False), first_sequences, first_timestamps)
def test_jitter_below_the_depth_loses_nothing(sent: list[Sent], sequence: int, timestamp: int) -> None:
    """Each frame that arrives is heard in its place, and each that does not is marked there."""
    slots, buffer = play(sent, sequence, timestamp)
    arrived = [one.number for one in sent if not one.lost]
    if not arrived:
        assert slots == []
        return
    begin, end = arrived[0], arrived[-1]
    # three ticks and the jitter may make 100 ms: that is a pause, and its holes are not marked
    outages = {
        number for before, after in pairwise(arrived) if after - before > 2 for number in range(before + 1, after)
    }
    origin = slots[0].timestamp_samples
    found = {begin + (slot.timestamp_samples - origin) // FRAME: slot.frame for slot in slots}
    assert {number: found.get(number) for number in arrived} == {number: name(number) for number in arrived}
    marked = {number for number, frame in found.items() if frame is None}
    missing = set(range(begin, end)) - set(arrived)
    assert missing - outages <= marked <= missing
    assert buffer.lost == len(missing)
