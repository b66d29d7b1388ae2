"""One WebSocket of the voice gateway, from Hello to close."""

import asyncio
import secrets
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from aiohttp import WSMsgType, web

from tests.emulator import messages
from tests.emulator.dave.codec import MlsFormatError
from tests.emulator.dave.group import DaveOp
from tests.emulator.messages import Envelope, Refused
from tests.emulator.session import Closing, VoiceSession, lost_connection
from tests.emulator.wire import ABNORMAL_CLOSURE, Close, Op

if TYPE_CHECKING:
    from tests.emulator.endpoint import Endpoint
    from tests.emulator.server import VoiceServer

_HEARTBEATS_MISSED = 2.5
_BEFORE_IDENTIFY = frozenset({Op.IDENTIFY, Op.HEARTBEAT, Op.RESUME})
_HEEDLESS = frozenset({Op.HEARTBEAT_ACK, Op.VIDEO, Op.SESSION_UPDATE, Op.MEDIA_SINK_WANTS, Op.NO_ROUTE})
"""What a client may say and an audio server does nothing about."""
_DAVE_TEXT = frozenset({DaveOp.TRANSITION_READY, DaveOp.INVALID_COMMIT_WELCOME})
_DAVE_BINARY = frozenset({DaveOp.KEY_PACKAGE, DaveOp.COMMIT_WELCOME})
_MOST_UNSENT = 8_192
_FLUSH_S = 1.0


class Conversation:
    """Reads, checks and answers one client (reference sections 2.2 to 2.6).

    Every close goes through `run`, with nobody else reading: the peer's own close is waited for, so the code arrives.
    """

    def __init__(
        self, server: "VoiceServer", endpoint: "Endpoint", socket: web.WebSocketResponse, version: int
    ) -> None:
        self.version = version
        self._server = server
        self._endpoint = endpoint
        self._socket = socket
        self._session: VoiceSession | None = None
        self._unsent: deque[str | bytes] = deque()
        self._writer: asyncio.Task[None] | None = None
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

    def say(self, message: str | bytes) -> None:
        """Send a message after those said before; a client that takes none for long is dropped."""
        self._unsent.append(message)
        if len(self._unsent) > _MOST_UNSENT:
            self._unsent.clear()
            self.drop()
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._unsent:
                message = self._unsent.popleft()
                if isinstance(message, str):
                    await self._socket.send_str(message)
                else:
                    await self._socket.send_bytes(message)
        except ConnectionError:
            self._unsent.clear()  # the reader sees the end of the connection, too

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
            if self._writer is not None:
                self._writer.cancel()
            if self._session is not None:
                self._server.left(self, self._session, closing)
            self.done.set()

    def _timed_out(self) -> None:
        self.want_close(Close.SESSION_TIMEOUT, "Session timeout.")

    async def _close(self, refused: Refused) -> Closing:
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=_FLUSH_S)
        await self._socket.close(code=refused.code, message=refused.reason.encode()[:120])
        return Closing(refused.code, "server", clean=self._socket.close_code != ABNORMAL_CLOSURE)

    async def _read(self) -> Closing:
        """Raises: Refused."""
        faults = self._endpoint.coming.take()
        if faults.close is not None:
            raise Refused(faults.close, "closed on demand")
        if faults.hello_late_ms:
            await asyncio.sleep(faults.hello_late_ms / 1000)
        interval_ms = self._server.heartbeat_interval_ms if faults.interval_ms is None else faults.interval_ms
        try:
            self.say(messages.hello(self.version, interval_ms))
            while True:
                message = await self._socket.receive()
                if message.type is WSMsgType.TEXT:
                    self._hear(message.data)
                elif message.type is WSMsgType.BINARY:
                    self._hear_binary(message.data)
                elif message.type is WSMsgType.CLOSE:
                    return Closing(int(message.data or 1005), "client", clean=True)
                else:
                    return lost_connection()
        except ConnectionError:
            return lost_connection()

    def _hear(self, text: str) -> None:
        envelope = messages.read(text, Envelope)
        op, data = envelope.op, envelope.d
        if self._session is None and op not in _BEFORE_IDENTIFY:
            raise Refused(Close.NOT_AUTHENTICATED, "Not authenticated.")
        if op == Op.HEARTBEAT:
            self._heartbeat(messages.read_heartbeat(data, self.version))
        elif op in (Op.IDENTIFY, Op.RESUME):
            if self._session is not None:
                raise Refused(Close.ALREADY_AUTHENTICATED, "Already authenticated.")
            if op == Op.IDENTIFY:
                self._identify(messages.read(data, messages.Identify))
            else:
                self._resume(messages.read(data, messages.Resume))
        elif self._session is not None:
            self._hear_member(self._session, op, envelope)

    def _hear_member(self, session: VoiceSession, op: int, envelope: Envelope) -> None:
        if op == Op.SELECT_PROTOCOL:
            key = self._server.select(session, messages.read(envelope.d, messages.SelectProtocol))
            self.describe(session, key)
            session.seat.faults.check("description")
        elif op == Op.SPEAKING:
            speaking = messages.read(envelope.d, messages.Speaking)
            session.seat.faults.check("speaking")
            if speaking.ssrc != session.ssrc or session.opener is None:
                raise Refused(Close.BAD_REQUEST, "Speaking with an ssrc that is not this session's")
            self._server.speaking(session, speaking.speaking)
        elif op == Op.BACKEND_VERSION:
            self.say(messages.write(Op.BACKEND_VERSION, {"voice": "0.13.0", "rtc_worker": "0.4.0"}))
        elif op in _DAVE_TEXT and session.channel.group is not None:
            transition = messages.read(envelope.d, messages.TransitionMessage)
            session.channel.hear_dave(session, op, transition.transition_id)
        elif op not in _HEEDLESS:
            raise Refused(Close.UNKNOWN_OPCODE, "Unknown opcode.")

    def _hear_binary(self, message: bytes) -> None:
        """Messages of MLS; JSON sent as binary is passed over."""
        if self._session is None or not message or message[0] not in _DAVE_BINARY:
            return
        try:
            self._session.channel.hear_dave(self._session, message[0], message[1:])
        except MlsFormatError as error:
            raise Refused(Close.BAD_REQUEST, str(error)) from error

    def describe(self, session: VoiceSession, key: bytes) -> None:
        """Send op 4, and with the first one let the client into the DAVE group."""
        channel = session.channel
        first = channel.join_group(session)
        before = first[:1] if session.seat.faults.external_sender_first else []
        channel.dispatch(before)
        media_session = secrets.token_hex(16)
        self.say(messages.session_description(session.mode or "", key, media_session, session.dave_version))
        session.described_ns = session.described_ns or time.time_ns()
        channel.dispatch(first[len(before) :])

    def _heartbeat(self, heartbeat: messages.Heartbeat) -> None:
        session = self._session
        if session is not None:
            session.seat.faults.check("heartbeat")
            if not session.outbox.acknowledges(heartbeat.seq_ack):
                raise Refused(Close.BAD_REQUEST, "seq_ack of a message that was never sent")
            session.heartbeats += 1
        self._watchdog.cancel()
        self._watchdog = asyncio.get_running_loop().call_later(self._patience_s, self._timed_out)
        if session is None or not session.seat.faults.no_ack:
            self.say(messages.heartbeat_ack(heartbeat, self.version))

    def _identify(self, message: messages.Identify) -> None:
        session = self._session = self._server.identify(self, self._endpoint, message)
        endpoint = self._endpoint
        told = session.seat.faults.take_ready_ip(endpoint.address)
        self.say(messages.ready(session.ssrc, told, endpoint.udp_port, session.modes))
        session.channel.enter(session)
        session.seat.faults.check("ready")

    def _resume(self, message: messages.Resume) -> None:
        session, missed = self._server.resume(self, self._endpoint, message)
        self._session = session
        self.say(messages.write(Op.RESUMED, None))
        for each in missed:
            self.say(each)
