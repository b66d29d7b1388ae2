"""Transport encryption and UDP control against vectors that two other implementations agreed on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import MalformedPacket
from shared.protocol import ip_discovery
from shared.protocol.rtp import Kind, classify, parse_header
from shared.protocol.transport_crypto import (
    AES_GCM,
    NONCE_SUFFIX_BYTES,
    TAG_BYTES,
    XCHACHA,
    new_sealer,
    nonce_bytes,
    open_packet,
    seal_packet,
)

VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("transport-vectors.json").read_text())
KEY = bytes.fromhex(VECTORS["key_hex"])
CONTROL: dict[str, Any] = VECTORS["udp_control"]

rtp_vectors = pytest.mark.parametrize(
    "vector", [pytest.param(v, id=f"{v['mode']}-{v['case']}") for v in VECTORS["transport_rtp"]]
)


def seal_fast(mode: str, packets: list[tuple[int, bytes, bytes]]) -> list[bytes]:
    """Seal (counter, header, frame) one after the other with one sealer, in place, as the row builder does."""
    seal = new_sealer(mode, KEY)
    nonce = bytearray(nonce_bytes(mode))
    sealed = []
    for counter, header, frame in packets:
        suffix = counter.to_bytes(NONCE_SUFFIX_BYTES, "big")
        nonce[:NONCE_SUFFIX_BYTES] = suffix
        body = len(header)
        row = bytearray(body + len(frame) + TAG_BYTES + NONCE_SUFFIX_BYTES)
        row[:body] = header
        row[-NONCE_SUFFIX_BYTES:] = suffix
        view = memoryview(row)
        seal(nonce, frame, view[:body], view[body : len(row) - NONCE_SUFFIX_BYTES])
        sealed.append(bytes(row))
    return sealed


@rtp_vectors
def test_seal_packet_gives_the_vector(vector: dict[str, Any]) -> None:
    """The simple path gives the packet of the vector, byte for byte."""
    packet = seal_packet(
        vector["mode"],
        KEY,
        bytes.fromhex(vector["clear_header_hex"]),
        bytes.fromhex(vector["plaintext_hex"]),
        vector["nonce_counter"],
    )
    assert packet.hex() == vector["packet_hex"]


@rtp_vectors
def test_the_fast_sealer_gives_the_vector(vector: dict[str, Any]) -> None:
    """The fast path gives the packet of the vector, byte for byte, into a buffer that already holds the header."""
    header = bytes.fromhex(vector["clear_header_hex"])
    frame = bytes.fromhex(vector["plaintext_hex"])
    [packet] = seal_fast(vector["mode"], [(vector["nonce_counter"], header, frame)])
    assert packet.hex() == vector["packet_hex"]


@rtp_vectors
def test_a_vector_opens_to_its_payload(vector: dict[str, Any]) -> None:
    """Opening drops extension elements and padding and leaves the payload of the vector."""
    packet = bytes.fromhex(vector["packet_hex"])
    assert classify(packet) is Kind.AUDIO
    assert parse_header(packet).clear_bytes == len(vector["clear_header_hex"]) // 2
    assert open_packet(vector["mode"], KEY, packet).hex() == vector["payload_after_decrypt_hex"]


@pytest.mark.parametrize("mode", [AES_GCM, XCHACHA])
def test_two_packets_in_a_row_use_two_nonces(mode: str) -> None:
    """Two packets in a row are the two of the vectors, and the same frame never looks the same twice."""
    basic = next(v for v in VECTORS["transport_rtp"] if v["mode"] == mode and v["case"] == "basic")
    header, frame = bytes.fromhex(basic["clear_header_hex"]), bytes.fromhex(basic["plaintext_hex"])
    first, second = seal_fast(mode, [(1, header, frame), (2, header, frame)])
    assert first.hex() == basic["packet_hex"]
    assert second == seal_packet(mode, KEY, header, frame, 2)
    assert second[-NONCE_SUFFIX_BYTES:].hex() == "00000002"
    body = slice(len(header), -NONCE_SUFFIX_BYTES)
    assert first[body] != second[body]
    assert open_packet(mode, KEY, second) == frame


@pytest.mark.parametrize("vector", VECTORS["must_fail"], ids=lambda v: v["why"])
def test_a_forged_packet_does_not_open(vector: dict[str, Any]) -> None:
    """Each packet that must fail is dropped as malformed."""
    with pytest.raises(MalformedPacket):
        open_packet(vector["mode"], KEY, bytes.fromhex(vector["packet_hex"]))


def test_discovery_request_and_response() -> None:
    """The request is the vector, and the response of the vector gives its address and port."""
    ssrc = CONTROL["ssrc"]
    response = bytes.fromhex(CONTROL["ip_discovery_response_hex"])
    assert ip_discovery.request(ssrc).hex() == CONTROL["ip_discovery_request_hex"]
    assert classify(response) is Kind.DISCOVERY
    assert ip_discovery.parse_response(response, ssrc) == (CONTROL["response_address"], CONTROL["response_port"])


def test_keepalives_count_little_endian() -> None:
    """Two keepalives in a row are the two of the vectors, and their echoes are told apart from audio."""
    for counter in (0, 1):
        packet = ip_discovery.keepalive(counter)
        assert packet.hex() == CONTROL[f"keepalive_counter{counter}_hex"]
        assert classify(packet) is Kind.CONTROL


def test_a_ping_response_is_control() -> None:
    """An answer to the official client's UDP ping is no audio."""
    assert classify(bytes.fromhex(CONTROL["udp_ping_response_hex"])) is Kind.CONTROL
