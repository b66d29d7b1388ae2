"""UDP sockets that guild connections share. A socket never carries two connections with the same remote address, so
each connection keeps a 5-tuple of its own. Datagrams received are told apart by where they come from.

Source: design section 3, "Sockets".
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from shared.errors import ErrorCode, VoiceError
from shared.logs import get_logger

Address = tuple[str, int]
Receiver = Callable[[bytes], None]

_LARGEST_DATAGRAM_BYTES = 2048
_DRAIN_AT_ONCE = 256
SEND_BUFFER_BYTES = 1 << 20


@dataclass(eq=False)
class _Shared:
    number: int
    socket: socket.socket
    receivers: dict[Address, Receiver] = field(default_factory=dict)


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
            get_logger().debug("datagram.dropped", error=errno.errorcode.get(error.errno or 0, str(error)))

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
        self._busy = 0
        self.send_errors = 0
        self.strays = 0
        """Datagrams from addresses that no connection talks to."""

    @property
    def sockets(self) -> list[socket.socket]:
        """All sockets in the order of their numbers."""
        return [shared.socket for shared in self._sockets]

    def lease(self, remote: Address, receiver: Receiver) -> Port:
        """A 5-tuple towards `remote`, the most used socket that has none yet.

        Raises: VoiceError (`udp_ports_too_few`, `udp_ports_in_use`).
        """
        free = [
            shared
            for shared in self._sockets
            if remote not in shared.receivers and not (self._per_guild and shared.receivers)
        ]
        shared = max(free, key=lambda one: len(one.receivers)) if free else self._bind()
        shared.receivers[remote] = receiver
        return Port(self, shared, remote)

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
        shared = _Shared(len(self._sockets), one)
        self._sockets.append(shared)
        self._on_new(one)
        self._loop.add_reader(one, self._drain, shared)
        return shared

    def _drain(self, shared: _Shared) -> None:
        for _ in range(_DRAIN_AT_ONCE):
            try:
                datagram, remote = shared.socket.recvfrom(_LARGEST_DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error of an earlier send; the datagram it speaks of is lost
                self.send_errors += 1
                continue
            receiver = shared.receivers.get(remote)
            if receiver is None:
                self.strays += 1
            else:
                receiver(datagram)

    def close(self) -> None:
        for shared in self._sockets:
            self._loop.remove_reader(shared.socket)
            shared.socket.close()
        self._sockets.clear()
