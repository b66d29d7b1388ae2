"""Media files and answers of servers that somebody, or something, has spoilt: the same ones in every run."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.fuzz.mutate import bytes_of
from tests.media.audio import resampled, write_audio
from tests.media.radio import RATE, marks

FORMS: list[tuple[str, str, int, str]] = [
    ("wav", "pcm_s16le", 44_100, "stereo"),
    ("mp3", "libmp3lame", 44_100, "stereo"),
    ("ogg", "libopus", RATE, "stereo"),
    ("oga", "flac", 44_100, "mono"),
    ("flac", "flac", 44_100, "stereo"),
    ("m4a", "aac", 44_100, "stereo"),
    ("aac", "aac", RATE, "mono"),
    ("webm", "libopus", RATE, "stereo"),
    ("mka", "ac3", RATE, "stereo"),
    ("ts", "aac", RATE, "stereo"),
    ("flv", "aac", 44_100, "stereo"),
    ("aiff", "pcm_s16be", 22_050, "mono"),
]
_SIZES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFE, 0xFFFF_FFFF)
_TITLE_EVERY = 4_096
_HEAD_BYTES = 600
"""Most of what a parser believes stands there."""


def whole_files(folder: Path) -> dict[str, bytes]:
    """A second of sound in each form."""
    found = {}
    for ending, codec, rate, layout in FORMS:
        pcm = resampled(marks(0, RATE), rate, layout)
        path = write_audio(folder / f"whole.{ending}", pcm, rate=rate, layout=layout, codec=codec)
        found[f"{ending}-{codec}"] = path.read_bytes()
    found["chain"] = found["ogg-libopus"] + found["oga-flac"]
    return found


def _spoilt(random: Random, data: bytes, other: bytes) -> bytes:
    spoilt = bytearray(data)
    at = random.randrange(min(len(data), _HEAD_BYTES) if random.random() < 0.7 else len(data))
    match random.randrange(7):
        case 0:
            spoilt[at : at + 4] = struct.pack(random.choice("<>") + "I", random.choice(_SIZES))
        case 1:
            spoilt[at : at + 8] = struct.pack(">Q", random.choice(_SIZES) << random.choice((0, 31, 32)))
        case 2:
            del spoilt[at:]
        case 3:
            spoilt[at:at] = other[: random.randint(1, len(other))]
        case 4:
            spoilt[at : at + random.randint(1, 5_000)] = random.randbytes(random.randint(1, 5_000))
        case 5:
            for _ in range(random.randint(1, 200)):
                spoilt[random.randrange(len(spoilt))] ^= 1 << random.randrange(8)
        case _:
            return bytes_of(random, [data, other])
    return bytes(spoilt)


def spoilt_files(whole: dict[str, bytes], each: int) -> Iterator[tuple[str, bytes]]:
    """So many of each form, with their names."""
    random = Random(11)
    for name, data in whole.items():
        for number in range(each):
            yield f"{name}-{number}", _spoilt(random, data, random.choice(list(whole.values())))


def whole_answers(whole: dict[str, bytes]) -> dict[str, bytes]:
    """What servers say, from the first byte of the head to the last of the body."""
    mp3, ogg = whole["mp3-libmp3lame"], whole["ogg-libopus"]
    pieces = [mp3[at : at + _TITLE_EVERY] for at in range(0, len(mp3), _TITLE_EVERY)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    titled = b"".join(piece + b"\x02" + b"StreamTitle='A song';".ljust(32, b"\0") for piece in pieces)
    ok = b"HTTP/1.1 200 OK\r\n"
    return {
        "length": ok + b"Content-Type: audio/mpeg\r\nContent-Length: %d\r\n\r\n" % len(mp3) + mp3,
        "chunks": ok + b"Content-Type: audio/mpeg\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n",
        "icy": b"ICY 200 OK\r\nicy-name: Station\r\nicy-metaint: 4096\r\nContent-Type: audio/mpeg\r\n\r\n" + titled,
        "ogg": ok + b"Content-Type: application/ogg\r\nServer: Icecast 2.4.4\r\n\r\n" + ogg * 2,
        "gzip": ok + b"Content-Type: audio/mpeg\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(mp3, mtime=0),
        "list": ok + b"Content-Type: audio/x-scpls\r\n\r\n[playlist]\nFile1=BASE/length\nFile2=BASE/icy\n",
        "hls": ok
        + b"Content-Type: application/vnd.apple.mpegurl\r\n\r\n#EXTM3U\n#EXT-X-TARGETDURATION:1\n"
        + b"#EXTINF:1,\nBASE/length\n#EXT-X-DISCONTINUITY\n#EXTINF:1,\nBASE/chunks\n#EXT-X-ENDLIST\n",
        "elsewhere": b"HTTP/1.1 302 Found\r\nLocation: BASE/length\r\nContent-Length: 0\r\n\r\n",
    }


def spoilt_answers(answers: dict[str, bytes], each: int) -> Iterator[tuple[str, bytes]]:
    """So many of each, with their names."""
    random = Random(12)
    for name, data in answers.items():
        for number in range(each):
            yield f"{name}-{number}", _spoilt(random, data, random.choice(list(answers.values())))
