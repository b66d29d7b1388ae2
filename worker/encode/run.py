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

from shared.clock import NS_PER_MS, NS_PER_S, NS_PER_US, CommonClock
from shared.errors import ErrorCode, Fenced, GuildcastError, SourceError, StoreError
from shared.logs import get_logger
from shared.schema.frame_entry import FRAMES_PER_ENTRY, TICK_US, Flags, FrameEntry
from shared.schema.job import SourceKind
from shared.schema.records import BroadcastState, BroadcastStatus, SourceWant
from worker.encode.feeder import FRAME_SAMPLES, Ended, Fed, Feeder, Opened, Stalled
from worker.encode.live import LOOK_S, Beginning, LiveBeginning, LiveLateness, LivePace, entry_frames
from worker.encode.publish import Publisher
from worker.encode.records import ChildOrder
from worker.encode.resolve import is_web, resolve_source
from worker.encode.source import EncodedFrame, SourceChild

_TICK_NS = TICK_US * NS_PER_US
START_FRAMES = 25
"""A run goes on air when 500 ms of it are there; live input, when it comes at its own pace (`worker.encode.live`)."""
CUT_AHEAD_NS = 200 * NS_PER_MS
"""A cut, a start or a return lies this far ahead, so that every worker knows of it in time."""
MARK_AHEAD_NS = 100 * NS_PER_MS
_REFILL_ENTRIES = 10
"""The lead of a file is filled up when so many entries of it are used, one for each second of lead where that is less:
to wake for each single entry, with its code out of the caches by then, cost as much as encoding does."""
_SEEK_TIMEOUT_S = 120.0
"""To reach a place in a source that cannot seek, all before it must be read first."""
_STATUS_EVERY_S = 5.0
"""While nothing comes, the silence that listeners hear is told so often."""

_T = TypeVar("_T")


class Word(NamedTuple):
    """What is told of a source. Without `is_event` only its figures are new."""

    state: BroadcastState
    reason: str = ""
    error: GuildcastError | None = None
    attempt: int = 0
    is_event: bool = True


Tell = Callable[["SourceRun", Word], None]
Recall = Callable[[], Awaitable[BroadcastStatus | None]]


class SourceRun:
    """Publishes one run under one generation.

    Args:
        want: what the coordinator asked for.
        publisher: of the run's stream.
        media_dir: where sources that are files may lie.
        tell: takes what becomes of it.
        recall: what was told last of this broadcast, by whomever.
    Attributes:
        epoch_us: time of frame 0; 0 until it is known.
    """

    def __init__(
        self,
        want: SourceWant,
        publisher: Publisher,
        clock: CommonClock,
        media_dir: Path | None,
        tell: Tell,
        recall: Recall,
    ) -> None:
        self.want = want
        self.epoch_us = 0
        self._publisher = publisher
        self._clock = clock
        self._media_dir = media_dir
        self._tell = tell
        self._recall = recall
        self._word = Word("starting")
        """Told last."""
        self._before = BroadcastStatus(state="starting", at=0)
        """How it stood when this encoder took it over."""
        self._silent_frames = 0
        self._silent_from: int | None = None
        """The first frame that is missing now."""
        self._next_index = 0
        self._marked_index = -1
        self._position_samples = 0
        self._batch: list[EncodedFrame] = []
        self._away = True
        """Nothing lies ahead of the listeners: what comes next starts at now + 200 ms."""
        self._live = False
        self._found_not_live = False
        """Its end is not known, but it came too fast to be live: that holds for the run."""
        self._flowing = False
        """What comes is published as it comes; before that, it is looked at (`_may_flow`)."""
        self._live_beginning: LiveBeginning | None = None
        self._live_lateness = LiveLateness()
        self._live_pace = LivePace()
        """Of the source as it is open now."""
        self._taken_samples = 0
        """Position of the last frame taken."""
        self._feeder: Feeder | None = None
        self._log = get_logger().bind(broadcast=want.spec.broadcast, run=want.spec.run, term=want.term)
        self.task = asyncio.create_task(self._run(), name=f"source {want.spec.broadcast}")

    @property
    def child_pid(self) -> int | None:
        return self._feeder.child.pid if self._feeder is not None and self._feeder.child is not None else None

    @property
    def encodes(self) -> int:
        """Children started for this run."""
        return self._before.encodes + (self._feeder.opened if self._feeder is not None else 0)

    @property
    def silent_ms(self) -> int:
        """For how long listeners of this run heard nothing that should have been heard."""
        frames = self._silent_frames
        if self._silent_from is not None:
            frames += max(0, self._index_at(self._clock.now_ns()) - self._silent_from)
        return self._before.silent_ms + frames * TICK_US // 1_000

    async def _run(self) -> None:
        try:
            last = await self._patiently(self._publisher.last)
            if last is not None:
                self.epoch_us, self._next_index = last.epoch_us, last.next_index
                self._position_samples = last.position_samples + FRAME_SAMPLES * len(last.packets)
                self._away = self._is_past(self._next_index)
                before = await self._patiently(self._recall)
                if before is not None and before.epoch_us == self.epoch_us:
                    self._before = before
            if self.want.stop:
                await self._end("stopped")
                return
            if last is not None and Flags.ENDED in last.flags:
                # Somebody else published all of it: only the rest is to be heard.
                await self._finished("finished", None)
                return
            if last is not None and self._away:
                self._silent_from = self._next_index
            await self._play()
        except Fenced as error:
            self._log.info("publisher.fenced", error=error.message)
        except Exception:  # noqa: BLE001 - one source's defect must not end the others
            self._log.exception("source.crashed")
            self._say(Word("ended", "source_failed", SourceError("internal error", code=ErrorCode.SOURCE_FAILED)))

    async def _play(self) -> None:
        """Feed and publish until the source ends.

        Raises: Fenced.
        """
        source = self.want.spec.source
        self._feeder = Feeder(
            source,
            is_local=not is_web(source.url or ""),
            start_child=self._start_child,
            start_samples=self._position_samples,
        )
        feeding = asyncio.create_task(self._feeder.run(), name=f"feeder {self.want.spec.broadcast}")
        try:
            await self._publish_all(self._feeder.fed)
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    async def _start_child(self, kind: SourceKind, start_samples: int) -> SourceChild:
        source = self.want.spec.source
        return await SourceChild.start(
            ChildOrder(
                url=resolve_source(source.url or "", self._media_dir),
                kind=kind,
                loop=source.loop,
                start_samples=start_samples,
                opus=self.want.spec.opus,
            ),
            first_frame_timeout_s=_SEEK_TIMEOUT_S if start_samples and kind != "live" else None,
        )

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
        self._tell(self, self._word._replace(is_event=False))

    # the publisher

    async def _publish_all(self, fed: asyncio.Queue[Fed]) -> None:
        while True:
            match await self._next(fed):
                case Opened():
                    self._flowing, self._live_beginning = False, None
                    self._live_pace, self._live_lateness = LivePace(), LiveLateness()
                case EncodedFrame() as frame:
                    await self._take(frame, fed.qsize())
                case Stalled(error, attempt):
                    if self._live and self._flowing and self._batch:
                        await self._publish_batch(Flags.NONE)  # it goes on from here, or is cut
                    self._say(Word("stalled", "", error, attempt))
                case Ended(None):
                    await self._publish_batch(Flags.ENDED)
                    await self._finished("finished", None)
                    return
                case Ended(error):
                    if self._batch or self.epoch_us:
                        await self._publish_batch(Flags.ENDED)
                    await self._finished("source_failed", error)
                    return

    async def _take(self, frame: EncodedFrame, waiting: int) -> None:
        """Publish what is ripe with one more frame; so many more are there."""
        self._live = frame.live and not self._found_not_live
        self._note_pace(frame)
        self._batch.append(frame)
        if self._live and self._flowing:
            self._look_at_lateness(waiting)
        if self._flowing or self._may_flow():
            while len(self._batch) >= self._entry_frames:
                await self._publish_batch(Flags.NONE)

    @property
    def _lead_ms(self) -> int:
        return self.want.spec.source.lead_ms_of(live=self._live)

    @property
    def _entry_frames(self) -> int:
        return entry_frames(self._lead_ms) if self._live else FRAMES_PER_ENTRY

    def _may_flow(self) -> bool:
        """Whether what is there may go on air; of live input, only what its lead allows is kept."""
        if not self._live:
            self._live_beginning = None
            self._flowing = bool(self.epoch_us) or len(self._batch) >= START_FRAMES
            return self._flowing
        self._live_beginning = self._live_beginning or LiveBeginning(self._lead_ms, CUT_AHEAD_NS, self._live_pace)
        return self._begin_live(self._live_beginning.arrived(self._clock.now_ns()))

    def _begin_live(self, beginning: Beginning | None) -> bool:
        if beginning is None:
            return False
        self._live_beginning = None
        self._flowing = True
        if not beginning.live:
            self._found_not_live, self._live = True, False
        if not self.epoch_us:
            self._batch = self._batch[-beginning.frames :]
            self._begin_at(beginning.first_at_ns)
        elif beginning.live:
            self._return_live(beginning)
        return True

    def _return_live(self, beginning: Beginning) -> None:
        """Go on with live input, so that it is late by its lead as before.

        Where listeners did not run dry it goes on without a gap: then it is late by less, for the break that they
        did not hear, but never by more.
        """
        newest_index = self._index_at(beginning.newest_at_ns)
        if self._away:
            self._batch = self._batch[-beginning.frames :]
            self._return_at(newest_index - len(self._batch) + 1)
        self._batch = self._batch[-max(1, newest_index - self._next_index + 1) :]

    def _note_pace(self, frame: EncodedFrame) -> None:
        if frame.position_samples < self._taken_samples and self._live_beginning is None:
            self._live_pace = LivePace()  # a loop opened it again
        self._taken_samples = frame.position_samples
        self._live_pace.arrived(self._clock.now_ns())

    def _look_at_lateness(self, waiting_before: int) -> None:
        """Leave out what live input is late by, unless it turns out to be none."""
        now_ns, waiting = self._clock.now_ns(), len(self._batch) + waiting_before
        late_ns = self._time_ns(self._next_index + waiting - 1) - now_ns - self._lead_ms * NS_PER_MS
        found = self._live_lateness.taken(now_ns, late_ns, waiting)
        if found == "in time":
            return
        self._log.info("source.fell_behind", late_ms=late_ns // NS_PER_MS, live=found == "behind")
        if found == "behind":
            self._flowing = False
        else:
            self._found_not_live, self._live = True, False

    def _begin_at(self, common_ns: int) -> None:
        """Frame 0 is due then, or just after it."""
        self.epoch_us = -(-common_ns // _TICK_NS) * TICK_US
        self._away = False

    def _return_at(self, index: int) -> None:
        """Listeners heard nothing up to here."""
        index = max(self._next_index + 1, index)
        if self._silent_from is not None:
            self._silent_frames += index - self._silent_from
            self._silent_from = None
        self._next_index = index
        self._away = False

    async def _next(self, fed: asyncio.Queue[Fed]) -> Fed:
        """What comes next; when listeners are about to run dry before it comes, the gap is flagged first."""
        while self._live_beginning is not None:
            if not self._away and self._is_past(self._next_index):
                await self._run_dry()  # a burst is looked at, and none of it is ahead of the listeners yet
            try:
                async with asyncio.timeout(LOOK_S):
                    return await fed.get()
            except TimeoutError:
                if self._begin_live(self._live_beginning.look(self._clock.now_ns())):
                    while len(self._batch) >= self._entry_frames:
                        await self._publish_batch(Flags.NONE)
        if self.epoch_us and not self._away:
            deadline_ns = self._time_ns(self._next_index) - MARK_AHEAD_NS - self._clock.now_ns()
            try:
                async with asyncio.timeout(max(0.0, deadline_ns / 1e9)):
                    return await fed.get()
            except TimeoutError:
                if not fed.empty():
                    return fed.get_nowait()
                await self._run_dry()
        while True:
            try:
                async with asyncio.timeout(_STATUS_EVERY_S):
                    return await fed.get()
            except TimeoutError:
                if self._silent_from is not None:
                    self._tell_figures()

    async def _run_dry(self) -> None:
        """Flag the gap. Live input that is looked at is not published with it: it may be too old."""
        looked_at: list[EncodedFrame] = []
        if self._live_beginning is not None:
            looked_at, self._batch = self._batch, looked_at
        else:
            self._live_lateness = LiveLateness()  # a file that comes too fast never runs dry
        await self._publish_batch(Flags.GAP)
        self._batch = looked_at
        self._away, self._flowing = True, False
        self._silent_from = self._next_index
        self._log.warning("source.ran_dry", index=self._next_index)
        if self._word.state == "playing":
            self._say(Word("stalled", "", SourceError("nothing comes any more", code=ErrorCode.SOURCE_STALLED)))

    async def _publish_batch(self, flags: Flags) -> None:
        """Publish up to five frames, or a mark where there is none, when their lead has come."""
        batch, self._batch = self._batch[: self._entry_frames], self._batch[self._entry_frames :]
        last = not self._batch
        if not self.epoch_us:
            self._begin_at(self._clock.now_ns() + CUT_AHEAD_NS)
        if self._away and batch:
            self._return_at(self._index_at(self._clock.now_ns() + CUT_AHEAD_NS))
        self._away = False
        if not batch and self._next_index == self._marked_index:
            self._next_index += 1  # a mark stands there already, and an id is used once
        await self._until_lead()
        entry = FrameEntry(
            term=self.want.term,
            first_index=self._next_index,
            epoch_us=self.epoch_us,
            item=batch[0].item if batch else 0,
            position_samples=batch[0].position_samples if batch else self._position_samples,
            packets=[frame.packet for frame in batch],
            flags=flags if last else Flags.NONE,
        )
        await self._publish(entry)
        if not batch:
            self._marked_index = self._next_index
        if batch:
            self._position_samples = batch[-1].position_samples + FRAME_SAMPLES
            self._say(Word("playing"))
        if not last and flags:
            await self._publish_batch(flags)

    async def _publish(self, entry: FrameEntry) -> None:
        """Publish for as long as it takes; what became too late meanwhile moves to now + 200 ms."""
        while True:
            try:
                await self._publisher.publish(entry)
            except Fenced:
                raise
            except StoreError as error:
                self._log.warning("publisher.delayed", error=error.message)
                await asyncio.sleep(random.uniform(0.1, 0.4))  # noqa: S311 - jitter
                if self._is_past(entry.first_index):
                    moved = max(entry.first_index, self._index_at(self._clock.now_ns() + CUT_AHEAD_NS))
                    self._silent_frames += (moved - entry.first_index) if entry.packets else 0
                    entry = entry._replace(first_index=moved)
                    self._say(Word("stalled", "", error))
            else:
                self._next_index = entry.next_index
                return

    async def _until_lead(self) -> None:
        lead_ms = self._lead_ms
        wait_ns = self._time_ns(self._next_index) - lead_ms * NS_PER_MS - self._clock.now_ns()
        if wait_ns > 0:
            entries = 0 if self._live else min(lead_ms // 1_000, _REFILL_ENTRIES)
            await asyncio.sleep((wait_ns + entries * FRAMES_PER_ENTRY * _TICK_NS) / NS_PER_S)

    async def _finished(self, reason: str, error: SourceError | None) -> None:
        """Tell the end when listeners have heard it, not when it is published."""
        if self.epoch_us:
            wait_ns = self._time_ns(self._next_index) - self._clock.now_ns()
            await asyncio.sleep(max(0.0, wait_ns / 1e9))
            await self._patiently(self._publisher.expire)
        self._say(Word("ended", reason, error))

    # the end by order

    def update(self, want: SourceWant) -> None:
        """Take over what may change under the same generation: a fresh term, the order to stop."""
        stop_now = want.stop and not self.want.stop
        self.want = want
        if stop_now:
            self.task.cancel()
            self.task = asyncio.create_task(self._stop_after(self.task), name=f"end of {want.spec.broadcast}")

    async def _stop_after(self, running: asyncio.Task[None]) -> None:
        await asyncio.gather(running, return_exceptions=True)
        try:
            await self._end("stopped")
        except Fenced as error:
            self._log.info("publisher.fenced", error=error.message)

    async def _end(self, reason: str) -> None:
        """Cut what is published at now + 200 ms and end there."""
        if not self.epoch_us:  # stopped before this worker had looked
            last = await self._patiently(self._publisher.last)
            self.epoch_us = last.epoch_us if last is not None else 0
        if self.epoch_us:
            index = max(0, self._index_at(self._clock.now_ns() + CUT_AHEAD_NS))
            await self._publish(
                FrameEntry(self.want.term, index, self.epoch_us, 0, self._position_samples, (), Flags.ENDED)
            )
            await self._patiently(self._publisher.expire)
        self._say(Word("ended", reason))

    async def close(self) -> None:
        """Let go of the run without a word: what is published stays, somebody else may go on."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    # time

    def _time_ns(self, index: int) -> int:
        return self.epoch_us * NS_PER_US + index * _TICK_NS

    def _index_at(self, common_ns: int) -> int:
        """First frame that does not begin before a moment."""
        return -(-(common_ns - self.epoch_us * NS_PER_US) // _TICK_NS)

    def _is_past(self, index: int) -> bool:
        return self._time_ns(index) < self._clock.now_ns() + MARK_AHEAD_NS

    async def _patiently(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Do one thing on Redis, however long Redis is away."""
        while True:
            try:
                return await call()
            except StoreError as error:
                self._log.warning("store.awaited", error=error.message)
                await asyncio.sleep(random.uniform(0.2, 1.0))  # noqa: S311 - jitter
