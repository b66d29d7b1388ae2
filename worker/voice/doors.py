"""The doors of the voice servers: how many connections of a worker open a WebSocket to each at once, and how often.

A handshake in flight takes a place, so many at each server and so many in all: what waits for a place waits outside
and times out nowhere. A server that cannot be reached is away: one connection knocks each half second, and when it gets
a word the others follow. All of them leave from one local address, so they are opened at a rate, too.

A place is a moment of the handshake and no session: an established one needs none.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Self

from shared.logs import get_logger

HANDSHAKES = 64
"""In flight at all servers; those that knock at a closed door not counted."""
HANDSHAKES_EACH = 8
"""In flight at one server."""
KNOCK_EVERY_S = 0.5
OPENS_PER_S = 200.0
"""WebSockets that a host opens, over all its workers."""
_FORGOTTEN_AFTER_S = 10.0
"""A closed door that nobody comes to any more."""


class _Door:
    """One server's."""

    __slots__ = ("away", "inside", "knocking", "next_knock_s", "server", "waiting")

    def __init__(self, server: str) -> None:
        self.server = server
        self.inside = 0
        self.waiting: deque[asyncio.Future[bool]] = deque()
        """Each is told whether it knocks."""
        self.away = False
        self.knocking = False
        self.next_knock_s = 0.0


class Place:
    """One handshake's: `with place:` around all of it.

    What ends it before the server said a word tells that the server is away, but for the end of the connection's task.
    """

    def __init__(self, doors: Doors, door: _Door, *, knocks: bool) -> None:
        self._doors = doors
        self._door: _Door | None = door
        self.knocks = knocks
        self._answered = False

    @property
    def was_answered(self) -> bool:
        return self._answered

    def answered(self) -> None:
        """The server said something: it is there."""
        if self._door is not None and not self._answered:
            self._doors.back(self._door)
        self._answered = True

    def leave(self) -> None:
        """The handshake is done; what comes later is no more of the door's business."""
        self._leave(reached=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cancelled = kind is not None and not issubclass(kind, Exception)
        # without an error it was our own close, before the first word
        self._leave(reached=True if self._answered else None if cancelled or kind is None else False)

    def _leave(self, *, reached: bool | None) -> None:
        door, self._door = self._door, None
        if door is not None:
            self._doors.left(door, knocked=self.knocks, reached=reached)


class Doors:
    """All servers of one worker.

    Args:
        workers: of this host, which share the rate.
    """

    def __init__(self, workers: int = 1) -> None:
        self._doors: dict[str, _Door] = {}
        self._inside = 0
        self._queue: deque[_Door] = deque()
        """Doors that somebody waits at, in the order of their turns."""
        self._every_s = max(1, workers) / OPENS_PER_S
        self._next_open_s = 0.0
        self._timers: dict[_Door, asyncio.TimerHandle] = {}
        """Of closed doors: for the next knock, or to be forgotten."""

    @property
    def away(self) -> list[str]:
        """Servers that cannot be reached just now."""
        return [door.server for door in self._doors.values() if door.away]

    async def enter(self, server: str) -> Place:
        """Wait for a place at a server's door, for as long as it takes."""
        door = self._doors.get(server)
        if door is None:
            door = self._doors[server] = _Door(server)
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()
        if not door.waiting:
            self._queue.append(door)
        door.waiting.append(turn)
        self._let_in()
        try:
            knocks = await turn
            now_s = loop.time()
            opens_s = self._next_open_s = max(now_s, self._next_open_s + self._every_s)
            if opens_s > now_s:
                await asyncio.sleep(opens_s - now_s)
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.left(door, knocked=turn.result(), reached=None)
            self._let_in()
            raise
        return Place(self, door, knocks=knocks)

    def _let_in(self) -> None:
        """Let in whoever may go, one at each door in turn."""
        now_s = asyncio.get_running_loop().time()
        for _ in range(len(self._queue)):
            door = self._queue.popleft()
            while door.waiting and self._may_enter(door, now_s):
                self._enter(door, now_s)
            if door.waiting:
                self._queue.append(door)
            self._set_timer(door)

    def _enter(self, door: _Door, now_s: float) -> None:
        turn = door.waiting.popleft()
        if turn.done():
            return  # it gave up
        door.inside += 1
        if door.away:
            door.knocking, door.next_knock_s = True, now_s + KNOCK_EVERY_S
        else:
            self._inside += 1
        turn.set_result(door.away)

    def _may_enter(self, door: _Door, now_s: float) -> bool:
        if door.away:
            return not door.knocking and now_s >= door.next_knock_s
        # one at each server in any case: sick ones that hold all places must not keep the others' out
        return door.inside < HANDSHAKES_EACH and (self._inside < HANDSHAKES or not door.inside)

    def _set_timer(self, door: _Door) -> None:
        """Have the next one knock at a closed door; forget one that nobody comes to."""
        if (timer := self._timers.pop(door, None)) is not None:
            timer.cancel()
        loop = asyncio.get_running_loop()
        if door.away and door.waiting and not door.knocking:
            self._timers[door] = loop.call_at(door.next_knock_s, self._let_in)
        elif not door.waiting and not door.inside:
            if door.away:
                self._timers[door] = loop.call_later(_FORGOTTEN_AFTER_S, self._forget, door)
            else:
                self._forget(door)

    def _forget(self, door: _Door) -> None:
        self._timers.pop(door, None)
        if self._doors.get(door.server) is door:
            del self._doors[door.server]

    # told by places

    def back(self, door: _Door) -> None:
        """A server answered."""
        if door.away:
            door.away = False
            get_logger().info("voice_server.returned", server=door.server)
            self._let_in()

    def left(self, door: _Door, *, knocked: bool, reached: bool | None) -> None:
        """A handshake is over; `reached` is None where nobody knows."""
        door.inside -= 1
        if knocked:
            door.knocking = False
        else:
            self._inside -= 1
        if reached is False and not door.away:
            door.away = True
            get_logger().warning("voice_server.unreachable", server=door.server)
        self._set_timer(door)
        self._let_in()
