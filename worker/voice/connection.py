"""One voice connection: a thin shell of sockets and timers over the gateway's state machine.

It connects, identifies, finds its external address, selects the protocol, keeps the heartbeat, and resumes on its own
where the protocol says so. Every other end it raises; whoever owns the guild decides.

Source: voice protocol reference, sections 2 and 3; design section 4, "Voice credentials".
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

from shared.errors import ErrorCode, HandshakeBroken, MalformedPacket, ProtocolError, VoiceClosed, VoiceError
from shared.logs import get_logger
from shared.protocol import ip_discovery
from shared.protocol.close_codes import Action
from shared.protocol.transport_crypto import choose_mode
from shared.protocol.voice_gateway import (
    BackendVersion,
    ClientDisconnected,
    ClientsConnected,
    Credentials,
    Event,
    HeartbeatAcked,
    Hello,
    Ready,
    Resumed,
    SessionDescription,
    Speaking,
    State,
    VoiceGateway,
)
from shared.text import in_words
from worker.voice.allowance import USERS, Allowance
from worker.voice.commons import VoiceShared
from worker.voice.dave import Dave
from worker.voice.doors import Place
from worker.voice.group import MAX_VERSION
from worker.voice.path import ASK_EVERY_S, PING_EVERY_S, UdpPath, Verdict
from worker.voice.receive.receiver import Receiver
from worker.voice.rounds import Round

CONNECT_TIMEOUT_S = 10.0
KNOCK_TIMEOUT_S = 3.0
"""At a closed door: where packets vanish, the next knock must not wait for the last one for long."""
HANDSHAKE_TIMEOUT_S = 20.0
"""From an open WebSocket to a key, or to the end of a resume."""
DISCOVERY_EVERY_S = 1.0
DISCOVERY_TRIES = 6
SHORTEST_HEARTBEAT_S = 1.0
"""Whatever a server tells: each millisecond, heartbeats would be a flood, and every pause of a network a dead peer."""
DEAD_AFTER_UNACKED, DEAD_AFTER_S = 2, 5.0
"""At the server's own interval of 13.75 s a dead one is noticed after 28 to 41 s (section 2.4); at one of a second, no
server is dead that paused for two."""
RESUME_TRIES = 5
"""With a server that is there."""
RESUME_WITHIN_S = 60.0
"""So long a server keeps a session whose WebSocket is gone (section 2.5)."""
JOIN_WITHIN_S = 5.0
"""A server that is away is waited for, where there is no session yet."""
STEADY_AFTER_S = 30.0
"""A session that stood this long has its tries back."""
CLOSE_TIMEOUT_S = 1.0
_CLOSE_FOR_GOOD = 1000
_NO_CLOSE = 1006
_FIRST_VOICE_CODE = 4000
_CLOSE_TO_RESUME = 4000
"""1000 would end the session on the server (section 2.5)."""
_LARGEST_MESSAGE_BYTES = 1 << 20
_KINDS_LOGGED = 32
_PAID_FROM_NS = 1_000_000
"""Less is not worth a turn."""
_NOT_THE_NETWORK = (
    *(ErrorCode.E2EE_REQUIRED, ErrorCode.E2EE_FAILED, ErrorCode.VOICE_MODE_UNSUPPORTED),
    *(ErrorCode.MALFORMED_MESSAGE, ErrorCode.VOICE_SERVER_REFUSED, ErrorCode.VOICE_FLOODED),
    *(ErrorCode.UDP_LOST, ErrorCode.UDP_REFUSED, ErrorCode.UDP_UNREACHABLE),
)
_PATH_MESSAGES = {
    ErrorCode.UDP_LOST: "the media server at {} answers no ping any more: sound does not arrive there",
    ErrorCode.UDP_REFUSED: "{} refuses UDP: nobody listens there any more",
    ErrorCode.UDP_UNREACHABLE: "UDP to {} cannot leave: no route, or a firewall of this host",
}
_MODE_BITS = {"microphone": 1, "soundshare": 2, "priority": 4}


def speaking_bits(flags: tuple[str, ...]) -> int:
    """Bitmask of op 5 for the flags of a guild."""
    return sum(_MODE_BITS.get(flag, 0) for flag in set(flags))


class DatagramPort(Protocol):
    """A 5-tuple of this connection's own."""

    number: int

    def send(self, datagram: bytes) -> None: ...

    def shun(self) -> None: ...

    def release(self) -> None: ...


LeasePort = Callable[[tuple[str, int], Callable[[bytes], None], Callable[[int], None]], DatagramPort]
"""Takes the remote address, and who is told of datagrams from there, and of errors (errno) on the way there."""


@dataclass(frozen=True, slots=True)
class Media:
    """What is needed to send audio: handed over when a key came, and again when it changed."""

    ssrc: int
    remote: tuple[str, int]
    socket_number: int
    mode: str
    secret_key: bytes = field(repr=False)


class Owner(Protocol):
    """Who holds a connection and is told of it."""

    def media(self, media: Media) -> None:
        """A key is there, the first or the next; Speaking was heard by the server."""

    def link(self, up: bool) -> None:
        """The WebSocket was lost and is being resumed (False), or that is done (True)."""

    def path(self, lost: VoiceError | None) -> None:
        """Sound does not leave or arrive any more, and why; None: it does again."""

    def changed(self) -> None:
        """Encryption, members or the server's version are not what they were."""


class VoiceConnection:
    """A session on one voice server, over as many WebSockets as its resumes need.

    Args:
        credentials: of this session.
        endpoint: host or host:port of the voice gateway.
        shared: what all connections of a worker share.
        lease_port: gives a UDP 5-tuple towards the media server.
        may_open: returns once a WebSocket may be opened (`worker.membership.Membership.wait_clearance`).
        owner: told of the session.
        speaking: flags of op 5 while established.
        receiver: takes what others send; None: nobody listens.
    """

    def __init__(
        self,
        credentials: Credentials,
        endpoint: str,
        *,
        shared: VoiceShared,
        lease_port: LeasePort,
        may_open: Callable[[], Awaitable[None]],
        owner: Owner,
        speaking: int,
        receiver: Receiver | None = None,
    ) -> None:
        self._gateway = VoiceGateway(credentials, max_dave_protocol_version=MAX_VERSION)
        self._endpoint = endpoint
        self._url = f"wss://{endpoint}/?v={self._gateway.version}"
        self._user_id = credentials.user_id
        self._shared = shared
        self._lease_port = lease_port
        self._may_open = may_open
        self._owner = owner
        self._speaking = speaking
        self._receiver = receiver
        self._log = get_logger().bind(guild=credentials.guild_id)
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._place: Place | None = None
        """Until the handshake is done."""
        self._port: DatagramPort | None = None
        self._remote: tuple[str, int] = ("", 0)
        self._allowance = Allowance(time.monotonic())
        self._unpaid_ns = 0
        """Work on messages since a turn was taken for it."""
        self._path = UdpPath()
        self._path_is_lost = False
        self._keepalives = 0
        self._questions = 0
        """Of IP discovery, since Ready."""
        self._discovery_ssrc: int | None = None
        """Of the discovery that waits for its answer."""
        self._up_since_s: float | None = None
        self._rounds: dict[str, Round] = {}
        """Of this WebSocket."""
        self._conversing: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        """What ends this WebSocket, and came up outside of its conversation."""
        self._working = False
        """What was received is being worked on: an answer to a heartbeat may lie unread behind it."""
        self._acked_s = 0.0
        """When a heartbeat was answered last, or the WebSocket opened."""
        self._last_heartbeat_ms = 0
        self._spoken_at_ms = 0
        """The heartbeat behind Speaking."""
        self._mode = ""
        self._speaking_heard = False
        self._media: Media | None = None
        """Waits for the server to have heard Speaking."""
        self._closing = False
        self._described = False
        """Session Description came: there is a key to receive with."""
        self._refused: set[str] = set()
        """Kinds of malformed messages that were logged."""
        self.resumes = 0
        self.others: set[str] | None = None
        """Users in the channel besides us; None while the server has not said."""
        self.gateway_version = self._gateway.version
        self.backend_version = ""
        self.dave = Dave(
            self._gateway,
            credentials.user_id,
            credentials.channel_id,
            counters=shared.counters,
            turns=shared.turns,
            required=shared.dave_required,
            receiving=receiver is not None,
            on_change=owner.changed,
            call_later=self._call_later,
            log=self._log,
        )

    async def run(self) -> None:
        """Hold the session until `close` is called.

        Raises: VoiceClosed, VoiceError: the session is over.
        """
        _refuse(self._shared.servers.refusal_of_endpoint(self._endpoint))
        tries = 0
        lost_at_s = time.monotonic()
        failure: VoiceError | None = None
        try:
            while not self._closing:
                established_before = self._gateway.can_resume
                patience_s = RESUME_WITHIN_S if established_before else JOIN_WITHIN_S
                failure = None
                try:
                    await self._serve_one_socket(max(0.0, lost_at_s + patience_s - time.monotonic()))
                except VoiceClosed as closed:
                    failure = closed
                    if not self._resumable(closed.close_code):
                        raise
                except VoiceError as error:
                    # the network failed: an established session outlives that, a new one only a door that is closed
                    failure = error
                    if error.code in _NOT_THE_NETWORK or not self._may_try_again(error, established_before):
                        raise
                if self._closing or failure is None:
                    return
                if self._up_since_s is not None:
                    lost_at_s = time.monotonic()
                    if lost_at_s - self._up_since_s > STEADY_AFTER_S:
                        tries = 0
                    self._log.info("connection.lost", error=failure.message)
                    self._owner.link(False)
                if failure.code == ErrorCode.VOICE_UNREACHABLE:
                    # the door makes wait; that nobody is there says nothing against the session
                    if time.monotonic() - lost_at_s >= patience_s:
                        raise failure
                    continue
                tries += 1
                if tries >= RESUME_TRIES:
                    self._log.warning("connection.not_resumed", attempts=tries)
                    raise failure
                await asyncio.sleep(random.uniform(0, 0.25 * 2 ** (tries - 1)))  # noqa: S311 - jitter
        finally:
            failure = None  # its traceback holds this frame: that would be a cycle
            self._closing = True
            self.dave.close()
            if self._port is not None:
                self._port.release()

    def _may_try_again(self, error: VoiceError, established_before: bool) -> bool:
        resumable = self._resumable(None)
        return error.code == ErrorCode.VOICE_UNREACHABLE or (established_before and resumable)

    def _resumable(self, code: int | None) -> bool:
        return self._gateway.disconnected(code) is Action.RESUME and self._gateway.can_resume

    async def _serve_one_socket(self, patience_s: float) -> None:
        """Open a WebSocket, shake hands, and stay until it ends. Raises what ended it.

        Args:
            patience_s: how long it may be waited for in front of the door.
        """
        self._up_since_s = None
        self._failure = None
        self._working = False
        try:
            async with asyncio.timeout(patience_s):
                place = await self._shared.doors.enter(self._endpoint)
        except TimeoutError:
            told = f"{self._url}: cannot be reached for {patience_s:.0f} s"
            raise VoiceError(told, code=ErrorCode.VOICE_UNREACHABLE) from None
        with place as self._place:
            await self._may_open()
            try:
                await self._talk(await self._connect())
            finally:
                self._shared.counters.websockets_ended += 1

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        """Raises: VoiceError: the server cannot be reached."""
        assert self._place is not None
        try:
            await self._shared.turns.handshake()
            async with asyncio.timeout(KNOCK_TIMEOUT_S if self._place.knocks else CONNECT_TIMEOUT_S):
                return await self._shared.http.ws_connect(
                    self._url, ssl=self._shared.tls, max_msg_size=_LARGEST_MESSAGE_BYTES, autoclose=False, compress=0
                )
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            told = f"{self._url}: {in_words(error)}"
            # without the frames, in which the library leaves cycles
            raise VoiceError(told, code=ErrorCode.VOICE_UNREACHABLE) from error.with_traceback(None)

    async def _talk(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = websocket
        self._conversing = asyncio.current_task()
        try:
            await self._converse(websocket)
        except asyncio.CancelledError:
            failure, self._failure = self._failure, None
            if failure is None or self._conversing is None or self._conversing.uncancel():
                raise
            try:
                raise failure from None
            finally:
                failure = None  # as above: its traceback holds this frame
        finally:
            self._conversing = self._socket = None
            if not websocket.closed:
                await _close_quietly(websocket, _CLOSE_FOR_GOOD if self._closing else _CLOSE_TO_RESUME)
            _forget_frames(websocket.exception())

    async def _converse(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        assert self._place is not None
        gateway = self._gateway
        gateway.connected()
        self._acked_s = time.monotonic()
        self._flush(websocket)
        self._go_round("handshake", HANDSHAKE_TIMEOUT_S, HANDSHAKE_TIMEOUT_S, self._give_up_handshake)
        try:
            while True:
                message = await websocket.receive()
                if message.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                    if self._closing:
                        return
                    code = websocket.close_code if message.type is not aiohttp.WSMsgType.ERROR else None
                    raise self._ended(_NO_CLOSE if code is None else code, _reason(message))
                self._place.answered()
                began_ns = time.thread_time_ns()
                events = self._read(message)
                for event in events:
                    self._react(event)
                work_ns = time.thread_time_ns() - began_ns
                self._working = True
                for event in events:
                    await self.dave.take(event)
                await self._account(work_ns)
                self._working = False
                self._flush(websocket)
        finally:
            self._discovery_ssrc = None
            for one in self._rounds.values():
                one.cancel()
            self._rounds.clear()

    async def _account(self, work_ns: int) -> None:
        """Have what messages cost paid for like any work: a server that says very much must not outrun the pace.

        Raises: VoiceError: it is more than one server may have.
        """
        excess = self._allowance.excess(time.monotonic(), work_ns / 1e9)
        if excess or (self.others is not None and len(self.others) > USERS):
            raise VoiceError(
                f"the server floods this worker: {excess or f'more than {USERS} users'}", code=ErrorCode.VOICE_FLOODED
            )
        self._unpaid_ns += work_ns
        if self._unpaid_ns > _PAID_FROM_NS:
            paid_ns, self._unpaid_ns = self._unpaid_ns, 0
            await self._shared.turns.group()
            self._shared.turns.spent(paid_ns)

    def _ended(self, code: int, reason: str) -> VoiceError:
        """What a WebSocket ended with. Before the first word it was no voice server's but its edge's."""
        assert self._place is not None
        if code >= _FIRST_VOICE_CODE or code == _CLOSE_FOR_GOOD:
            self._place.answered()
        if self._place.was_answered:
            return VoiceClosed(code, reason)
        return VoiceError(f"{self._url}: closed with {code} before the first word", code=ErrorCode.VOICE_UNREACHABLE)

    def _call_later(self, delay_s: float, do: Callable[[], None]) -> asyncio.TimerHandle:
        """Have something done that may have something to say, or end the session."""

        def run() -> None:
            try:
                do()
                if self._socket is not None:
                    self._flush(self._socket)
            except VoiceError as error:
                self._fail(error)

        return asyncio.get_running_loop().call_later(delay_s, run)

    def _fail(self, error: Exception) -> None:
        """End this WebSocket from outside of its conversation: `error` is what it ends with."""
        if self._failure is None and self._conversing is not None:
            self._failure = error
            self._conversing.cancel()

    def _go_round(self, what: str, after_s: float, every_s: float, visit: Callable[[], None]) -> None:
        """Have something done again and again while this WebSocket lasts."""
        self._end_round(what)
        self._rounds[what] = self._shared.rounds.begin(after_s, every_s, visit, self._fail)

    def _end_round(self, what: str) -> None:
        one = self._rounds.pop(what, None)
        if one is not None:
            one.cancel()

    def _give_up_handshake(self) -> None:
        raise VoiceError(f"no answer in state {self._gateway.state}", code=ErrorCode.VOICE_TIMEOUT)

    def _read(self, message: aiohttp.WSMessage) -> list[Event]:
        """What a message means; one that cannot be read is counted, logged once per kind, and costs nothing else.

        Raises: VoiceError: it was what the handshake waits for.
        """
        try:
            if message.type is aiohttp.WSMsgType.TEXT:
                return self._gateway.receive_text(message.data)
            return self._gateway.receive_binary(message.data)
        except HandshakeBroken as error:
            self._shared.counters.malformed_messages += 1
            raise VoiceError(error.message, code=ErrorCode.MALFORMED_MESSAGE) from None
        except ProtocolError as error:
            self._shared.counters.malformed_messages += 1
            kind = error.message.partition(":")[0]
            if kind not in self._refused and len(self._refused) < _KINDS_LOGGED:
                self._refused.add(kind)
                self._log.warning("message.malformed", error=error.message)
            return []

    def _react(self, event: Event) -> None:
        """Do what an event asks for."""
        match event:
            case Hello(heartbeat_interval_ms=interval_ms):
                if "heartbeat" not in self._rounds:
                    interval_s = max(SHORTEST_HEARTBEAT_S, interval_ms / 1_000)
                    spread_s = interval_s * random.random()  # noqa: S311 - over all connections
                    self._go_round("heartbeat", spread_s, interval_s, self._heartbeat)
            case Ready():
                _refuse(self._shared.servers.refusal_of_address(event.ip))
                if self._port is not None:
                    self._port.release()
                if self._receiver is not None:
                    self._receiver.begin_session(lambda user, frame: self.dave.decrypt(str(user), frame))
                self._mode = choose_mode(event.modes, self._shared.modes)
                self._remote = (event.ip, event.port)
                self._port = self._lease_port(self._remote, self._receive_datagram, self.datagram_failed)
                self._discovery_ssrc, self._questions = event.ssrc, 0
                self._ask_address()
                self._go_round("discovery", DISCOVERY_EVERY_S, DISCOVERY_EVERY_S, self._ask_address)
            case SessionDescription():
                if event.mode != self._mode:
                    raise VoiceError(
                        f"{self._mode} was selected, and the server answers with another mode",
                        code=ErrorCode.VOICE_MODE_UNSUPPORTED,
                        retryable=False,
                    )
                self._gateway.request_backend_version()
                self._up_since_s = self._up_since_s or time.monotonic()
                assert self._port is not None
                assert self._gateway.ssrc is not None
                if self._receiver is not None:
                    self._receiver.rekey(event.mode, event.secret_key)
                self._described = True
                media = Media(self._gateway.ssrc, self._remote, self._port.number, event.mode, event.secret_key)
                if self._speaking_heard:
                    self._owner.media(media)
                    return
                # Nothing answers Speaking itself, but a heartbeat sent behind it is answered after it. Only then may
                # audio start: a server that is busy with handshakes would else see RTP first, and close.
                self._gateway.speaking(self._speaking)
                self._spoken_at_ms = self._queue_heartbeat()
                self._media = media
                self._stay()
            case HeartbeatAcked():
                self._acked_s = time.monotonic()
                if self._media is not None and event.t_ms >= self._spoken_at_ms:
                    media, self._media = self._media, None
                    self._speaking_heard = True
                    self._owner.media(media)
            case Resumed():
                self.resumes += 1
                self._up_since_s = time.monotonic()
                self._gateway.speaking(self._speaking)
                # answered behind all that the server tells again: audio may start, and the group knows where it stands
                self._spoken_at_ms = self._queue_heartbeat()
                self._owner.link(True)
                self._path.resumed(time.monotonic())
                self._stay()
            case ClientsConnected():
                self._meet(set(event.user_ids) - {self._user_id})
            case ClientDisconnected():
                self._part(event.user_id)
            case Speaking():
                if self._receiver is not None:
                    self._receiver.speaking(int(event.user_id), event.ssrc)
            case BackendVersion():
                self.backend_version = f"{event.voice}/{event.rtc_worker}"
                self._owner.changed()

    def _meet(self, users: set[str]) -> None:
        self.others = (self.others or set()) | users
        self.dave.members(self.others)
        self._owner.changed()

    def _part(self, user: str) -> None:
        if self._receiver is not None:
            self._receiver.user_left(int(user))
        if self.others and user in self.others:
            self.others = self.others - {user}
            self.dave.members(self.others)
            self._owner.changed()

    def _stay(self) -> None:
        """The handshake is done; from now on the 5-tuple is kept alive. A second key changes nothing in that."""
        self._end_round("handshake")
        if self._place is not None:
            self._place.leave()
        if "keepalive" not in self._rounds:
            self._go_round("keepalive", 0, PING_EVERY_S, self._keep_alive)

    def _flush(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        """Send what the gateway has to say. Raises: VoiceClosed."""
        try:
            for message in self._gateway.data_to_send():
                if isinstance(message, bytes):
                    _at_once(websocket.send_bytes(message))
                else:
                    _at_once(websocket.send_str(message))
        except (aiohttp.ClientError, OSError) as error:
            raise VoiceClosed(_NO_CLOSE, in_words(error)) from error

    def _heartbeat(self) -> None:
        silent_s = time.monotonic() - self._acked_s
        if self._gateway.unacked_heartbeats >= DEAD_AFTER_UNACKED and silent_s > DEAD_AFTER_S and not self._working:
            raise VoiceClosed(_NO_CLOSE, f"{DEAD_AFTER_UNACKED} heartbeats without an answer")
        self.dave.check()
        self._queue_heartbeat()
        assert self._socket is not None
        self._flush(self._socket)

    def _queue_heartbeat(self) -> int:
        """Queue a heartbeat; returns its number, which is greater than the one before."""
        self._last_heartbeat_ms = max(self._last_heartbeat_ms + 1, time.time_ns() // 1_000_000)
        self._gateway.heartbeat(self._last_heartbeat_ms)
        return self._last_heartbeat_ms

    def _keep_alive(self) -> None:
        """Keep NAT mappings and the server's idea of our address fresh (section 3.2)."""
        assert self._port is not None
        self._look_at_path()
        self._port.send(ip_discovery.keepalive(self._keepalives))
        self._ping()

    def _ping(self) -> None:
        assert self._port is not None
        self._port.send(ip_discovery.ping(self._keepalives))
        self._keepalives += 1
        self._path.pinged(time.monotonic())

    def datagram_failed(self, number: int) -> None:
        """A datagram of ours came back, or could not leave.

        Args:
            number: the kernel's error (errno).
        """
        self._path.failed(number, time.monotonic())
        if self._path.code is not None and "keepalive" in self._rounds and "path" not in self._rounds:
            self._go_round("path", 0, ASK_EVERY_S, self._look_at_path)

    def _look_at_path(self) -> None:
        """Ask a path that is doubted, say that one is lost, and end the session where it does not come back."""
        assert self._port is not None
        assert self._gateway.ssrc is not None
        verdict = self._path.look(time.monotonic())
        if verdict is Verdict.FINE:
            self._end_round("path")
            self._path_is_well()
            return
        if "path" not in self._rounds:
            self._go_round("path", ASK_EVERY_S, ASK_EVERY_S, self._look_at_path)
        if verdict is Verdict.OVER:
            self._port.shun()
            raise self._lost_path()
        if verdict is Verdict.LOST and not self._path_is_lost:
            self._path_is_lost = True
            self._owner.path(self._lost_path())
        self._ping()
        self._port.send(ip_discovery.request(self._gateway.ssrc))

    def _lost_path(self) -> VoiceError:
        assert self._path.code is not None
        where = f"{self._remote[0]}:{self._remote[1]}"
        return VoiceError(_PATH_MESSAGES[self._path.code].format(where), code=self._path.code)

    def _path_answers(self, *, ping: bool) -> None:
        self._path.answered(ping=ping)
        self._path_is_well()

    def _path_is_well(self) -> None:
        if self._path_is_lost:
            self._path_is_lost = False
            self._owner.path(None)

    def _ask_address(self) -> None:
        """Ask for the external address, again each second, until it is told (section 3.1)."""
        assert self._port is not None
        assert self._discovery_ssrc is not None
        if self._questions == DISCOVERY_TRIES:
            raise VoiceError(
                f"no UDP answer from {self._remote[0]}:{self._remote[1]} in {DISCOVERY_TRIES} s: "
                "a firewall blocks UDP between this host and Discord's voice servers",
                code=ErrorCode.UDP_BLOCKED,
            )
        self._questions += 1
        self._port.send(ip_discovery.request(self._discovery_ssrc))

    def _receive_datagram(self, datagram: bytes) -> None:
        """The answer to a discovery, then those of the path, and what others send, if somebody listens."""
        if ip_discovery.is_pong(datagram):
            self._path_answers(ping=True)
            return
        if self._discovery_ssrc is None:
            if len(datagram) == ip_discovery.PACKET_BYTES and self._path.code is not None:
                self._path_answers(ping=False)
            if self._receiver is not None and self._described:
                self._receiver.datagram(datagram)
            return
        try:
            address, port = ip_discovery.parse_response(datagram, self._discovery_ssrc)
        except MalformedPacket:
            return  # anything may arrive before the answer; the request is repeated
        self._discovery_ssrc = None
        self._end_round("discovery")
        self._gateway.select_protocol(address, port, self._mode)
        assert self._socket is not None
        try:
            self._flush(self._socket)
        except VoiceClosed as closed:
            self._fail(closed)

    async def close(self) -> None:
        """End the session: speaking off, then a clean close. `run` returns."""
        self._closing = True
        websocket = self._socket
        if websocket is None or websocket.closed:
            return
        try:
            if self._gateway.state is State.ESTABLISHED:
                self._gateway.speaking(0)
                self._flush(websocket)
        except VoiceClosed:
            return  # the server was faster
        await _close_quietly(websocket, _CLOSE_FOR_GOOD)


def _refuse(reason: str) -> None:
    """Raises: VoiceError: there is a reason."""
    if reason:
        raise VoiceError(reason, code=ErrorCode.VOICE_SERVER_REFUSED)


def _at_once(sending: Coroutine[Any, Any, None]) -> None:
    """Send without waiting: a peer that lets so much pile up that there is something to wait for is as good as gone.

    Raises: VoiceClosed, and what `sending` raises.
    """
    try:
        sending.send(None)
    except StopIteration:
        return
    sending.close()
    raise VoiceClosed(_NO_CLOSE, "the server takes nothing")


async def _close_quietly(websocket: aiohttp.ClientWebSocketResponse, code: int) -> None:
    """Close within a second, whether or not the peer answers."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await websocket.close(code=code)
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        get_logger().debug("websocket.close_failed", error=in_words(error))


def _forget_frames(error: BaseException | None) -> None:
    """A WebSocket keeps what ended it, and that its frames, and those the WebSocket: until a collection, with its TLS.

    To free all of them in one took a worker half a second where 1,500 had been lost.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


def _reason(message: aiohttp.WSMessage) -> str:
    if isinstance(message.data, BaseException):  # the WebSocket broke, nobody closed it
        return in_words(message.data)
    return message.extra if isinstance(message.extra, str) else ""
