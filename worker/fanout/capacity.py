"""What building and sending a packet costs on this machine, and so how many guilds a worker can take.

    python -m worker.fanout.capacity --seconds N

Packets are built by the real builder, with end-to-end encryption by libdave in a group of one, and sent over the real
plan of slots to a socket on 127.0.0.1 that nobody reads: what does not fit its buffer is dropped there, nothing leaves
the machine. Before each step other memory is written, so that what is measured is the cost with cold caches: in a
worker with a thousand guilds nothing stays in them for 20 ms. CPU of the thread, medians, so that whoever else is at
work on the machine, and the other workers that measure at the same moment, matter little.

The rest of both processes is a factor on top: it was found with workers that played to 1,000 and 2,000 guilds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import dave
import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from shared.capacity import MEASURED_SHARE, SET_SHARE, Capability, Measured, Spread, guilds_within, limits
from shared.clock import NS_PER_MS
from shared.errors import ErrorCode, VoiceError
from shared.logs import get_logger
from shared.process import raise_file_limit, usable_cores
from shared.protocol.transport_crypto import AES_GCM, KEY_BYTES, XCHACHA
from shared.settings import Settings
from shared.text import in_words
from worker.fanout.admission import Admission
from worker.fanout.build import Builder, Lane, Target
from worker.fanout.grid import SLOTS
from worker.fanout.rows import RowTable
from worker.fanout.scratch import BLOCK_TICKS, Protect
from worker.fanout.sender import SlotPlan
from worker.fanout.sockets import SEND_BUFFER_BYTES

_ROWS = 256
_SOCKETS = 8
"""As many as guilds on one voice server address, where those are few."""
_FRAME_BYTES = 240
_CACHE_BYTES = 16 << 20
"""More than the caches next to a core; the last one, which all share, is nobody's own."""
_WARM_UP_BLOCKS = 1
_LEAST_BLOCKS = 3
_BLOCKS_AT_START = 8
_AT_START_WITHIN_S = 0.3
_NICE = 10
"""Workers that play on this host come first."""
WORKER_FACTOR = 2.0
"""The whole worker process, beside building with cold caches: WebSockets, the stream reader, the loop, and memory that
a thousand calls need. 1,000 guilds on one worker: 1.9 us a packet without DAVE, where building is 0.9; 3.3 us with,
where it is 1.9. With more guilds it is less."""
SENDER_FACTOR = 1.3
"""The whole sender, beside sending full batches: a wake-up each slot, and batches that are not full. 2,000 guilds:
4.1 to 4.4 us a packet, where sending is 3.3; with 1,000 it is 4.4 to 5.1."""
_UNMEASURED = 1_000
"""Capacity where measuring fails."""
_MOST = 20_000
"""As many as the setting allows."""
_SPARE_FILES = 128
_FILES_PER_GUILD = 2
_KINDS = [(mode, with_dave) for mode in (AES_GCM, XCHACHA) for with_dave in (False, True)]
_USER = "1"


def _encryptions(count: int) -> list[Protect]:
    """End-to-end encryption for so many rows, by one group of which we are the only member.

    Its external sender is a key that is thrown away: nobody will ever be proposed.

    Raises: VoiceError: no group was made.
    Source: voice protocol reference, sections 6.4 and 6.10.
    """
    version = dave.get_max_supported_protocol_version()
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    point = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    session = dave.Session()
    session.set_external_sender(b"\x40" + bytes([len(point)]) + point + b"\x00\x01\x01\x00")
    session.init(version, 1, _USER, dave.SignatureKeyPair.generate(version))
    commit = session.process_proposals(b"\0\0", {_USER})  # none at all
    if commit is None or not isinstance(session.process_commit(commit), dict):
        raise VoiceError("libdave made no group of one", code=ErrorCode.E2EE_FAILED)
    made: list[Protect] = []
    for ssrc in range(1, count + 1):
        ratchet = session.get_key_ratchet(_USER)
        if ratchet is None:
            raise VoiceError("a group of one has no key", code=ErrorCode.E2EE_FAILED)
        encryptor = dave.Encryptor()
        encryptor.assign_ssrc_to_codec(ssrc, dave.Codec.opus)
        encryptor.set_key_ratchet(ratchet)
        made.append(partial(encryptor.encrypt, dave.MediaType.audio, ssrc))
    return made


class _Bed:
    """Rows of one kind, laid out as the worker lays them out."""

    def __init__(self, mode: str, with_dave: bool, remote: tuple[str, int], fds: list[int]) -> None:
        self.mode, self.with_dave = mode, with_dave
        self.build_us: list[float] = []
        self.send_us: list[float] = []
        self._tick = 0
        self._table = table = RowTable(_ROWS)
        self._builder = builder = Builder(table)
        lane = Lane(lambda _tick: frame, lambda _first, last: last)
        frame = os.urandom(_FRAME_BYTES)
        builder.lanes.append(lane)
        encryptions = _encryptions(_ROWS) if with_dave else [None] * _ROWS
        for number, encryption in enumerate(encryptions):
            row = builder.open(Target(number + 1, remote, number % len(fds), mode, os.urandom(KEY_BYTES)))
            builder.protect(row, encryption)
            builder.tune(row, lane)
        self._plans = []
        for slot in range(SLOTS):
            rows = np.flatnonzero(table.slot == slot)
            if len(rows):
                self._plans.append(SlotPlan(table, rows[np.argsort(table.socket[rows], kind="stable")], fds))

    def close(self) -> None:
        self._table.close()

    def block(self, chill: Callable[[], object]) -> None:
        """Build a block of packets of each row, and send them tick by tick."""
        last_tick = self._tick + BLOCK_TICKS
        chill()
        began_ns = time.thread_time_ns()
        self._builder.build(self._tick + 1, last_tick)
        built_ns = time.thread_time_ns()
        send_us = [self._send(tick, chill) for tick in range(self._tick + 1, last_tick + 1)]
        if self._tick >= _WARM_UP_BLOCKS * BLOCK_TICKS:
            self.build_us.append((built_ns - began_ns) / 1e3 / _ROWS / BLOCK_TICKS)
            self.send_us += send_us
        self._tick = last_tick

    def _send(self, tick: int, chill: Callable[[], object]) -> float:
        """Send one packet of each row; returns microseconds for each."""
        chill()
        began_ns = time.thread_time_ns()
        for plan in self._plans:
            plan.send(self._table, tick)
        return (time.thread_time_ns() - began_ns) / 1e3 / _ROWS

    def measured(self) -> Measured:
        build, send = _spread(self.build_us), _spread(self.send_us)
        return Measured(
            mode=self.mode,
            dave=self.with_dave,
            build_us=build,
            send_us=send,
            worker_us=build.median * WORKER_FACTOR,
            sender_us=send.median * SENDER_FACTOR,
            packet_bytes=int(self._table.length.max()),
        )


def _spread(readings: list[float]) -> Spread:
    return Spread(statistics.median(readings), min(readings), max(readings))


def measure(kinds: Iterable[tuple[str, bool]], within_s: float, most_blocks: int | None = None) -> list[Measured]:
    """What packets of each kind (transport mode, with end-to-end encryption) cost.

    Blocks of all kinds go in turns: what else the machine does falls on all of them.

    Raises: OSError: no sockets are to be had; VoiceError: no end-to-end encryption is.
    """
    deadline_s = time.monotonic() + within_s
    with ExitStack() as exits:
        receiver, *senders = (
            exits.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(1 + _SOCKETS)
        )
        receiver.bind(("127.0.0.1", 0))
        for sender in senders:
            sender.bind(("127.0.0.1", 0))
        fds = [sender.fileno() for sender in senders]
        beds = [_Bed(mode, with_dave, receiver.getsockname(), fds) for mode, with_dave in kinds]
        for bed in beds:
            exits.callback(bed.close)
        other = np.zeros(_CACHE_BYTES, np.uint8)
        blocks = 0
        while blocks < _WARM_UP_BLOCKS + _LEAST_BLOCKS or (blocks != most_blocks and time.monotonic() < deadline_s):
            blocks += 1
            for bed in beds:
                bed.block(lambda: other.__iadd__(1))
        return [bed.measured() for bed in beds]


# a worker's start


async def admission_of(settings: Settings, files: int) -> Admission:
    """What this worker may take: as set, or measured; within the limit of open files."""
    cores = usable_cores() / max(1, settings.fanout_workers)
    if settings.worker_capacity is not None:
        return Admission(capacity_within(files, settings.worker_capacity), cores, SET_SHARE)
    return Admission(capacity_within(files, await _measured_capacity(cores)), cores, MEASURED_SHARE)


async def _measured_capacity(cores: float) -> int:
    """Guilds with end-to-end encryption, as nearly all are, that this worker carries."""
    log, began_ns = get_logger(), time.monotonic_ns()
    with ThreadPoolExecutor(1, initializer=_step_back) as thread:
        work = thread.submit(measure, [(AES_GCM, True)], _AT_START_WITHIN_S, _BLOCKS_AT_START)
        try:
            (found,) = await asyncio.wrap_future(work)
        except (OSError, VoiceError) as error:
            log.warning("capacity.unmeasured", error=in_words(error), capacity=_UNMEASURED)
            return _UNMEASURED
    capacity = min(_MOST, guilds_within(found.cost, cores, MEASURED_SHARE))
    allowed = limits(found.cost, cores, MEASURED_SHARE)
    log.info(
        "capacity.measured",
        capacity=capacity,
        limit=min(allowed, key=allowed.__getitem__),
        worker_us=round(found.worker_us, 2),
        sender_us=round(found.sender_us, 2),
        cores=round(cores, 2),
        took_ms=(time.monotonic_ns() - began_ns) // NS_PER_MS,
    )
    return capacity


def _step_back() -> None:
    """Let others go first; a thread's nice value is its own on Linux."""
    os.setpriority(os.PRIO_PROCESS, 0, max(_NICE, os.getpriority(os.PRIO_PROCESS, 0)))


def files_allow(files: int) -> int:
    """Guilds that a limit of open files allows."""
    return max(1, (files - _SPARE_FILES) // _FILES_PER_GUILD)


def capacity_within(files: int, wanted: int) -> int:
    """Guilds that the limit of open files allows, with a warning where that is less than wanted."""
    possible = files_allow(files)
    if possible < wanted:
        get_logger().warning("capacity.limited", wanted=wanted, possible=possible, by="limit of open files")
    return min(possible, wanted)


# a test of the machine


def _send_buffer_bytes() -> int:
    """What a UDP socket's send buffer holds, in the kernel's count: with all that belongs to a packet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        return one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    found = Capability(
        cores=usable_cores(),
        files=files_allow(raise_file_limit()),
        send_buffer_bytes=_send_buffer_bytes(),
        measured=measure(_KINDS, options.seconds),
    )
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")


if __name__ == "__main__":
    main()
