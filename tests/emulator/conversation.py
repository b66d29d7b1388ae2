"""One WebSocket of the voice gateway, from Hello to close."""

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

from aiohttp import WSMsgType, web

from tests.emulator import messages
from tests.emulator.messages import Envelope, Refused
from tests.emulator.session import Closing, VoiceSession, lost_connection
from tests.emulator.wire import ABNORMAL_CLOSURE, Close, Op

if TYPE_CHECKING:
    from tests.emulator.endpoint import Endpoint
    from tests.emulator.server import VoiceServer

_HEARTBEATS_MISSED = 2.5
_BEFORE_IDENTIFY = frozenset({Op.IDENTIFY, Op.HEARTBEAT, Op.RESUME})
_HEEDLESS = frozenset({Op.VIDEO, Op.SESSION_UPDATE, Op.MEDIA_SINK_WANTS, Op.NO_ROUTE})
"""What a client may say and an audio server does nothing about."""


class Conversation:
    """Reads, checks and answers one client (reference sections 2.2 to 2.6).

    Every close goes through `run`, with nobody else reading: the peer's own close is waited for, so the code arrives.
    """

    def __init__(self, server: "VoiceServer", endpoint: "Endpoint", socket: web.WebSocketResponse) -> None:
        self._server = server
        self._endpoint = endpoint
        self._socket = socket
        self._session: VoiceSession | None = None
        loop = asyncio.get_running_loop()
        self._close_wanted: asyncio.Future[Refused] = loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._patience_s = _HEARTBEATS_MISSED * server.heartbeat_interval_ms / 1000
        self._watchdog = loop.call_later(self._patience_s, self._timed_out)
        self.done = asyncio.Event()

    def want_close(self, code: int, reason: str) -> None:
        """Close soon; only the first wish counts."""
        if not self._close_wanted.done():
            self._close_wanted.set_result(Refused(code, reason))

    def drop(self) -> None:
        """Break the TCP connection without a close frame."""
        if self._transport is not None:
            self._transport.abort()

    async def run(self, transport: asyncio.Transport | None) -> None:
        """Talk until either side closes."""
        self._transport = transport
        reader = asyncio.create_task(self._read())
        awaited: set[asyncio.Future[Any]] = {reader, self._close_wanted}
        closing = lost_connection()
        try:
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                closing = reader.result()
            else:
                reader.cancel()
                await asyncio.wait({reader})
                closing = await self._close(self._close_wanted.result())
        except Refused as refused:
            closing = await self._close(refused)
        finally:
            self._watchdog.cancel()
            reader.cancel()
            if self._session is not None:
                self._server.left(self, self._session, closing)
            self.done.set()

    def _timed_out(self) -> None:
        self.want_close(Close.SESSION_TIMEOUT, "Session timeout.")

    async def _close(self, refused: Refused) -> Closing:
        await self._socket.close(code=refused.code, message=refused.reason.encode()[:120])
        return Closing(refused.code, "server", clean=self._socket.close_code != ABNORMAL_CLOSURE)

    async def _read(self) -> Closing:
        """Raises: Refused."""
        try:
            await self._say(messages.hello(self._server.heartbeat_interval_ms))
            while True:
                message = await self._socket.receive()
                if message.type is WSMsgType.TEXT:
                    await self._hear(message.data)
                elif message.type is WSMsgType.CLOSE:
                    return Closing(int(message.data or 1005), "client", clean=True)
                elif message.type is not WSMsgType.BINARY:  # JSON sent as binary is passed over
                    return lost_connection()
        except ConnectionError:
            return lost_connection()

    async def _say(self, text: str) -> None:
        await self._socket.send_str(text)

    async def _hear(self, text: str) -> None:
        envelope = messages.read(text, Envelope)
        op, data = envelope.op, envelope.d
        if self._session is None and op not in _BEFORE_IDENTIFY:
            raise Refused(Close.NOT_AUTHENTICATED, "Not authenticated.")
        if op == Op.HEARTBEAT:
            await self._heartbeat(messages.read_heartbeat(data))
        elif op in (Op.IDENTIFY, Op.RESUME):
            if self._session is not None:
                raise Refused(Close.ALREADY_AUTHENTICATED, "Already authenticated.")
            if op == Op.IDENTIFY:
                await self._identify(messages.read(data, messages.Identify))
            else:
                await self._resume(messages.read(data, messages.Resume))
        elif self._session is not None:
            await self._hear_member(self._session, op, envelope)

    async def _hear_member(self, session: VoiceSession, op: int, envelope: Envelope) -> None:
        if op == Op.SELECT_PROTOCOL:
            key = self._server.select(session, messages.read(envelope.d, messages.SelectProtocol))
            await self._say(messages.session_description(session.mode or "", key, secrets.token_hex(16)))
        elif op == Op.SPEAKING:
            speaking = messages.read(envelope.d, messages.Speaking)
            if speaking.ssrc != session.ssrc or session.opener is None:
                raise Refused(Close.BAD_REQUEST, "Speaking with an ssrc that is not this session's")
            self._server.speaking(session, speaking.speaking)
        elif op == Op.BACKEND_VERSION:
            await self._say(messages.write(Op.BACKEND_VERSION, {"voice": "0.13.0", "rtc_worker": "0.4.0"}))
        elif op not in _HEEDLESS:
            raise Refused(Close.UNKNOWN_OPCODE, "Unknown opcode.")

    async def _heartbeat(self, heartbeat: messages.Heartbeat) -> None:
        session = self._session
        if session is not None and not session.outbox.acknowledges(heartbeat.seq_ack):
            raise Refused(Close.BAD_REQUEST, "seq_ack of a message that was never sent")
        self._watchdog.cancel()
        self._watchdog = asyncio.get_running_loop().call_later(self._patience_s, self._timed_out)
        if session is None or not session.guild.faults.no_ack:
            await self._say(messages.write(Op.HEARTBEAT_ACK, {"t": heartbeat.t}))

    async def _identify(self, message: messages.Identify) -> None:
        session = self._server.identify(self, self._endpoint, message)
        self._session = session
        endpoint, other = self._endpoint, session.guild.listener_id
        await self._say(messages.ready(session.ssrc, endpoint.address, endpoint.udp_port, session.modes))
        await self._say(session.outbox.add(Op.CLIENTS_CONNECT, {"user_ids": [other]}))
        await self._say(session.outbox.add(Op.CLIENT_FLAGS, {"user_id": other, "flags": 0}))
        await self._say(session.outbox.add(Op.CLIENT_PLATFORM, {"user_id": other, "platform": 0}))

    async def _resume(self, message: messages.Resume) -> None:
        session, missed = self._server.resume(self, self._endpoint, message)
        self._session = session
        await self._say(messages.write(Op.RESUMED, None))
        for text in missed:
            await self._say(text)
