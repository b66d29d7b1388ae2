"""Building: three counters, five frames of silence, no (key, nonce) pair twice. Packets are opened by other code."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_decrypt
from numpy.typing import NDArray

from shared.errors import VoiceError
from shared.protocol.transport_crypto import AES_GCM, MODES, XCHACHA, open_packet
from worker.fanout import build, rows
from worker.fanout.app import BEGIN_TICKS, FAR_TICKS
from worker.fanout.build import Builder, Lane, Target
from worker.fanout.rows import MOST_AHEAD_TICKS, RING_TICKS, RowTable
from worker.fanout.scratch import BLOCK_TICKS, ROWS_AT_ONCE

ROWS = 4
SILENCE = b"\xf8\xff\xfe"
START = 85_000_000_000
"""A tick of our days, whose RTP timestamps are beyond 32 bits."""


class Packet(NamedTuple):
    """One packet as a receiver sees it."""

    sequence: int
    timestamp: int
    ssrc: int
    counter: int
    frame: bytes


class Connection:
    """One row and the receiver's view of it, which knows keys and modes by itself."""

    def __init__(self, rig: Rig, mode: str = AES_GCM, ssrc: int = 7, socket_number: int = 0) -> None:
        self._rig = rig
        self.mode = mode
        self.ssrc = ssrc
        self.socket_number = socket_number
        self.key = os.urandom(32)
        self.row = rig.builder.open(self.target())

    def target(self) -> Target:
        return Target(self.ssrc, ("192.0.2.1", 50_000), self.socket_number, self.mode, self.key)

    def rekey(self) -> None:
        self.key = os.urandom(32)
        self._rig.builder.rekey(self.row, self.target())

    def packet(self, tick: int) -> Packet | None:
        """What is built for a tick, or None."""
        table, ring = self._rig.table, tick % RING_TICKS
        if table.due[ring, self.row] != tick:
            return None
        data = table.packets[self.row, ring, : table.length[ring, self.row]].tobytes()
        flags, payload_type, sequence, timestamp, ssrc = struct.unpack(">BBHII", data[:12])
        assert (flags, payload_type) == (0x80, 120)
        header, sealed, suffix = data[:12], data[12:-4], data[-4:]
        if self.mode == AES_GCM:
            frame = AESGCM(self.key).decrypt(suffix + bytes(8), sealed, header)
        elif self.mode == XCHACHA:
            frame = crypto_aead_xchacha20poly1305_ietf_decrypt(sealed, header, suffix + bytes(20), self.key)
        else:
            frame = open_packet(self.mode, self.key, data)
        return Packet(sequence, timestamp, ssrc, int.from_bytes(suffix, "big"), frame)

    def must(self, tick: int) -> Packet:
        packet = self.packet(tick)
        assert packet is not None
        return packet


class Rig:
    """A builder over real shared memory, with one lane that plays what the test puts into `frames`."""

    def __init__(self, rows: int = ROWS) -> None:
        self.table = RowTable(rows)
        self.builder = Builder(self.table)
        self.frames: dict[int, bytes] = {}
        self.lane = self.new_lane(self.frames)
        self.sent(START - 1)

    def new_lane(self, frames: dict[int, bytes]) -> Lane:
        lane = Lane(frame_at=frames.get)
        self.builder.lanes.append(lane)
        return lane

    def connect(self, mode: str = AES_GCM, ssrc: int = 7, socket_number: int = 0, *, tuned: bool = True) -> Connection:
        connection = Connection(self, mode, ssrc, socket_number)
        if tuned:
            self.builder.tune(connection.row, self.lane)
        return connection

    def play(self, *ticks: int) -> None:
        """Put a frame on the air for each tick and build it."""
        for tick in ticks:
            self.frames[tick] = b"frame %d" % tick
            self.builder.build(tick)

    def sent(self, tick: int) -> None:
        """The sender is through with a tick."""
        self.table.taken_tick[:] = tick
        self.table.sent_tick[:] = tick


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.table.close()


def span(first: int, number: int) -> range:
    return range(START + first, START + first + number)


@pytest.mark.parametrize("mode", MODES)
def test_a_packet_is_opened_by_its_receiver(rig: Rig, mode: str) -> None:
    """Header, frame and counter stand where the voice protocol has them, in every mode."""
    connection = rig.connect(mode, ssrc=0xDEADBEEF)
    rig.play(START)
    packet = connection.must(START)
    assert (packet.ssrc, packet.frame) == (0xDEADBEEF, b"frame %d" % START)
    assert packet.sequence <= 2**15


def test_nothing_is_built_for_a_row_that_is_not_tuned(rig: Rig) -> None:
    """A connection is silent until it is tuned."""
    connection = rig.connect(tuned=False)
    rig.play(START)
    assert connection.packet(START) is None


def test_sequence_goes_up_by_one_per_packet_and_timestamp_by_960_per_tick(rig: Rig) -> None:
    """A tick without a packet moves the timestamp and not the sequence."""
    connection = rig.connect()
    ticks = [START, START + 1, START + 2, START + 6, START + 7]  # 3 to 5 were skipped: the worker was late
    packets = []
    for tick in ticks:
        rig.play(tick)
        packets.append(connection.must(tick))
    first = packets[0]
    assert [(one.sequence - first.sequence) % 2**16 for one in packets] == [0, 1, 2, 3, 4]
    assert [(one.timestamp - first.timestamp) % 2**32 for one in packets] == [0, 960, 1_920, 5_760, 6_720]


def test_timestamps_go_on_over_silence(rig: Rig) -> None:
    """Ticks on which nothing is on the air count, too."""
    connection = rig.connect()
    rig.play(START)
    first = connection.must(START)
    for tick in span(1, 100):
        rig.builder.build(tick)
    rig.play(START + 101)
    again = connection.must(START + 101)
    assert (again.timestamp - first.timestamp) % 2**32 == 101 * 960
    assert (again.sequence - first.sequence) % 2**16 == 6


def test_the_sequence_wraps(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 65535 comes 0, without a word."""
    monkeypatch.setattr("worker.fanout.build.secrets.randbelow", lambda _limit: 65_534)
    connection = rig.connect()
    sequences = []
    for tick in span(0, 4):
        rig.play(tick)
        sequences.append(connection.must(tick).sequence)
    assert sequences == [65_535, 0, 1, 2]


def test_the_timestamp_wraps(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timestamps are taken modulo 2^32, wherever they begin."""
    base = (-START * 960 - 960) % 2**32
    monkeypatch.setattr("worker.fanout.build.secrets.randbits", lambda _bits: base)
    connection = rig.connect()
    rig.play(START, START + 1)
    assert connection.must(START).timestamp == 2**32 - 960
    assert connection.must(START + 1).timestamp == 0


@pytest.mark.parametrize("mode", [AES_GCM, XCHACHA])
def test_no_nonce_is_used_twice_under_a_key(rig: Rig, mode: str) -> None:
    """Frames, silence, pauses and tuning: each packet has a counter of its own, one above the last."""
    connection = rig.connect(mode)
    other = rig.new_lane(dict.fromkeys(span(30, 10), b"other"))
    counters = []
    for tick in span(0, 60):
        if tick == START + 30:
            rig.builder.tune(connection.row, other)
        if tick == START + 50:
            rig.builder.tune(connection.row, None)
        if tick < START + 10 or tick % 7 == 0:
            rig.frames[tick] = b"x"
        rig.builder.build(tick)
        packet = connection.packet(tick)
        if packet is not None:
            counters.append(packet.counter)
    assert len(counters) > 20
    assert counters == list(range(counters[0], counters[0] + len(counters)))


def test_the_counter_goes_on_under_a_new_key(rig: Rig) -> None:
    """A server that comes back to a key it had gave up must not meet a nonce twice; packets open with the new key."""
    connection = rig.connect()
    rig.play(*span(0, 3))
    last_counter = connection.must(START + 2).counter
    rig.sent(START + 2)
    connection.rekey()
    rig.play(START + 3)
    assert connection.must(START + 3).counter > last_counter


def test_a_new_key_voids_what_was_built_under_the_old_one(rig: Rig) -> None:
    """Nothing leaves under a key that the receiver has given up; the sequence goes back, so that nothing is missing."""
    connection = rig.connect()
    rig.play(*span(0, 5))
    last_sent = connection.must(START + 1)
    rig.sent(START + 1)
    connection.rekey()
    assert [connection.packet(tick) for tick in span(2, 3)] == [None] * 3
    rig.play(START + 5)
    after = connection.must(START + 5)
    assert after.sequence == (last_sent.sequence + 1) % 2**16
    assert (after.timestamp - last_sent.timestamp) % 2**32 == 4 * 960


def test_what_was_sent_under_the_old_key_is_not_void(rig: Rig) -> None:
    """Sequence numbers that are out are never used again."""
    connection = rig.connect()
    rig.play(*span(0, 5))
    last = connection.must(START + 4)
    rig.sent(START + 4)
    connection.rekey()
    rig.play(START + 5)
    assert connection.must(START + 5).sequence == (last.sequence + 1) % 2**16


def test_a_sequence_goes_back_over_its_wrap(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Voiding packets just after the wrap leads back before it."""
    monkeypatch.setattr("worker.fanout.build.secrets.randbelow", lambda _limit: 65_533)
    connection = rig.connect()
    rig.play(*span(0, 4))  # 65534, 65535, 0, 1
    rig.sent(START)
    connection.rekey()
    rig.play(START + 4)
    assert connection.must(START + 4).sequence == 65_535


def test_silence_that_a_new_key_voided_is_owed_again(rig: Rig) -> None:
    """A receiver hears five frames of silence, whatever was thrown away on the way."""
    connection = rig.connect()
    rig.play(START)
    for tick in span(1, 4):
        rig.builder.build(tick)
    rig.sent(START + 1)  # one frame of silence has left, three are void
    connection.rekey()
    heard = []
    for tick in span(5, 10):
        rig.builder.build(tick)
        heard += frames_of(connection, range(tick, tick + 1))
    assert heard == [SILENCE] * 4 + [None] * 6


def test_a_new_key_of_one_touches_no_other(rig: Rig) -> None:
    """Guilds share lanes, not fates."""
    one, other = rig.connect(ssrc=1), rig.connect(ssrc=2)
    rig.play(*span(0, 3))
    before = other.must(START + 2)
    one.rekey()
    assert other.must(START + 2) == before
    rig.play(START + 3)
    after = other.must(START + 3)
    assert (after.sequence, after.counter) == ((before.sequence + 1) % 2**16, before.counter + 1)


def frames_of(connection: Connection, ticks: range) -> list[bytes | None]:
    return [packet and packet.frame for packet in map(connection.packet, ticks)]


def test_five_frames_of_silence_end_what_was_on_the_air_then_nothing_comes(rig: Rig) -> None:
    """A receiver must not take an end for a loss."""
    connection = rig.connect()
    rig.play(START)
    heard = []
    for tick in span(1, 20):
        rig.builder.build(tick)
        heard += frames_of(connection, range(tick, tick + 1))
    assert heard == [SILENCE] * 5 + [None] * 15


def test_silence_is_owed_anew_after_each_piece(rig: Rig) -> None:
    """A gap of two frames has two frames of silence; the next gap has its own five."""
    connection = rig.connect()
    on_air = [*span(0, 2), *span(4, 1)]
    heard = []
    for tick in span(0, 12):
        if tick in on_air:
            rig.frames[tick] = b"x"
        rig.builder.build(tick)
        heard += frames_of(connection, range(tick, tick + 1))
    assert heard == [b"x"] * 2 + [SILENCE] * 2 + [b"x"] + [SILENCE] * 5 + [None] * 2


def test_a_row_that_never_played_owes_no_silence(rig: Rig) -> None:
    """Silence ends something, or is not sent."""
    connection = rig.connect()
    rig.builder.build(START)
    assert connection.packet(START) is None
    rig.builder.tune(connection.row, None)
    rig.builder.build(START + 1)
    assert connection.packet(START + 1) is None
    assert rig.builder.silent(connection.row)


def test_a_row_that_leaves_ends_with_silence_while_others_play_on(rig: Rig) -> None:
    """Leaving is an end of one guild, not of the lane; it is over when all has been sent."""
    leaving, staying = rig.connect(ssrc=1), rig.connect(ssrc=2)
    rig.play(START)
    rig.builder.tune(leaving.row, None)
    heard: list[bytes | None] = []
    for tick in span(1, 7):
        rig.play(tick)
        heard += frames_of(leaving, range(tick, tick + 1))
        assert staying.must(tick).frame == b"frame %d" % tick
        rig.sent(tick - 1)
        if tick <= START + 5:
            assert not rig.builder.silent(leaving.row)
    assert heard == [SILENCE] * 5 + [None] * 2
    rig.sent(START + 7)
    assert rig.builder.silent(leaving.row)
    assert not rig.builder.silent(staying.row) or rig.table.sent_tick[0] >= START + 7


def test_a_row_is_not_silent_before_its_last_packet_was_sent(rig: Rig) -> None:
    """Silence that was built and has not left yet is still owed to the receiver."""
    connection = rig.connect()
    rig.play(START)
    rig.builder.tune(connection.row, None)
    for tick in span(1, 5):
        rig.builder.build(tick)
    rig.sent(START + 4)
    assert not rig.builder.silent(connection.row)
    rig.sent(START + 5)
    assert rig.builder.silent(connection.row)


def test_a_late_row_plays_what_the_others_play(rig: Rig) -> None:
    """Whoever joins a lane hears the frame of the tick, with counters of its own."""
    early = rig.connect(ssrc=1)
    rig.play(*span(0, 3))
    late = rig.connect(ssrc=2)
    rig.play(START + 3)
    assert late.must(START + 3).frame == early.must(START + 3).frame
    assert late.must(START + 3).counter == early.must(START).counter
    assert late.packet(START + 2) is None


def test_two_modes_play_in_one_lane(rig: Rig) -> None:
    """A lane is what is heard; how it is sealed is each connection's own."""
    one, other = rig.connect(AES_GCM, ssrc=1), rig.connect(XCHACHA, ssrc=2)
    rig.play(*span(0, 3))
    for tick in span(0, 3):
        assert one.must(tick).frame == other.must(tick).frame == b"frame %d" % tick


def test_a_change_of_lane_changes_no_counter(rig: Rig) -> None:
    """Switching programmes is heard, not seen: sequence, timestamp and counter go on."""
    connection = rig.connect()
    rig.play(START)
    other = rig.new_lane({START + 1: b"other"})
    rig.builder.tune(connection.row, other)
    rig.play(START + 1)
    before, after = connection.must(START), connection.must(START + 1)
    assert after.frame == b"other"
    assert (after.sequence, after.counter) == ((before.sequence + 1) % 2**16, before.counter + 1)
    assert (after.timestamp - before.timestamp) % 2**32 == 960


def test_a_closed_row_has_nothing_to_send(rig: Rig) -> None:
    """What is built and not sent yet is void, and nothing is built any more."""
    connection = rig.connect()
    rig.play(*span(0, 3))
    rig.sent(START)
    slot = rig.builder.slot_of(connection.row)
    layout = int(rig.table.layout[slot])
    rig.builder.close(connection.row)
    assert not rig.table.active[connection.row]
    assert rig.table.layout[slot] != layout
    rig.play(START + 3)
    assert [connection.packet(tick) for tick in span(1, 3)] == [None] * 3


def test_a_row_rests_for_a_second_before_it_is_used_again(rig: Rig) -> None:
    """The sender must not mix a row's old and its next connection."""
    connections = [rig.connect(ssrc=number) for number in range(ROWS)]
    rig.play(START)
    rig.builder.close(connections[2].row)
    for tick in span(1, 49):
        rig.builder.build(tick)
        with pytest.raises(VoiceError):
            rig.connect()
    rig.builder.build(START + 50)
    again = rig.connect(ssrc=9)
    assert again.row == connections[2].row
    rig.play(START + 51)
    assert again.must(START + 51).ssrc == 9


def test_more_connections_than_rows_are_refused(rig: Rig) -> None:
    """A full worker says so; the connections it has are not touched."""
    held = [rig.connect(ssrc=number) for number in range(ROWS)]
    with pytest.raises(VoiceError):
        rig.connect()
    rig.play(START)
    assert len({connection.must(START).ssrc for connection in held}) == ROWS


def test_a_packet_in_the_hands_of_the_sender_is_not_taken_back(rig: Rig) -> None:
    """It leaves under the key before; the next one has the next number: none comes twice and none is missing."""
    connection = rig.connect()
    rig.play(START, START + 1, START + 2)
    taken = connection.must(START + 1)
    rig.sent(START)
    rig.table.taken_tick[:] = START + 1  # it is sending this tick
    connection.rekey()
    rig.play(START + 3)
    assert connection.packet(START + 2) is None
    assert connection.must(START + 3).sequence == (taken.sequence + 1) % 2**16


# what the sender may see in which order


def at_each_fence(monkeypatch: pytest.MonkeyPatch, look: Callable[[], None]) -> None:
    """Be the sender at each fence: what was written before it is seen, what is written after it is not."""

    def fence() -> None:
        look()
        rows.fence()

    monkeypatch.setattr(build, "fence", fence)


def test_a_packet_is_in_place_before_it_is_due(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole block: no tick is due while the packet of one is missing."""
    connection, ticks = rig.connect(), range(START, START + 4)
    seen: list[tuple[list[int], bool]] = []

    def look() -> None:
        rings = [tick % RING_TICKS for tick in ticks]
        lengths = rig.table.length[rings, connection.row]
        nonces = [rig.table.packets[connection.row, ring, lengths[n] - 4 : lengths[n]] for n, ring in enumerate(rings)]
        seen.append((rig.table.due[rings, connection.row].tolist(), all(nonce.any() for nonce in nonces)))

    at_each_fence(monkeypatch, look)
    rig.frames.update(dict.fromkeys(ticks, b"frame"))
    rig.builder.build(START, ticks[-1])
    assert seen == [([0, 0, 0, 0], True)]
    assert built(rig, connection) == list(ticks)


def test_what_is_taken_back_is_not_asked_about_before(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender takes a tick in hand in this very moment: it finds nothing there, or the builder knows of it."""
    connection = rig.connect()
    rig.play(START, START + 1, START + 2)
    last = connection.must(START + 2)
    found: list[list[int]] = []

    def take_in_hand() -> None:
        rig.table.taken_tick[:] = START
        found.append(built(rig, connection))

    at_each_fence(monkeypatch, take_in_hand)
    connection.rekey()
    assert found == [[]]
    monkeypatch.undo()
    rig.play(START + 3)
    # one packet counts as sent, two were taken back
    assert connection.must(START + 3).sequence == (last.sequence - 1) % 2**16


def test_a_row_is_whole_before_the_sender_is_told_of_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """And off before it is told that it is gone: else it would go on in the old plan, to the old address."""
    table = rig.table
    seen: list[tuple[int, int, bool]] = []
    at_each_fence(
        monkeypatch, lambda: seen.append((int(table.layout.sum()), int(table.active[0]), bool(table.address[0].any())))
    )
    connection = rig.connect(tuned=False)
    assert (seen, table.layout.sum()) == ([(0, 1, True)], 1)
    rig.builder.close(connection.row)
    assert (seen[-1], table.layout.sum()) == ((1, 0, True), 2)


def test_the_longest_frame_fits_with_its_encryption(rig: Rig) -> None:
    """Opus makes 1275 bytes at most, end-to-end encryption adds 16."""
    connection = rig.connect()
    rig.builder.protect(connection.row, lambda frame: frame + bytes(16))
    rig.frames[START] = bytes(1_275)
    rig.builder.build(START)
    assert connection.must(START).frame == bytes(1_275 + 16)


def test_each_guild_has_its_own_end_to_end_encryption(rig: Rig) -> None:
    """One frame, three rows: two protected, each in its own way and length, and a plain one between them."""
    one, plain, other = rig.connect(ssrc=1), rig.connect(ssrc=2), rig.connect(XCHACHA, ssrc=3)
    rig.builder.protect(one.row, lambda frame: b"1" + frame)
    rig.builder.protect(other.row, lambda frame: b"two" + frame)
    for tick in span(0, 3):
        rig.play(tick)
        frame = rig.frames[tick]
        assert [c.must(tick).frame for c in (one, plain, other)] == [b"1" + frame, frame, b"two" + frame]


def test_no_frame_leaves_in_the_clear_when_its_encryption_fails(rig: Rig) -> None:
    """Silence takes its place, so that sequence numbers go on, and the failure is counted."""
    connection = rig.connect()
    rig.builder.protect(connection.row, lambda _frame: None)
    rig.play(START)
    assert connection.must(START).frame == SILENCE
    assert rig.builder.unprotected == 1


def test_silence_frames_are_never_encrypted(rig: Rig) -> None:
    """Neither one of the programme nor those at its end: receivers and server know them as they are."""
    connection = rig.connect()
    rig.builder.protect(connection.row, lambda frame: b"no " + frame)
    rig.play(START)
    rig.frames[START + 1] = SILENCE
    for tick in span(1, 6):
        rig.builder.build(tick)
    frames = [connection.must(tick).frame for tick in span(0, 7 - 1)]
    assert frames == [b"no frame %d" % START, *[SILENCE] * 5]
    assert rig.builder.unprotected == 0


def test_protection_ends_where_it_is_taken_away(rig: Rig) -> None:
    """A downgrade that the server ordered: frames go out as they are from the next tick on."""
    connection = rig.connect()
    rig.builder.protect(connection.row, lambda frame: b"no " + frame)
    rig.play(START)
    rig.builder.protect(connection.row, None)
    rig.play(START + 1)
    assert [connection.must(tick).frame[:2] for tick in span(0, 2)] == [b"no", b"fr"]


def test_a_frame_that_does_not_fit_is_refused_and_spoils_nothing(rig: Rig) -> None:
    """Neither the neighbour's row nor a counter is touched by what cannot be sent."""
    one, other = rig.connect(ssrc=1), rig.connect(ssrc=2)
    rig.play(START)
    rig.frames[START + 1] = bytes(1_276)
    with pytest.raises(ValueError, match="does not fit"):
        rig.builder.build(START + 1)
    assert one.packet(START + 1) is None
    rig.play(START + 2)
    for connection in (one, other):
        before, after = connection.must(START), connection.must(START + 2)
        assert (after.sequence, after.counter) == ((before.sequence + 1) % 2**16, before.counter + 1)


def test_a_nearly_spent_counter_is_told_in_time(rig: Rig) -> None:
    """A session is made anew hours before its nonces run out, and never after."""
    one, other = rig.connect(ssrc=1), rig.connect(ssrc=2)
    rig.play(START)
    assert rig.builder.worn_out() == []
    rig.builder._nonces[other.row] = 2**32 - 50 * 3_600
    assert rig.builder.worn_out() == [other.row]
    rig.play(START + 1)
    assert one.must(START + 1).counter < other.must(START + 1).counter
    other.rekey()
    assert rig.builder.worn_out() == [other.row]


def test_connections_are_spread_over_slots_and_keep_theirs(rig: Rig) -> None:
    """A connection owns a slot; it never changes while it lives."""
    connections = [rig.connect(ssrc=number, socket_number=number % 2) for number in range(ROWS)]
    slots = [rig.builder.slot_of(connection.row) for connection in connections]
    rig.play(*span(0, 3))
    connections[0].rekey()
    rig.builder.close(connections[1].row)
    rig.builder.tune(connections[2].row, None)
    assert [rig.builder.slot_of(connections[number].row) for number in (0, 2, 3)] == [slots[0], slots[2], slots[3]]


def test_an_address_is_a_sockaddr(rig: Rig) -> None:
    """The sender hands the kernel the bytes that stand in the row."""
    connection = rig.connect()
    assert rig.table.address[connection.row].tobytes() == (
        struct.pack("=H", 2) + struct.pack(">H", 50_000) + bytes([192, 0, 2, 1]) + bytes(8)
    )


def test_building_leaves_nothing_behind_in_other_rows(rig: Rig) -> None:
    """A packet is written within its row and below its length."""
    connection = rig.connect()
    others = np.arange(ROWS) != connection.row
    rig.play(START)
    ring = START % RING_TICKS
    assert not rig.table.packets[others].any()
    assert not rig.table.packets[connection.row, ring, rig.table.length[ring, connection.row] :].any()


# blocks


def known_to(tick: int) -> Lane:
    """A lane that knows what it plays up to a tick."""
    return Lane(lambda at: b"frame %d" % at, lambda _first, last: min(last, tick))


def built(rig: Rig, connection: Connection) -> list[int]:
    """Ticks for which packets of a connection stand in the shared memory."""
    return sorted(int(tick) for tick in rig.table.due[:, connection.row] if tick >= START)


def grown_in(rig: Rig, tick: int) -> NDArray[np.intp]:
    """Packets that are built at a tick, per row."""
    before = (rig.table.due >= START).sum(axis=0)
    rig.builder.build(tick)
    grown: NDArray[np.intp] = (rig.table.due >= START).sum(axis=0) - before
    return grown


def test_groups_of_rows_are_built_in_turns_a_block_at_a_time() -> None:
    """After the first time, each tick has its share of the work: another group of rows, for all ticks of a block."""
    rig = Rig(BLOCK_TICKS * ROWS_AT_ONCE)
    with closing(rig.table):
        lane = known_to(START + 1_000)
        rig.builder.lanes.append(lane)
        for number in range(rig.table.rows):
            rig.builder.tune(rig.connect(ssrc=number, tuned=False).row, lane)
        rig.builder.build(START)
        turns = []
        for tick in span(1, 2 * BLOCK_TICKS):
            grown = grown_in(rig, tick).reshape(BLOCK_TICKS, ROWS_AT_ONCE)
            assert (rig.table.due[tick % RING_TICKS] == tick).all()
            (group,) = np.flatnonzero(grown.any(axis=1))
            assert (grown[group] == BLOCK_TICKS).all()
            turns.append(group)
        assert turns[:BLOCK_TICKS] == turns[BLOCK_TICKS:]
        assert sorted(turns[:BLOCK_TICKS]) == list(range(BLOCK_TICKS))


def test_few_rows_are_built_in_one_go(rig: Rig) -> None:
    """They fill one block in one tick of four, and nothing in between."""
    lane = known_to(START + 1_000)
    rig.builder.lanes.append(lane)
    connections = [rig.connect(ssrc=number, tuned=False) for number in range(ROWS)]
    for connection in connections:
        rig.builder.tune(connection.row, lane)
    rig.builder.build(START)
    grown = []
    for tick in span(1, 2 * BLOCK_TICKS):
        grown.append(set(grown_in(rig, tick).tolist()))
        assert all(one.must(tick).frame == b"frame %d" % tick for one in connections)
    assert sorted(grown, key=sum) == [{0}] * 6 + [{BLOCK_TICKS}] * 2


def test_rows_of_a_lane_are_built_together_however_they_lie_among_those_of_others() -> None:
    """Guilds of four broadcasts that joined in turns: each lane is one piece of work, and each tick has one of them."""
    rig = Rig(BLOCK_TICKS * ROWS_AT_ONCE)
    with closing(rig.table):
        lanes = [known_to(START + 1_000) for _ in range(BLOCK_TICKS)]
        rig.builder.lanes += lanes
        for number in range(rig.table.rows):
            row = rig.connect(ssrc=number, tuned=False).row
            rig.builder.tune(row, lanes[number % BLOCK_TICKS])
        rig.builder.build(START)
        turns = []
        for tick in span(1, BLOCK_TICKS):
            grown = grown_in(rig, tick).reshape(ROWS_AT_ONCE, BLOCK_TICKS)
            (turn,) = np.flatnonzero(grown.any(axis=0))
            assert (grown[:, turn] == BLOCK_TICKS).all()
            turns.append(turn)
        assert sorted(turns) == list(range(BLOCK_TICKS))


def test_whoever_leaves_a_lane_moves_nobody_to_another_group() -> None:
    """A row that changes its group is built apart from the others, a few ticks at a time."""
    rig = Rig(2 * ROWS_AT_ONCE)
    with closing(rig.table):
        lane = known_to(START + 1_000)
        rig.builder.lanes.append(lane)
        rows = [rig.connect(ssrc=number, tuned=False).row for number in range(rig.table.rows)]
        for row in rows:
            rig.builder.tune(row, lane)
        rig.builder.build(START)
        before = dict(lane.places)
        for row in rows[: ROWS_AT_ONCE // 2]:
            rig.builder.close(row)
        assert lane.places == {row: before[row] for row in rows[ROWS_AT_ONCE // 2 :]}
        rig.builder.tune(rows[-1], None)
        rig.builder.tune(rows[-1], lane)
        assert lane.places[rows[-1]] == 0


def test_a_group_takes_the_turn_at_which_the_fewest_rows_are_built() -> None:
    """Lanes come and go: those that stay may all have one turn, and those that come have the others."""
    rig = Rig(8 * ROWS)
    with closing(rig.table):
        lanes = [known_to(START + 1_000) for _ in range(2 * BLOCK_TICKS)]
        rig.builder.lanes += lanes
        rows = [[rig.connect(ssrc=number, tuned=False).row for number in range(2)] for _ in lanes]

        def tune(number: int) -> None:
            for row in rows[number]:
                rig.builder.tune(row, lanes[number])

        def turns() -> list[int]:
            rig.builder.build(START)
            return sorted(lane.turns[0] for lane in lanes if len(lane.rows))

        for number in range(2 * BLOCK_TICKS):
            tune(number)
        assert turns() == [turn for turn in range(BLOCK_TICKS) for _ in range(2)]
        for number in range(2 * BLOCK_TICKS):
            if lanes[number].turns[0]:
                for row in rows[number]:
                    rig.builder.close(row)
        assert turns() == [0, 0]
        fresh = [known_to(START + 1_000) for _ in range(BLOCK_TICKS - 1)]
        rig.builder.lanes += fresh
        for number, lane in enumerate(fresh):
            rig.builder.tune(rig.connect(ssrc=100 + number, tuned=False).row, lane)
        rig.builder.build(START)
        assert sorted(lane.turns[0] for lane in fresh) == list(range(1, BLOCK_TICKS))


def test_lanes_with_few_rows_each_take_turns(rig: Rig) -> None:
    """A worker with as many broadcasts as guilds has the same work each tick, too."""
    for number in range(BLOCK_TICKS):
        lane = known_to(START + 1_000)
        rig.builder.lanes.append(lane)
        rig.builder.tune(rig.connect(ssrc=number, tuned=False).row, lane)
    rig.builder.build(START)
    for tick in span(1, 2 * BLOCK_TICKS):
        assert sorted(grown_in(rig, tick).tolist()) == [0] * (ROWS - 1) + [BLOCK_TICKS]


def test_rows_in_use_stay_the_lowest_however_many_come_and_go() -> None:
    """Else a worker that guilds leave and join for days would touch all of its memory for a few of them."""
    rig = Rig(8 * ROWS)
    with closing(rig.table):
        held = [rig.connect(ssrc=number).row for number in range(2 * ROWS)]
        for number in range(20):
            gone = held[number % 3 :: 3]
            for row in reversed(gone):
                rig.builder.close(row)
            rig.builder.build(START + number * 60)
            rig.builder.build(START + number * 60 + 59)  # what was given back rests for a second
            assert [rig.connect(ssrc=1).row for _ in gone] == gone
        assert held == list(range(2 * ROWS))


def test_a_block_ends_where_nobody_knows_what_comes(rig: Rig) -> None:
    """What is not there yet may still come: it is waited for until the last moment."""
    lane = known_to(START + 1)
    rig.builder.lanes.append(lane)
    connections = [rig.connect(ssrc=number, tuned=False) for number in range(ROWS)]
    for connection in connections:
        rig.builder.tune(connection.row, lane)
    rig.builder.build(START)
    assert {max(built(rig, connection)) for connection in connections} <= {START, START + 1}
    rig.builder.build(START + 1)
    assert {max(built(rig, connection)) for connection in connections} == {START + 1}


def encrypted(rig: Rig) -> Connection:
    """A connection that plays, under keys that mark its frames as old, what is known for long."""
    connection = rig.connect(tuned=False)
    lane = known_to(START + 1_000)
    rig.builder.lanes.append(lane)
    rig.builder.protect(connection.row, lambda frame: b"old " + frame)
    rig.builder.tune(connection.row, lane)
    return connection


def test_frames_are_encrypted_anew_under_new_keys_where_there_is_time(rig: Rig) -> None:
    """A newcomer has no keys of the time before; whoever was there misses nothing, and no nonce comes twice."""
    connection = encrypted(rig)
    rig.builder.build(START, START + 4)
    before = {tick: connection.must(tick) for tick in built(rig, connection)}
    rig.sent(START)
    rig.builder.protect(connection.row, lambda frame: b"new " + frame)
    rig.builder.build(START + 1, START + 5, START + 1)
    after = [connection.must(tick) for tick in span(1, 5)]
    assert [packet.frame[:3] for packet in after] == [b"new"] * 5
    assert [packet.sequence for packet in after] == [(before[START].sequence + 1 + n) % 2**16 for n in range(5)]
    assert min(packet.counter for packet in after) > max(packet.counter for packet in before.values())


def test_new_keys_cost_no_packet_however_late_the_next_build_is(rig: Rig) -> None:
    """What there was no time for to build again goes out under the keys before."""
    connection = encrypted(rig)
    rig.builder.build(START, START + 4, START)
    rig.builder.protect(connection.row, lambda frame: b"new " + frame)
    rig.sent(START + 2)  # the keys came with work that took two ticks
    rig.builder.build(START + 3, START + 7, START + 4)
    packets = [connection.must(tick) for tick in span(0, 8)]
    assert [packet.frame[:3] for packet in packets] == [b"old"] * 4 + [b"new"] * 4
    assert {(b.sequence - a.sequence) % 2**16 for a, b in pairwise(packets)} == {1}
    assert rig.builder.ticks_skipped == 0


def test_what_a_cut_changes_is_built_again(rig: Rig) -> None:
    """However far ahead rows were built: from the cut on they play what is played now."""
    frames = dict.fromkeys(span(0, 30), b"before")
    lane = Lane(frames.get, lambda _first, last: last)
    rig.builder.lanes.append(lane)
    connections = [rig.connect(ssrc=number, tuned=False) for number in range(ROWS)]
    for connection in connections:
        rig.builder.tune(connection.row, lane)
    rig.builder.build(START, START + 3, far_tick=START + 15)
    frames.update(dict.fromkeys(span(10, 20), b"after"))
    rig.builder.revise(lane, START + 10)
    rig.builder.build(START + 1, START + 4, START + 2, START + 15)
    for connection in connections:
        packets = [connection.must(tick) for tick in span(0, 16)]
        assert [packet.frame for packet in packets] == [b"before"] * 10 + [b"after"] * 6
        assert {(b.sequence - a.sequence) % 2**16 for a, b in pairwise(packets)} == {1}


def test_an_end_begins_as_soon_as_there_is_time_for_it(rig: Rig) -> None:
    """What was built of the programme beyond that is void: who leaves is not heard for what was built ahead."""
    connection = rig.connect(tuned=False)
    lane = known_to(START + 1_000)
    rig.builder.lanes.append(lane)
    rig.builder.tune(connection.row, lane)
    rig.builder.build(START, START + 4, far_tick=START + 12)
    rig.builder.tune(connection.row, None)
    for tick in span(1, 12):
        rig.builder.build(tick, tick + 3, tick + 1)
    frames = [packet and packet.frame for packet in (connection.packet(tick) for tick in span(0, 10))]
    assert frames == [*(b"frame %d" % tick for tick in span(0, 2)), *[SILENCE] * 5, None, None, None]


def test_who_begins_does_not_race_the_sender(rig: Rig) -> None:
    """A row that goes on may be built in the last moment, one that begins has until a later tick."""
    going_on, beginning = rig.connect(ssrc=1), rig.connect(ssrc=2, tuned=False)
    rig.frames.update(dict.fromkeys(span(0, 10), b"x"))
    rig.builder.build(START)
    rig.builder.tune(beginning.row, rig.lane)
    rig.builder.build(START + 1, START + 4, START + 3)
    assert built(rig, going_on) == list(span(0, 5))
    assert built(rig, beginning) == list(span(3, 2))


def test_before_a_hold_up_all_rows_are_built_far_ahead(rig: Rig) -> None:
    """Every tick of it stands there, the next builds find nothing to do, and none is skipped or built twice."""
    lane = known_to(START + 1_000)
    rig.builder.lanes.append(lane)
    connections = [rig.connect(ssrc=number, tuned=False) for number in range(ROWS)]
    for connection in connections:
        rig.builder.tune(connection.row, lane)
    rig.builder.build(START, START + 3)
    far = START + MOST_AHEAD_TICKS - BLOCK_TICKS
    rig.builder.build(START, START + 3, far_tick=far)
    sequences = []
    for tick in range(START, far + 1):
        rig.sent(tick - 1)
        rig.builder.build(tick, tick + 3)
        sequences.append([connection.must(tick).sequence for connection in connections])
    steps = {(after - before) % 2**16 for one in zip(*sequences, strict=True) for before, after in pairwise(one)}
    assert steps == {1}
    assert rig.builder.ticks_skipped == 0


def test_far_ahead_ends_where_nobody_knows_what_comes(rig: Rig) -> None:
    """Live input is known for little longer than its lead: the rest is built when it is there."""
    connection = rig.connect(tuned=False)
    lane = known_to(START + 6)
    rig.builder.lanes.append(lane)
    rig.builder.tune(connection.row, lane)
    rig.builder.build(START, START + 3, far_tick=START + 15)
    assert built(rig, connection) == list(span(0, 7))


def test_what_is_built_too_late_is_counted(rig: Rig) -> None:
    """A packet for a tick that the sender is through with never leaves: that must show."""
    rig.connect()
    rig.play(START)
    rig.sent(START + 3)
    rig.frames.update(dict.fromkeys(span(1, 5), b"x"))
    rig.builder.build(START + 1, START + 5)
    assert rig.builder.ticks_skipped == 3
    rig.builder.build(START + 6)
    assert rig.builder.ticks_skipped == 3


def test_who_begins_late_skips_nothing(rig: Rig) -> None:
    """What was never heard has no gap; what was heard and begins anew behind the sender has one."""
    connection = rig.connect()
    rig.frames.update(dict.fromkeys(span(0, 10), b"x"))
    rig.sent(START + 1)
    rig.builder.build(START, START + 3, START)
    assert rig.builder.ticks_skipped == 0
    rig.builder.protect(connection.row, lambda frame: frame)
    rig.sent(START + 5)
    rig.builder.build(START + 4, START + 8, START + 4)
    assert rig.builder.ticks_skipped == 2


def test_it_is_known_how_far_what_plays_goes_on(rig: Rig) -> None:
    """The least of all lanes that somebody hears; lanes without rows, and rows that say goodbye, wait for nothing."""
    near, far, unheard = known_to(START + 5), known_to(START + 1_000), known_to(START)
    rig.builder.lanes += [near, far, unheard]
    rows = [rig.connect(ssrc=number, tuned=False).row for number in range(3)]
    for row, lane in zip(rows, (near, far, far), strict=True):
        rig.builder.tune(row, lane)
    rig.builder.build(START, START + 3, far_tick=START + 9)
    assert rig.builder.playing_until == START + 5
    rig.builder.tune(rows[0], None)
    rig.builder.build(START, START + 3, far_tick=START + 9)
    assert rig.builder.playing_until == START + 9
    for row in rows[1:]:
        rig.builder.tune(row, None)
    rig.builder.build(START, START + 3, far_tick=START + 9)
    assert rig.builder.playing_until == START + 3


def test_who_begins_where_nothing_is_known_yet_waits(rig: Rig) -> None:
    """A build that is late and looks no further than before leaves such a row to the next one, and builds the rest."""
    lane = known_to(START + 4)
    rig.builder.lanes.append(lane)
    going_on, beginning = (rig.connect(ssrc=number, tuned=False) for number in range(2))
    rig.builder.tune(going_on.row, lane)
    rig.builder.build(START, START + 3, START)
    rig.builder.tune(beginning.row, lane)
    rig.builder.build(START + 3, START + 4, START + 5, START + 17)
    assert (built(rig, going_on), built(rig, beginning)) == (list(span(0, 5)), [])
    lane.known_until = lambda _first, last: last
    rig.builder.build(START + 4, START + 7, START + 6)
    assert built(rig, beginning)[0] == START + 6


def test_a_row_that_is_silent_skips_nothing(rig: Rig) -> None:
    """However long nobody builds: there was nothing to be heard."""
    silent, heard = rig.connect(ssrc=1, tuned=False), rig.connect(ssrc=2, tuned=False)
    lane = known_to(START + 1_000)
    rig.builder.lanes.append(lane)
    rig.builder.tune(heard.row, lane)
    rig.builder.tune(silent.row, None)
    rig.builder.build(START, START + 3, far_tick=START + 17)
    rig.sent(START + 12)
    rig.builder.build(START + 13, START + 16)
    assert rig.builder.ticks_skipped == 0
    assert rig.builder.playing_until >= START + 16


def test_whoever_leaves_has_its_silence_built_ahead(rig: Rig) -> None:
    """A loop that is late by some ticks cuts nobody's end short."""
    leaving, staying = rig.connect(ssrc=1), rig.connect(ssrc=2)
    lane = known_to(START + 1_000)
    rig.builder.lanes.append(lane)
    for connection in (leaving, staying):
        rig.builder.tune(connection.row, lane)
    rig.builder.build(START, START + 3, START + 2, START + 7)
    rig.builder.tune(leaving.row, None)
    rig.builder.build(START + 1, START + 4, START + 3, START + 8)
    rig.sent(START + 7)
    rig.builder.build(START + 8, START + 11, START + 10, START + 15)
    assert frames_of(leaving, span(3, 6)) == [SILENCE] * 5 + [None]
    assert rig.builder.ticks_skipped == 0


def test_who_begins_is_built_before_those_who_go_on(rig: Rig) -> None:
    """It has the least time: the sender may be there before thousands of others are built."""
    built_first: list[int] = []

    def protect_of(number: int) -> Callable[[bytes], bytes]:
        def protect(frame: bytes) -> bytes:
            built_first.append(number)
            return frame

        return protect

    lane = known_to(START + 1_000)
    rig.builder.lanes.append(lane)
    going_on, beginning = (rig.connect(ssrc=number, tuned=False) for number in range(2))
    rig.builder.protect(going_on.row, protect_of(0))
    rig.builder.tune(going_on.row, lane)
    rig.builder.build(START, START + 3, START)
    built_first.clear()
    rig.builder.protect(beginning.row, protect_of(1))
    rig.builder.tune(beginning.row, lane)
    rig.builder.build(START + 7, START + 10, START + 9)
    assert set(built_first) == {0, 1}
    assert built_first[0] == 1


def test_what_was_in_place_in_time_is_not_counted_as_skipped(rig: Rig) -> None:
    """While the last rows are built the sender goes on with the first ones: those lost nothing."""
    first, last = (rig.connect(ssrc=number, tuned=False) for number in range(2))
    lane = known_to(START + 1_000)
    rig.builder.lanes.append(lane)
    rig.table.slot[first.row], rig.table.slot[last.row] = 0, 2

    def take_meanwhile(frame: bytes) -> bytes:
        if first.packet(START + 7) is not None:
            rig.table.taken_tick[0] = START + 7
        return frame

    rig.builder.protect(last.row, take_meanwhile)
    for connection in (first, last):
        rig.builder.tune(connection.row, lane)
    rig.builder.build(START, START + 3, START)
    rig.sent(START + 3)
    rig.builder.build(START + 4, START + 7, START + 6)
    assert rig.table.taken_tick[0] == START + 7
    assert rig.builder.ticks_skipped == 0


@pytest.mark.parametrize("mode", [AES_GCM, XCHACHA])
@pytest.mark.parametrize("protected", [False, True])
def test_many_rows_of_one_block_have_their_own_packets(mode: str, protected: bool) -> None:
    """Frames of all sizes, silence among them, and one row whose encryption fails: nobody gets what is another's."""
    rig = Rig(rows=19)
    with closing(rig.table):
        frames = [b"first", SILENCE, b"the third one", b"4th"]
        rig.frames.update({START + number: frame for number, frame in enumerate(frames)})
        connections = [rig.connect(mode, ssrc=number) for number in range(19)]
        broken = 11

        def protect_of(number: int) -> Callable[[bytes], bytes | None]:
            return lambda frame: None if number == broken else b"%d" % 10**number + frame

        if protected:
            for number, connection in enumerate(connections):
                rig.builder.protect(connection.row, protect_of(number))
        rig.builder.build(START, START + 3)
        for number, connection in enumerate(connections):
            for tick, frame in zip(span(0, 4), frames, strict=True):
                packet = connection.must(tick)
                wanted = frame
                if protected and frame != SILENCE:
                    wanted = protect_of(number)(frame) or SILENCE
                assert (packet.frame, packet.ssrc, packet.counter) == (wanted, number, tick - START + 1)
        assert rig.builder.unprotected == (3 if protected else 0)


def test_new_keys_cost_no_packet_where_it_is_built_in_steps(rig: Rig) -> None:
    """Whoever is late builds what is due next first: what the first step takes back, it also builds again."""
    lane = known_to(START + 1_000)
    rig.builder.lanes.append(lane)
    connections = [rig.connect(ssrc=number, tuned=False) for number in range(ROWS)]
    for connection in connections:
        rig.builder.protect(connection.row, lambda frame: b"old " + frame)
        rig.builder.tune(connection.row, lane)
    rig.builder.build(START, START + 4, START + 3, START + 7)
    rig.sent(START + 5)
    for connection in connections:
        rig.builder.protect(connection.row, lambda frame: b"new " + frame)
    for due, ahead in ((START + 5, BEGIN_TICKS), (START + 7, FAR_TICKS)):  # the first step took two ticks
        rig.builder.build(due + 1, max(due + 1, rig.builder.last_tick), due + BEGIN_TICKS, due + ahead)
    for connection in connections:
        sequences = [connection.must(tick).sequence for tick in span(6, 6)]
        assert [(later - earlier) % 2**16 for earlier, later in pairwise(sequences)] == [1] * 5
    assert rig.builder.ticks_skipped == 0
