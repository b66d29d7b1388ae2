"""The floor: a process that sends prebuilt packets slot by slot with `sendmmsg`, and does nothing else.

Every 20 ms each guild's packet leaves once, in 20 slots; as many receivers listen on loopback as there are voice
servers. Prints {"all_us", "inside_us"}: CPU per packet of the whole process, and inside `sendmmsg` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import sys
import time

import numpy as np

from shared.process import parent_death_signal, raise_file_limit
from shared.protocol import rtp
from tests.emulator.datagrams import hear_little
from worker.fanout.build import Builder, Target
from worker.fanout.grid import SLOTS, TICK_NS
from worker.fanout.rows import RowTable
from worker.fanout.sender import SlotPlan, Timer

_PACKET_BYTES = 12 + 240 + 16 + 4


def _receive_and_forget(receivers: list[socket.socket]) -> int:
    """Fork a process that empties the receivers' buffers; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    parent_death_signal()
    poll = select.epoll()
    for receiver in receivers:
        poll.register(receiver.fileno(), select.EPOLLIN)
    by_fd = {receiver.fileno(): receiver for receiver in receivers}
    buffer = bytearray(2_048)
    while True:
        for fd, _ in poll.poll():
            try:
                while by_fd[fd].recv_into(buffer):
                    pass
            except BlockingIOError:
                continue
        time.sleep(0.004)


def _prepared(table: RowTable, slot: int, fds: list[int]) -> SlotPlan | None:
    rows = np.flatnonzero(table.slot == slot)
    if not len(rows):
        return None
    plan = SlotPlan(table, rows[np.argsort(table.socket[rows], kind="stable")], fds)
    plan.prepare(_PACKET_BYTES)
    return plan


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guilds", type=int, required=True)
    parser.add_argument("--addresses", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--deaf", action="store_true", help="the kernel throws away what comes to the receivers")
    options = parser.parse_args()
    raise_file_limit()
    receivers = []
    for number in range(options.addresses):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        if options.deaf:
            hear_little(receiver)
        receiver.bind((f"127.10.0.{1 + number % 16}", 0))
        receivers.append(receiver)
    per_address = -(-options.guilds // options.addresses)
    senders = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(per_address)]
    for sender in senders:
        sender.bind(("127.0.0.1", 0))
    # The same layout as the product's: rows, slots and sockets are dealt out by the same code.
    table = RowTable(options.guilds)
    builder = Builder(table)
    for number in range(options.guilds):
        remote = receivers[number % options.addresses].getsockname()
        socket_number = number // options.addresses
        builder.open(Target(number, remote, socket_number, "aead_aes256_gcm_rtpsize", bytes(32)))
    table.length[:] = _PACKET_BYTES
    table.packets[:, 0, :4] = (rtp.VERSION_FLAGS, rtp.PAYLOAD_TYPE, 0, 1)
    fds = [sender.fileno() for sender in senders]
    plans = [_prepared(table, slot, fds) for slot in range(SLOTS)]
    receiving = _receive_and_forget(receivers)
    timer = Timer()
    packets = inside_ns = 0
    start_ns = time.monotonic_ns() + TICK_NS
    began_ns = time.process_time_ns()
    for number in range(int(options.seconds * 1e9) // (TICK_NS // SLOTS)):
        plan = plans[number % SLOTS]
        if plan is None:
            continue  # the sender does not wake for a slot without rows
        timer.sleep_until(start_ns + number * (TICK_NS // SLOTS))
        before_ns = time.process_time_ns()
        sent, _ = plan.send_prepared(table)
        inside_ns += time.process_time_ns() - before_ns
        packets += sent
    all_ns = time.process_time_ns() - began_ns
    os.kill(receiving, signal.SIGKILL)
    os.waitpid(receiving, 0)
    sys.stdout.write(json.dumps({"all_us": all_ns / 1e3 / packets, "inside_us": inside_ns / 1e3 / packets}) + "\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main()
