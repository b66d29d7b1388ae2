"""Opus frames to sound, for those who ask for it. Loading this module loads FFmpeg; relaying needs neither."""

from __future__ import annotations

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from numpy.typing import NDArray

from shared.protocol.opus import FRAME_SAMPLES, SAMPLE_RATE_HZ

CHANNELS = 2

Pcm = NDArray[np.int16]
"""Shape (960, 2)."""

SILENCE: Pcm = np.zeros((FRAME_SAMPLES, CHANNELS), np.int16)
SILENCE.flags.writeable = False


class OpusDecoder:
    """The decoder of one talk's frames: what it heard before shapes what it says next."""

    def __init__(self) -> None:
        context = av.CodecContext.create("libopus", "r")
        assert isinstance(context, AudioCodecContext)
        context.sample_rate = SAMPLE_RATE_HZ
        context.layout = "stereo"
        context.open()
        self._context = context

    def decode(self, opus: bytes) -> Pcm | None:
        """Decode one packet of 20 ms; mono comes out as stereo.

        Returns: None when libopus does not take it for one.
        """
        try:
            frames = self._context.decode(av.Packet(opus))
        except av.FFmpegError:
            return None
        if len(frames) != 1 or frames[0].samples != FRAME_SAMPLES:
            return None
        return frames[0].to_ndarray().reshape(FRAME_SAMPLES, CHANNELS).astype(np.int16, copy=False)
