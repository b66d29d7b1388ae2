"""One source on air: what its feeder brings is given its place in time and published ahead of it.

Two tasks: the feeder (`worker.encode.feeder`) opens the source for as long as that is right; the publisher here knows
index and time, and when listeners hear nothing. Source: design section 3, "Lead", "Cuts" and "Gaps".
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from shared.clock import NS_PER_MS, NS_PER_S, CommonClock
from shared.errors import ErrorCode, Fenced, GuildcastError, SourceError, StoreError
from shared.logs import get_logger
from shared.schema.frame_entry import Flags, FrameEntry
from shared.schema.job import SourceKind
from shared.schema.records import BroadcastState, BroadcastStatus, SourceWant
from shared.seal import Seal
from shared.tasks import begin, to_its_end, uncancelled
from worker.encode.feeder import Ended, Fed, Feeder, Opened, Stalled
from worker.encode.publish import Publisher
from worker.encode.records import SILENT_DB, ChildOrder
from worker.encode.resolve import is_web, resolve_source
from worker.encode.source import EncodedFrame, SourceChild, Title
from worker.encode.timeline import FRAME_SAMPLES, Slice, Timeline

_SEEK_TIMEOUT_S = 120.0
"""To reach a place in a source that cannot seek, all before it must be read first."""
_STATUS_EVERY_NS = 5 * NS_PER_S
"""While nothing comes, the silence that listeners hear is told so often."""
_DELAY_TOLD_MS = 100
_LEVEL_TOLD_DB = 3
"""What changes less is not told."""

_T = TypeVar("_T")


class Word(NamedTuple):
    """What is told of a source. Without `is_event` only its figures are new; `is_title`: the event is of its title."""

    state: BroadcastState
    reason: str = ""
    error: GuildcastError | None = None
    attempt: int = 0
    is_event: bool = True
    is_title: bool = False


Tell = Callable[["SourceRun", Word], None]
Recall = Callable[[], Awaitable[BroadcastStatus | None]]


class _Alarm:
    """Wakes whoever waits at a queue, by putting nothing into it.

    Live input comes fifty times a second, and each time what it is waited for lies later: a timer that rings too early
    now and then costs less than one that is set anew each time.
    """

    def __init__(self, queue: asyncio.Queue[Fed | None]) -> None:
        self._queue = queue
        self._timer: asyncio.TimerHandle | None = None
        self._at_s = 0.0

    def within(self, seconds: float) -> None:
        """Wake no later than this."""
        loop = asyncio.get_running_loop()
        at_s = loop.time() + seconds
        if self._timer is None or at_s < self._at_s:
            self.cancel()
            self._at_s = at_s
            self._timer = loop.call_at(at_s, self._ring)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        if not self._queue.full():  # else nobody waits
            self._queue.put_nowait(None)


class SourceRun:
    """Publishes one run under one generation.

    Args:
        want: what the coordinator asked for.
        publisher: of the run's stream.
        media_dir: where sources that are files may lie.
        seal: opens what a source's URL and headers hold.
        tell: takes what becomes of it.
        recall: what was told last of this broadcast, by whomever.
    Attributes:
        title: what is on air, as the source says.
        level_db: peak of what was published lately, in dB of full scale; None: nothing was.
    """

    def __init__(
        self,
        want: SourceWant,
        publisher: Publisher,
        clock: CommonClock,
        media_dir: Path | None,
        seal: Seal,
        tell: Tell,
        recall: Recall,
    ) -> None:
        self.want = want
        self.title = ""
        self.level_db: int | None = None
        self._peak_db: int | None = None
        """Since the level was looked at; None: nothing came."""
        self._timeline = Timeline(want.spec.source)
        self._publisher = publisher
        self._clock = clock
        self._media_dir = media_dir
        self._seal = seal
        self._tell = tell
        self._recall = recall
        self._word = Word("starting")
        """Told last."""
        self._told_ns = self._told_delay_ms = 0
        self._error: SourceError | None = None
        """Why it ended, where that is no end of its own."""
        self._before = BroadcastStatus(state="starting", at=0)
        """How it stood when this encoder took it over."""
        self._feeder: Feeder | None = None
        self._log = get_logger().bind(broadcast=want.spec.broadcast, run=want.spec.run, term=want.term)
        self.task = begin(self._run(), f"source {want.spec.broadcast}")

    @property
    def child_pid(self) -> int | None:
        return self._feeder.child.pid if self._feeder is not None and self._feeder.child is not None else None

    @property
    def encodes(self) -> int:
        """Children started for this run."""
        return self._before.encodes + (self._feeder.opened if self._feeder is not None else 0)

    @property
    def epoch_us(self) -> int:
        """Time of frame 0; 0 until it is known."""
        return self._timeline.epoch_us

    @property
    def silent_ms(self) -> int:
        """For how long listeners of this run heard nothing that should have been heard."""
        return self._before.silent_ms + self._timeline.silent_ms(self._clock.now_ns())

    @property
    def delay_ms(self) -> int:
        """How late live input is heard; 0 of a file."""
        return self._timeline.delay_ms

    async def _run(self) -> None:
        try:
            await uncancelled(self._run_to_its_end())
        except Fenced as error:
            self._give_way(error)
        except Exception:  # noqa: BLE001 - one source's defect must not end the others
            self._log.exception("source.crashed")
            self._say(Word("ended", "source_failed", SourceError("internal error", code=ErrorCode.SOURCE_FAILED)))

    async def _run_to_its_end(self) -> None:
        """Raises: Fenced."""
        last = await self._patiently(self._publisher.last)
        if last is not None and last.term > self.want.term:
            raise Fenced(f"an entry of term {last.term} stands there")
        if last is not None:
            await self._take_over(last)
        if self.want.stop:
            await self._end("stopped")
            return
        if last is None or Flags.ENDED not in last.flags:
            await self._play()
        # Else somebody published all of it: only the rest is to be heard.
        await self._finished()

    def _give_way(self, fence: Fenced) -> None:
        """Say that something stands in the stream that is above us.

        Where that is the encoder that took this source over, nobody listens: the generation is not ours any more. Else
        it has no business there, and the leader gives the broadcast a fresh run, on another stream.
        """
        self._log.warning("publisher.fenced", error=fence.message)
        self._say(Word("ended", "stopped") if self.want.stop else Word("stalled", "fenced", fence))

    async def _take_over(self, last: FrameEntry) -> None:
        """Go on behind the last entry, with the figures told before."""
        position_samples = last.position_samples + FRAME_SAMPLES * len(last.packets)
        self._timeline.resume(last.epoch_us, last.next_index, position_samples, self._clock.now_ns())
        before = await self._patiently(self._recall)
        if before is not None and before.epoch_us == last.epoch_us:
            self._before = before

    async def _play(self) -> None:
        """Feed and publish until the source ends.

        Raises: Fenced.
        """
        source = self.want.spec.source
        self._feeder = Feeder(
            source,
            is_local=not is_web(source.url or ""),
            open_child=self._open_child,
            start_samples=self._timeline.position_samples,
        )
        feeding = begin(self._feeder.run(), f"feeder {self.want.spec.broadcast}")
        try:
            await self._publish_all(self._feeder)
        finally:
            feeding.cancel()
            await to_its_end(asyncio.wait({feeding}))

    async def _open_child(
        self, child: SourceChild | None, kind: SourceKind, start_samples: int, place: int | None
    ) -> SourceChild:
        source = self._seal.open_source(self.want.spec)
        order = ChildOrder(
            url=resolve_source(source.url or "", self._media_dir),
            kind=kind,
            loop=source.loop,
            start_samples=start_samples,
            opus=self.want.spec.opus,
            place=place,
            folder=str(self._media_dir or ""),
            headers=source.headers,
        )
        first_frame_timeout_s = _SEEK_TIMEOUT_S if start_samples and kind != "live" else None
        if child is None:
            return await SourceChild.start(order, first_frame_timeout_s=first_frame_timeout_s)
        child.again(order, first_frame_timeout_s=first_frame_timeout_s)
        return child

    # what is told

    def _say(self, word: Word) -> None:
        """Tell a state. Of failures in a row, the first, the second, the fourth ... are events, and each new one."""
        before, self._word = self._word, word
        if word.state == before.state == "stalled":
            same = before.error is not None and word.error is not None and before.error.code == word.error.code
            word = word._replace(is_event=not same or word.attempt.bit_count() == 1)
        elif word.state == before.state:
            return
        if word.is_event and word.error is not None:
            code, message = word.error.code, word.error.message
            self._log.warning(f"source.{word.state}", code=code, error=message, attempt=word.attempt)
        self._tell(self, word)

    def _tell_figures(self) -> None:
        """Tell how silence grows that listeners hear, and a delay or a level that has become another one."""
        delay_ms, peak_db, self._peak_db = self._timeline.delay_ms, self._peak_db, None
        before_db = self.level_db if self.level_db is not None else SILENT_DB - _LEVEL_TOLD_DB
        is_other_level = peak_db is not None and abs(peak_db - before_db) >= _LEVEL_TOLD_DB
        if is_other_level:
            self.level_db = peak_db
        is_other_delay = abs(delay_ms - self._told_delay_ms) >= _DELAY_TOLD_MS
        if self._timeline.silent_from is not None or is_other_delay or is_other_level:
            self._told_delay_ms = delay_ms
            self._tell(self, self._word._replace(is_event=False))

    def _tell_title(self, title: str) -> None:
        if title != self.title:
            self.title = title
            self._tell(self, self._word._replace(is_event=True, is_title=True))

    # the publisher

    async def _publish_all(self, feeder: Feeder) -> None:
        """Publish what is ripe, then wait for more, until the end.

        Raises: Fenced.
        """
        timeline, alarm = self._timeline, _Alarm(feeder.fed)
        try:
            while True:
                while (ripe := timeline.take(self._clock.now_ns())) is not None:
                    await self._publish(ripe)
                if timeline.over:
                    return
                self._take(await self._next(feeder, alarm), feeder)
        finally:
            alarm.cancel()

    def _take(self, came: Fed | None, feeder: Feeder) -> None:
        timeline, nature, now_ns = self._timeline, feeder.nature, self._clock.now_ns()
        match came:
            case EncodedFrame() as frame:
                self._peak_db = max(frame.level_db, SILENT_DB if self._peak_db is None else self._peak_db)
                timeline.arrived(frame, now_ns, live=nature.live, certain=nature.certain, paced=nature.paced)
                if feeder.child is not None:
                    feeder.child.set_rate(timeline.rate_ppm)
            case Opened(looks):
                timeline.opened(now_ns, looks.chunk_ms * NS_PER_MS, looks.burst_ms * NS_PER_MS)
            case Title(text):
                self._tell_title(text)
            case Stalled(error, attempt):
                timeline.broke()
                self._say(Word("stalled", "", error, attempt))
            case Ended(error):
                timeline.ended()
                self._error = error

    async def _next(self, feeder: Feeder, alarm: _Alarm) -> Fed | None:
        """What comes next; None: it is time to look again."""
        now_ns, timeline, fed = self._clock.now_ns(), self._timeline, feeder.fed
        if now_ns - self._told_ns > _STATUS_EVERY_NS:
            self._told_ns = now_ns
            self._tell_figures()
        wants_more, due_ns = timeline.wants_more(now_ns), timeline.due_ns(now_ns)
        if wants_more and not fed.empty():
            return fed.get_nowait()
        wait_ns = _STATUS_EVERY_NS if due_ns is None else min(_STATUS_EVERY_NS, max(0, due_ns - now_ns))
        if not wants_more:
            if timeline.holds_much:
                feeder.nature.certain = True
            await asyncio.sleep(wait_ns / NS_PER_S)
            return None
        alarm.within(wait_ns / NS_PER_S)
        return await fed.get()

    async def _publish(self, ripe: Slice) -> None:
        """Publish for as long as it takes; what became too late meanwhile is moved, or left where it is live."""
        waiting: Slice | None = ripe
        while waiting is not None:
            entry = FrameEntry(
                term=self.want.term,
                first_index=waiting.first_index,
                epoch_us=self.epoch_us,
                item=waiting.item,
                position_samples=waiting.position_samples,
                packets=[frame.packet for frame in waiting.frames],
                flags=waiting.flags,
            )
            try:
                await self._publisher.publish(entry)
            except Fenced:
                raise
            except StoreError as error:
                self._log.warning("publisher.delayed", error=error.message)
                await asyncio.sleep(random.uniform(0.1, 0.4))  # noqa: S311 - jitter
                now_ns = self._clock.now_ns()
                if self._timeline.is_late(waiting, now_ns):
                    self._say(Word("stalled", "", error))
                    waiting = self._timeline.moved(waiting, now_ns)
            else:
                if waiting.frames and not self._timeline.broken:
                    self._say(Word("playing"))
                if Flags.GAP in waiting.flags:
                    self._ran_dry(waiting)
                return

    def _ran_dry(self, gap: Slice) -> None:
        self._log.warning("source.ran_dry", index=gap.next_index)
        if self._word.state == "playing":
            self._say(Word("stalled", "", SourceError("nothing comes any more", code=ErrorCode.SOURCE_STALLED)))

    async def _finished(self) -> None:
        """Tell the end when listeners have heard it, not when it is published."""
        if self.epoch_us:
            wait_ns = self._timeline.time_ns(self._timeline.next_index) - self._clock.now_ns()
            await asyncio.sleep(max(0.0, wait_ns / NS_PER_S))
            await self._patiently(self._publisher.expire)
        self._say(Word("ended", "source_failed" if self._error else "finished", self._error))

    # the end by order

    def update(self, want: SourceWant) -> None:
        """Take over what may change under the same generation: a fresh term, the order to stop."""
        stop_now = want.stop and not self.want.stop
        self.want = want
        if stop_now:
            self.task.cancel()
            self.task = begin(self._stop_after(self.task), f"end of {want.spec.broadcast}")

    async def _stop_after(self, running: asyncio.Task[None]) -> None:
        await asyncio.gather(running, return_exceptions=True)
        try:
            await self._end("stopped")
        except Fenced as error:
            self._give_way(error)

    async def _end(self, reason: str) -> None:
        """Cut what is published at now + 200 ms and end there."""
        if not self.epoch_us:  # stopped before this worker had looked
            last = await self._patiently(self._publisher.last)
            self._timeline.epoch_us = last.epoch_us if last is not None else 0
        if self.epoch_us:
            await self._publish(self._timeline.cut_off(self._clock.now_ns()))
            await self._patiently(self._publisher.expire)
        self._say(Word("ended", reason))

    async def close(self) -> None:
        """Let go of the run without a word: what is published stays, somebody else may go on."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _patiently(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Do one thing on Redis, however long Redis is away."""
        while True:
            try:
                return await call()
            except StoreError as error:
                self._log.warning("store.awaited", error=error.message)
                await asyncio.sleep(random.uniform(0.2, 1.0))  # noqa: S311 - jitter
