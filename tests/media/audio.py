"""Sound for tests: decode, write, align, look for clicks. Arrays are float32 of shape (n, 2) at 48 kHz."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from numpy.typing import NDArray

RATE = 48_000
FRAME_SAMPLES = 960
PROGRAMME = Path(__file__).with_name("programme.ogg")

Pcm = NDArray[np.float32]


def decode_opus(packets: Iterable[bytes]) -> Pcm:
    """Decode raw Opus packets of one stream, the encoder's delay included: 960 samples for each 20 ms packet."""
    decoder = av.CodecContext.create("libopus", "r")
    assert isinstance(decoder, AudioCodecContext)
    decoder.sample_rate = RATE
    decoder.layout = "stereo"
    decoder.open()
    frames: list[AudioFrame] = []
    for packet in packets:
        frames += decoder.decode(av.Packet(packet))
    return _stereo(frames)


def decode_file(path: Path | str) -> Pcm:
    """Decode the best audio stream of a file."""
    with av.open(str(path)) as container:
        stream = container.streams.best("audio")
        assert isinstance(stream, AudioStream)
        return _stereo(container.decode(stream))


def _stereo(frames: Iterable[AudioFrame]) -> Pcm:
    resampler = av.AudioResampler(format="flt", layout="stereo", rate=RATE)
    parts: list[AudioFrame | None] = []
    for frame in frames:
        frame.pts = None
        parts += resampler.resample(frame)
    parts += resampler.resample(None)
    arrays = [part.to_ndarray().astype(np.float32).reshape(-1, 2) for part in parts if part is not None]
    return np.concatenate(arrays) if arrays else np.zeros((0, 2), np.float32)


def align(reference: Pcm, heard: Pcm) -> tuple[int, float]:
    """Find where in the reference the heard sound is.

    Returns: (offset_samples, ncc): `heard[i]` sounds like `reference[offset_samples + i]`; ncc is the normalised
        cross-correlation of what overlaps there, both channels together, 1.0 for equal but for the volume. The overlap
        is at least half of the shorter one.
    """
    n, m = len(reference), len(heard)
    size = 1 << (n + m - 1).bit_length()
    product = np.zeros(size)
    for channel in range(2):
        spectrum = np.fft.rfft(reference[:, channel], size) * np.conj(np.fft.rfft(heard[:, channel], size))
        product += np.fft.irfft(spectrum, size)
    offsets = np.arange(-(m - 1), n)
    correlation = product[offsets]
    overlap_begin, overlap_end = np.maximum(offsets, 0), np.minimum(offsets + m, n)
    energy = _energy(reference, overlap_begin, overlap_end) * _energy(
        heard, overlap_begin - offsets, overlap_end - offsets
    )
    ncc = np.where(
        overlap_end - overlap_begin >= min(n, m) // 2, correlation / np.sqrt(np.maximum(energy, 1e-12)), -np.inf
    )
    best = int(np.argmax(ncc))
    return int(offsets[best]), float(ncc[best])


def _energy(pcm: Pcm, begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.float64]:
    sums = np.concatenate([[0.0], np.cumsum(np.square(pcm, dtype=np.float64).sum(axis=1))])
    return np.asarray(sums[end] - sums[begin])


@dataclass(frozen=True, slots=True)
class BorderClicks:
    """How rough the difference between heard and reference is, where packets meet and everywhere else.

    Attributes:
        at_borders: worst roughness at a multiple of 960 samples, in units of the typical roughness around it.
        elsewhere: the same halfway between borders: what the encoder itself yields.
    """

    at_borders: float
    elsewhere: float

    @property
    def audible(self) -> bool:
        """A border sticks out as no other place does."""
        return self.at_borders > 2.0 * self.elsewhere


def border_clicks(heard: Pcm, reference: Pcm) -> BorderClicks:
    """Measure discontinuities at packet borders.

    Args:
        heard: decoded packets; a packet begins at every multiple of 960 samples.
        reference: what was encoded, aligned to `heard` and at least as long. The music's own jumps cancel out.
    """
    error = heard.astype(np.float64) - reference[: len(heard)]
    # A click is broad-band: the second difference leaves little else.
    rough = np.abs(np.diff(error, n=2, axis=0)).max(axis=1)
    frames = (len(rough) - FRAME_SAMPLES) // FRAME_SAMPLES
    assert frames > 0, "too short to have borders"
    local = rough[: frames * FRAME_SAMPLES].reshape(frames, FRAME_SAMPLES)
    typical = np.sqrt(np.mean(np.square(local), axis=1)) + 1e-7

    def worst(shift: int) -> float:
        # The second difference at sample k spans k to k + 2: look at all that touch the place.
        places = np.arange(1, frames) * FRAME_SAMPLES + shift
        peaks = np.stack([rough[places + near] for near in (-2, -1, 0)]).max(axis=0)
        return float((peaks / typical[1:]).max())

    return BorderClicks(at_borders=worst(0), elsewhere=max(worst(240), worst(480), worst(720)))


def write_audio(
    path: Path,
    pcm: NDArray[np.float32],
    *,
    rate: int = RATE,
    layout: str = "stereo",
    codec: str = "pcm_s16le",
    container_format: str | None = None,
    bitrate: int | None = None,
    options: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
) -> Path:
    """Write an audio file.

    Args:
        path: its ending chooses the format unless `container_format` is given.
        pcm: shape (n, channels) at `rate`; channels as `layout` has them.
        codec: FFmpeg's name: `libmp3lame`, `flac`, `aac`, `libopus`, `pcm_s16le` ..
        options: FFmpeg's options for the container.
        tags: title, artist and the like.
    """
    with av.open(str(path), "w", format=container_format, options=options or {}) as container:
        container.metadata.update(tags or {})
        stream = container.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(stream, AudioStream)
        if bitrate is not None:
            stream.bit_rate = bitrate
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(pcm, np.float32).reshape(1, -1), format="flt", layout=layout
        )
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=stream.format.name, layout=layout, rate=rate)
        for part in (*resampler.resample(frame), None):
            # FLAC's last packet holds no sound but its check sum, which Ogg has no place for.
            container.mux([packet for packet in stream.encode(part) if packet.size or path.suffix != ".oga"])
    return path


def resampled(pcm: Pcm, rate: int, layout: str = "stereo") -> NDArray[np.float32]:
    """`pcm` at another rate and layout, shape (n, channels)."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm).reshape(1, -1), format="flt", layout="stereo")
    frame.sample_rate = RATE
    resampler = av.AudioResampler(format="flt", layout=layout, rate=rate)
    parts: list[AudioFrame | None] = [*resampler.resample(frame), *resampler.resample(None)]
    arrays = [part.to_ndarray().reshape(part.samples, -1) for part in parts if part is not None]
    return np.concatenate(arrays).astype(np.float32)
