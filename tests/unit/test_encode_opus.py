"""The encoder: one packet for every block, as it was told, or an error."""

from __future__ import annotations

import numpy as np
import pytest

from shared.errors import ConfigError
from shared.protocol.opus import check_frame
from shared.schema.job import OpusOptions
from tests.media.audio import PROGRAMME, Pcm, align, decode_file, decode_opus
from worker.encode.opus import FRAME_SAMPLES, MAX_PACKET_BYTES, OpusEncoder, open_libopus


@pytest.fixture(scope="module")
def music() -> Pcm:
    return decode_file(PROGRAMME)[: FRAME_SAMPLES * 250]


def _encode(encoder: OpusEncoder, pcm: Pcm) -> list[bytes]:
    return [encoder.encode(pcm[k : k + FRAME_SAMPLES]) for k in range(0, len(pcm), FRAME_SAMPLES)]


def _noise(frames: int) -> Pcm:
    rng = np.random.default_rng(1)
    noise = rng.uniform(-1, 1, (frames * FRAME_SAMPLES, 2))
    noise[len(noise) // 3 : len(noise) // 2] = 0  # silence and an onset ask for the largest packets
    return noise.astype(np.float32)


def test_every_block_gives_one_valid_packet(music: Pcm) -> None:
    """20 ms in, one 20 ms packet out, from the first block on."""
    packets = _encode(OpusEncoder(OpusOptions()), music)
    assert len(packets) == len(music) // FRAME_SAMPLES
    for packet in packets:
        check_frame(packet)


def test_sound_comes_back_later_by_the_delay(music: Pcm) -> None:
    """`delay_samples` is what lies between input and decoded output."""
    encoder = OpusEncoder(OpusOptions())
    heard = decode_opus(_encode(encoder, music))
    offset, ncc = align(music, heard)
    assert offset == -encoder.delay_samples
    assert ncc > 0.98


def test_flush_hands_out_the_last_samples(music: Pcm) -> None:
    """With the flushed packet the last block is heard to its end."""
    encoder = OpusEncoder(OpusOptions())
    packets = [*_encode(encoder, music), *encoder.flush()]
    heard = decode_opus(packets)
    tail = heard[encoder.delay_samples :][len(music) - 480 : len(music)]
    assert len(tail) == 480
    assert align(music[-480:], tail)[1] > 0.98


def test_bitrate_is_read_back_and_changes_the_size(music: Pcm) -> None:
    """More bits per second, larger packets."""
    sizes = []
    for bitrate in (32_000, 96_000, 192_000):
        encoder = OpusEncoder(OpusOptions(bitrate=bitrate))
        assert encoder.bitrate == bitrate
        sizes.append(sum(map(len, _encode(encoder, music))))
    assert sizes[0] * 2 < sizes[1] < sizes[2] / 1.5


@pytest.mark.parametrize("bitrate", [16_000, 96_000, 384_000])
def test_constant_bitrate_is_constant(bitrate: int, music: Pcm) -> None:
    """Without vbr all packets have the length the bit rate gives, in music, noise and silence."""
    encoder = OpusEncoder(OpusOptions(bitrate=bitrate, vbr=False))
    sound = np.concatenate([music[: 50 * FRAME_SAMPLES], _noise(50), np.zeros((20 * FRAME_SAMPLES, 2), np.float32)])
    assert {len(packet) for packet in _encode(encoder, sound)} == {bitrate // 8 // 50}


def test_variable_bitrate_varies(music: Pcm) -> None:
    """With vbr the lengths follow the sound."""
    assert len({len(packet) for packet in _encode(OpusEncoder(OpusOptions(vbr=True)), music)}) > 10


@pytest.mark.parametrize("vbr", [True, False])
@pytest.mark.parametrize("bitrate", [96_000, 250_000, 256_000, 384_000, 510_000, 512_000])
def test_no_bitrate_makes_a_packet_too_large(bitrate: int, vbr: bool) -> None:
    """Every allowed bit rate stays within what may be sent, even for noise."""
    encoder = OpusEncoder(OpusOptions(bitrate=bitrate, vbr=vbr))
    for packet in _encode(encoder, _noise(100)):
        assert len(packet) <= MAX_PACKET_BYTES
        check_frame(packet)
    assert encoder.bitrate == min(bitrate, 510_000)


def test_in_band_fec_is_accepted_and_carries_a_second_copy() -> None:
    """With fec and expected loss the packets are others than without."""
    tone = np.sin(2 * np.pi * 200 * np.arange(50 * FRAME_SAMPLES) / 48_000)
    speech = np.repeat((0.3 * tone).astype(np.float32)[:, None], 2, axis=1)
    plain = _encode(OpusEncoder(OpusOptions(bitrate=24_000)), speech)
    protected = _encode(OpusEncoder(OpusOptions(bitrate=24_000, fec=True, expected_loss=20)), speech)
    assert plain != protected
    for packet in protected:
        check_frame(packet)


def test_an_option_that_libopus_does_not_know_is_an_error() -> None:
    """FFmpeg drops unknown options in silence; here they are found."""
    with pytest.raises(ConfigError, match="does not know fek"):
        open_libopus(96_000, {"fek": "1", "application": "audio"})


@pytest.mark.parametrize(
    ("bitrate", "settings"), [(96_000, {"packet_loss": "300"}), (96_000, {"vbr": "maybe"}), (9_000_000, {})]
)
def test_a_value_that_libopus_refuses_is_an_error(bitrate: int, settings: dict[str, str]) -> None:
    """Out of range is told with the value."""
    with pytest.raises(ConfigError, match="refused"):
        open_libopus(bitrate, settings)


def test_another_frame_duration_is_an_error() -> None:
    """Frames are 20 ms and nothing else."""
    with pytest.raises(ConfigError, match="480 samples"):
        open_libopus(96_000, {"frame_duration": "10"})


@pytest.mark.parametrize(
    "block", [np.zeros((959, 2), np.float32), np.zeros((960, 1), np.float32), np.zeros((960, 2), np.float64)]
)
def test_a_block_of_another_shape_is_refused(block: Pcm) -> None:
    """Shape and type are part of the contract."""
    with pytest.raises(ValueError, match="not \\(960, 2\\) float32"):
        OpusEncoder(OpusOptions()).encode(block)
