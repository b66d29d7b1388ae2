"""libopus through PyAV: 48 kHz stereo, one packet for every 20 ms. Used in the encoding child only."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from numpy.typing import NDArray

from shared.errors import ConfigError
from shared.schema.records import OpusRecord

SAMPLE_RATE = 48_000
FRAME_SAMPLES = 960
CHANNELS = 2
MAX_PACKET_BYTES = 1_275
"""Largest packet that goes on the wire."""
MAX_CONSTANT_BITRATE = MAX_PACKET_BYTES * 8 * 50
"""510 kbit/s: above it libopus pads packets beyond `MAX_PACKET_BYTES`."""
MAX_VARIABLE_BITRATE = 250_000
"""A variable-rate packet takes up to twice the mean and a few bytes more, so above this one could be too large."""

_PRE_SKIP_OFFSET = 10
"""Where the encoder's delay stands in the OpusHead it hands out (RFC 7845 section 5.1, little endian)."""


def open_libopus(bitrate: int, settings: Mapping[str, str]) -> AudioCodecContext:
    """Open a libopus encoder and check that it took everything it was told.

    Args:
        bitrate: bits per second.
        settings: FFmpeg's private options of libopus, by name.
    Raises: ConfigError: a value was refused, a name was left unused, or the bit rate came back different.
    Source: FFmpeg, avcodec_open2: options that nobody consumed stay in the dictionary and raise nothing.
    """
    context = av.CodecContext.create("libopus", "w")
    if not isinstance(context, AudioCodecContext):
        raise ConfigError("FFmpeg's libopus is not an audio encoder")
    context.sample_rate = SAMPLE_RATE
    context.layout = "stereo"
    context.format = "flt"
    context.bit_rate = bitrate
    context.options = dict(settings)
    try:
        context.open()
    except av.FFmpegError as error:
        raise ConfigError(f"libopus refused {bitrate} bit/s with {dict(settings)}: {error.strerror}") from error
    if context.options:
        raise ConfigError(f"libopus does not know {', '.join(sorted(context.options))}")
    if context.bit_rate != bitrate:
        raise ConfigError(f"libopus took {context.bit_rate} bit/s for {bitrate}")
    if context.frame_size != FRAME_SAMPLES:
        raise ConfigError(f"libopus takes frames of {context.frame_size} samples, not {FRAME_SAMPLES}")
    return context


class OpusEncoder:
    """One encoder for one stream of blocks; what it heard before shapes what it says next.

    A packet decodes to the block it was made from, later by `delay_samples`: the encoder looks that far ahead, and
    the first `delay_samples` heard of a stream are the encoder's own silence.

    Attributes:
        bitrate: effective bits per second; `options.bitrate`, at most `MAX_CONSTANT_BITRATE`.
        vbr: effective; above `MAX_VARIABLE_BITRATE` the rate is constant whatever was asked.
        delay_samples: the encoder's lookahead at 48 kHz.
    Raises: ConfigError: see `open_libopus`.
    """

    def __init__(self, options: OpusRecord) -> None:
        self.vbr = options.vbr and options.bitrate <= MAX_VARIABLE_BITRATE
        self._context = open_libopus(
            min(options.bitrate, MAX_CONSTANT_BITRATE),
            {
                "application": "audio",
                "frame_duration": "20",
                "vbr": "on" if self.vbr else "off",
                "fec": "1" if options.fec else "0",
                "packet_loss": str(options.expected_loss),
            },
        )
        self.bitrate = self._context.bit_rate or 0
        self.delay_samples = _lookahead_samples(self._context)
        self._next_samples = 0

    def encode(self, pcm: NDArray[np.float32]) -> bytes:
        """Encode one block into one packet.

        Args: pcm: shape (960, 2), full scale at 1.0.
        Raises:
            ValueError: another shape or type.
            ConfigError: libopus broke the rule of one packet, at most `MAX_PACKET_BYTES`, for every block.
        """
        if pcm.shape != (FRAME_SAMPLES, CHANNELS) or pcm.dtype != np.float32:
            raise ValueError(f"block of {pcm.shape} {pcm.dtype}, not ({FRAME_SAMPLES}, {CHANNELS}) float32")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm).reshape(1, -1), format="flt", layout="stereo")
        frame.sample_rate = SAMPLE_RATE
        frame.pts = self._next_samples
        self._next_samples += FRAME_SAMPLES
        packets = [_checked(bytes(packet)) for packet in self._context.encode(frame)]
        if len(packets) != 1:
            raise ConfigError(f"libopus made {len(packets)} packets of one block")
        return packets[0]

    def flush(self) -> list[bytes]:
        """End the stream: the packets (at most one) with what is still inside because of the delay.

        Nothing can be encoded afterwards.
        """
        return [_checked(bytes(packet)) for packet in self._context.encode(None)]


def _lookahead_samples(context: AudioCodecContext) -> int:
    head = context.extradata
    if head is None or not head.startswith(b"OpusHead") or len(head) < _PRE_SKIP_OFFSET + 2:
        raise ConfigError("libopus did not tell its delay")
    (pre_skip_samples,) = struct.unpack_from("<H", head, _PRE_SKIP_OFFSET)
    return int(pre_skip_samples)


def _checked(packet: bytes) -> bytes:
    if len(packet) > MAX_PACKET_BYTES:
        raise ConfigError(f"libopus made a packet of {len(packet)} bytes; {MAX_PACKET_BYTES} are allowed")
    return packet
