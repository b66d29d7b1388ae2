"""Something for members to say: a second of a steady tone in Opus, encoded once."""

from functools import cache

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext

from tests.emulator.wire import SAMPLES_PER_TICK

_RATE = 48_000
_LOUDNESS = 0.3
FRAMES_PER_SECOND = _RATE // SAMPLES_PER_TICK


@cache
def second_of_tone(hertz: int) -> tuple[bytes, ...]:
    """50 Opus frames; played in a loop they go on without a click where `hertz` is whole."""
    encoder = av.CodecContext.create("libopus", "w")
    if not isinstance(encoder, AudioCodecContext):
        raise TypeError("libopus is no audio codec")
    encoder.sample_rate = _RATE
    encoder.layout = "stereo"
    encoder.format = av.AudioFormat("flt")
    encoder.options = {"frame_duration": "20", "vbr": "off"}
    encoder.open()
    wave = _LOUDNESS * np.sin(2 * np.pi * hertz * np.arange(2 * _RATE) / _RATE)
    frames: list[bytes] = []
    for start in range(0, len(wave), SAMPLES_PER_TICK):
        block = np.repeat(wave[start : start + SAMPLES_PER_TICK].astype(np.float32), 2)
        frame = av.AudioFrame.from_ndarray(block.reshape(1, -1), format="flt", layout="stereo")
        frame.sample_rate = _RATE
        frame.pts = start
        frames += [bytes(packet) for packet in encoder.encode(frame)]
    frames += [bytes(packet) for packet in encoder.encode(None)]
    return tuple(frames[FRAMES_PER_SECOND // 2 :][:FRAMES_PER_SECOND])  # past the encoder's first moments
