"""Feeds one source: runs its child, and opens the source again when it fails, as long as that is right.

    open_child ─▶ frames ─▶ queue         a failure ─▶ Stalled ─▶ (wait) ─▶ Opened ─▶ frames ...
                                          the end of a file, or of its tries ─▶ Ended

Live input is opened again for ever. What has never been open may be live, so it is, too, unless it is a local file or
said to be one. A file ends when it ends, and is given up after some tries. Source: design section 3, "Off air only by
order".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from shared.errors import ErrorCode, SourceError
from shared.logs import get_logger
from shared.schema.job import SourceKind
from shared.schema.records import SourceRecord
from shared.tasks import uncancelled
from shared.text import in_words
from worker.encode.nature import Nature
from worker.encode.records import Looks
from worker.encode.retries import Retries
from worker.encode.source import EncodedFrame, Place, SourceChild, Title
from worker.encode.timeline import FRAME_SAMPLES

_RECOVERED_FRAMES = 500
"""A file that was read for 10 s has its tries back; of live input any sound will do."""
_QUEUE_FRAMES = 50

OpenChild = Callable[[SourceChild | None, SourceKind, int, int | None], Awaitable[SourceChild]]
"""Opens the source as what it is taken for, from a position (samples at 48 kHz) on; of live input, from a place on. By
a child that waits, or by a new one."""


class Opened(NamedTuple):
    """Stands before the first frame of each child, with what the source looks like."""

    looks: Looks = Looks()


class Stalled(NamedTuple):
    """Nothing comes; it is tried again after this."""

    error: SourceError
    attempt: int


class Ended(NamedTuple):
    """Nothing more will come: the end of a file, or an error that trying again does not mend."""

    error: SourceError | None


Fed = EncodedFrame | Opened | Title | Stalled | Ended


class Feeder:
    """One source's frames, whatever happens to it.

    Args:
        source: what the job says of it.
        is_local: it is a file of this machine.
        open_child: opens it.
        start_samples: position to begin at.
        retries: when it is opened again.
    Attributes:
        fed: what comes, in order; None stands for nothing, put there by whoever waits.
        nature: what the source is taken for.
        child: the one that runs, or waits.
        opened: how often it was opened.
    """

    def __init__(
        self,
        source: SourceRecord,
        *,
        is_local: bool,
        open_child: OpenChild,
        start_samples: int = 0,
        retries: Retries | None = None,
    ) -> None:
        self.fed: asyncio.Queue[Fed | None] = asyncio.Queue(_QUEUE_FRAMES)
        self.child: SourceChild | None = None
        self.opened = 0
        self._open_child = open_child
        self._loops = source.loop
        self._next_samples = start_samples
        self._place: int | None = None
        self.nature = Nature(source.kind, is_local=is_local)
        self._retries = retries or Retries()

    async def run(self) -> None:
        """Feed until the end. A defect of this side is told as the end: nobody must wait for it for ever."""
        try:
            while (ended := await uncancelled(self._open_once())) is None:
                pass
            await self.fed.put(ended)
        except Exception:  # noqa: BLE001 - told as the end of the source
            get_logger().exception("feeder.crashed")
            await self.fed.put(Ended(SourceError("internal error", code=ErrorCode.SOURCE_FAILED)))
        finally:
            await self._let_go()

    async def _open_once(self) -> Ended | None:
        """Feed one child to its end; wait until it is time for the next one, or say that there is none."""
        self._retries.opened(time.monotonic())
        try:
            try:
                return await self._feed_child()
            finally:
                if self.child is not None and not self.child.waits:
                    await self._let_go()
        except (SourceError, OSError) as failure:  # OSError: no process or pipe to be had, or none to be got rid of
            error = (
                failure if isinstance(failure, SourceError) else SourceError(f"encoding process: {in_words(failure)}")
            )
        if not error.retryable:
            return Ended(error)
        now_s = time.monotonic()
        wait_s = self._retries.of_live_input(now_s) if self.nature.live else self._retries.of_file(now_s)
        if wait_s is None:
            return Ended(error)
        await self.fed.put(Stalled(error, self._retries.attempt))
        await asyncio.sleep(wait_s)
        return None

    async def _feed_child(self) -> Ended | None:
        """Put the frames of one child; None: there is another one to come at once.

        Raises: SourceError, OSError.
        """
        self.opened += 1
        nature, frames, looks = self.nature, 0, Looks()
        place = self._place if nature.live else None
        self.child = child = await self._open_child(self.child, nature.kind, self._next_samples, place)
        while True:
            since_ns = time.monotonic_ns()
            match await child.read():
                case None:
                    break
                case Looks() as looks:
                    nature.opened(live=looks.live, certain=looks.certain)
                case Place(number):
                    self._place = number
                case Title() as title:
                    await self.fed.put(title)
                case EncodedFrame() as frame:
                    if frames:
                        nature.arrived(time.monotonic_ns() - since_ns)
                    else:
                        await self.fed.put(Opened(looks))
                    await self.fed.put(frame)
                    self._next_samples = frame.position_samples + FRAME_SAMPLES
                    frames += 1
                    if nature.live or frames >= _RECOVERED_FRAMES:
                        self._retries.recovered()
        nature.ended(complete=child.complete)
        if nature.live:
            raise SourceError("the server ended the stream", code=ErrorCode.SOURCE_ENDED)
        if looks.live and self._loops:  # the child could not know that it is to begin again
            self._next_samples = 0
            return None
        return Ended(None)

    async def _let_go(self) -> None:
        child, self.child = self.child, None
        if child is not None:
            await child.close()
