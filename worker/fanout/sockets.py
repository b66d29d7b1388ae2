"""UDP sockets that guild connections share. A socket never carries two connections with the same remote address, so
each connection keeps a 5-tuple of its own. Datagrams received are told apart by where they come from.

Source: design section 3, "Sockets".
"""

from __future__ import annotations

import asyncio
import errno
import select
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from shared.errors import ErrorCode, VoiceError
from shared.logs import get_logger
from shared.text import in_words

Address = tuple[str, int]
Receiver = Callable[[bytes], None]
Failed = Callable[[int], None]
"""Takes the errno of a datagram that came back."""

_LARGEST_DATAGRAM_BYTES = 2048
_DRAIN_AT_ONCE = 256
SEND_BUFFER_BYTES = 1 << 20
_SHUNNED_FOR_S = 60.0
"""A 5-tuple that lost its path: whatever stands between may have forgotten or condemned it."""
_IP_RECVERR = 11
_ERROR_BYTES = 64
"""Room for a `sock_extended_err` and the address of who told it."""


@dataclass(eq=False)
class _Shared:
    number: int
    socket: socket.socket
    receivers: dict[Address, tuple[Receiver, Failed]] = field(default_factory=dict)
    shunned: dict[Address, float] = field(default_factory=dict)
    """Until when, by the loop's clock."""


class Port:
    """One connection's use of a socket towards one remote address.

    Attributes:
        number: of the socket, as the sender knows it.
    """

    def __init__(self, pool: SocketPool, shared: _Shared, remote: Address) -> None:
        self._pool = pool
        self._shared = shared
        self.remote = remote
        self.number = shared.number

    def send(self, datagram: bytes) -> None:
        """Send a datagram that is not audio; one that does not fit the buffer is dropped and counted."""
        try:
            self._shared.socket.sendto(datagram, self.remote)
        except OSError as error:
            self._pool.send_errors += 1
            get_logger().debug("datagram.dropped", error=errno.errorcode.get(error.errno or 0, in_words(error)))

    def shun(self) -> None:
        """Let nobody have this 5-tuple for a while."""
        self._pool.shun(self._shared, self.remote)

    def release(self) -> None:
        """Give the 5-tuple back."""
        self._shared.receivers.pop(self.remote, None)


class SocketPool:
    """The sockets of one worker.

    Args:
        address: local address to bind to.
        ports: ports dealt to this worker; an empty range lets the system pick.
        per_guild: never share.
        on_new: told of every new socket before it is used; the sender needs its descriptor.
    """

    def __init__(self, address: str, ports: range, *, per_guild: bool, on_new: Callable[[socket.socket], None]) -> None:
        self._address = address
        self._limited = len(ports) > 0
        self._unbound: Iterator[int] = iter(ports)
        self._per_guild = per_guild
        self._on_new = on_new
        self._sockets: list[_Shared] = []
        self._loop = asyncio.get_running_loop()
        # The loop watches this and not the sockets: uvloop gives up a socket at its first error.
        self._ready = select.epoll()
        self._by_fd: dict[int, _Shared] = {}
        self._loop.add_reader(self._ready.fileno(), self._drain_all)
        self._busy = 0
        self.send_errors = 0
        self.strays = 0
        """Datagrams from addresses that no connection talks to."""

    @property
    def sockets(self) -> list[socket.socket]:
        """All sockets in the order of their numbers."""
        return [shared.socket for shared in self._sockets]

    def lease(self, remote: Address, receiver: Receiver, failed: Failed = lambda _: None) -> Port:
        """A 5-tuple towards `remote`, the most used socket that has none yet.

        Args:
            receiver: takes the datagrams that come from there.
            failed: told of errors on the way there, also those of what the sender sent.
        Raises: VoiceError (`udp_ports_too_few`, `udp_ports_in_use`).
        """
        free = [
            shared
            for shared in self._sockets
            if remote not in shared.receivers and not (self._per_guild and shared.receivers)
            if shared.shunned.get(remote, 0.0) <= self._loop.time()
        ]
        shared = max(free, key=lambda one: len(one.receivers)) if free else self._bind_or_reuse(remote)
        shared.receivers[remote] = receiver, failed
        return Port(self, shared, remote)

    def _bind_or_reuse(self, remote: Address) -> _Shared:
        """Another socket; where there is none to be had, one whose 5-tuple was shunned: the longest ago."""
        try:
            return self._bind()
        except VoiceError:
            shunned = [one for one in self._sockets if remote in one.shunned and remote not in one.receivers]
            if not shunned or self._per_guild:
                raise
            return min(shunned, key=lambda one: one.shunned[remote])

    def shun(self, shared: _Shared, remote: Address) -> None:
        now_s = self._loop.time()
        shared.shunned = {one: until_s for one, until_s in shared.shunned.items() if until_s > now_s}
        shared.shunned[remote] = now_s + _SHUNNED_FOR_S

    def _bind(self) -> _Shared:
        while True:
            port = next(self._unbound, None) if self._limited else 0
            if port is None:
                raise VoiceError(
                    f"GUILDCAST_UDP_PORTS: all {len(self._sockets) + self._busy} UDP ports of this worker are used up"
                    f"{f', {self._busy} of them by others' if self._busy else ''}; widen the range",
                    code=ErrorCode.UDP_PORTS_IN_USE if self._busy else ErrorCode.UDP_PORTS_TOO_FEW,
                )
            one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            try:
                one.bind((self._address, port))
            except OSError as error:
                one.close()
                if error.errno != errno.EADDRINUSE:
                    raise VoiceError(
                        f"UDP socket on {self._address}:{port}: {error.strerror}", code=ErrorCode.UDP_PORTS_IN_USE
                    ) from error
                self._busy += 1
                get_logger().warning("udp_port.skipped", port=port, reason="in use")
                continue
            break
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        one.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        shared = _Shared(len(self._sockets), one)
        self._sockets.append(shared)
        self._on_new(one)
        self._by_fd[one.fileno()] = shared
        self._ready.register(one, select.EPOLLIN)
        return shared

    def _drain_all(self) -> None:
        for fd, happened in self._ready.poll(0):
            shared = self._by_fd[fd]
            if happened & select.EPOLLERR:
                self._drain_errors(shared)
            if happened & select.EPOLLIN:
                self._drain(shared)

    def _drain(self, shared: _Shared) -> None:
        for _ in range(_DRAIN_AT_ONCE):
            try:
                datagram, remote = shared.socket.recvfrom(_LARGEST_DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error of an earlier send; which one, the queue tells
                continue
            found = shared.receivers.get(remote)
            if found is None:
                self.strays += 1
            else:
                found[0](datagram)

    def _drain_errors(self, shared: _Shared) -> None:
        """Take what came back, and tell those who talk to where it was sent: a socket's error is nobody else's.

        Source: ip(7), IP_RECVERR; the address is that of the datagram that caused the error.
        """
        for _ in range(_DRAIN_AT_ONCE):
            try:
                _, ancillary, _, remote = shared.socket.recvmsg(1, socket.CMSG_SPACE(_ERROR_BYTES), socket.MSG_ERRQUEUE)
            except OSError:
                return
            self.send_errors += 1
            for level, kind, data in ancillary:
                if (level, kind) == (socket.IPPROTO_IP, _IP_RECVERR) and remote in shared.receivers:
                    shared.receivers[remote][1](int.from_bytes(data[:4], sys.byteorder))

    def close(self) -> None:
        self._loop.remove_reader(self._ready.fileno())
        self._ready.close()
        for shared in self._sockets:
            shared.socket.close()
        self._sockets.clear()
