"""CPU per received packet: opening, end-to-end decryption, buffering, queueing; without and with decoding.

    python -m tests.bench.receive

One talker of one guild, packets of 160 bytes of Opus every 20 ms of a simulated clock, in this process and without a
socket. A reader empties its stream. Medians of several rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable

import numpy as np

from shared.clock import NS_PER_MS, NS_PER_US
from shared.logs import configure
from shared.protocol.rtp import pack_header
from shared.protocol.transport_crypto import AES_GCM, KEY_BYTES, XCHACHA, seal_packet
from shared.schema.job import OpusOptions
from tests.emulator.dave.external_sender import ExternalSender
from tests.emulator.dave.group import DaveGroup, DaveOp
from tests.libdave_member import LibdaveMember
from worker.encode.opus import OpusEncoder
from worker.voice.receive.pipeline import Decrypt
from worker.voice.receive.receiver import Receiver

KEY = bytes(KEY_BYTES)
USER, LISTENER, CHANNEL, SSRC = 1, 2, 3, 4
FRAME_NS = 20 * NS_PER_MS


def opus_frames(number: int) -> list[bytes]:
    """Music-like noise at 64 kbit/s."""
    encoder = OpusEncoder(OpusOptions(bitrate=64_000, vbr=False))
    noise = np.random.default_rng(1).normal(0, 0.1, (50, 960, 2)).astype(np.float32)
    frames = [encoder.encode(block) for block in noise]
    encoder.flush()
    return (frames * (number // len(frames) + 1))[:number]


def in_a_group() -> tuple[LibdaveMember, LibdaveMember]:
    """A sender and a listener in one MLS group."""
    group = DaveGroup(CHANNEL, ExternalSender(), lambda: 0.0)
    members = {str(user): LibdaveMember(str(user), CHANNEL) for user in (USER, LISTENER)}
    outgoing = []
    for user, member in members.items():
        member.connected(members)
        [(_, key_package)] = member.start()
        assert isinstance(key_package, bytes)
        outgoing += group.join(user) + group.key_package(user, key_package)
    while outgoing:
        one = outgoing.pop(0)
        for op, body in members[one.user].hear(one.op, one.body):
            assert op == DaveOp.COMMIT_WELCOME
            assert isinstance(body, bytes)
            outgoing += group.commit_welcome(one.user, body)
    return members[str(USER)], members[str(LISTENER)]


def sealed(mode: str, frames: list[bytes]) -> list[bytes]:
    return [
        seal_packet(mode, KEY, pack_header(number, number * 960, SSRC), frame, number)
        for number, frame in enumerate(frames)
    ]


async def measure_us(mode: str, packets: list[bytes], decrypt: Decrypt, *, pcm: bool) -> float:
    """Microseconds of CPU per packet."""
    now_ns = 0
    receiver = Receiver("bench", now_ns=lambda: now_ns)
    receiver.begin_session(decrypt)
    receiver.rekey(mode, KEY)
    receiver.speaking(USER, SSRC)
    stream = receiver.pcm() if pcm else receiver.opus()
    heard = 0
    begin_ns = time.process_time_ns()
    for number, packet in enumerate(packets):
        now_ns += FRAME_NS
        receiver.datagram(packet)
        if number >= 3:
            await anext(stream)
            heard += 1
    spent_ns = time.process_time_ns() - begin_ns
    assert heard == len(packets) - 3
    receiver.close()
    return spent_ns / NS_PER_US / len(packets)


async def run(rounds: int, number: int) -> list[float]:
    """Print the figures and return them."""
    frames = opus_frames(number)
    sender, listener = in_a_group()

    def plain(_: int, frame: bytes) -> bytes:
        return frame

    def dave(user_id: int, frame: bytes) -> bytes | None:
        return listener.decrypt(str(user_id), frame)

    make: dict[str, tuple[Callable[[], list[bytes]], Decrypt]] = {
        "no DAVE": (lambda: frames, plain),
        "DAVE": (lambda: [sender.encrypt(frame) for frame in frames], dave),
    }
    figures: list[float] = []
    for mode in (AES_GCM, XCHACHA):
        for name, (encrypted, decrypt) in make.items():
            for pcm in (False, True):
                costs = [await measure_us(mode, sealed(mode, encrypted()), decrypt, pcm=pcm) for _ in range(rounds)]
                what = "opened, buffered, decoded" if pcm else "opened and buffered"
                figures.append(statistics.median(costs))
                print(f"{mode:32} {name:8} {what:26} {figures[-1]:6.1f} us")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--packets", type=int, default=5_000)
    arguments = parser.parse_args()
    configure("warning", "console")
    asyncio.run(run(arguments.rounds, arguments.packets))


if __name__ == "__main__":
    main()
