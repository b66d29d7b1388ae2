"""Many datagrams from many sockets into one set of numpy columns (Linux, 64 bit).

`recvmmsg` writes straight into preallocated rows; kernel arrival times and drop counts come as control messages and
are read as columns. Nothing is allocated per datagram.
"""

import ctypes
import errno
import os
import socket
import struct
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tests.emulator.wire import OPUS_PAYLOAD_TYPE

DATAGRAM_BYTES = 1536
HEARD_EVERY = 64
"""Of this many packets one is heard where a voice server is not listened to; a power of two."""
_NAME_BYTES = 16
_CONTROL_BYTES = 64
_MSG_DONTWAIT = 0x40
_SO_RCVBUFFORCE = 33
_SO_TIMESTAMPNS = 35
_SO_RXQ_OVFL = 40
_TIMESTAMP_WORD = socket.SOL_SOCKET | _SO_TIMESTAMPNS << 32
_DROPS_WORD = socket.SOL_SOCKET | _SO_RXQ_OVFL << 32
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_RECEIVE_BUFFER_BYTES = 8 << 20

# struct mmsghdr and struct iovec of a 64-bit Linux
_HEADER = np.dtype(
    {
        "names": ["name", "name_bytes", "iov", "iov_count", "control", "control_bytes", "flags", "length"],
        "formats": ["u8", "u4", "u8", "u8", "u8", "u8", "i4", "u4"],
        "offsets": [0, 8, 16, 24, 32, 40, 48, 56],
        "itemsize": 64,
    }
)
_IOVEC = np.dtype([("base", "u8"), ("length", "u8")])

# The GIL is kept: a call that cannot block is cheaper than handing the GIL to and fro.
_recvmmsg = ctypes.PyDLL(None, use_errno=True).recvmmsg
_recvmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]
_recvmmsg.restype = ctypes.c_int


def open_socket(address: str, port: int = 0) -> socket.socket:
    """A UDP socket with the largest receive buffer allowed and kernel arrival times; port 0 is a free one."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
    except PermissionError:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
    opened.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    opened.setsockopt(socket.SOL_SOCKET, _SO_RXQ_OVFL, 1)
    opened.bind((address, port))
    return opened


# (operation, jump if true, jump if false, operand); offsets count from the UDP header of 8 bytes
_LOAD_BYTE, _LOAD_HALF, _AND, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x28, 0x54, 0x15, 0x06
_HEAR_LITTLE = (
    (_LOAD_BYTE, 0, 0, 9),
    (_AND, 0, 0, 0x7F),
    (_JUMP_IF_EQUAL, 0, 4, OPUS_PAYLOAD_TYPE),
    (_LOAD_HALF, 0, 0, 10),
    (_AND, 0, 0, HEARD_EVERY - 1),
    (_JUMP_IF_EQUAL, 1, 0, 0),
    (_RETURN, 0, 0, 0),
    (_RETURN, 0, 0, 0xFFFF),
)


def hear_little(receiver: socket.socket) -> None:
    """Have the kernel throw away all audio but each 64th packet of a sequence, before it is queued.

    Source: Linux, networking/filter; the kernel counts what is thrown away among its drops.
    """
    _filter(receiver, _HEAR_LITTLE)


def hear_nothing(receiver: socket.socket) -> None:
    """Have the kernel throw away all that comes, as a path does that swallows it."""
    _filter(receiver, ((_RETURN, 0, 0, 0),))


def hear_all(receiver: socket.socket) -> None:
    """Undo that."""
    receiver.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def _filter(receiver: socket.socket, steps: Sequence[tuple[int, int, int, int]]) -> None:
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    # struct sock_fprog: the number of steps, and where they are
    wish = struct.pack("HL", len(steps), ctypes.addressof(program))
    receiver.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, wish)


def replace_socket(old: socket.socket, new: socket.socket) -> None:
    """Put another socket in the place of one, for all who hold it; `new` is closed."""
    os.dup2(new.fileno(), old.fileno(), inheritable=False)
    new.close()


def peer_key(address: str, port: int) -> int:
    """A peer as the number that its `sockaddr_in` makes in `Batch.peer`."""
    name = socket.AF_INET.to_bytes(2, "little") + port.to_bytes(2, "big") + socket.inet_aton(address)
    return int.from_bytes(name, "little")


def peer_address(key: int) -> tuple[str, int]:
    """Address and port of a number from `Batch.peer`."""
    name = key.to_bytes(8, "little")
    return socket.inet_ntoa(name[4:]), int.from_bytes(name[2:4], "big")


class Batch:
    """Columns over the datagrams received since `clear`; only the first `count` rows mean anything.

    Columns: `length` (bytes), `peer` (see `peer_key`), `source` (the number given to `receive`), `words` (the datagram
    as big endian 32-bit words), `data` (the datagram as bytes).
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self.data: NDArray[np.uint8] = np.zeros((capacity, DATAGRAM_BYTES), np.uint8)
        self.words = self.data.view(">u4")
        self.source: NDArray[np.int64] = np.zeros(capacity, np.int64)
        self.raw = self.data.data.cast("B")
        names: NDArray[np.uint64] = np.zeros((capacity, _NAME_BYTES // 8), np.uint64)
        self.peer = names[:, 0]
        self._control: NDArray[np.int64] = np.zeros((capacity, _CONTROL_BYTES // 8), np.int64)
        self._iovecs = np.zeros(capacity, _IOVEC)
        self._headers = np.zeros(capacity, _HEADER)
        rows = np.arange(capacity, dtype=np.uint64)
        self._iovecs["base"] = self.data.ctypes.data + rows * DATAGRAM_BYTES
        self._iovecs["length"] = DATAGRAM_BYTES
        self._headers["name"] = names.ctypes.data + rows * _NAME_BYTES
        self._headers["iov"] = self._iovecs.ctypes.data + rows * _IOVEC.itemsize
        self._headers["iov_count"] = 1
        self._headers["control"] = self._control.ctypes.data + rows * _CONTROL_BYTES
        self._name_bytes = self._headers["name_bytes"]
        self._control_bytes = self._headers["control_bytes"]
        self.length = self._headers["length"]
        self._headers_address = self._headers.ctypes.data
        self._name_bytes[:] = _NAME_BYTES
        self._control_bytes[:] = _CONTROL_BYTES

    @property
    def full(self) -> bool:
        """Whether datagrams may be left in a socket because no row was free."""
        return self.count == self.capacity

    def clear(self) -> None:
        """Make all rows free again."""
        used = slice(0, self.count)
        self._name_bytes[used] = _NAME_BYTES
        self._control_bytes[used] = _CONTROL_BYTES
        self._control[used] = 0
        self.count = 0

    def receive(self, descriptor: int, source: int) -> None:
        """Take what waits in one socket, without blocking. Raises: OSError."""
        start = self.count
        address = self._headers_address + start * _HEADER.itemsize
        received = _recvmmsg(descriptor, address, self.capacity - start, _MSG_DONTWAIT, None)
        if received < 0:
            code = ctypes.get_errno()
            if code in (errno.EAGAIN, errno.EINTR):
                return
            raise OSError(code, os.strerror(code))
        self.count = start + received
        self.source[start : self.count] = source

    def arrival_ns(self) -> NDArray[np.int64]:
        """Kernel arrival times of the `count` rows, unix nanoseconds (now, where the kernel gave none)."""
        control = self._control[: self.count]
        arrival: NDArray[np.int64] = control[:, 2] * 1_000_000_000 + control[:, 3]
        unstamped = control[:, 1] != _TIMESTAMP_WORD
        if unstamped.any():
            arrival[unstamped] = time.time_ns()
        return arrival

    def kernel_drops(self) -> dict[int, int]:
        """Datagrams that the kernel dropped so far for want of buffer, by source; only sources that tell of any."""
        control = self._control[: self.count]
        telling = np.flatnonzero(control[:, 5] == _DROPS_WORD)
        return {int(self.source[row]): int(control[row, 6]) & 0xFFFFFFFF for row in telling}
