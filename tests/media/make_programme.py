"""Makes `programme.ogg`: 40 s of music-like sound that no two places of which are alike.

    python -m tests.media.make_programme

Chords of ever different length and pitch follow one another, and every voice drifts slowly in pitch, so that
correlation has one peak. Left and right carry different voices. The result is the same at every run.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

RATE = 48_000
DURATION_S = 40
PEAK = 10 ** (-3 / 20)
PROGRAMME = Path(__file__).with_name("programme.ogg")

_SEED = 20_260_101
_CHORDS = ((0, 4, 7, 11), (-3, 0, 4, 9), (2, 5, 9, 12), (-5, -1, 2, 7), (3, 7, 10, 14), (-2, 2, 5, 8))
_ROOT_HZ = 196.0
_FADE_S = 0.18
_HARMONICS = (1.0, 0.45, 0.3, 0.18, 0.1, 0.06)


def synthesise() -> NDArray[np.float32]:
    """The sound, shape (n, 2), peak at -3 dBFS."""
    rng = np.random.default_rng(_SEED)
    total = RATE * DURATION_S
    sound = np.zeros((total, 2))
    begin_s, number = 0.0, 0
    while begin_s < DURATION_S:
        length_s = float(rng.uniform(0.9, 2.1))
        transpose = 0.37 * number % 7
        for voice, step in enumerate(_CHORDS[number % len(_CHORDS)]):
            pitch_hz = _ROOT_HZ * 2 ** ((step + transpose + float(rng.normal(0, 0.08))) / 12)
            note = _note(rng, pitch_hz, length_s + _FADE_S)
            first = int(begin_s * RATE)
            part = note[: total - first]
            # Voices 0 and 2 sit left, 1 and 3 right, each a little on the other side as well.
            left, right = (0.9, 0.2) if voice % 2 == 0 else (0.15, 0.9)
            sound[first : first + len(part), 0] += left * part
            sound[first : first + len(part), 1] += right * part
        begin_s += length_s
        number += 1
    fade = np.minimum(1.0, np.arange(total) / (0.02 * RATE))
    sound *= (fade * fade[::-1])[:, None]
    return np.asarray(sound * (PEAK / np.abs(sound).max()), np.float32)


def _note(rng: np.random.Generator, pitch_hz: float, length_s: float) -> NDArray[np.float64]:
    time_s = np.arange(int(length_s * RATE)) / RATE
    drift = 0.004 * np.sin(2 * np.pi * float(rng.uniform(0.3, 0.9)) * time_s + float(rng.uniform(0, 6)))
    phase = 2 * np.pi * np.cumsum(pitch_hz * (1 + drift)) / RATE
    tone = np.zeros(len(time_s))
    for harmonic, level in enumerate(_HARMONICS, start=1):
        tone += level * float(rng.uniform(0.6, 1.0)) * np.sin(harmonic * phase + float(rng.uniform(0, 6)))
    swell = np.minimum(1.0, np.minimum(time_s, time_s[::-1]) / _FADE_S)
    shape = np.sin(np.pi / 2 * swell) ** 2 * (0.75 + 0.25 * np.cos(2 * np.pi * 0.4 * time_s))
    return np.asarray(tone * shape)


def write(path: Path, pcm: NDArray[np.float32], bitrate: int = 128_000) -> None:
    """Write Ogg Opus without dates or random numbers in it."""
    with av.open(path, "w", format="ogg", options={"fflags": "+bitexact", "serial_offset": "1"}) as container:
        stream = container.add_stream("libopus", rate=RATE, layout="stereo")
        stream.bit_rate = bitrate
        frame = av.AudioFrame.from_ndarray(pcm.reshape(1, -1), format="flt", layout="stereo")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(format=stream.format.name, layout="stereo", rate=RATE)
        for part in (*resampler.resample(frame), None):
            container.mux(stream.encode(part))


if __name__ == "__main__":
    write(PROGRAMME, synthesise())
