"""Playlists: HLS, and the lists of URLs that people call a stream. Pure.

Sources: RFC 8216 (HLS); the M3U, PLS and XSPF formats as players read them.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from urllib.parse import urljoin
from xml.etree import ElementTree

from shared.errors import ErrorCode, SourceError

MOST_BYTES = 2 * 1024 * 1024
"""A playlist that is longer is refused."""
MOST_SEGMENTS = 20_000
MOST_ENTRIES = 100
_MOST_BITRATE = 256_000
_ATTRIBUTE = re.compile(r'([A-Z0-9-]+)=("[^"]*"|[^,]*)')
_VIDEO_CODECS = ("avc", "hvc", "hev", "vp8", "vp9", "vp0", "av01", "mp4v", "dvh")

Kind = Literal["hls", "list"]


@dataclass(frozen=True, slots=True)
class Segment:
    """One piece of sound.

    Attributes:
        sequence: its place in the whole stream.
        first_byte, length: of a piece of a larger file; length 0: all of it.
        seam: what comes from here on is of another kind, or of another time.
        init: URL of what a decoder needs first; empty: nothing.
        key: URL of the AES-128 key; empty: not encrypted.
        iv: for the key; None: the sequence.
    """

    url: str
    sequence: int
    duration_s: float
    first_byte: int = 0
    length: int = 0
    seam: bool = False
    init: str = ""
    key: str = ""
    iv: bytes | None = None


@dataclass(frozen=True, slots=True)
class MediaPlaylist:
    """A media playlist: the segments it has just now."""

    target_s: float
    segments: tuple[Segment, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class MasterPlaylist:
    """A master playlist: the one of its playlists that is played."""

    url: str


def _joined(base: str, url: str) -> str:
    """An absolute URL or path; empty where it is none."""
    if base.startswith("/") and not url.lower().startswith(("http://", "https://", "file:")):
        return posixpath.join(posixpath.dirname(base), url)
    try:
        return urljoin(base, url)
    except ValueError:
        return ""


def sniff(head: bytes, content_type: str, url: str) -> Kind | None:
    """What kind of playlist something is by its first bytes; None: none."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = text[:2_000].lower()
    if text.startswith(b"#EXTM3U"):
        return "hls" if b"#ext-x-" in lower else "list"
    if lower.startswith(b"[playlist]") or (lower.startswith((b"<?xml", b"<playlist")) and b"<playlist" in lower):
        return "list"
    is_list = content_type in ("audio/x-mpegurl", "audio/mpegurl", "audio/x-scpls", "application/xspf+xml")
    path = url.partition("?")[0].lower()
    is_named_so = path.endswith((".m3u", ".m3u8", ".pls"))
    if (is_list or is_named_so) and (lower.startswith((b"http://", b"https://", b"#")) or url.startswith("/")):
        return "list"
    return None


def parse_list(text: str, base: str) -> list[str]:
    """The URLs in an M3U, PLS or XSPF list, in its order."""
    text = text.lstrip("\ufeff \t\r\n")
    lower = text[:2_000].lower()
    if lower.startswith("[playlist]"):
        found = re.findall(r"(?im)^\s*file(\d+)\s*=\s*(\S.*?)\s*$", text)
        urls = [url for _, url in sorted(found, key=lambda one: int(one[0]))]
    elif lower.startswith("<"):
        urls = _of_xspf(text)
    else:
        urls = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [_joined(base, url) for url in urls[:MOST_ENTRIES]]


def _of_xspf(text: str) -> list[str]:
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        return []
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 - without entities, and bounded
    except ElementTree.ParseError:
        return []
    return [(one.text or "").strip() for one in root.iter() if one.tag.rpartition("}")[2] == "location" and one.text]


def parse_hls(text: str, base: str) -> MediaPlaylist | MasterPlaylist:
    """Read an HLS playlist.

    Raises: SourceError: it names no segment or playlist, or too many, or is encrypted in a way that is not supported.
    """
    if not text.lstrip("\ufeff \t\r\n").startswith("#EXTM3U"):
        raise SourceError("the answer is no HLS playlist any more", code=ErrorCode.SOURCE_NOT_AUDIO)
    lines = [line.strip() for line in text.splitlines()]
    if any(line.startswith("#EXT-X-STREAM-INF") for line in lines):
        return MasterPlaylist(_variant(lines, base))
    return _media(lines, base)


def _attributes(line: str) -> dict[str, str]:
    return {name: value.strip('"') for name, value in _ATTRIBUTE.findall(line.partition(":")[2])}


def _number(text: str, kind: type[float] | type[int] = float) -> float:
    try:
        number = kind(text.strip().split(",")[0])
    except ValueError:
        return 0
    return number if 0 <= number < 1e15 else 0


def _variant(lines: list[str], base: str) -> str:
    """The best sound up to 256 kbit/s, else the least: an audio rendition, a variant of sound alone, any other."""
    renditions: dict[str, str] = {}
    for line in lines:
        said = _attributes(line) if line.startswith("#EXT-X-MEDIA:") else {}
        if said.get("TYPE") == "AUDIO" and said.get("URI"):
            group = said.get("GROUP-ID", "")
            if group not in renditions or said.get("DEFAULT") == "YES":
                renditions[group] = said["URI"]
    of_sound: list[tuple[float, str]] = []
    with_video: list[tuple[float, str]] = []
    beside_video: list[str] = []
    for line, after in pairwise(lines):
        if not line.startswith("#EXT-X-STREAM-INF") or not after or after.startswith("#"):
            continue
        said = _attributes(line)
        has_video = "RESOLUTION" in said or any(one in said.get("CODECS", "").lower() for one in _VIDEO_CODECS)
        (with_video if has_video else of_sound).append((_number(said.get("BANDWIDTH", "")), after))
        if said.get("AUDIO") in renditions:
            beside_video.append(renditions[said["AUDIO"]])
    small = [one for one in of_sound if one[0] <= _MOST_BITRATE]
    if small:
        chosen = max(small)[1]
    elif beside_video:
        chosen = beside_video[0]
    elif of_sound or with_video:
        chosen = min(of_sound or with_video)[1]
    else:
        raise SourceError("the HLS playlist names no stream", code=ErrorCode.SOURCE_NOT_AUDIO)
    return _joined(base, chosen)


def _media(lines: list[str], base: str) -> MediaPlaylist:
    target_s, sequence, duration_s = 0.0, 0, 0.0
    segments: list[Segment] = []
    seam = ended = False
    init = key = ""
    iv: bytes | None = None
    first_byte = length = next_byte = 0
    for line in lines:
        tag, _, value = line.partition(":")
        match tag:
            case "#EXT-X-TARGETDURATION":
                target_s = _number(value)
            case "#EXT-X-MEDIA-SEQUENCE":
                sequence = int(_number(value, int))
            case "#EXTINF":
                duration_s = _number(value)
            case "#EXT-X-DISCONTINUITY":
                seam = True
            case "#EXT-X-ENDLIST":
                ended = True
            case "#EXT-X-MAP":
                said = _attributes(line)
                if "BYTERANGE" in said:
                    message = "HLS with its init section inside another file is not supported"
                    raise SourceError(message, code=ErrorCode.SOURCE_NOT_AUDIO)
                before, init = init, _joined(base, said.get("URI", ""))
                seam = seam or bool(before and before != init)
            case "#EXT-X-KEY":
                said = _attributes(line)
                method = said.get("METHOD", "NONE")
                if method not in ("NONE", "AES-128") or said.get("KEYFORMAT", "identity") != "identity":
                    raise SourceError(f"the HLS stream is encrypted ({method})", code=ErrorCode.SOURCE_ENCRYPTED)
                key = _joined(base, said.get("URI", "")) if method == "AES-128" else ""
                iv = _iv(said.get("IV", ""))
            case "#EXT-X-BYTERANGE":
                size, _, start = value.partition("@")
                length = int(_number(size, int))
                first_byte = int(_number(start, int)) if start else next_byte
            case _ if line and not line.startswith("#"):
                url = _joined(base, line)
                segments.append(Segment(url, sequence, duration_s, first_byte, length, seam, init, key, iv))
                if len(segments) > MOST_SEGMENTS:
                    raise SourceError(f"more than {MOST_SEGMENTS:,} HLS segments", code=ErrorCode.SOURCE_TOO_LARGE)
                next_byte = first_byte + length
                sequence, seam, first_byte, length = sequence + 1, False, 0, 0
    if not target_s:
        target_s = max((one.duration_s for one in segments), default=10.0) or 10.0
    return MediaPlaylist(min(max(target_s, 0.5), 60.0), tuple(segments), ended)


def _iv(text: str) -> bytes | None:
    digits = text.lower().removeprefix("0x")
    try:
        return bytes.fromhex(digits[-32:].rjust(32, "0")) if digits else None
    except ValueError:
        return None
