"""Transport encryption and UDP control against vectors that two other implementations agreed on."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import MalformedPacket
from shared.protocol import ip_discovery
from shared.protocol.rtp import (
    HEADER_BYTES,
    Kind,
    audio_level,
    classify,
    extension_elements,
    parse_header,
    speaking_flags,
    split_packet,
)
from shared.protocol.transport_crypto import (
    MODES,
    XSALSA_SUFFIX,
    open_packet,
    open_rtcp,
    open_rtp,
    seal_packet,
    seal_rtcp,
    suffix_bytes,
)
from tests.sealed_row import SealedRow
from tests.vectors.vectors import KEY, VECTORS

CONTROL: dict[str, Any] = VECTORS["udp_control"]
RTP: list[dict[str, Any]] = VECTORS["transport_rtp"]


def ids(vectors: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(vector, id=f"{vector['mode']}-{vector['case']}") for vector in vectors]


rtp_vectors = pytest.mark.parametrize("vector", ids(RTP))
rtcp_vectors = pytest.mark.parametrize("vector", ids(VECTORS["transport_rtcp"]))


def counter_of(vector: dict[str, Any]) -> int:
    """The counter of a vector; a nonce of 24 bytes on the wire is one, too, only longer."""
    if vector["mode"] == XSALSA_SUFFIX:
        return int(vector["nonce_wire_hex"], 16)
    return vector["nonce_counter"] or 0


def clear_header(vector: dict[str, Any]) -> bytes:
    return bytes.fromhex(vector["clear_header_hex"])


def test_every_mode_has_its_five_cases() -> None:
    """None of the seven modes goes without vectors."""
    cases = {"basic", "wrap_edge_silence", "extension", "extension_padding", "csrc_extension"}
    assert {mode: {vector["case"] for vector in RTP if vector["mode"] == mode} for mode in MODES} == dict.fromkeys(
        MODES, cases
    )


@rtp_vectors
def test_seal_packet_gives_the_vector(vector: dict[str, Any]) -> None:
    """Sealing gives the packet of the vector, byte for byte."""
    packet = seal_packet(
        vector["mode"],
        KEY,
        bytes.fromhex(vector["clear_header_hex"]),
        bytes.fromhex(vector["plaintext_hex"]),
        counter_of(vector),
    )
    assert packet.hex() == vector["packet_hex"]


@rtp_vectors
def test_a_whole_header_is_cut_where_the_mode_says(vector: dict[str, Any]) -> None:
    """Given CSRC list and extension word as header, each mode leaves clear what is its own to leave clear."""
    whole = bytes.fromhex(vector["clear_header_hex"] + vector["plaintext_hex"])
    clear_bytes = parse_header(whole).clear_bytes
    packet = seal_packet(vector["mode"], KEY, whole[:clear_bytes], whole[clear_bytes:], counter_of(vector))
    assert packet.hex() == vector["packet_hex"]


@pytest.mark.parametrize("vector", ids([vector for vector in RTP if len(clear_header(vector)) == HEADER_BYTES]))
def test_the_second_packet_made_in_place_is_the_vector(vector: dict[str, Any]) -> None:
    """On memory that stays where it is: first the packet before the vector's, then the vector, byte for byte."""
    mode, header, frame = vector["mode"], clear_header(vector), bytes.fromhex(vector["plaintext_hex"])
    header_before = header[:2] + (int.from_bytes(header[2:4], "big") - 1).to_bytes(2, "big") + header[4:]
    nonce = bytes.fromhex(vector["nonce_full_hex"])
    nonce_before = (int.from_bytes(nonce[:4], "big") - 1).to_bytes(4, "big") + nonce[4:]
    row = SealedRow(mode, KEY, nonce_before)
    first = row.seal(header_before, frame)
    row.count()
    second = row.seal(header, frame)
    assert first == seal_packet(
        mode, KEY, header_before, frame, int.from_bytes(nonce_before[: suffix_bytes(mode)], "big")
    )
    assert second.hex() == vector["packet_hex"]
    assert open_packet(mode, KEY, first) == open_packet(mode, KEY, second)
    assert first[HEADER_BYTES:] != second[HEADER_BYTES:]


@rtp_vectors
def test_a_vector_opens_to_its_payload(vector: dict[str, Any]) -> None:
    """Opening drops CSRC list, extension elements and padding and leaves the payload of the vector."""
    packet = bytes.fromhex(vector["packet_hex"])
    assert classify(packet) is Kind.AUDIO
    opened = open_rtp(vector["mode"], KEY, packet)
    assert opened.payload.hex() == vector["payload_after_decrypt_hex"]
    assert opened.extension.hex() == (vector["extension_elements_hex"] or "")
    assert open_packet(vector["mode"], KEY, packet) == opened.payload


@rtp_vectors
def test_extension_elements_of_a_vector_are_told(vector: dict[str, Any]) -> None:
    """The elements of the vectors are a level with voice, and the speaker byte of a microphone."""
    elements = extension_elements(open_rtp(vector["mode"], KEY, bytes.fromhex(vector["packet_hex"])))
    if vector["extension_elements_hex"] is None:
        assert elements == {}
        return
    assert elements == {1: b"\xb2", 9: b"\x02"}
    assert audio_level(elements) == (0x32, True)
    assert speaking_flags(elements) == 1


@rtp_vectors
def test_a_vector_cut_anywhere_is_malformed(vector: dict[str, Any]) -> None:
    """No part of a packet opens."""
    packet = bytes.fromhex(vector["packet_hex"])
    for size in range(len(packet)):
        with pytest.raises(MalformedPacket):
            open_packet(vector["mode"], KEY, packet[:size])


@rtcp_vectors
def test_rtcp_gives_the_vector_and_opens_to_it(vector: dict[str, Any]) -> None:
    """Reports are sealed and opened byte for byte."""
    plain, packet = bytes.fromhex(vector["plain_packet_hex"]), bytes.fromhex(vector["packet_hex"])
    counter = int(vector["nonce_full_hex"][:8], 16)
    assert seal_rtcp(vector["mode"], KEY, plain, counter).hex() == vector["packet_hex"]
    assert open_rtcp(vector["mode"], KEY, packet) == plain
    assert classify(packet) is Kind.RTCP


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


@pytest.mark.parametrize(("flags", "speaker"), CONTROL["speaking_ext_map"].items())
def test_the_speaker_byte_is_read_back_into_its_flags(flags: str, speaker: int) -> None:
    """Every combination of flags but none, which stands for the microphone."""
    packet = bytes.fromhex("9078123400abcdefdeadbeefbede0001") + bytes([0x90, speaker, 0, 0])
    assert speaking_flags(extension_elements(split_packet(packet))) == (int(flags) or 1)
