"""One bounded table of Opus frames, shared by all recordings."""

from collections.abc import Iterable

from tests.emulator.wire import SILENCE_FRAME

SILENCE_ID = 0


class PayloadTable:
    """Gives equal frames one id and keeps their bytes once.

    Ids only grow; the oldest frame is forgotten when the table is full. Silence has id 0 and is never forgotten.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ids: dict[bytes, int] = {}
        self._frames: dict[int, bytes] = {}
        self._next_id = SILENCE_ID + 1

    def intern(self, frame: bytes) -> int:
        """The id of a frame, new or known."""
        if frame == SILENCE_FRAME:
            return SILENCE_ID
        known = self._ids.get(frame)
        if known is not None:
            return known
        if len(self._ids) >= self._limit:
            oldest = next(iter(self._frames))
            del self._ids[self._frames.pop(oldest)]
        number = self._next_id
        self._next_id += 1
        self._ids[frame] = number
        self._frames[number] = frame
        return number

    def frames(self, ids: Iterable[int]) -> dict[int, bytes]:
        """Bytes of those ids that are still known."""
        wanted = ((number, self._frames.get(number)) for number in ids if number != SILENCE_ID)
        found = {number: frame for number, frame in wanted if frame is not None}
        return {SILENCE_ID: SILENCE_FRAME, **found}
