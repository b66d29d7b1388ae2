"""From datagrams to frames of users: whose, in which order, what is dropped, when a talk ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.clock import NS_PER_MS, NS_PER_S
from shared.protocol import ip_discovery
from shared.protocol.opus import SILENCE_FRAME
from shared.protocol.rtp import pack_header
from shared.protocol.transport_crypto import AES_GCM, KEY_BYTES, MODES, XCHACHA, seal_packet
from worker.voice.receive.drops import Drop, Drops
from worker.voice.receive.jitter import DEPTH_NS
from worker.voice.receive.pipeline import (
    CLOSING_SILENCES,
    IDLE_NS,
    MAX_USERS,
    UNCLAIMED_NS,
    UNCLAIMED_PACKETS,
    UNCLAIMED_SSRCS,
    Event,
    Frame,
    Pipeline,
    Stopped,
)

KEY = bytes(range(KEY_BYTES))
OTHER_KEY = KEY[::-1]
START_NS = 5_000 * NS_PER_S
FRAME_NS = 20 * NS_PER_MS
ALICE, BOB = 100, 200
ALICE_SSRC, BOB_SSRC = 11, 22


def opus(number: int) -> bytes:
    """A CELT frame of 20 ms, well framed, told apart by its number."""
    return b"\xfc" + number.to_bytes(4, "big")


def veil(user_id: int, frame: bytes) -> bytes:
    """Stands for end-to-end encryption: only its user's unveils it."""
    return b"e2ee%d:" % user_id + frame


def unveil(user_id: int, frame: bytes) -> bytes | None:
    prefix = b"e2ee%d:" % user_id
    return frame.removeprefix(prefix) if frame.startswith(prefix) else None


class Rig:
    """A pipeline with a clock of its own, and senders towards it."""

    def __init__(self, decrypt: Callable[[int, bytes], bytes | None] = lambda _, frame: frame) -> None:
        self.first: list[Drop] = []
        self.drops = Drops(self.first.append)
        self.pipeline = Pipeline(self.drops)
        self.pipeline.begin_session(decrypt)
        self.pipeline.rekey(AES_GCM, KEY)
        self.now_ns = START_NS
        self.events: list[Event] = []
        self._counter = 0

    def seal(self, number: int, payload: bytes, ssrc: int = ALICE_SSRC, key: bytes = KEY, mode: str = AES_GCM) -> bytes:
        self._counter += 1
        return seal_packet(mode, key, pack_header(number, number * 960, ssrc), payload, self._counter)

    def send(self, number: int, payload: bytes | None = None, ssrc: int = ALICE_SSRC) -> None:
        self.receive(self.seal(number, opus(number) if payload is None else payload, ssrc))

    def receive(self, datagram: bytes) -> None:
        self.pipeline.datagram(datagram, self.now_ns)

    def speaking(self, user_id: int = ALICE, ssrc: int = ALICE_SSRC) -> None:
        self.events += self.pipeline.speaking(user_id, ssrc)

    def wait(self, duration_ns: int) -> None:
        """Let time pass, from one due time to the next."""
        end_ns = self.now_ns + duration_ns
        while (due_ns := self.pipeline.due_ns) is not None and due_ns <= end_ns:
            self.now_ns = max(due_ns, self.now_ns)
            self.events += self.pipeline.advance(self.now_ns)
            again_ns = self.pipeline.due_ns
            assert again_ns is None or again_ns > self.now_ns, "due, and nothing was done"
        self.now_ns = end_ns

    def talk(self, numbers: Iterable[int], ssrc: int = ALICE_SSRC) -> None:
        for number in numbers:
            self.send(number, ssrc=ssrc)
            self.wait(FRAME_NS)

    def frames(self, user_id: int = ALICE) -> list[bytes | None]:
        return [event.opus for event in self.events if isinstance(event, Frame) and event.user_id == user_id]

    def stops(self, user_id: int = ALICE) -> int:
        return self.events.count(Stopped(user_id))

    @property
    def counted(self) -> dict[str, int]:
        return self.drops.as_dict()


def opuses(*numbers: int) -> list[bytes]:
    return [opus(number) for number in numbers]


def test_frames_come_out_under_their_user() -> None:
    """Two who speak at the same time are told apart, each in order and with timestamps that grow by a frame."""
    rig = Rig()
    rig.speaking(ALICE, ALICE_SSRC)
    rig.speaking(BOB, BOB_SSRC)
    for number in range(5):
        rig.send(number, ssrc=ALICE_SSRC)
        rig.send(900 + number, ssrc=BOB_SSRC)
        rig.wait(FRAME_NS)
    rig.wait(NS_PER_S)
    assert rig.frames(ALICE) == opuses(*range(5))
    assert rig.frames(BOB) == opuses(*range(900, 905))
    timestamps = [event.timestamp_samples for event in rig.events if isinstance(event, Frame) and event.user_id == BOB]
    assert timestamps == [(900 + number) * 960 for number in range(5)]
    assert rig.counted == {}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_opened(mode: str) -> None:
    """Mode and key are the last ones told: what the key before sealed is dropped."""
    rig = Rig()
    rig.pipeline.rekey(mode, OTHER_KEY)
    rig.speaking()
    rig.receive(rig.seal(1, opus(1), key=OTHER_KEY, mode=mode))
    rig.receive(rig.seal(2, opus(2), mode=mode))
    rig.wait(NS_PER_S)
    assert rig.frames() == opuses(1)
    assert rig.counted == {"forged" if mode in (AES_GCM, XCHACHA) else "malformed": 1}


def test_end_to_end_decryption_gets_the_sender_and_no_padding() -> None:
    """Padding is cut first, then the frame is decrypted as its sender's, then it is an Opus frame."""
    rig = Rig(unveil)
    rig.speaking(ALICE, ALICE_SSRC)
    rig.speaking(BOB, BOB_SSRC)
    rig.send(1, veil(ALICE, opus(1)))
    header = bytes([0xB2]) + pack_header(2, 2 * 960, ALICE_SSRC)[1:] + bytes(8) + b"\xbe\xde\x00\x01"
    rig.receive(seal_packet(AES_GCM, KEY, header, bytes(4) + veil(ALICE, opus(2)) + b"\x00\x00\x03", 77))
    rig.send(1, veil(BOB, opus(3)), BOB_SSRC)
    rig.send(2, veil(ALICE, opus(4)), BOB_SSRC)
    rig.wait(NS_PER_S)
    assert rig.frames(ALICE) == opuses(1, 2)
    assert rig.frames(BOB) == opuses(3)
    assert rig.counted == {"e2ee_failed": 1}


def test_plain_silence_passes_end_to_end_encryption() -> None:
    """The one frame that may come unencrypted is not offered to decryption."""
    asked: list[bytes] = []

    def decrypt(user_id: int, frame: bytes) -> bytes | None:
        asked.append(frame)
        return unveil(user_id, frame)

    rig = Rig(decrypt)
    rig.speaking()
    rig.send(1, veil(ALICE, opus(1)))
    rig.send(2, SILENCE_FRAME)
    rig.send(3, SILENCE_FRAME + b"\x00")
    rig.wait(NS_PER_S)
    assert rig.frames() == [opus(1), SILENCE_FRAME]
    assert SILENCE_FRAME not in asked
    assert rig.counted == {"e2ee_failed": 1}


def test_encrypted_silence_is_silence_as_well() -> None:
    """Senders that encrypt their closing silence end their talk with it."""
    rig = Rig(unveil)
    rig.speaking()
    for number in range(6):
        rig.send(number, veil(ALICE, SILENCE_FRAME if number else opus(0)))
    rig.wait(5 * FRAME_NS + DEPTH_NS)
    assert rig.stops() == 1


def test_audio_that_overtakes_its_user_waits() -> None:
    """What came before op 5 is heard after it, in its place, each packet once."""
    rig = Rig()
    rig.talk([1, 2, 3])
    rig.receive(packet := rig.seal(4, opus(4)))
    rig.receive(packet)
    assert rig.events == []
    rig.speaking()
    rig.receive(packet)
    rig.talk([5, 6])
    rig.wait(NS_PER_S)
    assert rig.frames() == opuses(1, 2, 3, 4, 5, 6)
    assert rig.counted == {"duplicate": 2}


def test_audio_of_nobody_waits_for_a_second_at_most() -> None:
    """Then it is dropped and counted, and nothing of it is kept."""
    rig = Rig()
    rig.talk([1, 2, 3])
    rig.wait(2 * UNCLAIMED_NS)
    assert rig.counted == {"unknown_ssrc": 3}
    assert rig.pipeline.due_ns is None
    rig.speaking()
    rig.wait(NS_PER_S)
    assert rig.events == []


def test_little_of_nobodys_audio_waits() -> None:
    """A bound for each SSRC, and one for their number."""
    rig = Rig()
    for number in range(UNCLAIMED_PACKETS + 7):
        rig.send(number)
    assert rig.drops[Drop.UNKNOWN_SSRC] == 7
    for ssrc in range(1_000, 1_000 + UNCLAIMED_SSRCS + 9):
        rig.send(1, ssrc=ssrc)
    assert rig.drops[Drop.UNKNOWN_SSRC] == 7 + 10
    rig.speaking()
    rig.wait(NS_PER_S)
    assert rig.frames() == opuses(*range(7, UNCLAIMED_PACKETS + 7))


def test_a_forged_packet_opens_no_place_for_its_ssrc() -> None:
    """Only authentic packets are kept, so nobody from outside fills the places."""
    rig = Rig()
    for ssrc in range(UNCLAIMED_SSRCS * 2):
        rig.receive(rig.seal(1, opus(1), ssrc=5_000 + ssrc, key=OTHER_KEY))
    assert rig.pipeline.due_ns is None
    rig.send(1)
    rig.speaking()
    rig.wait(NS_PER_S)
    assert rig.frames() == opuses(1)
    assert rig.counted == {"forged": 2 * UNCLAIMED_SSRCS}


def test_a_replayed_packet_is_heard_once() -> None:
    """Copies are dropped at once and long after, also when the packet before them was lost."""
    rig = Rig()
    rig.speaking()
    packets = [rig.seal(number, opus(number)) for number in range(40)]
    for number, packet in enumerate(packets):
        if number != 20:
            rig.receive(packet)
            rig.receive(packet)
        rig.receive(packets[number // 2])
        rig.wait(FRAME_NS)
    for packet in packets[:20]:
        rig.receive(packet)
    rig.wait(NS_PER_S)
    assert rig.frames() == [None if number == 20 else opus(number) for number in range(40)]
    assert rig.counted == {"duplicate": 39 + 40 + 20}
    assert rig.pipeline.lost == 1


def test_a_forged_copy_takes_no_place() -> None:
    """A packet that is not authentic does not keep the authentic one out."""
    rig = Rig()
    rig.speaking()
    packet = rig.seal(1, opus(1))
    rig.receive(packet[:20] + bytes([packet[20] ^ 1]) + packet[21:])
    rig.receive(packet)
    rig.wait(NS_PER_S)
    assert rig.frames() == opuses(1)
    assert rig.counted == {"forged": 1}


@pytest.mark.parametrize(
    ("datagram", "drop"),
    [
        (b"", Drop.GARBAGE),
        (b"\x80", Drop.GARBAGE),
        (bytes(60), Drop.GARBAGE),
        (b"\xc0\x78" + bytes(60), Drop.GARBAGE),
        (ip_discovery.keepalive(7), Drop.CONTROL),
        (b"\x00\x02\x00\x46" + bytes(70), Drop.CONTROL),
        (b"\x80\xc8" + bytes(60), Drop.RTCP),
        (b"\x80\x65" + bytes(60), Drop.OTHER_PAYLOAD),
        (b"\x80\x78" + bytes(10), Drop.MALFORMED),
        (b"\x80\x78" + bytes(29), Drop.MALFORMED),
        (b"\x8f\x78" + bytes(60), Drop.MALFORMED),
        (b"\x90\x78" + bytes(10) + b"\xbe\xde\xff\xff" + bytes(40), Drop.FORGED),
        (b"\x80\x78" + bytes(60), Drop.FORGED),
    ],
)
def test_what_is_no_audio_of_ours_is_counted_by_kind_and_told_once(datagram: bytes, drop: Drop) -> None:
    """Nothing is raised, each is counted, and the first one of its kind is told."""
    rig = Rig()
    for _ in range(3):
        rig.receive(datagram)
    assert rig.counted == {str(drop): 3}
    assert rig.first == [drop]
    assert rig.pipeline.due_ns is None


@pytest.mark.parametrize(
    "payload", [b"\xfc" + bytes(1_275), b"\xe0abc", b"\xff", b"\xfd\x00\x00", b"\xff\x41\x09\x00", b"\x18" + bytes(9)]
)
def test_what_is_not_one_opus_frame_of_20_ms_is_lost(payload: bytes) -> None:
    """Too long, 2.5 ms, 60 ms, badly framed: dropped, counted, and a hole in its place."""
    rig = Rig()
    rig.speaking()
    rig.send(1)
    rig.send(2, payload)
    rig.send(3)
    rig.wait(NS_PER_S)
    assert rig.frames() == [opus(1), None, opus(3)]
    assert rig.counted == {"not_opus": 1}


def test_padding_alone_is_no_loss() -> None:
    """Packets of padding, as clients send them around silence, leave no hole."""
    rig = Rig()
    rig.speaking()
    rig.send(1)
    header = b"\xa0" + pack_header(2, 2 * 960, ALICE_SSRC)[1:]
    rig.receive(seal_packet(AES_GCM, KEY, header, b"\x00\x00\x03", 99))
    rig.receive(seal_packet(AES_GCM, KEY, pack_header(3, 2 * 960, ALICE_SSRC), opus(3), 100))
    rig.wait(NS_PER_S)
    assert rig.frames() == opuses(1, 3)
    assert (rig.counted, rig.pipeline.lost) == ({"padding_only": 1}, 0)


def test_audio_before_the_key_is_dropped() -> None:
    """Between the sessions there is no key, and the old one is forgotten."""
    rig = Rig()
    rig.speaking()
    rig.send(1)
    rig.events += rig.pipeline.begin_session(lambda _, frame: frame)
    rig.send(2)
    rig.pipeline.rekey(AES_GCM, KEY)
    rig.speaking()
    rig.send(3)
    rig.wait(NS_PER_S)
    assert rig.frames() == opuses(3)
    assert rig.counted == {"no_key": 1}


def test_five_silences_end_a_talk() -> None:
    """They are given out, then the end is told, once; silence that follows is not heard."""
    rig = Rig()
    rig.speaking()
    rig.talk([1, 2])
    for number in range(3, 3 + CLOSING_SILENCES + 20):
        rig.send(number, SILENCE_FRAME)
        rig.wait(FRAME_NS)
    assert rig.frames() == [*opuses(1, 2), *[SILENCE_FRAME] * CLOSING_SILENCES]
    assert rig.events[-1] == Stopped(ALICE)
    rig.talk([40])
    rig.wait(NS_PER_S)
    assert rig.frames()[-1] == opus(40)
    assert rig.stops() == 2


def test_four_silences_do_not_end_a_talk() -> None:
    """A talk that goes on after them is one talk."""
    rig = Rig()
    rig.speaking()
    rig.send(0)
    for number in range(1, CLOSING_SILENCES):
        rig.send(number, SILENCE_FRAME)
        rig.wait(FRAME_NS)
    rig.talk([CLOSING_SILENCES])
    assert rig.stops() == 0
    rig.wait(NS_PER_S)
    assert rig.frames() == [opus(0), *[SILENCE_FRAME] * (CLOSING_SILENCES - 1), opus(CLOSING_SILENCES)]


def test_silences_within_a_talk_do_not_add_up() -> None:
    """Only five in a row end it."""
    rig = Rig()
    rig.speaking()
    for number in range(40):
        rig.send(number, opus(number) if number % 4 == 0 else SILENCE_FRAME)
        rig.wait(FRAME_NS)
    assert rig.stops() == 0


@pytest.mark.parametrize("goes_on", [True, False])
def test_after_a_pause_frames_are_held_as_before_it(goes_on: bool) -> None:
    """Whether or not the sender's timestamp went on: what overtakes after the pause is put in order again."""
    rig = Rig()
    rig.speaking()
    rig.talk([0, 1, 2])
    rig.wait(10 * NS_PER_S)
    pause_samples = 500 * 960 if goes_on else 0

    def resume(number: int) -> None:
        header = pack_header(number, number * 960 + pause_samples, ALICE_SSRC)
        rig.receive(seal_packet(AES_GCM, KEY, header, opus(number), 1_000 + number))

    resume(4)
    rig.wait(DEPTH_NS // 2)
    resume(3)
    rig.wait(NS_PER_S)
    assert rig.frames() == opuses(0, 1, 2, 3, 4)
    assert (rig.stops(), rig.pipeline.lost) == (2, 0)
    timestamps = [event.timestamp_samples for event in rig.events if isinstance(event, Frame)]
    assert timestamps == [0, 960, 1_920, 2_880 + pause_samples, 3_840 + pause_samples]


def test_a_talk_ends_when_nothing_comes() -> None:
    """100 ms after the last packet, and behind its last frame."""
    rig = Rig()
    rig.speaking()
    rig.talk([1, 2])
    last_ns = rig.now_ns - FRAME_NS
    rig.wait(last_ns + IDLE_NS - 1 - rig.now_ns)
    assert rig.stops() == 0
    rig.wait(1)
    assert rig.events[-1] == Stopped(ALICE)
    assert rig.stops() == 1
    assert rig.pipeline.due_ns is None


def test_silence_begins_no_talk() -> None:
    """A muted user, for whom the server may send silence, is not heard at all."""
    rig = Rig()
    rig.speaking()
    for number in range(30):
        rig.send(number, SILENCE_FRAME)
        rig.wait(FRAME_NS)
    rig.wait(NS_PER_S)
    assert rig.events == []


def test_who_leaves_is_forgotten() -> None:
    """SSRC and buffer go, the talk ends, and what comes afterwards is nobody's."""
    rig = Rig()
    rig.speaking()
    rig.talk([1, 2, 3, 4, 5, 6])
    assert rig.frames()
    before = len(rig.frames())
    rig.events += rig.pipeline.user_left(ALICE)
    assert rig.events[-1] == Stopped(ALICE)
    assert rig.pipeline.user_ids == []
    assert rig.pipeline.due_ns is None
    rig.send(7)
    rig.wait(2 * NS_PER_S)
    assert len(rig.frames()) == before
    assert rig.counted == {"unknown_ssrc": 1}
    assert rig.pipeline.user_left(ALICE) == []


def test_a_user_who_comes_back_has_another_ssrc() -> None:
    """The old SSRC is nobody's, the talk on it has ended, timestamps grow on, and sequence begins anywhere."""
    rig = Rig()
    rig.speaking(ALICE, ALICE_SSRC)
    rig.talk(range(50_000, 50_005))
    rig.speaking(ALICE, 77)
    assert rig.stops() == 1
    rig.send(50_005, ssrc=ALICE_SSRC)
    rig.talk([3, 4], ssrc=77)
    rig.wait(2 * NS_PER_S)
    assert rig.frames()[-2:] == opuses(3, 4)
    timestamps = [event.timestamp_samples for event in rig.events if isinstance(event, Frame)]
    assert all(after - before >= 960 for before, after in pairwise(timestamps))
    assert rig.counted == {"unknown_ssrc": 1}


def test_an_ssrc_that_changes_hands_belongs_to_the_new_user() -> None:
    """One SSRC, one user: whoever had it before is forgotten."""
    rig = Rig(unveil)
    rig.speaking(ALICE, ALICE_SSRC)
    rig.speaking(BOB, ALICE_SSRC)
    rig.send(1, veil(BOB, opus(1)))
    rig.wait(NS_PER_S)
    assert (rig.frames(ALICE), rig.frames(BOB)) == ([], opuses(1))
    assert rig.pipeline.user_ids == [BOB]


def test_saying_again_who_speaks_changes_nothing() -> None:
    """Op 5 may be repeated in the middle of a talk."""
    rig = Rig()
    rig.speaking()
    rig.talk([1, 2])
    rig.speaking()
    rig.talk([3])
    rig.wait(NS_PER_S)
    assert rig.frames() == opuses(1, 2, 3)
    assert rig.stops() == 1


def test_the_number_of_users_has_a_bound() -> None:
    """A server that announces users without end makes room by the oldest."""
    rig = Rig()
    for user_id in range(MAX_USERS + 5):
        rig.speaking(user_id, 10_000 + user_id)
    assert rig.pipeline.user_ids == list(range(5, MAX_USERS + 5))
    rig.send(1, ssrc=10_005)
    rig.wait(NS_PER_S)
    assert rig.frames(5) == opuses(1)


def test_a_new_session_forgets_the_old_one() -> None:
    """SSRCs, buffers and what waited go with their session; a talk that was on ends."""
    rig = Rig()
    rig.speaking()
    rig.talk([1, 2, 3, 4])
    rig.send(9, ssrc=BOB_SSRC)
    rig.events += rig.pipeline.begin_session(lambda _, frame: frame)
    assert rig.stops() == 1
    assert (rig.pipeline.user_ids, rig.pipeline.due_ns) == ([], None)
    assert rig.counted == {"unknown_ssrc": 1}


Step = tuple[str, int, int]
STEPS: st.SearchStrategy[list[Step]] = st.lists(
    st.tuples(
        st.sampled_from(
            ["packet"] * 6 + ["silence", "garbage", "forged", "speaking", "left", "wait", "wait", "rekey", "session"]
        ),
        st.integers(0, 60),
        st.integers(0, 3),
    ),
    max_size=80,
)


@settings(deadline=None, max_examples=300)
@given(STEPS, st.binary(max_size=80))
def test_whatever_happens_talks_are_whole_and_nothing_is_raised(steps: list[Step], garbage: bytes) -> None:
    """Any order of packets, users and keys: each talk begins with a frame, its time grows, and it ends once."""
    rig = Rig(unveil)
    key = KEY
    for kind, number, who in steps:
        user_id, ssrc = 100 + who, 10 + (who + number) % 4
        if kind == "packet":
            rig.receive(rig.seal(number, veil(user_id, opus(number)), ssrc, key))
        elif kind == "silence":
            rig.receive(rig.seal(number, SILENCE_FRAME, ssrc, key))
        elif kind == "garbage":
            rig.receive(garbage)
        elif kind == "forged":
            rig.receive(rig.seal(number, veil(user_id, opus(number)), ssrc, bytes(32)))
        elif kind == "speaking":
            rig.speaking(user_id, ssrc)
        elif kind == "left":
            rig.events += rig.pipeline.user_left(user_id)
        elif kind == "rekey":
            key = OTHER_KEY if key == KEY else KEY
            rig.pipeline.rekey(AES_GCM, key)
        elif kind == "session":
            rig.events += rig.pipeline.begin_session(unveil)
            rig.pipeline.rekey(AES_GCM, key)
        else:
            rig.wait(number * 5 * NS_PER_MS)
        assert len(rig.pipeline.user_ids) <= 4
    rig.wait(5 * NS_PER_S)
    assert rig.pipeline.due_ns is None
    talks: dict[int, int] = {}
    for event in rig.events:
        if isinstance(event, Stopped):
            talks.pop(event.user_id)  # KeyError: an end without a talk
            continue
        before = talks.get(event.user_id)
        if before is None:
            assert event.opus not in (None, SILENCE_FRAME)
        else:
            assert event.timestamp_samples - before >= 960
        talks[event.user_id] = event.timestamp_samples
    assert not talks, "a talk without an end"
