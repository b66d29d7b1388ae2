"""MPEG audio and ADTS in a row: their frames, and nothing of what stands between them.

Stations and mixes put file behind file, tags and pictures with them. FFmpeg looks for the next frame within a picture,
finds some that are none, and loses the beginning of the next song over them. A header says how long its frame is, so
three in a row, each where the one before ends, are frames.

Sources: ISO/IEC 11172-3, 2.4.2.3; 13818-7, 6.2; ID3v2.4, 3.1.
"""

from __future__ import annotations

import io
from typing import Literal, NamedTuple

from worker.encode.answer import Readable, Seekable

CONTENT_TYPES = frozenset({"audio/mpeg", "audio/mp3", "audio/aac", "audio/aacp", "audio/x-aac"})
TAG = b"ID3"
_OTHERS = (b"OggS", b"fLaC", b"RIFF", b"FORM", b"FLV", b"\x1a\x45\xdf\xa3", b"\x30\x26\xb2\x75")
_TS_BYTES, _TS_SYNC = 188, 0x47
_TAG_HEADER_BYTES = 10
_LAST_TAG_BYTES = 128
"""Of ID3v1, at the end."""
_HEADER_BYTES = 6
"""All of an ADTS header that says something about its length; MPEG's is shorter."""
_IN_A_ROW = 3
_LOOK_BYTES = 128 * 1024
"""Where no frames begin within so much, it is something else: a station may be joined in the middle of a picture."""
_READ_BYTES = 16 * 1024

_KBITS = {
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""By version and layer; layer III of version 2 has those of layer II."""
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""By the two bits of the version."""
_ADTS_RATES = 13


class _Header(NamedTuple):
    """Attributes: kind: what stays the same within a stream."""

    length_bytes: int
    kind: int


def begins_with_frames(head: bytes, content_type: str) -> bool:
    """Whether something may be frames in a row. Servers call by their names much else."""
    if head.startswith(TAG) or _header_at(head, 0) is not None:
        return True
    is_ts = len(head) > _TS_BYTES and head[0] == head[_TS_BYTES] == _TS_SYNC
    return content_type in CONTENT_TYPES and not (head.startswith(_OTHERS) or head[4:8] == b"ftyp" or is_ts)


class Frames:
    """A file for FFmpeg: a tag that stands before all, and then frames.

    Where there are no frames to be found at its beginning, it is handed on as it is.

    Args: looks_back: FFmpeg may go to its end and back, to look for a tag there.
    """

    def __init__(self, file: Readable, *, looks_back: bool = False) -> None:
        self._file = file
        self._looks_back = looks_back
        self._held = bytearray()
        """Not judged yet."""
        self._ready = bytearray()
        self._state: Literal["beginning", "tag", "looking", "within", "lost", "other"] = "beginning"
        self._tag_bytes = 0
        """Left of the tag."""
        self._kind = 0
        """Of the last frame."""
        self._searched_bytes = 0
        """Of what is held, in which no frames begin."""
        self._over = self._is_other = False
        self._at = 0
        self._size = 0
        if isinstance(file, Seekable) and file.seekable():
            self._size = file.seek(0, io.SEEK_END)
            file.seek(0)

    def read(self, most: int, /) -> bytes:
        """What has come; nothing at the end.

        Raises: SourceError: as reading does.
        """
        while not self._ready and not self._over:
            more = self._file.read(_READ_BYTES)
            self._held += more
            self._over = not more
            self._judge()
        found = bytes(self._ready[:most])
        del self._ready[:most]
        self._at += len(found)
        return found

    def seekable(self) -> bool:
        return isinstance(self._file, Seekable) and self._file.seekable()

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place of the file below: FFmpeg looks for a tag at its end, and comes back to its first frame.

        Returns: where it is; negative: it does not go there.
        """
        assert isinstance(self._file, Seekable)
        if whence == io.SEEK_END:
            return self._size + offset  # asked for the size alone
        offset += self._at if whence == io.SEEK_CUR else 0
        if offset > self._at and not self._looks_back:
            return -1
        if offset != self._at:
            self._at = self._file.seek(offset)
            self._held.clear()
            self._ready.clear()
            self._searched_bytes, self._over = 0, False
            if offset == self._size - _LAST_TAG_BYTES:
                self._state = "other"
            elif not self._is_other:
                self._state = "lost" if offset else "beginning"
        return self._at

    def _judge(self) -> None:
        """Make ready what can be told to be sound, and drop what can be told to be none."""
        before = None
        while before != self._state:
            before = self._state
            match before:
                case "beginning" if len(self._held) >= _TAG_HEADER_BYTES or self._over:
                    self._tag_bytes = _tag_length(self._held)
                    self._state = "tag"
                case "tag":
                    self._tag_bytes -= self._take(min(self._tag_bytes, len(self._held)))
                    self._state = "tag" if self._tag_bytes else "looking"
                case "looking":
                    self._find_row("other" if len(self._held) >= _LOOK_BYTES or self._over else "looking")
                    self._is_other = self._state == "other"
                case "within":
                    self._take_row()
                case "lost":
                    self._find_row("lost")
                case "other":
                    self._take(len(self._held))

    def _take(self, count: int) -> int:
        self._ready += self._held[:count]
        del self._held[:count]
        return count

    def _take_row(self) -> None:
        """Take the frames that another one follows, and the last one unless the next row begins within it."""
        end = 0
        header = _header_at(self._held, end)
        while header is not None and header.kind == self._kind:
            after = end + header.length_bytes
            if after + _HEADER_BYTES > len(self._held):
                self._take(after if self._over and after <= len(self._held) else end)
                return
            following = _header_at(self._held, after)
            if following is None or following.kind != self._kind:
                at, is_row = self._search(end + 1)
                if is_row is None and at < after:
                    self._take(end)
                    return
                end = after if at >= after else end
                break
            end, header = after, following
        self._take(end)
        if len(self._held) >= _HEADER_BYTES or self._over:
            self._state = "lost"

    def _find_row(self, otherwise: Literal["looking", "lost", "other"]) -> None:
        """Go to where the next frames in a row begin."""
        at, is_row = self._search(self._searched_bytes)
        self._searched_bytes = at
        self._state = "within" if is_row else otherwise
        if self._state in ("within", "lost"):
            header = _header_at(self._held, at)
            self._kind = header.kind if header is not None else 0
            del self._held[:at]
            self._searched_bytes = 0

    def _search(self, begin: int) -> tuple[int, bool | None]:
        """Where frames in a row begin, or may begin when more has come, or all of it; and whether they do."""
        at = self._held.find(0xFF, begin)
        while at >= 0:
            is_row = self._is_row(at)
            if is_row or (is_row is None and not self._over):
                return at, is_row
            at = self._held.find(0xFF, at + 1)
        return len(self._held), False

    def _is_row(self, at: int) -> bool | None:
        """Whether frames in a row begin there; None: more has to come."""
        kind: int | None = None
        for _ in range(_IN_A_ROW):
            if at == len(self._held) and self._over and kind is not None:
                break
            if len(self._held) - at < _HEADER_BYTES:
                return None
            header = _header_at(self._held, at)
            if header is None or kind not in (None, header.kind):
                return False
            kind = header.kind
            at += header.length_bytes
        return True


def _tag_length(held: bytes | bytearray) -> int:
    """Of the ID3v2 tag that something begins with; 0: none."""
    if not held.startswith(TAG) or len(held) < _TAG_HEADER_BYTES or max(held[6:10]) > 0x7F:
        return 0
    size = held[6] << 21 | held[7] << 14 | held[8] << 7 | held[9]
    footer = _TAG_HEADER_BYTES if held[5] & 0x10 else 0
    return _TAG_HEADER_BYTES + size + footer


def _header_at(held: bytes | bytearray, at: int) -> _Header | None:
    """The header of the frame that begins there; None: none does."""
    if len(held) - at < _HEADER_BYTES or held[at] != 0xFF or held[at + 1] & 0xE0 != 0xE0:
        return None
    second, third = held[at + 1], held[at + 2]
    version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
    if layer == 4:
        return _adts(held, at) if second & 0xF0 == 0xF0 else None
    kbits_index, rate_index = third >> 4, third >> 2 & 3
    if version == 1 or not 0 < kbits_index < 15 or rate_index == 3:
        return None
    generation = 1 if version == 3 else 2
    kbits = _KBITS[generation, 2 if (generation, layer) == (2, 3) else layer][kbits_index]
    rate = _RATES[version][rate_index]
    padding = third >> 1 & 1
    if layer == 1:
        length = (12_000 * kbits // rate + padding) * 4
    else:
        length = (72_000 if (generation, layer) == (2, 3) else 144_000) * kbits // rate + padding
    return _Header(length, version << 8 | layer << 4 | rate_index)


def _adts(held: bytes | bytearray, at: int) -> _Header | None:
    rate_index = held[at + 2] >> 2 & 15
    length = (held[at + 3] & 3) << 11 | held[at + 4] << 3 | held[at + 5] >> 5
    if rate_index >= _ADTS_RATES or length < _HEADER_BYTES:
        return None
    return _Header(length, 1 << 16 | held[at + 2] >> 2 << 2)
