"""Each sequence number of a sender is taken once. Pure.

Source: RFC 3711 section 3.3.2 (replay list); RFC 3550 appendix A.1 (sequence numbers that jump).
"""

from __future__ import annotations

WINDOW_PACKETS = 512
"""So far back a packet may come late; a bit for each is kept."""
MAX_AHEAD_PACKETS = 3_000
"""A minute of loss. What is further ahead may be a replay from half a cycle ago."""

_SEQUENCE_BITS = 16
_SEQUENCES = 1 << _SEQUENCE_BITS
_HALF = _SEQUENCES // 2
_WINDOW_MASK = (1 << WINDOW_PACKETS) - 1


class ReplayWindow:
    """Sequence numbers of one SSRC, extended to an index that never wraps.

    Ask `seen` before a packet is decrypted and `accept` after: only an authentic packet moves the window.

    A sender that starts anew with other numbers is followed when two of its packets come in a row (RFC 3550 appendix
    A.1). So replayed packets can move the window as well, when they are 512 packets old and come in a row: RTP cannot
    tell them from a new start; end-to-end encryption, where it is on, refuses them.
    """

    def __init__(self) -> None:
        self._highest = -1
        self._taken = 0
        """Bit n: index `_highest - n` was taken."""
        self._probe: int | None = None
        """The sequence that would show that the sender started anew."""

    def _index_of(self, sequence: int) -> int:
        return self._highest + ((sequence - self._highest + _HALF) % _SEQUENCES) - _HALF

    def seen(self, sequence: int) -> bool:
        """Whether this sequence is in the window and was taken."""
        if self._highest < 0:
            return False
        behind = self._highest - self._index_of(sequence)
        return 0 <= behind < WINDOW_PACKETS and bool(self._taken >> behind & 1)

    def accept(self, sequence: int) -> int | None:
        """Take the sequence of an authentic packet.

        Returns: its index, +1 for each packet the sender sent; None: taken before, or too far away.
        """
        if self._highest < 0:
            # room below: packets that were sent before the first one received may still come
            self._highest = sequence + _SEQUENCES
            self._taken = 1
            return self._highest
        index = self._index_of(sequence)
        ahead = index - self._highest
        if 0 < ahead <= MAX_AHEAD_PACKETS:
            self._taken = (self._taken << ahead | 1) & _WINDOW_MASK
            self._highest = index
        elif -WINDOW_PACKETS < ahead <= 0:
            bit = 1 << -ahead
            if self._taken & bit:
                return None
            self._taken |= bit
        elif sequence == self._probe:
            index += _SEQUENCES if ahead < 0 else 0  # the index only grows
            self._highest, self._taken = index, 1
        else:
            self._probe = (sequence + 1) % _SEQUENCES
            return None
        self._probe = None
        return index
