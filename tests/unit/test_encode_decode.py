"""Decoding: any source to 960-sample blocks at 48 kHz, exact in position, without a seam when looping."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.stream import VideoStream
from numpy.typing import NDArray

from shared.errors import ErrorCode, SourceError
from tests.media.audio import PROGRAMME, RATE, Pcm, align, decode_file, resampled, write_audio
from worker.encode.decode import decode
from worker.encode.pcm import FRAME_SAMPLES, Block

START_SAMPLES = 3 * RATE + 12_345
"""Not at a border of anything."""


@dataclass(frozen=True)
class Form:
    """One way to store sound."""

    ending: str
    codec: str
    rate: int = RATE
    layout: str = "stereo"


LOSSLESS = [
    Form("wav", "pcm_s16le"),
    Form("flac", "flac"),
    Form("aiff", "pcm_s16be"),
    Form("mka", "pcm_s16le"),
    Form("w64", "pcm_s24le"),
]
LOSSY = [
    Form("mp3", "libmp3lame"),
    Form("ogg", "libopus"),
    Form("m4a", "aac"),
    Form("aac", "aac"),
    Form("mka", "libopus"),
    Form("webm", "libopus"),
    Form("ac3", "ac3"),
    Form("ts", "mp2"),
]
ODD = [
    Form("mp3", "libmp3lame", 44_100, "mono"),
    Form("mp3", "libmp3lame", 44_100),
    Form("wav", "pcm_u8", 8_000, "mono"),
    Form("wav", "pcm_alaw", 8_000, "mono"),
    Form("flac", "flac", 96_000),
    Form("wav", "pcm_f32le", 11_025),
    Form("m4a", "aac", 22_050),
    Form("wav", "pcm_f64le", 192_000, "mono"),
]


def _name(form: Form) -> str:
    return f"{form.ending}-{form.codec}-{form.rate}-{form.layout}"


@pytest.fixture(scope="module")
def music() -> Pcm:
    return decode_file(PROGRAMME)[5 * RATE : 13 * RATE]


def _stored(folder: Path, form: Form, sound: Pcm) -> str:
    pcm: NDArray[np.float32] = sound
    if form.rate != RATE or form.layout != "stereo":
        pcm = resampled(sound, form.rate, form.layout)
    return str(write_audio(folder / f"a.{form.ending}", pcm, rate=form.rate, layout=form.layout, codec=form.codec))


def _joined(blocks: Iterable[Block]) -> Pcm:
    return np.concatenate([block.pcm for block in blocks])


@pytest.mark.parametrize("form", [*LOSSLESS, *LOSSY, *ODD], ids=_name)
def test_any_form_becomes_blocks_that_sound_the_same(form: Form, music: Pcm, tmp_path: Path) -> None:
    """Whatever codec, rate and layout: 960 stereo samples a block, positions without a hole, the same sound."""
    blocks = list(decode(_stored(tmp_path, form, music)))
    assert [block.position_samples for block in blocks] == [k * FRAME_SAMPLES for k in range(len(blocks))]
    assert {block.pcm.shape for block in blocks} == {(FRAME_SAMPLES, 2)}
    assert {block.pcm.dtype for block in blocks} == {np.dtype(np.float32)}
    heard = _joined(blocks)
    assert abs(len(heard) - len(music)) < 6_000
    reference = music
    if form.layout == "mono":
        reference = np.repeat(music.mean(axis=1, keepdims=True), 2, axis=1)
    assert align(reference, heard)[1] > (0.98 if form.rate >= 22_050 else 0.95)


@pytest.mark.parametrize("form", LOSSLESS, ids=_name)
def test_lossless_sound_is_not_changed(form: Form, music: Pcm, tmp_path: Path) -> None:
    """48 kHz stereo passes through to the bit, and the last block is filled up with zeros."""
    sound = music[: 2 * RATE + 100]
    heard = _joined(decode(_stored(tmp_path, form, sound)))
    assert len(heard) == -(-len(sound) // FRAME_SAMPLES) * FRAME_SAMPLES
    assert np.abs(heard[: len(sound)] - sound).max() < 1e-4
    assert not heard[len(sound) :].any()


def test_mono_keeps_its_level_on_both_sides(tmp_path: Path) -> None:
    """A mono programme is as loud as its file, left and right."""
    tone = (0.5 * np.sin(np.arange(RATE) / 20)).astype(np.float32)[:, None]
    heard = _joined(decode(str(write_audio(tmp_path / "m.wav", tone, layout="mono"))))
    assert np.abs(heard - tone).max() < 1e-4


HALF_DB = 20 * np.log10(np.sqrt(0.5))
MIXES: dict[str, list[tuple[float, float]]] = {
    "5.1": [(0, -np.inf), (-np.inf, 0), (HALF_DB, HALF_DB), (-np.inf, -np.inf), (HALF_DB, -np.inf), (-np.inf, HALF_DB)],
    "quad": [(0, -np.inf), (-np.inf, 0), (HALF_DB, -np.inf), (-np.inf, HALF_DB)],
    "3.0": [(0, -np.inf), (-np.inf, 0), (HALF_DB, HALF_DB)],
}
"""Levels on both sides of each channel (ITU-R BS.775): centre and surround half as strong, and no bass channel."""


@pytest.mark.parametrize("layout", MIXES)
def test_more_channels_are_mixed_down_by_the_standard_and_cannot_clip(layout: str, tmp_path: Path) -> None:
    """All at full scale at once stay within it; one alone has its own share of that."""
    tone = np.sin(np.arange(RATE) / 20).astype(np.float32)[:, None]
    full = np.repeat(tone, len(MIXES[layout]), axis=1)
    heard = _joined(decode(str(write_audio(tmp_path / "full.wav", full, layout=layout))))
    assert 0.99 < np.abs(heard).max() <= 1.001
    most = max(sum(10 ** (sides[side] / 20) for sides in MIXES[layout]) for side in (0, 1))
    for channel, sides in enumerate(MIXES[layout]):
        one = np.zeros_like(full)
        one[:, channel] = tone[:, 0]
        heard = _joined(decode(str(write_audio(tmp_path / "one.wav", one, layout=layout))))
        assert np.abs(heard).max(axis=0) == pytest.approx([10 ** (db / 20) / most for db in sides], abs=0.003)


def _full(url: str) -> Pcm:
    return _joined(decode(url))


@pytest.mark.parametrize("form", [*LOSSLESS, *LOSSY, *ODD], ids=_name)
def test_a_start_is_exact_to_the_sample(form: Form, music: Pcm, tmp_path: Path) -> None:
    """Beginning at n gives what a decode from the beginning has at n, and says so in its positions."""
    url = _stored(tmp_path, form, music)
    whole = _full(url)
    blocks = list(decode(url, start_samples=START_SAMPLES))
    assert [block.position_samples for block in blocks] == [
        START_SAMPLES + k * FRAME_SAMPLES for k in range(len(blocks))
    ]
    heard = _joined(blocks)
    expected = whole[START_SAMPLES:]
    assert abs(len(heard) - len(expected)) < 2 * FRAME_SAMPLES
    both = min(len(heard), len(expected)) - 2 * FRAME_SAMPLES
    offset, ncc = align(whole[START_SAMPLES - 2_000 : START_SAMPLES + both + 2_000], heard[:both])
    assert offset == 2_000
    assert ncc > 0.999


@pytest.mark.parametrize("start", [1, 100, 47_999, 48_000, 48_001, 200_000])
def test_any_start_near_the_beginning_is_exact_too(start: int, music: Pcm, tmp_path: Path) -> None:
    """Before, at and after the preroll the samples are the right ones."""
    url = _stored(tmp_path, Form("wav", "pcm_s16le"), music)
    heard = _joined(islice(decode(url, start_samples=start), 20))
    assert np.array_equal(heard, _full(url)[start : start + len(heard)])


@pytest.mark.parametrize(
    "form", [Form("wav", "pcm_s16le"), Form("mp3", "libmp3lame"), Form("ogg", "libopus")], ids=_name
)
def test_a_start_beyond_the_end_is_silence_or_the_rest_of_the_division(form: Form, music: Pcm, tmp_path: Path) -> None:
    """Once: nothing to hear. Looping: the place that so many samples of looping lead to."""
    url = _stored(tmp_path, form, music)
    looped = list(islice(decode(url, loop=True), 1 + 4 * len(music) // FRAME_SAMPLES))
    positions = np.array([block.position_samples for block in looped])
    length = int(
        FRAME_SAMPLES * (np.argmax(np.diff(positions) < 0) + 1) - positions[np.argmax(np.diff(positions) < 0) + 1]
    )
    for start in (length + 5_000, 3 * length + 70_000, 50 * length + 70_000):
        assert list(decode(url, start_samples=start)) == []
        block = next(decode(url, loop=True, start_samples=start))
        assert block.position_samples == start % length


def _tone(cycles: int, samples: int) -> NDArray[np.float32]:
    wave = 0.5 * np.sin(2 * np.pi * cycles * np.arange(samples) / samples)
    return np.repeat(wave.astype(np.float32)[:, None], 2, axis=1)


@pytest.mark.parametrize("rate", [48_000, 44_100, 8_000])
def test_a_loop_has_no_break_at_its_seam(rate: int, tmp_path: Path) -> None:
    """A tone that fits its file a whole number of times goes on over the seam as if there were none."""
    samples = rate + 137
    url = str(write_audio(tmp_path / "tone.wav", _tone(441, samples), rate=rate, codec="pcm_f32le"))
    heard = _joined(islice(decode(url, loop=True), 250))[2_000:]
    time = np.arange(len(heard)) + 2_000
    period = samples * RATE / rate / 441
    expected = 0.5 * np.sin(2 * np.pi * time / period)
    assert np.abs(heard[:, 0] - expected).max() < 2e-3


@pytest.mark.parametrize("form", [Form("wav", "pcm_s16le"), Form("mp3", "libmp3lame", 44_100)], ids=_name)
def test_positions_begin_again_with_every_pass(form: Form, music: Pcm, tmp_path: Path) -> None:
    """Blocks go on in steps of 960; their positions wrap where the source does, also within a block."""
    sound = music[: 2 * RATE + 333]
    url = _stored(tmp_path, form, sound)
    once = _full(url)
    blocks = list(islice(decode(url, loop=True), 400))
    positions = [block.position_samples for block in blocks]
    wraps = [k for k in range(1, len(blocks)) if positions[k] != positions[k - 1] + FRAME_SAMPLES]
    assert len(wraps) == 3
    for k in wraps:
        assert 0 <= positions[k] < FRAME_SAMPLES
    last = wraps[-1] + 10
    there = once[positions[last] : positions[last] + FRAME_SAMPLES]
    # Of another rate than 48 kHz a pass begins within a sample, not on one.
    assert np.corrcoef(blocks[last].pcm.ravel(), there.ravel())[0, 1] > 0.995


def test_a_loop_of_less_than_a_block_goes_on(tmp_path: Path) -> None:
    """A few samples, over and over, fill block after block."""
    sound = _tone(1, 100)
    url = str(write_audio(tmp_path / "short.wav", sound, codec="pcm_f32le"))
    heard = _joined(islice(decode(url, loop=True), 5))
    assert np.allclose(heard, np.tile(sound, (48, 1)), atol=1e-6)


def test_a_change_of_rate_and_layout_midway_is_followed(music: Pcm, tmp_path: Path) -> None:
    """Two MP3 streams in one file, 44.1 kHz mono and 48 kHz stereo, are both heard at their speed."""
    first, second = music[: 2 * RATE], music[3 * RATE : 6 * RATE]
    mono = write_audio(
        tmp_path / "1.mp3", resampled(first, 44_100, "mono"), rate=44_100, layout="mono", codec="libmp3lame"
    )
    stereo = write_audio(tmp_path / "2.mp3", second, codec="libmp3lame")
    both = tmp_path / "both.mp3"
    both.write_bytes(mono.read_bytes() + stereo.read_bytes())
    heard = _full(str(both))
    assert abs(len(heard) - 5 * RATE) < 6_000
    assert align(heard, second)[1] > 0.98
    assert align(heard, np.repeat(first.mean(axis=1, keepdims=True), 2, axis=1))[1] > 0.98


def test_cover_art_is_ignored(music: Pcm, tmp_path: Path) -> None:
    """A picture beside the sound changes nothing."""
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        assert isinstance(video, VideoStream)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=RATE, layout="stereo")
        for _ in range(25):
            container.mux(video.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray((music[:RATE] * 32_767).astype(np.int16).reshape(1, -1), "s16", "stereo")
        frame.sample_rate = RATE
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    assert np.abs(_full(str(path))[:RATE] - music[:RATE]).max() < 1e-3


def _code(url: str, *, loop: bool = False) -> ErrorCode:
    with pytest.raises(SourceError) as caught:
        for _ in decode(url, loop=loop):
            pass
    return caught.value.code


def test_each_unusable_file_has_its_code(tmp_path: Path) -> None:
    """Missing, empty, text, garbage, a folder: each failure has its own name, looping or not."""
    (tmp_path / "empty.mp3").touch()
    (tmp_path / "text.txt").write_text("no sound here\n" * 1_000)
    (tmp_path / "text.mp3").write_text("no sound here\n" * 1_000)
    (tmp_path / "garbage.bin").write_bytes(np.random.default_rng(5).bytes(100_000))
    silent = write_audio(tmp_path / "nothing.wav", np.zeros((10, 2), np.float32))
    (tmp_path / "header.wav").write_bytes(silent.read_bytes()[:-40])
    expected = {
        "missing.mp3": ErrorCode.SOURCE_NOT_FOUND,
        "empty.mp3": ErrorCode.SOURCE_EMPTY,
        "text.txt": ErrorCode.SOURCE_NOT_AUDIO,
        "text.mp3": ErrorCode.SOURCE_NOT_AUDIO,
        "garbage.bin": ErrorCode.SOURCE_NOT_AUDIO,
        ".": ErrorCode.SOURCE_NOT_AUDIO,
        "text.txt/below": ErrorCode.SOURCE_NOT_FOUND,
        "header.wav": ErrorCode.SOURCE_EMPTY,
    }
    assert {name: _code(str(tmp_path / name)) for name in expected} == expected
    assert {name: _code(str(tmp_path / name), loop=True) for name in expected} == expected


def test_a_film_without_sound_is_no_audio(tmp_path: Path) -> None:
    """Pictures alone are not a source."""
    path = tmp_path / "mute.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        assert isinstance(video, VideoStream)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for _ in range(5):
            container.mux(video.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(video.encode(None))
    assert _code(str(path)) is ErrorCode.SOURCE_NOT_AUDIO


def test_a_scratch_is_skipped_and_a_ruin_is_not(music: Pcm, tmp_path: Path) -> None:
    """A corrupt packet or two cost their own length; when nothing more can be decoded, that is an error."""
    good = write_audio(tmp_path / "good.m4a", music, codec="aac")
    with av.open(str(good)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux() if packet.size]

    def spoiled(name: str, bad: Iterable[int]) -> str:
        data = bytearray(good.read_bytes())
        for number in bad:
            place, size = places[number]
            assert place is not None
            data[place : place + size] = b"\xff" * size
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    scratched = _full(spoiled("scratched.m4a", (100, 101, 150)))
    assert align(scratched, music[:RATE])[1] > 0.98
    assert align(scratched, music[6 * RATE : 7 * RATE])[1] > 0.98
    assert _code(spoiled("ruin.m4a", range(100, len(places)))) is ErrorCode.SOURCE_BROKEN
    assert _code(spoiled("never.m4a", range(len(places)))) is ErrorCode.SOURCE_NOT_AUDIO


def test_a_local_playlist_cannot_reach_the_network(tmp_path: Path) -> None:
    """A file may not make anybody open an address."""
    (tmp_path / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    assert _code(str(tmp_path / "list.m3u8")) is ErrorCode.SOURCE_FORBIDDEN


def test_a_path_is_never_taken_for_a_protocol(music: Pcm, tmp_path: Path) -> None:
    """Colons and the like in a file's name mean nothing."""
    folder = tmp_path / "concat:a|b,c %20 ü"
    folder.mkdir()
    url = _stored(folder, Form("wav", "pcm_s16le"), music[:RATE])
    assert len(_full(url)) == RATE
