"""Where time stamps say that there is a hole between two frames. Pure.

Sound is played by the count of its samples. Recorders leave out what is silent, and a packet gets lost: only the time
stamps tell, and what they are ahead of the count is a hole. A clock that is a little fast or slow is none, so the count
is led after the time stamps, slowly; and where they jump far, or back, another recording begins.
"""

from __future__ import annotations

_LEAST_S = 0.1
"""Less may be the jitter of time stamps; it is heard earlier than it should be, and no gap."""
_LED_BY = 0.005
"""Of the length of each frame, so much is made up for."""


class Gaps:
    """The time stamps of one stream.

    Args:
        most_s: what is longer is no hole but a jump.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._due_s: float | None = None
        """When the next frame should begin."""

    def before(self, begins_s: float | None, length_s: float) -> float:
        """A frame comes; returns for how long there is nothing before it, in seconds.

        Args:
            begins_s: its time stamp; None: it has none, and follows the one before.
            length_s: by its samples.
        """
        if begins_s is None:
            if self._due_s is not None:
                self._due_s += length_s
            return 0.0
        ahead_s = 0.0 if self._due_s is None else begins_s - self._due_s
        if self._due_s is None or abs(ahead_s) >= _LEAST_S:
            self._due_s = begins_s + length_s
            return ahead_s if _LEAST_S <= ahead_s <= self._most_s else 0.0
        most_s = _LED_BY * length_s
        self._due_s += length_s + min(max(ahead_s, -most_s), most_s)
        return 0.0
