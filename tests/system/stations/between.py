"""What stands between a station and who listens, and what may happen there."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Self

_PIECE_BYTES = 4_096


class Between:
    """`async with Between(port) as between`: hands on bytes both ways, at `between.port`.

    Attributes:
        away: new connections are refused as if nobody was there.
        status: new requests are answered with this, 0: by the station.
        flowing: cleared, nothing is handed on, and all at once when it is set again.
        length: said in every answer as its length, 0: nothing is.
    """

    def __init__(self, station_port: int) -> None:
        self._station_port = station_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.status = 0
        self.length = 0
        self.flowing = asyncio.Event()
        self.flowing.set()

    async def __aenter__(self) -> Self:
        await self.come_back()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.go_away()

    async def come_back(self) -> None:
        """Take connections, at the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def go_away(self) -> None:
        """Hang up, and take no connection any more."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.hang_up(reset=True)
        await asyncio.sleep(0)

    def hang_up(self, *, reset: bool) -> None:
        """End all connections, by a reset or politely."""
        for writer in self._writers:
            if writer.is_closing():
                continue
            if reset:
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            else:
                writer.close()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            request = await reader.readuntil(b"\r\n\r\n")
            if self.status:
                writer.write(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % self.status)
                await writer.drain()
            else:
                await self._hand_on(request, writer)
        self._writers.discard(writer)
        if not writer.is_closing():
            writer.close()

    async def _hand_on(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        from_station, to_station = await asyncio.open_connection("127.0.0.1", self._station_port)
        try:
            to_station.write(request)
            head = await from_station.readuntil(b"\r\n\r\n")
            if self.length and b"\r\ncontent-length:" not in head.lower():
                said = b"Content-Length: %d\r\nAccept-Ranges: bytes\r\n\r\n" % self.length
                head = head.removesuffix(b"\r\n").replace(b"Transfer-Encoding: chunked\r\n", b"") + said
            writer.write(head)
            while piece := await from_station.read(_PIECE_BYTES):
                await self.flowing.wait()
                if writer.is_closing():
                    return
                writer.write(piece)
                await writer.drain()
        finally:
            to_station.close()
