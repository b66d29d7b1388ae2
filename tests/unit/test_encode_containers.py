"""Files as they are found in the field: with foreign bytes among the sound, seams, holes, padding."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from shared.errors import ErrorCode, SourceError
from tests.media.audio import RATE, Pcm, resampled, write_audio
from tests.media.radio import find_marks, marks
from worker.encode.decode import Hooks, decode
from worker.encode.pcm import FRAME_SAMPLES

BARE = {"write_xing": "0", "id3v2_version": "0"}
CLIP_S = 4
"""Longer than what a container is judged by."""


def heard(path: Path | str) -> Pcm:
    return np.concatenate([block.pcm for block in decode(str(path))])


def seconds_of(pcm: Pcm) -> list[int]:
    return [second for _, second in find_marks(pcm)]


class Clip:
    """Makes a piece of the programme of marks, as bytes of a file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(
        self,
        first_second: int,
        ending: str,
        codec: str,
        *,
        rate: int = RATE,
        layout: str = "stereo",
        seconds: int = CLIP_S,
        tags: dict[str, str] | None = None,
    ) -> bytes:
        pcm = marks(first_second * RATE, seconds * RATE)
        if rate != RATE or layout != "stereo":
            pcm = resampled(pcm, rate, layout)
        options = BARE if ending == "mp3" else {}
        path = write_audio(
            self._folder / f"clip.{ending}", pcm, rate=rate, layout=layout, codec=codec, options=options, tags=tags
        )
        return path.read_bytes()


@pytest.fixture
def clip(tmp_path: Path) -> Clip:
    return Clip(tmp_path)


# foreign bytes


def _picture(size: int) -> bytes:
    """As good as a PNG: no byte of it is predictable."""
    return b"\x89PNG\r\n\x1a\n" + np.random.default_rng(5).bytes(size)


def _id3v2(picture: bytes) -> bytes:
    body = b"\0image/png\0\x03\0" + picture
    frame = b"APIC" + struct.pack(">I", len(body)) + b"\0\0" + body
    return b"ID3\x03\0\0" + bytes((len(frame) >> shift) & 127 for shift in (21, 14, 7, 0)) + frame


def _ape(picture: bytes) -> bytes:
    item = struct.pack("<II", len(picture) + 10, 2 << 1) + b"Cover Art (Front)\0cover.png\0" + picture
    ends = struct.pack("<IIII", 2_000, len(item) + 32, 1, 0xA0000000) + bytes(8)
    return b"APETAGEX" + ends + item + b"APETAGEX" + ends


FOREIGN: dict[str, bytes] = {
    "ID3v2 with a picture": _id3v2(_picture(400_000)),
    "APE with a picture": _ape(_picture(150_000)),
    "ID3v1": b"TAG" + b"Title".ljust(125, b"\0"),
    "a page of HTML": b"<html><body>" + b"<p>Service unavailable</p>" * 3_000 + b"</body></html>",
    "zeros": bytes(300_000),
    "ones": b"\xff" * 100_000,
}
FRAMES_IN_A_ROW = {"mp3": "libmp3lame", "aac": "aac", "ac3": "ac3", "mp2": "mp2"}


@pytest.mark.parametrize("junk", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("ending", FRAMES_IN_A_ROW)
def test_foreign_bytes_are_skipped_however_long_they_are(ending: str, junk: bytes, clip: Clip, tmp_path: Path) -> None:
    """Between tracks, and behind the last one: all three are heard, one behind the other, and no noise between."""
    tracks = [clip(k * CLIP_S, ending, FRAMES_IN_A_ROW[ending]) for k in range(3)]
    path = tmp_path / f"tracks.{ending}"
    path.write_bytes(junk.join([*tracks, b""]))
    pcm = heard(path)
    assert seconds_of(pcm) == list(range(1, 3 * CLIP_S))
    assert len(pcm) == pytest.approx(3 * CLIP_S * RATE, abs=0.25 * RATE)
    assert np.abs(pcm).max() < 0.7


@pytest.mark.parametrize("ending", FRAMES_IN_A_ROW)
def test_what_begins_within_a_picture_is_heard_from_its_end_on(ending: str, clip: Clip, tmp_path: Path) -> None:
    """Whoever listens to a station from now on may come while it sends one."""
    path = tmp_path / f"late.{ending}"
    path.write_bytes(_picture(300_000)[1_000:] + clip(0, ending, FRAMES_IN_A_ROW[ending]))
    assert seconds_of(heard(path)) == [1, 2, 3]


def test_a_looped_file_with_a_picture_at_its_end_goes_on(clip: Clip, tmp_path: Path) -> None:
    """Each pass is as long as the first."""
    path = tmp_path / "loop.mp3"
    path.write_bytes(clip(0, "mp3", "libmp3lame") + FOREIGN["APE with a picture"])
    passes = _pass_lengths(path, 4)
    assert len(set(passes)) == 1
    assert passes[0] == pytest.approx(CLIP_S * RATE, abs=0.1 * RATE)


# seams


class Titles(Hooks):
    def __init__(self) -> None:
        self.told: list[str] = []

    def titled(self, title: str) -> None:
        self.told.append(title)


CHAINS: dict[str, list[tuple[str, str, int, str]]] = {
    "Opus, mono between stereo": [
        ("ogg", "libopus", RATE, "stereo"),
        ("ogg", "libopus", RATE, "mono"),
        ("ogg", "libopus", RATE, "stereo"),
    ],
    "FLAC of other rates": [
        ("oga", "flac", RATE, "stereo"),
        ("oga", "flac", 44_100, "stereo"),
        ("oga", "flac", 22_050, "mono"),
    ],
    "of other codecs": [
        ("ogg", "libopus", RATE, "stereo"),
        ("oga", "flac", 44_100, "stereo"),
        ("ogg", "libopus", RATE, "5.1"),
    ],
    "MP3 of other rates": [
        ("mp3", "libmp3lame", 44_100, "stereo"),
        ("mp3", "libmp3lame", 22_050, "mono"),
        ("mp3", "libmp3lame", RATE, "stereo"),
    ],
    "AAC of other rates": [
        ("aac", "aac", RATE, "stereo"),
        ("aac", "aac", 44_100, "mono"),
        ("aac", "aac", 32_000, "stereo"),
    ],
}


@pytest.mark.parametrize("forms", CHAINS.values(), ids=CHAINS)
def test_a_seam_between_streams_of_another_kind_is_heard_as_one(
    forms: list[tuple[str, str, int, str]], clip: Clip, tmp_path: Path
) -> None:
    """Whatever changes there: each stream is heard whole, at its own speed."""
    parts = [
        clip(k * CLIP_S, ending, codec, rate=rate, layout=layout)
        for k, (ending, codec, rate, layout) in enumerate(forms)
    ]
    path = tmp_path / f"chain.{forms[0][0]}"
    path.write_bytes(b"".join(parts))
    pcm = heard(path)
    assert seconds_of(pcm) == list(range(1, 3 * CLIP_S))
    assert len(pcm) == pytest.approx(3 * CLIP_S * RATE, abs=0.3 * RATE)


def test_each_link_of_a_chain_tells_its_title(clip: Clip, tmp_path: Path) -> None:
    """A station that hands on files says with each what it is."""
    parts = [clip(k, "ogg", "libopus", seconds=1, tags={"title": f"Song {k}", "artist": "Somebody"}) for k in range(3)]
    (tmp_path / "chain.ogg").write_bytes(b"".join(parts))
    titles = Titles()
    for _ in decode(str(tmp_path / "chain.ogg"), hooks=titles):
        pass
    assert titles.told == ["Somebody - Song 0", "Somebody - Song 1", "Somebody - Song 2"]


def test_a_link_without_sound_is_left_out(clip: Clip, tmp_path: Path) -> None:
    """A station whose next file fails at once sends its headers alone."""
    first, second = clip(0, "ogg", "libopus"), clip(CLIP_S, "ogg", "libopus")
    headers = second[: second.index(b"OggS", second.index(b"OpusTags"))]
    (tmp_path / "chain.ogg").write_bytes(first + headers + second)
    assert seconds_of(heard(tmp_path / "chain.ogg")) == list(range(1, 2 * CLIP_S))


def test_a_place_within_a_chain_is_found(clip: Clip, tmp_path: Path) -> None:
    """Positions count on over the seam."""
    parts = [clip(0, "ogg", "libopus"), clip(CLIP_S, "ogg", "libopus", layout="mono")]
    (tmp_path / "chain.ogg").write_bytes(b"".join(parts))
    blocks = list(decode(str(tmp_path / "chain.ogg"), start_samples=5 * RATE + 960))
    assert blocks[0].position_samples == 5 * RATE + 960
    pcm = np.concatenate([block.pcm for block in blocks])
    assert [(round(at / RATE, 2), second) for at, second in find_marks(pcm)] == [(0.98, 6), (1.98, 7)]


# holes


@pytest.mark.parametrize(
    ("ending", "codec"), [("webm", "libopus"), ("mka", "aac"), ("mp4", "aac"), ("flv", "aac"), ("ts", "aac")]
)
@pytest.mark.parametrize("holes", [[(3, 5)], [(1.5, 1.9), (4, 8)]])
def test_holes_are_kept_as_time(ending: str, codec: str, holes: list[tuple[float, float]], tmp_path: Path) -> None:
    """What a recorder left out is heard as the silence that it was, so that all else keeps its place."""
    path = _with_holes(tmp_path, ending, codec, holes)
    pcm = heard(path)
    assert len(pcm) == pytest.approx(10 * RATE, abs=0.1 * RATE)
    expected = [k for k in range(1, 10) if not any(since - 0.2 <= k < until for since, until in holes)]
    onsets = [round(at / RATE, 1) for at, _ in find_marks(pcm)]
    assert seconds_of(pcm) == expected
    assert onsets == pytest.approx(expected, abs=0.11)


def _with_holes(folder: Path, ending: str, codec: str, holes: list[tuple[float, float]]) -> Path:
    """Ten seconds of the programme in which nothing is stored for some."""
    whole = write_audio(folder / f"whole.{ending}", marks(0, 10 * RATE), codec=codec)
    path = folder / f"holes.{ending}"
    with av.open(str(whole)) as full, av.open(str(path), "w") as out:
        stream = full.streams.audio[0]
        copy = out.add_stream_from_template(stream)
        begin: float | None = None
        for packet in full.demux(stream):
            if packet.pts is None or packet.time_base is None:
                continue
            at_s = float(packet.pts * packet.time_base)
            begin = at_s if begin is None else begin
            if not any(since <= at_s - begin < until for since, until in holes):
                packet.stream = copy
                out.mux(packet)
    return path


@pytest.mark.parametrize("start_s", [2, 4, 5, 7])
@pytest.mark.parametrize(("ending", "codec"), [("webm", "libopus"), ("m4a", "aac"), ("ts", "aac"), ("flv", "aac")])
def test_a_place_in_or_behind_a_hole_is_found(ending: str, codec: str, start_s: int, tmp_path: Path) -> None:
    """An encoder that takes over goes on there, and not before it."""
    path = _with_holes(tmp_path, ending, codec, [(3.0, 6.0)])
    blocks = list(decode(str(path), start_samples=start_s * RATE))
    assert blocks[0].position_samples >= start_s * RATE
    assert np.all(np.diff([block.position_samples for block in blocks]) == FRAME_SAMPLES)
    begin_s = blocks[0].position_samples / RATE
    pcm = np.concatenate([block.pcm for block in blocks])
    found = [(round(begin_s + at / RATE), second) for at, second in find_marks(pcm)]
    assert found
    assert [second for second, _ in found] == [second for _, second in found]
    assert {second for _, second in found} >= {7, 8, 9} - {start_s}


def test_a_place_behind_a_jump_of_time_stamps_is_found(clip: Clip, tmp_path: Path) -> None:
    """Two MPEG-TS files in one begin to count anew; positions do not."""
    path = tmp_path / "two.ts"
    path.write_bytes(clip(0, "ts", "aac") + clip(CLIP_S, "ts", "aac"))
    blocks = list(decode(str(path), start_samples=5 * RATE + 24_000))
    assert blocks[0].position_samples == 5 * RATE + 24_000
    assert seconds_of(np.concatenate([block.pcm for block in blocks])) == [6, 7]


def test_a_chain_that_ends_as_it_begins_is_heard_whole(clip: Clip, tmp_path: Path) -> None:
    """The same jingle first and last has the same serial twice."""
    jingle, song = clip(0, "ogg", "libopus"), clip(CLIP_S, "ogg", "libopus", layout="mono")
    (tmp_path / "a.ogg").write_bytes(jingle + song + jingle)
    assert seconds_of(heard(tmp_path / "a.ogg"))[:8] == [1, 2, 3, 4, 5, 6, 7, 0]


@pytest.mark.parametrize("codec", ["flac", "aac"])
def test_a_cover_that_is_larger_than_what_is_looked_at_hides_nothing(codec: str, clip: Clip, tmp_path: Path) -> None:
    """The name of a file says what it is, too."""
    (tmp_path / f"a.{codec}").write_bytes(_id3v2(_picture(1_500_000)) + clip(0, codec, codec))
    assert seconds_of(heard(tmp_path / f"a.{codec}")) == [1, 2, 3]


def test_a_tag_at_the_end_tells_the_title(clip: Clip, tmp_path: Path) -> None:
    """ID3v1, as old files have it; it is no sound."""
    tag = b"TAG" + b"My Song".ljust(30, b"\0") + b"Me".ljust(30, b"\0") + bytes(65)
    (tmp_path / "a.mp3").write_bytes(clip(0, "mp3", "libmp3lame") + tag)
    titles = Titles()
    pcm = np.concatenate([block.pcm for block in decode(str(tmp_path / "a.mp3"), hooks=titles)])
    assert titles.told == ["Me - My Song"]
    assert seconds_of(pcm) == [1, 2, 3]


def test_a_file_that_grows_is_read_to_its_end(clip: Clip, tmp_path: Path) -> None:
    """A recording may go on while it is played."""
    path = tmp_path / "a.mp3"
    path.write_bytes(clip(0, "mp3", "libmp3lame"))
    blocks = decode(str(path))
    first = next(blocks)
    with path.open("ab") as file:
        file.write(clip(CLIP_S, "mp3", "libmp3lame"))
    pcm = np.concatenate([first.pcm, *(block.pcm for block in blocks)])
    assert seconds_of(pcm) == [1, 2, 3, 4, 5, 6, 7]


def test_a_loop_of_minutes_at_a_low_rate_is_not_kept(tmp_path: Path) -> None:
    """Few bytes there are many here."""
    sound = resampled(marks(0, 12 * RATE), 8_000, "mono")
    path = write_audio(tmp_path / "a.wav", sound, rate=8_000, layout="mono", codec="pcm_u8")
    blocks = decode(str(path), loop=True)
    some = [next(blocks) for _ in range(610)]
    path.unlink()
    with pytest.raises(SourceError):
        some.extend(blocks)


# padding


def _pass_lengths(path: Path, count: int) -> list[int]:
    """Lengths of the first passes of a loop."""
    lengths: list[int] = []
    before = begun_at = 0
    for number, block in enumerate(decode(str(path), loop=True)):
        if block.position_samples < before:
            at = number * FRAME_SAMPLES - block.position_samples
            lengths.append(at - begun_at)
            begun_at = at
            if len(lengths) == count:
                break
        before = block.position_samples
    return lengths


GAPLESS: dict[str, tuple[str, str, int]] = {
    "mp3": ("mp3", "libmp3lame", RATE),
    "mp3 44.1": ("mp3", "libmp3lame", 44_100),
    "ogg opus": ("ogg", "libopus", RATE),
    "ogg flac": ("oga", "flac", RATE),
    "webm opus": ("webm", "libopus", RATE),
    "m4a aac": ("m4a", "aac", RATE),
    "m4a aac 44.1": ("m4a", "aac", 44_100),
    "m4a alac": ("m4a", "alac", 44_100),
    "flac": ("flac", "flac", 44_100),
    "wav": ("wav", "pcm_s16le", 44_100),
}


@pytest.mark.parametrize(("ending", "codec", "rate"), GAPLESS.values(), ids=GAPLESS)
@pytest.mark.parametrize("more", [0, 441])
def test_a_pass_of_a_loop_is_as_long_as_its_sound(
    ending: str, codec: str, rate: int, more: int, tmp_path: Path
) -> None:
    """The encoder's delay and its padding are no sound."""
    samples = 2 * rate + more
    pcm = resampled(marks(0, 3 * RATE), rate)[:samples]
    path = write_audio(tmp_path / f"a.{ending}", pcm, rate=rate, codec=codec)
    for length in _pass_lengths(path, 3):
        assert length == pytest.approx(samples * RATE / rate, abs=1)


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def _find(data: bytearray, *path: bytes) -> int:
    """Where a box begins, and all around it do."""
    at, end = 0, len(data)
    for kind in path:
        while data[at + 4 : at + 8] != kind:
            at += int(struct.unpack_from(">I", data, at)[0])
            assert at < end, kind
        end = at + int(struct.unpack_from(">I", data, at)[0])
        inside = at
        at += 12 if kind == b"meta" else 8
    return inside


_STTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stts")


def _as_apple(data: bytearray) -> None:
    """The last packet as long as all, and the end in the edit list alone."""
    at = _find(data, *_STTS)
    count = struct.unpack_from(">I", data, at + 12)[0]
    struct.pack_into(">I", data, at + 16 + 8 * (count - 1) + 4, 1_024)
    at = _find(data, b"moov", b"trak", b"mdia", b"mdhd")
    struct.pack_into(">I", data, at + 24, -(-struct.unpack_from(">I", data, at + 24)[0] // 1_024) * 1_024)


def _with_delay(data: bytearray) -> None:
    """The edit list begins behind the encoder's delay, and lasts for what was put in."""
    at = _find(data, b"moov", b"trak", b"edts", b"elst")
    struct.pack_into(">II", data, at + 16, 2_000, 1_024)


def _with_note(data: bytearray) -> None:
    """No edit list, but iTunes' note."""
    at = _find(data, b"moov", b"trak", b"edts")
    data[at + 4 : at + 8] = b"free"
    _as_apple(data)
    text = f" 00000000 00000400 00000180 {2 * RATE:016X} 00000000 00000000".encode()
    note = _box(
        b"----",
        _box(b"mean", bytes(4) + b"com.apple.iTunes")
        + _box(b"name", bytes(4) + b"iTunSMPB")
        + _box(b"data", b"\0\0\0\1" + bytes(4) + text),
    )
    path = (b"moov", b"udta", b"meta", b"ilst")
    at = _find(data, *path)
    end = at + struct.unpack_from(">I", data, at)[0]
    for depth in range(1, len(path) + 1):
        begin = _find(data, *path[:depth])
        struct.pack_into(">I", data, begin, struct.unpack_from(">I", data, begin)[0] + len(note))
    data[end:end] = note


MAKERS: dict[str, list[Callable[[bytearray], None]]] = {
    "an edit list with the delay": [_with_delay],
    "an edit list, and whole packets": [_with_delay, _as_apple],
    "iTunes' note": [_with_note],
}


@pytest.mark.parametrize("changes", MAKERS.values(), ids=MAKERS)
def test_padding_is_cut_off_however_mp4_tells_of_it(changes: list[Callable[[bytearray], None]], tmp_path: Path) -> None:
    """Each maker of files has a way of its own."""
    path = write_audio(tmp_path / "a.m4a", marks(0, 2 * RATE), codec="aac")
    data = bytearray(path.read_bytes())
    for change in changes:
        change(data)
    path.write_bytes(data)
    assert _pass_lengths(path, 2) == [2 * RATE, 2 * RATE]
    assert find_marks(heard(path))[0][0] == pytest.approx(RATE, abs=200)


def test_sound_behind_the_end_that_is_told_is_heard(tmp_path: Path) -> None:
    """A length that is far too short was no truth."""
    path = write_audio(tmp_path / "a.m4a", marks(0, 4 * RATE), codec="aac", tags={"iTunSMPB": f" 0 400 0 {RATE:X}"})
    assert seconds_of(heard(path)) == [1, 2, 3]


# what a file names


def test_a_local_list_leads_to_a_file_beside_it(clip: Clip, tmp_path: Path) -> None:
    """However it names it."""
    (tmp_path / "some music").mkdir()
    (tmp_path / "some music" / "a song.mp3").write_bytes(clip(0, "mp3", "libmp3lame"))
    for number, (ending, text) in enumerate(
        [
            ("m3u", "some music/a song.mp3\n"),
            ("m3u", "#EXTM3U\n#EXTINF:4,A song\nmissing.mp3\nsome music/a song.mp3\n"),
            ("pls", "[playlist]\nFile1=some%20music/a%20song.mp3\n"),
            ("m3u", f"{tmp_path}/some music/a song.mp3"),
            ("m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nsome music/a song.mp3\n#EXT-X-ENDLIST\n"),
        ]
    ):
        path = tmp_path / f"list{number}.{ending}"
        path.write_text(text)
        assert seconds_of(heard(path)) == [1, 2, 3], text


@pytest.mark.parametrize("name", ["../secret.mp3", "{outside}/secret.mp3", "file://{outside}/secret.mp3", "link.mp3"])
@pytest.mark.parametrize("form", ["{name}\n", "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{name}\n#EXT-X-ENDLIST\n"])
def test_a_local_playlist_names_nothing_outside_the_folder(name: str, form: str, clip: Clip, tmp_path: Path) -> None:
    """Not with dots, not with a whole path, not by a link."""
    inside = tmp_path / "media"
    inside.mkdir()
    (tmp_path / "secret.mp3").write_bytes(clip(0, "mp3", "libmp3lame"))
    (inside / "link.mp3").symlink_to(tmp_path / "secret.mp3")
    path = inside / "list.m3u"
    path.write_text(form.format(name=name.format(outside=tmp_path)))
    with pytest.raises(SourceError) as caught:
        list(decode(str(path)))
    assert caught.value.code is ErrorCode.SOURCE_FORBIDDEN


NAMING_OTHERS = {
    "ffconcat": "ffconcat version 1.0\nfile '{path}'\n",
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n",
}


@pytest.mark.parametrize("text", NAMING_OTHERS.values(), ids=NAMING_OTHERS)
def test_ffmpeg_opens_nothing_itself(text: str, clip: Clip, tmp_path: Path) -> None:
    """A container that is but a list of files or addresses is no audio."""
    (tmp_path / "a.mp3").write_bytes(clip(0, "mp3", "libmp3lame"))
    path = tmp_path / "names"
    path.write_text(text.format(path=tmp_path / "a.mp3"))
    with pytest.raises(SourceError) as caught:
        list(decode(str(path)))
    assert caught.value.code is ErrorCode.SOURCE_NOT_AUDIO
