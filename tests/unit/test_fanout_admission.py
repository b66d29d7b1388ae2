"""Admission: headroom from real costs, none while the pace slips, and nothing that goes to and fro."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.capacity import Cost, limits
from worker.fanout.admission import Admission, Reading

_BEAT_NS = 500_000_000


class Worker:
    """A worker's figures, beat by beat, by a clock that is moved by hand."""

    def __init__(self, capacity: int = 2_000, *, cores: float = 2.0, share: float = 0.7) -> None:
        self.admission = Admission(capacity, cores, share)
        self.cost = Cost(5.0, 4.0)
        self.held = 0
        self.now = Reading(0, 0, 0, 0, 0, 3, 0, 0)
        self.admission.note(self.now)

    def beat(
        self,
        times: int = 1,
        *,
        joins: int = 0,
        join_ns: int = 7_000_000,
        skipped: int = 0,
        lead: int = 3,
        sender_began_anew: bool = False,
    ) -> None:
        """So many times half a second of play, with joins in each."""
        for _ in range(times):
            self.held += joins
            packets = self.held * 25
            self.now = Reading(
                at_ns=self.now.at_ns + _BEAT_NS,
                worker_cpu_ns=self.now.worker_cpu_ns + int(packets * self.cost.worker_us * 1e3) + joins * join_ns,
                sender_cpu_ns=0
                if sender_began_anew
                else self.now.sender_cpu_ns + int(packets * self.cost.sender_us * 1e3),
                packets=self.now.packets + packets,
                ticks_skipped=self.now.ticks_skipped + skipped,
                lead=lead,
                opened=self.now.opened + joins,
                guilds=self.held,
            )
            self.admission.note(self.now)

    @property
    def headroom(self) -> int:
        return self.admission.headroom(self.held)

    @property
    def refuses(self) -> bool:
        return self.admission.refuses(self.held)


def test_a_worker_that_has_done_nothing_offers_its_capacity() -> None:
    """Measured or set: until costs are known it is believed, on any number of cores."""
    for cores in (0.3, 1.0, 2.0, 16.0):
        for capacity in (1, 64, 1_386, 20_000):
            assert Worker(capacity, cores=cores).headroom == capacity


def test_what_is_held_is_not_offered_again() -> None:
    """Each guild takes one place from the moment that it is given."""
    worker = Worker(capacity=3)
    worker.held = 2
    assert (worker.headroom, worker.refuses) == (1, False)
    worker.held = 3
    assert (worker.headroom, worker.refuses) == (0, True)


def test_headroom_follows_what_packets_really_cost() -> None:
    """Dearer than thought: fewer guilds; each process has its own core, and the fuller one decides."""
    worker = Worker(capacity=2_000)
    worker.held, worker.cost = 1_000, Cost(10.0, 4.0)
    worker.beat(100)
    assert worker.headroom == 1_400 - 1_000
    assert worker.admission.limit == "worker"
    worker.cost = Cost(5.0, 14.0)
    worker.beat(100)
    assert worker.headroom == 0
    assert worker.admission.limit == "sender"


def test_processes_that_share_cores_share_the_room() -> None:
    """On one core for both, costs add up."""
    worker = Worker(capacity=2_000, cores=1.0)
    worker.held, worker.cost = 500, Cost(8.0, 6.0)
    worker.beat(100)
    assert worker.headroom == 1_000 - 500
    assert worker.admission.limit == "cores"


def test_cheaper_packets_make_no_more_room_than_the_capacity() -> None:
    """It is the number of rows, too."""
    worker = Worker(capacity=2_000)
    worker.held, worker.cost = 1_000, Cost(0.5, 0.5)
    worker.beat(100)
    assert worker.headroom == 1_000
    assert worker.admission.limit == "capacity"


def test_one_dear_moment_is_smoothed() -> None:
    """A figure of half a second says little: a collection, a neighbour."""
    worker = Worker(capacity=2_000)
    worker.held, worker.cost = 1_000, Cost(7.0, 7.0)
    worker.beat(100)
    before = worker.headroom
    worker.cost = Cost(10.0, 7.0)
    worker.beat()
    assert before > worker.headroom > 0.9 * before


def test_few_guilds_teach_nothing_about_many() -> None:
    """A worker with hardly a guild costs something, too; that is no guild's cost."""
    worker = Worker(capacity=2_000)
    worker.held, worker.cost = 10, Cost(100.0, 100.0)
    worker.beat(100)
    assert worker.headroom == 1_990


def test_what_joins_cost_is_not_taken_for_what_guilds_cost() -> None:
    """A herd of joins fills half of a core for as long as it lasts, and none of it afterwards."""
    worker = Worker(capacity=2_000)
    worker.cost = Cost(6.9, 6.9)
    worker.beat(40, joins=40)
    assert worker.held == 1_600
    assert worker.headroom == 2_000 - 1_600


def test_a_cheaper_reading_is_believed_amid_joins() -> None:
    """Joins only add to what is read: what it is less than cannot be true."""
    worker = Worker(capacity=20_000, share=0.95)
    worker.held = 4_000
    worker.cost = Cost(0.5, 0.5)
    worker.beat(200, joins=1, join_ns=0)
    assert worker.admission.cost.worker_us < 0.6


def test_a_sender_that_began_anew_is_not_read_as_one_that_costs_nothing() -> None:
    """Its time counts from its own start."""
    worker = Worker(capacity=2_000)
    worker.held, worker.cost = 1_000, Cost(5.0, 7.0)
    worker.beat(100)
    before = worker.admission.cost
    worker.beat(sender_began_anew=True)
    assert worker.admission.cost == before
    worker.beat()
    assert abs(worker.admission.cost.sender_us - before.sender_us) < 0.01


def busy_worker() -> Worker:
    """It uses more than half of the 70 % of its core."""
    worker = Worker()
    worker.held, worker.cost = 1_000, Cost(7.1, 4.0)
    worker.beat(100)
    assert worker.headroom > 900
    return worker


def test_a_busy_worker_whose_pace_slips_offers_no_room_for_some_seconds() -> None:
    """Ticks skipped, or hardly anything built ahead: whatever the processor time says, it is too much."""
    for skipped, lead in ((1, 3), (0, 0), (0, -40)):
        worker = busy_worker()
        worker.beat(skipped=skipped, lead=lead)
        assert worker.headroom == 0
        assert worker.admission.limit == "pace"
        worker.beat(5)
        assert worker.headroom == 0
        worker.beat()
        assert worker.headroom > 900


def test_what_was_given_is_refused_only_when_the_pace_slips_again() -> None:
    """One slip may be the machine's; what is on its way then still comes in."""
    worker = busy_worker()
    worker.beat(lead=0)
    assert not worker.refuses
    worker.beat(skipped=3)
    assert worker.refuses
    worker.beat(5)
    assert not worker.refuses  # the first is forgotten
    worker.beat()
    assert worker.headroom > 900


def test_a_machine_that_stands_still_does_not_close_a_worker_that_does_little() -> None:
    """Guilds that it would refuse had no part in it, and no other worker of that machine would do better."""
    worker = Worker()
    worker.held = 100
    worker.beat(10, skipped=5, lead=-5)
    assert (worker.headroom, worker.refuses) == (1_900, False)


def test_joins_that_break_the_pace_are_the_workers_own_work() -> None:
    """A herd that is too much for it is held off for a moment."""
    worker = Worker()
    worker.beat(joins=40, lead=0)
    assert worker.headroom == 0


def test_a_slip_counts_by_the_cores_that_both_processes_share() -> None:
    """On half a core, a third of it is much."""
    for cores, headroom in ((2.0, 1_500), (0.5, 0)):
        worker = Worker(cores=cores)
        worker.held, worker.cost = 500, Cost(4.0, 3.0)
        worker.beat(lead=0)
        assert worker.headroom == headroom


def test_between_no_more_room_and_a_refusal_lies_a_margin() -> None:
    """Costs waver; what was placed when there was room is not sent away for that."""
    worker = Worker(capacity=2_000)
    worker.held, worker.cost = 1_000, Cost(10.0, 4.0)
    worker.beat(100)
    worker.held = 1_400
    assert (worker.headroom, worker.refuses) == (0, False)
    worker.held = 1_427
    assert not worker.refuses
    worker.held = 1_428
    assert worker.refuses


def test_costs_that_waver_at_the_edge_are_told_once() -> None:
    """A worker is overloaded until there is room worth the name, or the capacity is what limits it again."""
    worker = Worker(capacity=2_000)
    worker.held, worker.cost = 1_000, Cost(14.1, 4.0)
    told = []
    for worker_us in (14.1, 13.9, 14.1, 13.9, 13.0, 14.1, 6.0):
        worker.cost = Cost(worker_us, 4.0)
        worker.beat(100)
        told.append(worker.admission.overloaded(worker.held))
    assert told == [True, True, True, True, False, True, False]


_readings = st.lists(
    st.builds(
        lambda span, worker, sender, packets, skipped, lead, opened: (
            span,
            worker,
            sender,
            packets,
            skipped,
            lead,
            opened,
        ),
        *(st.integers(0, 10**10), st.integers(-(10**9), 10**10), st.integers(-(10**10), 10**10), st.integers(0, 10**6)),
        *(st.integers(0, 3), st.integers(-100, 4), st.integers(0, 100)),
    ),
    max_size=30,
)


@given(st.integers(1, 20_000), st.floats(0.05, 64), st.floats(0.1, 1), _readings, st.integers(0, 25_000))
def test_headroom_is_a_number_that_never_exceeds_the_capacity(
    capacity: int, cores: float, share: float, steps: list[tuple[int, ...]], held: int
) -> None:
    """Whatever the figures say: within bounds, and whoever would be refused is not offered room."""
    admission = Admission(capacity, cores, share)
    now = Reading(0, 0, 0, 0, 0, 3, 0, 0)
    for span, worker, sender, packets, skipped, lead, opened in steps:
        now = Reading(
            now.at_ns + span,
            *(now.worker_cpu_ns + worker, now.sender_cpu_ns + sender, now.packets + packets),
            *(now.ticks_skipped + skipped, lead, now.opened + opened, held),
        )
        admission.note(now)
        headroom = admission.headroom(held)
        assert 0 <= headroom <= max(0, capacity - held)
        assert not (headroom and admission.refuses(held))
        assert min(admission.cost) > 0


@given(st.floats(1, 30), st.floats(1, 30), st.floats(0.5, 4), st.integers(100, 5_000), st.integers(1, 50))
def test_a_pool_that_places_by_headroom_stays_within_the_processor(
    worker_us: float, sender_us: float, cores: float, capacity: int, a_beat: int
) -> None:
    """However wrong the capacity is: placing stops near what the processor carries, and stands still there."""
    worker = Worker(capacity, cores=cores)
    worker.cost = Cost(worker_us, sender_us)
    for _ in range(400):
        worker.beat(joins=min(a_beat, worker.headroom))
        worker.beat(2)
    settled = worker.held
    worker.beat(100)
    assert worker.headroom == 0 or worker.held + worker.headroom <= capacity
    carried = min(capacity, *limits(worker.cost, cores, 0.7).values())
    # Below a hundred guilds nothing is learned; then two seconds of placing may be on their way.
    assert settled <= max(100, carried) + 6 * a_beat


def test_a_worker_whose_guilds_are_silent_is_not_full() -> None:
    """All that its processes do falls on the few packets that are sent: what is idle is told by the load."""
    worker = Worker(capacity=4_000)
    worker.held = 2_000
    for _ in range(40):
        now = worker.now
        worker.now = now._replace(
            at_ns=now.at_ns + _BEAT_NS,
            worker_cpu_ns=now.worker_cpu_ns + _BEAT_NS * 15 // 100,
            sender_cpu_ns=now.sender_cpu_ns + _BEAT_NS * 6 // 100,
            packets=now.packets + 150 * 25,
            guilds=worker.held,
        )
        worker.admission.note(worker.now)
    assert worker.headroom == 2_000
    assert not worker.refuses
