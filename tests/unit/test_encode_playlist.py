"""Playlists as they are found: what of them is played, and that none is too large or too strange."""

from __future__ import annotations

import pytest

from shared.errors import ErrorCode, SourceError
from worker.encode.playlist import (
    MOST_ENTRIES,
    MOST_SEGMENTS,
    MasterPlaylist,
    MediaPlaylist,
    parse_hls,
    parse_list,
    sniff,
)

BASE = "http://host/path/list.m3u8"
VIDEO = '#EXT-X-STREAM-INF:BANDWIDTH={0},RESOLUTION=640x360,CODECS="avc1.4d401e,mp4a.40.2"{1}\nvideo{0}.m3u8\n'
AUDIO = '#EXT-X-STREAM-INF:BANDWIDTH={0},CODECS="mp4a.40.2"\n{0}.m3u8\n'
RENDITION = '#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="a",NAME="x",URI="sound.m3u8"\n'


def variant(text: str) -> str:
    told = parse_hls("#EXTM3U\n" + text, BASE)
    assert isinstance(told, MasterPlaylist)
    return told.url.removeprefix("http://host/path/")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (AUDIO.format(64_000) + AUDIO.format(256_000) + AUDIO.format(320_000), "256000.m3u8"),
        (AUDIO.format(320_000) + AUDIO.format(512_000), "320000.m3u8"),
        (VIDEO.format(900_000, "") + AUDIO.format(96_000), "96000.m3u8"),
        (RENDITION + VIDEO.format(900_000, ',AUDIO="a"'), "sound.m3u8"),
        (VIDEO.format(2_500_000, "") + VIDEO.format(400_000, ""), "video400000.m3u8"),
        ("#EXT-X-STREAM-INF:PROGRAM-ID=1\nonly.m3u8\n", "only.m3u8"),
    ],
    ids=["best sound", "least of too much", "sound before video", "rendition", "least video", "nothing said"],
)
def test_the_best_sound_up_to_256_kbit_is_chosen(text: str, chosen: str) -> None:
    """Of video only as much as must be."""
    assert variant(text) == chosen


def test_a_master_playlist_that_names_nothing_is_refused() -> None:
    """With a code, not with an error of the parser."""
    with pytest.raises(SourceError) as caught:
        parse_hls("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n", BASE)
    assert caught.value.code is ErrorCode.SOURCE_NOT_AUDIO


def media(text: str) -> MediaPlaylist:
    told = parse_hls("#EXTM3U\n#EXT-X-TARGETDURATION:4\n" + text, BASE)
    assert isinstance(told, MediaPlaylist)
    return told


def test_segments_are_counted_from_the_media_sequence() -> None:
    """Ranges follow each other where no place is said; a key holds until the next."""
    told = media(
        "#EXT-X-MEDIA-SEQUENCE:41\n#EXT-X-BYTERANGE:100@50\n#EXTINF:4,\na.ts\n#EXT-X-BYTERANGE:70\n#EXTINF:4,\na.ts\n"
        '#EXT-X-DISCONTINUITY\n#EXT-X-KEY:METHOD=AES-128,URI="k",IV=0x2\n#EXTINF:3.5,\n/b.ts\n'
    )
    assert [one.sequence for one in told.segments] == [41, 42, 43]
    assert [(one.first_byte, one.length) for one in told.segments] == [(50, 100), (150, 70), (0, 0)]
    assert [one.seam for one in told.segments] == [False, False, True]
    assert told.segments[2].url == "http://host/b.ts"
    assert (told.segments[2].key, told.segments[2].iv) == ("http://host/path/k", (2).to_bytes(16, "big"))
    assert not told.ended


@pytest.mark.parametrize("method", ["SAMPLE-AES", "SAMPLE-AES-CTR", "ROT13"])
def test_other_encryption_is_named(method: str) -> None:
    """Nothing is played as noise."""
    with pytest.raises(SourceError, match=method) as caught:
        media(f'#EXT-X-KEY:METHOD={method},URI="k"\n#EXTINF:4,\na.ts\n')
    assert caught.value.code is ErrorCode.SOURCE_ENCRYPTED


def test_a_playlist_of_hundreds_of_thousands_of_segments_is_refused() -> None:
    """Memory has a bound."""
    with pytest.raises(SourceError) as caught:
        media("#EXTINF:4,\na.ts\n" * (MOST_SEGMENTS + 1))
    assert caught.value.code is ErrorCode.SOURCE_TOO_LARGE


@pytest.mark.parametrize("target", ["0", "-5", "x", "1e99", "nan", "999999"])
def test_a_strange_target_duration_makes_no_strange_wait(target: str) -> None:
    """Half a second at least, a minute at most."""
    told = parse_hls(f"#EXTM3U\n#EXT-X-TARGETDURATION:{target}\n#EXTINF:4,\na.ts\n", BASE)
    assert isinstance(told, MediaPlaylist)
    assert 0.5 <= told.target_s <= 60


@pytest.mark.parametrize(
    ("head", "content_type", "url", "kind"),
    [
        (b"#EXTM3U\n#EXT-X-VERSION:3\n", "", BASE, "hls"),
        (b"#EXTM3U\n#EXTINF:-1,x\nhttp://a/\n", "application/vnd.apple.mpegurl", BASE, "list"),
        (b"http://a/b\n", "audio/x-mpegurl", "http://host/listen", "list"),
        (b"http://a/b\n", "text/plain", "http://host/listen.m3u?x=1", "list"),
        (b"http://a/b\n", "text/plain", "http://host/listen", None),
        (b"[playlist]\n", "", "http://host/", "list"),
        (b"<?xml version='1.0'?>\n<playlist>", "", "http://host/", "list"),
        (b"<?xml version='1.0'?>\n<svg>", "", "http://host/", None),
        (b"ID3\x04\x00", "audio/x-mpegurl", "http://host/a.m3u", None),
        (b"", "", "http://host/", None),
    ],
)
def test_a_list_is_known_by_what_is_in_it(head: bytes, content_type: str, url: str, kind: str | None) -> None:
    """Names and types only help where the text alone could be anything."""
    assert sniff(head, content_type, url) == kind


def test_a_list_is_bounded_and_names_nothing_by_entities() -> None:
    """A list of a million is cut, and XML that would grow is not read."""
    assert len(parse_list("#EXTM3U\n" + "http://a/\n" * 5_000, BASE)) == MOST_ENTRIES
    bomb = '<?xml version="1.0"?><!DOCTYPE p [<!ENTITY a "aaaa">]><playlist><location>&a;</location></playlist>'
    assert parse_list(bomb, BASE) == []
    assert parse_list("<playlist><location>", BASE) == []
