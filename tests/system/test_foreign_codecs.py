"""Sources that another program made: every codec that a radio station might hand over."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.media.audio import PROGRAMME, align, decode_file, decode_opus
from worker.encode.records import ChildOrder
from worker.encode.source import EncodedFrame, SourceChild

_CLIP_S = 6


def _write_clip(clip: Path, options: list[str]) -> None:
    ffmpeg = shutil.which("ffmpeg")
    assert ffmpeg, "install the packages of tests/packages.txt"
    subprocess.run([ffmpeg, "-v", "error", "-t", str(_CLIP_S), "-i", str(PROGRAMME), *options, str(clip)], check=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.mp3", ["-c:a", "libmp3lame", "-b:a", "128k", "-ar", "44100"]),
        ("clip.m4a", ["-c:a", "aac", "-b:a", "128k"]),
        ("clip.flac", ["-c:a", "flac", "-sample_fmt", "s32", "-ar", "96000"]),
        ("clip.wav", ["-c:a", "pcm_s24le"]),
        ("clip.opus", ["-c:a", "libopus", "-b:a", "96k"]),
        ("clip.mka", ["-c:a", "ac3", "-b:a", "192k"]),
        ("clip.aiff", ["-c:a", "pcm_s16be", "-ar", "32000"]),
        ("clip.ts", ["-c:a", "mp2", "-b:a", "192k"]),
    ],
)
async def test_what_ffmpeg_wrote_is_heard_as_it_was(tmp_path: Path, name: str, options: list[str]) -> None:
    """A clip that the ffmpeg program encoded comes out of the child as the same sound."""
    clip = tmp_path / name
    _write_clip(clip, options)
    packets = []
    async with await SourceChild.start(ChildOrder(url=str(clip))) as child:
        while (told := await child.read()) is not None:
            packets += [told.packet] if isinstance(told, EncodedFrame) else []
    heard = decode_opus(packets)
    _, ncc = align(decode_file(PROGRAMME)[: _CLIP_S * 48_000], heard)
    assert ncc > 0.97
    assert abs(len(heard) / 48_000 - _CLIP_S) < 0.1
