"""What a feeder makes of a child's word: opened again for ever, five times, or not at all. The child is scripted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, cast

import pytest

from shared.errors import ErrorCode, SourceError
from shared.protocol.opus import SILENCE_FRAME
from shared.schema.job import SourceKind
from shared.schema.records import SourceRecord
from worker.encode.feeder import Ended, Fed, Feeder, Opened, Stalled
from worker.encode.records import Looks
from worker.encode.retries import Retries
from worker.encode.source import EncodedFrame, Place, SourceChild, Told

PATIENCE_S = 20.0
FRAME_S = 0.02
END = None
BROKEN = SourceError("broken", code=ErrorCode.SOURCE_BROKEN)
AWAY = SourceError("away", code=ErrorCode.SOURCE_UNREACHABLE)
FORBIDDEN = SourceError("no", code=ErrorCode.SOURCE_FORBIDDEN, retryable=False)


class Play(NamedTuple):
    """So many frames, then the end or a failure; the last ones come at their own pace, the others at once."""

    frames: int
    then: SourceError | None
    paced: int = 0
    live: bool = True
    waits: bool = False
    """Its child is ready for the next order then."""
    stays: bool = False
    """It cannot be got rid of."""


class Child:
    def __init__(self, play: Play, start_samples: int) -> None:
        self.complete = self.closed = False
        self.waits = play.waits
        self._play = play
        self._next_samples = start_samples
        self._left = play.frames
        self._opened = False

    async def close(self) -> None:
        self.closed = True
        if self._play.stays:
            raise TimeoutError

    async def read(self) -> EncodedFrame | Looks | None:
        if self._play.frames and not self._opened:
            self._opened = True
            return Looks(live=self._play.live, certain=not self._play.live)
        if not self._left:
            if self._play.then is not None:
                raise self._play.then
            return None
        if self._left <= self._play.paced:
            await asyncio.sleep(FRAME_S)
        self._left -= 1
        frame = EncodedFrame(SILENCE_FRAME, 0, self._next_samples)
        self._next_samples += 960
        return frame


class Script:
    """Starts one scripted child after the other, the last one again and again, and notes as what each was opened."""

    def __init__(self, *plays: Play | Exception) -> None:
        self._plays = list(plays)
        self.opened: list[tuple[SourceKind, int]] = []
        self.before: list[Child | None] = []
        self.children: list[Child] = []

    async def open(
        self, before: SourceChild | None, kind: SourceKind, start_samples: int, _: int | None
    ) -> SourceChild:
        self.before.append(cast("Child | None", before))
        self.opened.append((kind, start_samples))
        play = self._plays[min(len(self.opened), len(self._plays)) - 1]
        if isinstance(play, Exception):
            raise play
        self.children.append(Child(play, start_samples))
        return cast(SourceChild, self.children[-1])


class Hasty(Retries):
    """Tries as often, but does not wait: for how long is told by the tests of `Retries`."""

    def of_live_input(self, now_s: float) -> float:
        return min(0.0, super().of_live_input(now_s))

    def of_file(self, now_s: float) -> float | None:
        return None if super().of_file(now_s) is None else 0.0


async def fed(script: Script, source: SourceRecord, count: int, *, is_local: bool = False) -> list[Fed]:
    """The first so many things that are fed, or all up to the end."""
    feeder = Feeder(source, is_local=is_local, open_child=script.open, retries=Hasty())
    task = asyncio.create_task(feeder.run())
    found: list[Fed] = []
    try:
        async with asyncio.timeout(PATIENCE_S):
            while len(found) < count and not (found and isinstance(found[-1], Ended)):
                one = await feeder.fed.get()
                assert one is not None
                found.append(one)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return found


def stalls(found: Sequence[Fed]) -> list[tuple[ErrorCode, int]]:
    return [(one.error.code, one.attempt) for one in found if isinstance(one, Stalled)]


def positions(found: Sequence[Fed]) -> list[int]:
    return [one.position_samples // 960 for one in found if isinstance(one, EncodedFrame)]


WEB, FILE, LIVE = SourceRecord(url="http://a/"), SourceRecord(url="http://a/", kind="file"), SourceRecord(kind="live")


@pytest.mark.parametrize("then", [END, BROKEN, AWAY], ids=["end", "break", "away"])
@pytest.mark.parametrize("source", [WEB, LIVE], ids=["auto", "live"])
async def test_live_input_is_opened_again_in_whatever_way_it_ends(
    source: SourceRecord, then: SourceError | None
) -> None:
    """A polite end is as good as a reset; positions count on, and any sound ends an absence."""
    script = Script(Play(5, then, paced=5))
    found = await fed(script, source, 40)
    code = then.code if then is not None else ErrorCode.SOURCE_ENDED
    assert set(stalls(found)) == {(code, 1)}
    assert len(stalls(found)) >= 4
    assert positions(found) == list(range(len(positions(found))))
    assert {kind for kind, _ in script.opened[1:]} == {"live"}
    for index, one in enumerate(found):
        if isinstance(one, Opened):
            assert isinstance(found[index + 1], EncodedFrame)


async def test_a_source_that_was_never_open_is_tried_for_ever() -> None:
    """It may be a station that is away: each try is told with its number."""
    found = await fed(Script(AWAY), WEB, 50)
    assert stalls(found) == [(ErrorCode.SOURCE_UNREACHABLE, number) for number in range(1, 51)]


@pytest.mark.parametrize(
    ("source", "is_local", "kind"), [(FILE, False, "file"), (SourceRecord(url="a.ogg"), True, "auto")]
)
async def test_a_file_that_was_never_open_is_given_up(source: SourceRecord, is_local: bool, kind: SourceKind) -> None:
    """The fifth failure is the end, with its code."""
    script = Script(AWAY)
    found = await fed(script, source, 50, is_local=is_local)
    assert found == [*(Stalled(AWAY, number) for number in range(1, 5)), Ended(AWAY)]
    assert script.opened == [(kind, 0)] * 5


@pytest.mark.parametrize("source", [WEB, FILE, LIVE], ids=["auto", "file", "live"])
async def test_what_trying_again_cannot_mend_is_the_end(source: SourceRecord) -> None:
    """Nothing but another order helps."""
    assert await fed(Script(FORBIDDEN), source, 5) == [Ended(FORBIDDEN)]


async def test_a_file_that_ends_has_ended() -> None:
    """The end of something whose length is known is one."""
    found = await fed(Script(Play(3, END, live=False)), WEB, 50)
    assert positions(found) == [0, 1, 2]
    assert found[-1] == Ended(None)


async def test_a_file_that_breaks_goes_on_where_it_broke() -> None:
    """Five times in a row; what was read before counts on."""
    script = Script(Play(3, BROKEN, live=False))
    found = await fed(script, WEB, 50)
    assert script.opened == [("auto", 0), *(("file", 3 * number * 960) for number in range(1, 5))]
    assert positions(found) == list(range(15))
    assert found[-1] == Ended(BROKEN)


async def test_something_of_unknown_length_that_was_there_at_once_is_a_file() -> None:
    """Its end is believed: nobody waited for it as for something live."""
    found = await fed(Script(Play(100, END)), WEB, 200)
    assert positions(found) == list(range(100))
    assert found[-1] == Ended(None)


async def test_a_burst_does_not_make_a_file_of_live_input() -> None:
    """Ten seconds and more at once, then live: how it came last counts."""
    found = await fed(Script(Play(1_000, END, paced=260)), WEB, 1_002)
    assert stalls(found) == [(ErrorCode.SOURCE_ENDED, 1)]


async def test_a_loop_of_unknown_length_goes_on_as_a_file() -> None:
    """The child could not know that it shall begin again; from its second pass on it does that itself."""
    source = SourceRecord(url="http://a/", loop=True)
    script = Script(Play(100, END), Play(50, END, live=False))
    found = await fed(script, source, 200)
    assert positions(found) == [*range(100), *range(50)]
    assert script.opened == [("auto", 0), ("file", 0)]
    assert not stalls(found)


async def test_a_child_that_cannot_be_started_is_a_failure_like_any_other() -> None:
    """No process to be had just now is no reason to go off air."""
    found = await fed(Script(BlockingIOError("no process")), LIVE, 7)
    assert stalls(found) == [(ErrorCode.SOURCE_BROKEN, number) for number in range(1, 8)]


async def test_a_defect_is_told_as_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever for a feeder that has crashed."""

    async def crash(_: Feeder) -> Ended | None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Feeder, "_open_once", crash)
    (ended,) = await fed(Script(AWAY), LIVE, 5)
    assert isinstance(ended, Ended)
    assert ended.error is not None
    assert ended.error.code is ErrorCode.SOURCE_FAILED


async def test_a_place_is_told_to_the_next_child_of_live_input_alone() -> None:
    """A file goes on at its position: with both, as much again would be left out."""
    for live in (True, False):
        places: list[int | None] = []

        class Placed(Script):
            async def open(
                self, before: SourceChild | None, kind: SourceKind, start_samples: int, place: int | None
            ) -> SourceChild:
                places.append(place)  # noqa: B023
                child = await super().open(before, kind, start_samples, place)
                read, told = child.read, iter([Place(7)])

                async def with_place() -> Told | None:
                    one = await read()
                    return next(told, one) if isinstance(one, EncodedFrame) else one

                child.read = with_place  # type: ignore[method-assign]
                return child

        await fed(Placed(Play(5, BROKEN, paced=5, live=live)), WEB, 14)
        assert places[:2] == [None, 7 if live else None]


async def test_a_child_that_waits_gets_the_next_order() -> None:
    """It is let go of at the end; one that does not wait, before the next one is started."""
    script = Script(Play(0, AWAY, waits=True), Play(0, AWAY, waits=True), Play(0, AWAY), Play(5, FORBIDDEN, waits=True))
    await fed(script, LIVE, 50)
    first, second, third, last = script.children
    assert script.before == [None, first, second, None]
    assert [child.closed for child in (first, second, third, last)] == [False, False, True, True]


async def test_a_child_that_cannot_be_got_rid_of_does_not_take_a_station_off_air() -> None:
    """It is told like any other failure, and the station is opened again."""
    found = await fed(Script(Play(0, AWAY, stays=True), Play(5, AWAY, paced=5)), LIVE, 5)
    assert not any(isinstance(one, Ended) for one in found)
    assert any(isinstance(one, EncodedFrame) for one in found)
