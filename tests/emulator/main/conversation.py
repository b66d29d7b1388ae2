"""One WebSocket of the main gateway, from Hello to close."""

import asyncio
import importlib
import zlib
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from aiohttp import WSMsgType, web

from tests.emulator.main import wire
from tests.emulator.main.session import MainSession
from tests.emulator.main.wire import Close, Op
from tests.emulator.messages import Envelope, Refused, read
from tests.emulator.wire import ABNORMAL_CLOSURE

if TYPE_CHECKING:
    from tests.emulator.main.gateway import MainGateway

_HEARTBEATS_MISSED = 2.5
_FLUSH_S = 1.0
_MOST_UNSENT = 1 << 15
_BEFORE_IDENTIFY = frozenset({Op.IDENTIFY, Op.RESUME, Op.HEARTBEAT})
_HEEDLESS = frozenset({Op.PRESENCE_UPDATE, Op.REQUEST_SOUNDBOARD_SOUNDS})


class InvalidSession(Exception):
    """The client is told so (op 9) and may identify on the same connection."""


class Compressor(Protocol):
    """One stream of compressed messages."""

    def message(self, text: str) -> bytes:
        """The bytes of the stream that end with this message."""


class ZlibStream:
    """`compress=zlib-stream`: every message ends with a sync flush."""

    def __init__(self) -> None:
        self._stream = zlib.compressobj()

    def message(self, text: str) -> bytes:
        """See `Compressor`."""
        return self._stream.compress(text.encode()) + self._stream.flush(zlib.Z_SYNC_FLUSH)


class ZstdStream:
    """`compress=zstd-stream`: every message ends a block; only with a Python that has zstd.

    Raises: ImportError.
    """

    def __init__(self) -> None:
        zstd: Any = importlib.import_module("compression.zstd")
        self._stream = zstd.ZstdCompressor()

    def message(self, text: str) -> bytes:
        """See `Compressor`."""
        return bytes(self._stream.compress(text.encode(), self._stream.FLUSH_BLOCK))


def compressor_for(name: str | None) -> Compressor | None:
    """What the client asked for. Raises: Refused: it cannot be had."""
    kinds: dict[str, type[ZlibStream] | type[ZstdStream]] = {"zlib-stream": ZlibStream, "zstd-stream": ZstdStream}
    if name is None:
        return None
    try:
        return kinds[name]()
    except (KeyError, ImportError) as error:
        raise Refused(Close.UNDECODABLE, f"no such transport compression: {name}") from error


class MainConversation:
    """Reads, checks and answers one client of the main gateway (reference section 1)."""

    def __init__(self, gateway: "MainGateway", socket: web.WebSocketResponse) -> None:
        self._gateway = gateway
        self._socket = socket
        self._limits = gateway.limits
        self._compressor: Compressor | None = None
        self._session: MainSession | None = None
        self._unsent: asyncio.Queue[str | None] = asyncio.Queue()
        self._transport: asyncio.Transport | None = None
        self.commands = 0
        self._recent: deque[float] = deque(maxlen=self._limits.commands)
        loop = asyncio.get_running_loop()
        self._close_wanted: asyncio.Future[Refused] = loop.create_future()
        self._patience_s = _HEARTBEATS_MISSED * self._limits.heartbeat_interval_ms / 1000
        self._watchdog = loop.call_later(self._patience_s, self._timed_out)
        self.done = asyncio.Event()

    def post(self, text: str) -> None:
        """Send soon, after all that was posted before; a client that does not read is dropped."""
        if self._unsent.qsize() >= _MOST_UNSENT:
            self.drop()
        else:
            self._unsent.put_nowait(text)

    def want_close(self, code: int, reason: str) -> None:
        """Close soon; only the first wish counts."""
        if not self._close_wanted.done():
            self._close_wanted.set_result(Refused(code, reason))

    def drop(self) -> None:
        """Break the TCP connection without a close frame."""
        if self._transport is not None:
            self._transport.abort()

    async def run(self, transport: asyncio.Transport, query: dict[str, str]) -> None:
        """Talk until either side closes."""
        self._transport = transport
        writer = asyncio.create_task(self._write())
        reader = asyncio.create_task(self._read(query))
        awaited: set[asyncio.Future[Any]] = {reader, self._close_wanted}
        by_client, code = True, ABNORMAL_CLOSURE
        try:
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                code = reader.result()
            else:
                reader.cancel()
                await asyncio.wait({reader})
                by_client, code = False, await self._close(self._close_wanted.result(), writer)
        except Refused as refused:
            self._gateway.note_refused(refused.code)
            by_client, code = False, await self._close(refused, writer)
        finally:
            self._watchdog.cancel()
            reader.cancel()
            writer.cancel()
            if self._session is not None:
                self._gateway.left(self, self._session, code, by_client=by_client)
            self.done.set()

    def _timed_out(self) -> None:
        self.want_close(Close.SESSION_TIMEOUT, "Session timed out.")

    async def _close(self, refused: Refused, writer: "asyncio.Task[None]") -> int:
        """Send what is posted, close, and wait for the peer's own close, so that the code arrives."""
        self._unsent.put_nowait(None)
        await asyncio.wait({writer}, timeout=_FLUSH_S)
        await self._socket.close(code=refused.code, message=refused.reason.encode()[:120])
        return refused.code

    async def _write(self) -> None:
        try:
            while (text := await self._unsent.get()) is not None:
                if self._compressor is None:
                    await self._socket.send_str(text)
                else:
                    await self._socket.send_bytes(self._compressor.message(text))
        except ConnectionError:
            return  # the reader sees it, too

    async def _read(self, query: dict[str, str]) -> int:
        """Gives the client's close code. Raises: Refused."""
        self._compressor = compressor_for(query.get("compress"))
        if query.get("v") != str(wire.API_VERSION) or query.get("encoding", "json") != "json":
            raise Refused(Close.INVALID_VERSION, "Invalid API version.")
        self.post(wire.write(Op.HELLO, {"heartbeat_interval": self._limits.heartbeat_interval_ms, "_trace": []}))
        while True:
            message = await self._socket.receive()
            if message.type is WSMsgType.TEXT:
                await self._hear(message.data)
            elif message.type is WSMsgType.BINARY:
                raise Refused(Close.UNDECODABLE, "Error while decoding payload.")
            elif message.type is WSMsgType.CLOSE:
                return int(message.data or 1005)
            else:
                return ABNORMAL_CLOSURE

    async def _hear(self, text: str) -> None:
        if len(text.encode()) > self._limits.payload_bytes:
            raise Refused(Close.UNDECODABLE, "Error while decoding payload.")
        self._count_command()
        envelope = read(text, Envelope)
        op, data = envelope.op, envelope.d
        if self._session is None and op not in _BEFORE_IDENTIFY:
            raise Refused(Close.NOT_AUTHENTICATED, "Not authenticated.")
        if op == Op.HEARTBEAT:
            self._heartbeat()
        elif op in (Op.IDENTIFY, Op.RESUME):
            if self._session is not None:
                raise Refused(Close.ALREADY_AUTHENTICATED, "Already authenticated.")
            self._log_in(op, data)
        elif self._session is not None:
            await self._hear_bot(self._session, op, envelope)

    async def _hear_bot(self, session: MainSession, op: int, envelope: Envelope) -> None:
        if op == Op.VOICE_STATE_UPDATE:
            await self._gateway.calls.request(session, read(envelope.d, wire.VoiceStateUpdate))
        elif op == Op.REQUEST_GUILD_MEMBERS:
            self._gateway.tell_members(session, read(envelope.d, wire.RequestGuildMembers))
        elif op not in _HEEDLESS:
            raise Refused(Close.UNKNOWN_OPCODE, "Unknown opcode.")

    def _log_in(self, op: int, data: msgspec.Raw) -> None:
        try:
            if op == Op.IDENTIFY:
                self._session = self._gateway.identify(self, read(data, wire.Identify))
            else:
                self._session = self._gateway.resume(self, read(data, wire.Resume))
        except InvalidSession:
            self._gateway.note_refused(Op.INVALID_SESSION)
            self.post(wire.write(Op.INVALID_SESSION, data=False))

    def _heartbeat(self) -> None:
        self._watchdog.cancel()
        self._watchdog = asyncio.get_running_loop().call_later(self._patience_s, self._timed_out)
        if self._session is None or not self._session.no_ack:
            self.post(wire.write(Op.HEARTBEAT_ACK))

    def _count_command(self) -> None:
        """Raises: Refused: more than may be sent in the time."""
        self.commands += 1
        now = asyncio.get_running_loop().time()
        recent = self._recent
        if len(recent) == recent.maxlen and now - recent[0] < self._limits.commands_every_s:
            raise Refused(Close.RATE_LIMITED, "Rate limited.")
        recent.append(now)
