"""The shell of the pipeline: its timer, its readers' queues, its log.

receiver = Receiver(guild_id)
async with receiver.opus() as stream:
    async for event in stream: ...
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from shared.clock import NS_PER_MS, NS_PER_S
from shared.logs import get_logger
from worker.voice.receive.drops import Drop, Drops
from worker.voice.receive.pipeline import Decrypt, Event, Frame, Pipeline, Stopped

if TYPE_CHECKING:
    from worker.voice.receive.decode import OpusDecoder, Pcm

QUEUE_EVENTS = 250
"""Five seconds of one user."""
_WAKE_APART_NS = 4 * NS_PER_MS
"""Users are served together rather than each at his own microsecond."""

_T = TypeVar("_T")


class Sound(msgspec.Struct, frozen=True):
    """20 ms of one user, decoded.

    Attributes:
        timestamp_samples: as of the Opus frame.
        pcm: shape (960, 2), 48 kHz, int16; not to be written to.
        lost: the frame was lost or could not be decoded; pcm is silence.
    """

    user_id: int
    timestamp_samples: int
    pcm: Pcm
    lost: bool


class Stream(Generic[_T]):
    """What one reader gets: an async iterator that ends with the receiver, to be used with `async with`.

    A reader that is too slow misses the oldest.

    Attributes:
        missed: how much of it.
    """

    def __init__(self, user_id: int | None, queue_events: int, drops: Drops, on_close: Callable[[Stream[_T]], None]):
        self.user_id = user_id
        self.missed = 0
        self._events: deque[_T | Stopped] = deque()
        self._queue_events = queue_events
        self._drops = drops
        self._on_close = on_close
        self._changed = asyncio.Event()
        self._closed = False

    def wants(self, user_id: int) -> bool:
        return self.user_id is None or self.user_id == user_id

    def put(self, event: _T | Stopped) -> None:
        """Queue an event; `Receiver` calls this."""
        if len(self._events) >= self._queue_events:
            self._events.popleft()
            self.missed += 1
            self._drops.add(Drop.QUEUE_FULL)
        self._events.append(event)
        self._changed.set()

    def close(self) -> None:
        """No more events; those in the queue can still be read."""
        if not self._closed:
            self._closed = True
            self._on_close(self)
            self._changed.set()

    def __aiter__(self) -> Stream[_T]:
        return self

    async def __anext__(self) -> _T | Stopped:
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()

    async def __aenter__(self) -> Stream[_T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Receiver:
    """What is heard in one guild, over all sessions of its voice connection.

    The connection calls `begin_session`, `rekey`, `datagram`, `speaking` and `user_left`; whoever listens calls `opus`
    or `pcm`; whoever made it calls `close`. Nothing a peer sends makes any of them raise.

    Args:
        guild_id: for the log.
        now_ns: monotonic clock.
    """

    def __init__(self, guild_id: str, *, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._log = get_logger().bind(guild=guild_id)
        self.drops = Drops(lambda drop: self._log.info("packet.dropped", reason=str(drop)))
        self._pipeline = Pipeline(self.drops)
        self._now_ns = now_ns
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_ns = 0
        self._opus_streams: list[Stream[Frame]] = []
        self._pcm_streams: list[Stream[Sound]] = []
        self._decoders: dict[int, OpusDecoder] = {}
        self._closed = False

    @property
    def lost(self) -> int:
        """Packets whose turn passed without them."""
        return self._pipeline.lost

    def opus(self, user_id: int | None = None, *, queue_events: int = QUEUE_EVENTS) -> Stream[Frame]:
        """Opus frames as they were sent, of one user or of all, for relaying."""
        return self._listen(self._opus_streams, self._opus_streams.remove, user_id, queue_events)

    def pcm(self, user_id: int | None = None, *, queue_events: int = QUEUE_EVENTS) -> Stream[Sound]:
        """Sound of one user or of all; each user's frames are decoded once, and only while somebody listens."""
        return self._listen(self._pcm_streams, self._pcm_closed, user_id, queue_events)

    def _listen(
        self,
        streams: list[Stream[_T]],
        on_close: Callable[[Stream[_T]], None],
        user_id: int | None,
        queue_events: int,
    ) -> Stream[_T]:
        stream = Stream(user_id, queue_events, self.drops, on_close)
        streams.append(stream)
        if self._closed:
            stream.close()
        return stream

    def _pcm_closed(self, stream: Stream[Sound]) -> None:
        self._pcm_streams.remove(stream)
        if not self._pcm_streams:
            self._decoders.clear()

    def begin_session(self, decrypt_e2ee: Decrypt) -> None:
        """A new voice session: another key will come, and others' SSRCs are told anew. Not for a resume.

        Args:
            decrypt_e2ee: asked for each frame, so that it may follow the session's protocol version by itself.
        """
        self._give(self._pipeline.begin_session(decrypt_e2ee))
        self._decoders.clear()
        self._rearm()

    def rekey(self, mode: str, key: bytes) -> None:
        """Session Description came, the first or a later one.

        Raises: VoiceError: voice_mode_unsupported. ValueError: the key has another length.
        """
        self._pipeline.rekey(mode, key)

    def speaking(self, user_id: int, ssrc: int) -> None:
        """Op 5 came from the server."""
        self._give(self._pipeline.speaking(user_id, ssrc))
        for gone in self._decoders.keys() - set(self._pipeline.user_ids):
            del self._decoders[gone]
        self._serve(self._now_ns())

    def user_left(self, user_id: int) -> None:
        """Op 13 came: SSRC, buffers and decoder of the user go."""
        self._give(self._pipeline.user_left(user_id))
        self._decoders.pop(user_id, None)
        self._rearm()

    def datagram(self, datagram: bytes, arrival_ns: int | None = None) -> None:
        """Take in whatever came from the voice server's address.

        Args:
            arrival_ns: on the receiver's clock, where the caller knows better than now.
        """
        if self._closed:
            return
        now_ns = self._now_ns() if arrival_ns is None else arrival_ns
        self._pipeline.datagram(datagram, now_ns)
        self._serve(now_ns)

    def close(self) -> None:
        """End all streams."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for stream in list(self._opus_streams):
            stream.close()
        for sound_stream in list(self._pcm_streams):
            sound_stream.close()
        self._decoders.clear()
        self._log.info("receiver.closed", lost=self.lost, **self.drops.as_dict())

    def _serve(self, now_ns: int) -> None:
        """Give out what is due, and wake for what is due next."""
        due_ns = self._pipeline.due_ns
        if due_ns is not None and due_ns <= now_ns:
            self._give(self._pipeline.advance(now_ns))
            due_ns = self._pipeline.due_ns
        self._arm(due_ns, now_ns)

    def _rearm(self) -> None:
        self._arm(self._pipeline.due_ns, self._now_ns())

    def _arm(self, due_ns: int | None, now_ns: int) -> None:
        if due_ns is None or self._closed:
            return  # a timer that is still armed finds nothing to do
        due_ns = max(due_ns, now_ns + _WAKE_APART_NS)
        if self._timer is not None:
            if self._timer_due_ns <= due_ns:
                return
            self._timer.cancel()
        self._timer_due_ns = due_ns
        self._timer = self._loop.call_later((due_ns - now_ns) / NS_PER_S, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._serve(self._now_ns())

    def _give(self, events: list[Event]) -> None:
        for event in events:
            for stream in self._opus_streams:
                if stream.wants(event.user_id):
                    stream.put(event)
            listeners = [stream for stream in self._pcm_streams if stream.wants(event.user_id)]
            if listeners:
                sound = event if isinstance(event, Stopped) else self._decode(event)
                for listener in listeners:
                    listener.put(sound)

    def _decode(self, frame: Frame) -> Sound:
        from worker.voice.receive.decode import SILENCE, OpusDecoder  # loaded where somebody wants sound

        pcm: Pcm | None = None
        if frame.opus is not None:
            decoder = self._decoders.get(frame.user_id)
            if decoder is None:
                decoder = self._decoders[frame.user_id] = OpusDecoder()
            pcm = decoder.decode(frame.opus)
            if pcm is None:
                self.drops.add(Drop.UNDECODABLE)
        return Sound(frame.user_id, frame.timestamp_samples, SILENCE if pcm is None else pcm, pcm is None)
