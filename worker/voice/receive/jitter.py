"""A jitter buffer of fixed depth: frames in whatever order in, in order and on time out, holes marked. Pure.

Order is by packet index; time is by RTP timestamp. A frame is due `DEPTH_NS` after it would have come had it travelled
as fast as the fastest of the last one to two seconds: that follows the drift of the sender's clock, and no frame is
held longer than that. Timestamps given out only grow, by at least a frame, whatever the sender does with its own.

Source: voice protocol reference, section 5: some senders let the timestamp stand still over a pause, others go on.
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple

from shared.clock import NS_PER_MS, NS_PER_S
from shared.protocol.opus import FRAME_SAMPLES
from worker.voice.receive.drops import Drop
from worker.voice.receive.replay import MAX_AHEAD_PACKETS

DEPTH_NS = 60 * NS_PER_MS
MAX_HELD = 64
"""Nobody who keeps time has more than a handful of frames here."""
MAX_MARKED_LOST = 25
"""A longer hole is an outage: it is counted, and not filled frame by frame."""
_FASTEST_OVER_NS = NS_PER_S
_MAX_LEAD_NS = NS_PER_S
"""A timestamp may run ahead of the time that passed by as much; what is further is a new start of the sender's."""

_CYCLE = 1 << 32
_HALF_CYCLE = _CYCLE // 2


class Slot(NamedTuple):
    """20 ms of a sender.

    Attributes:
        timestamp_samples: only grows; a pause the sender told by its timestamp is a gap.
        frame: None when it was lost.
    """

    timestamp_samples: int
    frame: bytes | None


class _Held(NamedTuple):
    packet_index: int
    position: int
    """The sender's timestamp without wraps."""
    frame: bytes
    """Empty: a packet that carried no frame."""
    arrival_ns: int


def _ns(samples: int) -> int:
    return samples * 62_500 // 3  # 48 kHz


def _samples(duration_ns: int) -> int:
    return duration_ns * 3 // 62_500


class JitterBuffer:
    """Frames of one sender, by the index of `ReplayWindow`.

    Attributes:
        lost: packets whose turn passed without them.
    """

    def __init__(self) -> None:
        self.lost = 0
        self._timestamp_samples: int | None = None
        self._given_arrival_ns = 0
        self.restart()

    def restart(self) -> None:
        """The sender starts anew: what is held goes; indices and its timestamps begin anywhere."""
        self._held: list[_Held] = []
        self._next: int | None = None
        self._reference: int | None = None
        """Position that the next timestamp is near."""
        self._given: int | None = None
        """Position of the slot given out last."""
        self.rebase()

    def rebase(self) -> None:
        """The sender paused: it may come back with any delay, and what is missing in between is no hole."""
        self._after_pause = True
        self._fastest_ns: int | None = None
        """Least arrival time minus position since `_counting_since_ns`; `_fastest_before_ns`: in the second before."""
        self._fastest_before_ns = 0
        self._counting_since_ns = 0

    def __len__(self) -> int:
        return len(self._held)

    def push(self, index: int, timestamp: int, frame: bytes, arrival_ns: int) -> Drop | None:
        """Take a frame.

        Args:
            index: of its packet; each comes once.
            timestamp: 32 bits, from its packet.
            frame: empty for a packet without one, so that it is not taken for lost.
            arrival_ns: never less than at the call before.
        Returns: why it was not taken.
        """
        if self._next is not None and index < self._next:
            return Drop.LATE
        held = self._held
        if len(held) >= MAX_HELD:
            return Drop.BUFFER_FULL
        position = timestamp
        if self._reference is not None:
            ahead = (timestamp - self._reference + _HALF_CYCLE) % _CYCLE - _HALF_CYCLE
            position = self._reference + ahead
        if frame:
            self._reference = position
            self._observe(arrival_ns - _ns(position), arrival_ns)
        one = _Held(index, position, frame, arrival_ns)
        if not held or index > held[-1].packet_index:
            held.append(one)
        else:
            insort(held, one)
        return None

    def _observe(self, transit_ns: int, now_ns: int) -> None:
        if self._fastest_ns is None:
            self._fastest_ns = self._fastest_before_ns = transit_ns
            self._counting_since_ns = now_ns
        elif now_ns - self._counting_since_ns >= _FASTEST_OVER_NS:
            self._fastest_before_ns, self._fastest_ns = self._fastest_ns, transit_ns
            self._counting_since_ns = now_ns
        elif transit_ns < self._fastest_ns:
            self._fastest_ns = transit_ns

    def _due_ns(self, position: int) -> int:
        if self._fastest_ns is None:
            return 0
        return _ns(position) + min(self._fastest_ns, self._fastest_before_ns) + DEPTH_NS

    @property
    def due_ns(self) -> int | None:
        """When `pop` has something to give; None while nothing is held."""
        if not self._held:
            return None
        head = self._held[0]
        if self._lost_before(head):
            assert self._given is not None
            return self._due_ns(self._given + FRAME_SAMPLES)
        return self._due_ns(head.position) if head.frame else head.arrival_ns + DEPTH_NS

    def _missing_before(self, head: _Held) -> int:
        return 0 if self._next is None else head.packet_index - self._next

    def _step(self, head: _Held) -> int | None:
        """Samples from the slot given out last to this frame as the sender tells them; None: not to be believed."""
        if self._given is None:
            return None
        step = head.position - self._given
        if step < FRAME_SAMPLES or _ns(step) > head.arrival_ns - self._given_arrival_ns + _MAX_LEAD_NS:
            return None
        return step

    def _lost_before(self, head: _Held) -> bool:
        """Whether the next slot is one that was lost: packets are missing, and before the head is time for one."""
        if self._after_pause or not 0 < self._missing_before(head) <= MAX_MARKED_LOST:
            return False
        step = self._step(head)
        return step is not None and step >= 2 * FRAME_SAMPLES

    def pop(self, now_ns: int) -> list[Slot]:
        """Take out all that is due."""
        slots: list[Slot] = []
        while (due_ns := self.due_ns) is not None and due_ns <= now_ns:
            head = self._held[0]
            if self._lost_before(head):
                assert self._given is not None
                assert self._next is not None
                self._given += FRAME_SAMPLES
                self._next += 1
                self.lost += 1
                slots.append(Slot(self._advance(FRAME_SAMPLES), None))
                continue
            del self._held[0]
            missing = self._missing_before(head)
            if not head.frame:
                # what is missing before it stays missing, as if it had been sent after it
                self._next = head.packet_index + 1 - missing
                continue
            self._next = head.packet_index + 1
            if missing <= MAX_AHEAD_PACKETS:
                self.lost += missing
            step = self._step(head)
            if step is None:
                step = max(FRAME_SAMPLES, _samples(head.arrival_ns - self._given_arrival_ns))
            if self._timestamp_samples is None:
                self._timestamp_samples = head.position - step
            slots.append(Slot(self._advance(step), head.frame))
            self._given = head.position
            self._given_arrival_ns = head.arrival_ns
            self._after_pause = False
        return slots

    def _advance(self, samples: int) -> int:
        assert self._timestamp_samples is not None
        self._timestamp_samples += samples
        return self._timestamp_samples
