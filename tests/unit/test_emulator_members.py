"""What members of the local Discord count, and how encrypted frames are told from others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.emulator.dave.external_sender import ExternalSender
from tests.emulator.dave.frame import is_protocol_frame
from tests.emulator.dave.group import DaveGroup, DaveOp
from tests.emulator.dave.member import DaveyMember
from tests.emulator.members import Member, Utterance
from tests.emulator.tone import FRAMES_PER_SECOND, second_of_tone
from tests.media.audio import decode_opus

CHANNEL = 7
SILENCE = b"\xf8\xff\xfe"


def pair() -> tuple[DaveyMember, Member]:
    """A sender and a member of the local Discord, in one group that is in force."""
    group = DaveGroup(CHANNEL, ExternalSender(), lambda: 0.0)
    sender, member = DaveyMember("11", CHANNEL), Member("22", 1, DaveyMember("22", CHANNEL), 0)
    assert member.dave is not None
    sender.connected(["22"])
    member.dave.connected(["11"])
    out = [*group.join("11"), *group.join("22")]
    said = [("11", reply) for reply in sender.start()] + [("22", reply) for reply in member.dave.start()]
    while out or said:
        for message in out:
            replies = sender.hear(message.op, message.body) if message.user == "11" else None
            if replies is None:
                replies = member.hear_gateway(message.op, message.body)
            said += [(message.user, reply) for reply in replies]
        out.clear()
        for user, (op, body) in said:
            assert isinstance(body, bytes)
            out += group.key_package(user, body) if op is DaveOp.KEY_PACKAGE else group.commit_welcome(user, body)
        said.clear()
    return sender, member


def test_a_member_counts_from_its_op_22() -> None:
    """What arrived before is early; after it failures up to the first success are told apart."""
    sender, member = pair()
    assert member.since_ns is not None
    at_ns = member.since_ns
    old = [sender.encrypt(b"old") for _ in range(2)]
    member.hear_frame("11", old[0], at_ns - 1)
    for offset, frame in enumerate([old[0], SILENCE, sender.encrypt(b"one"), b"\x78plain", sender.encrypt(b"two")]):
        member.hear_frame("11", frame, at_ns + offset * 20)
    hearing = member.hearing["11"]
    assert (hearing.early, hearing.received, hearing.decrypted) == (1, 5, 3)
    assert (hearing.failed, hearing.failed_at_start) == (2, 1)
    assert (hearing.first_decrypted_ns, hearing.last_decrypted_ns) == (at_ns + 20, at_ns + 80)
    assert (hearing.longest_gap_ns, hearing.last_failed_ns) == (40, at_ns + 60)


def test_who_begins_anew_counts_nothing_until_it_is_back() -> None:
    """After op 24 a member is in no group that is in force."""
    sender, member = pair()
    member.hear_gateway(DaveOp.PREPARE_EPOCH, {"epoch": 1, "protocol_version": 1})
    assert member.since_ns is None
    assert not member.may_speak
    assert member.hear_frame("11", sender.encrypt(b"frame"), 2**62) is None
    assert member.hearing["11"].received == 0


def test_utterances_are_encrypted_unless_told_otherwise() -> None:
    """Sequence and timestamp go on, whatever is said."""
    sender, member = pair()
    member.to_say.extend([Utterance(b"frame"), Utterance(b"plain", plain=True), Utterance(b"sealed", sealed=True)])
    packets = [member.next_packet() for _ in range(3)]
    assert sender.decrypt("22", packets[0].frame) == b"frame"
    assert [packet.frame for packet in packets[1:]] == [b"plain", b"sealed"]
    assert [(packet.sequence, packet.timestamp) for packet in packets] == [(0, 0), (1, 960), (2, 1920)]


def test_the_tone_is_opus() -> None:
    """A second of it decodes to a second of sound that is not silence."""
    tone = second_of_tone(440)
    assert len(tone) == FRAMES_PER_SECOND
    pcm = decode_opus(tone)
    assert 0.15 < float((pcm[9_600:] ** 2).mean() ** 0.5) < 0.25


SENDER, _ = pair()


@given(st.binary(min_size=1, max_size=1300))
def test_encrypted_frames_are_known_by_their_layout(frame: bytes) -> None:
    """Every encrypted frame is recognised; cut at either end it is not."""
    sealed = SENDER.encrypt(frame)
    if frame == SILENCE:
        assert not is_protocol_frame(sealed)
        return
    assert is_protocol_frame(sealed)
    assert not is_protocol_frame(sealed[:-1])
    assert not is_protocol_frame(sealed[-11:])


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        SILENCE,
        b"\xfa\xfa",
        bytes(9) + b"\x0b\xfa\xfa",
        bytes(8) + b"\x01\x0d\xfa\xfa",
        bytes(8) + b"\x01\x00\x0d\xfa\xfa",
        bytes(8) + b"\x81\x0c\xfa\xfa",
        bytes(10) + b"\x01\x00\x05\x0e\xfa\xfa",
        bytes(10) + b"\x01\x04\x02\x02\x01\x10\xfa\xfa",
        bytes(8) + b"\xff\xff\xff\xff\xff\x0f\x11\xfa\xfa",
        bytes(100) + b"\xfa\xfb",
    ],
    ids=["empty", "silence", "marker", "no-nonce", "too-short", "odd", "endless", "range", "order", "long", "other"],
)
def test_other_frames_are_not_taken_for_encrypted(frame: bytes) -> None:
    """The marker alone does not make a frame an encrypted one."""
    assert not is_protocol_frame(frame)
