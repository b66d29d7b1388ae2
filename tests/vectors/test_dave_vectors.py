"""End-to-end encryption against recorded vectors, a member written in plain Python, and both DAVE libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import dave
import davey
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from shared.protocol.dave_frame import is_protocol_frame, overhead_bytes, parse_frame
from shared.protocol.transport_crypto import open_packet, seal_packet
from shared.protocol.voice_gateway import (
    CommitAnnounced,
    Credentials,
    Event,
    ExternalSender,
    Proposals,
    VoiceGateway,
    Welcomed,
)
from tests.vectors.mls_member import (
    Epoch,
    Reader,
    decrypt_frame,
    encrypt_frame,
    open_welcome,
    private_key,
    public_bytes,
    ratchet,
    ref_hash,
    signed_content,
    vector,
)
from tests.vectors.vectors import KEY, VECTORS

DAVE: dict[str, Any] = VECTORS["dave_frame"]
IN_TRANSPORT: dict[str, Any] = VECTORS["dave_in_transport"]
MLS: dict[str, Any] = VECTORS["mls_recorded"]
GROUP_ID: int = MLS["group_id_int"]
USER_A, USER_P = int(MLS["user_a"]), int(MLS["user_p"])
OPUS = bytes.fromhex("7883d0a1b2c3d4e5f60718293a4b5c6d7e8f9001")


def recorded(name: str) -> bytes:
    """Bytes of the recorded exchange."""
    return bytes.fromhex(MLS[f"{name}_hex"])


INIT_KEY = private_key(recorded("p_init_private"))


# frames


@pytest.mark.parametrize("known", [*DAVE["ratchet"], DAVE["known_answer"]], ids=lambda known: known["generation"])
def test_the_ratchet_gives_the_keys(known: dict[str, Any]) -> None:
    """Every generation's key follows from the base secret."""
    key, nonce = ratchet(bytes.fromhex(known["base_secret_hex"]), known["generation"])
    assert (key.hex(), nonce.hex()) == (known["key_hex"], known["unused_nonce_hex"])


@pytest.mark.parametrize("known", DAVE["frames"], ids=lambda known: known["truncated_nonce"])
def test_a_frame_is_taken_apart_as_recorded(known: dict[str, Any]) -> None:
    """Ciphertext, tag and nonce stand where the vector has them, and the overhead is as long as the nonce says."""
    data = bytes.fromhex(known["frame_hex"])
    frame = parse_frame(data)
    assert is_protocol_frame(data)
    assert (frame.ciphertext.hex(), frame.tag.hex()) == (known["ciphertext_hex"], known["tag8_hex"])
    assert (frame.nonce, frame.generation) == (known["truncated_nonce"], known["generation"])
    assert (frame.gcm_nonce.hex(), frame.ranges, frame.authenticated) == (known["gcm_nonce_hex"], (), b"")
    assert overhead_bytes(frame.nonce) == known["supplemental_size"] == len(data) - len(known["plaintext_hex"]) // 2


@pytest.mark.parametrize("known", DAVE["frames"], ids=lambda known: known["truncated_nonce"])
def test_a_frame_is_encrypted_and_decrypted_as_recorded(known: dict[str, Any]) -> None:
    """Cipher, nonce and ratchet give the frame of the vector, byte for byte, and its plain text back."""
    secret, plain = bytes.fromhex(known["base_secret_hex"]), bytes.fromhex(known["plaintext_hex"])
    assert ratchet(secret, known["generation"])[0].hex() == known["key_hex"]
    assert encrypt_frame(secret, known["truncated_nonce"], plain).hex() == known["frame_hex"]
    frame = parse_frame(bytes.fromhex(known["frame_hex"]))
    assert decrypt_frame(secret, frame.nonce, frame.ciphertext, frame.tag) == plain


def test_a_frame_travels_inside_a_packet() -> None:
    """Transport encryption goes around the encrypted frame, and comes off before it."""
    mode, header = IN_TRANSPORT["mode"], bytes.fromhex(IN_TRANSPORT["clear_header_hex"])
    inner, packet = bytes.fromhex(IN_TRANSPORT["dave_frame_hex"]), bytes.fromhex(IN_TRANSPORT["packet_hex"])
    assert seal_packet(mode, KEY, header, inner, IN_TRANSPORT["nonce_counter"]) == packet
    assert open_packet(mode, KEY, packet) == inner
    frame = parse_frame(inner)
    secret = bytes.fromhex(DAVE["frames"][0]["base_secret_hex"])
    assert decrypt_frame(secret, frame.nonce, frame.ciphertext, frame.tag).hex() == IN_TRANSPORT["opus_hex"]


# the recorded exchange


def test_the_recorded_welcome_opens_to_the_recorded_epoch() -> None:
    """Whoever holds the joiner's keys derives the authenticator, the privacy code and both senders' secrets."""
    epoch = open_welcome(recorded("welcome"), recorded("key_package_p"), INIT_KEY)
    assert (epoch.group_id, epoch.number) == (recorded("group_id"), MLS["epoch_after"])
    assert epoch.authenticator == recorded("epoch_authenticator")
    assert epoch.privacy_code == MLS["voice_privacy_code"]
    assert dave.generate_displayable_code(epoch.authenticator, 30, 5) == MLS["voice_privacy_code"]
    assert epoch.base_secret(USER_A) == recorded("sender_base_secret_a")
    assert epoch.base_secret(USER_P) == recorded("sender_base_secret_p")


@pytest.mark.parametrize("known", MLS["frames_from_a"], ids=lambda known: known["truncated_nonce"])
def test_the_recorded_frames_decrypt(known: dict[str, Any]) -> None:
    """The committer's frames open under the secret that the Welcome led to, and under no other."""
    epoch = open_welcome(recorded("welcome"), recorded("key_package_p"), INIT_KEY)
    data = bytes.fromhex(known["frame_hex"])
    frame = parse_frame(data)
    assert frame.nonce == known["truncated_nonce"]
    secret = epoch.base_secret(USER_A)
    assert decrypt_frame(secret, frame.nonce, frame.ciphertext, frame.tag).hex() == known["plaintext_hex"]
    assert encrypt_frame(secret, frame.nonce, bytes.fromhex(known["plaintext_hex"])) == data
    with pytest.raises(InvalidTag):
        decrypt_frame(epoch.base_secret(USER_P), frame.nonce, frame.ciphertext, frame.tag)


def test_the_recorded_bodies_are_framed_as_the_gateway_reads_them() -> None:
    """What the server sent is told body by body, and what the client sent is framed byte for byte."""
    machine = VoiceGateway(Credentials("1", str(GROUP_ID), str(USER_A), "session", "token"))
    machine.connected()
    machine.data_to_send()
    told: list[Event] = []
    bodies = [
        (25, "external_sender_package_op25_payload"),
        (27, "op27_payload"),
        (27, "op27_revoke_payload"),
        (29, "op29_payload_tid1"),
        (30, "op30_payload_tid1"),
    ]
    for seq, (op, name) in enumerate(bodies, start=1):
        told += machine.receive_binary(seq.to_bytes(2, "big") + bytes([op]) + recorded(name))
    assert told == [
        ExternalSender(recorded("external_sender_package_op25_payload")),
        Proposals(b"\x00" + vector(recorded("proposal_mlsmessage"))),
        Proposals(b"\x01" + vector(vector(recorded("proposal_ref")))),
        CommitAnnounced(1, recorded("commit")),
        Welcomed(1, recorded("welcome")),
    ]
    machine.key_package(recorded("key_package_a"))
    machine.commit_welcome(recorded("commit") + recorded("welcome"))
    assert machine.data_to_send() == [b"\x1a" + recorded("key_package_a"), b"\x1c" + recorded("op28_payload")]


def test_the_recorded_names_and_signatures_hold() -> None:
    """Key packages and proposals are named by their hashes and signed by whom they say."""
    package, proposal = recorded("key_package_p"), recorded("proposal_mlsmessage")
    assert ref_hash("MLS 1.0 KeyPackage Reference", package) == recorded("key_package_ref_p")
    assert ref_hash("MLS 1.0 Proposal Reference", proposal[2:]) == recorded("proposal_ref")
    sender = private_key(recorded("external_sender_private"))
    assert recorded("external_sender_package_op25_payload").startswith(vector(public_bytes(sender)) + b"\x00\x01")
    reader = Reader(proposal)
    reader.take(4)  # version, wire format
    assert reader.vector() == recorded("group_id")
    assert proposal[reader.at :].startswith(bytes(8) + b"\x02" + bytes(4) + b"\x00\x02\x00\x01" + package)
    reader.take(8 + 1 + 4 + 1 + 1 + 2 + len(package))
    content = proposal[: reader.at]
    sender.public_key().verify(reader.vector(), signed_content("FramedContentTBS", content), ec.ECDSA(SHA256()))
    assert reader.at == len(proposal)
    reader = Reader(package)
    reader.take(4)  # version, cipher suite
    assert reader.vector() == public_bytes(INIT_KEY)
    assert reader.vector() == public_bytes(private_key(recorded("p_leaf_private")))
    signer = private_key(recorded("p_signature_private"))
    assert reader.vector() == public_bytes(signer)
    reader.take(2)
    for _ in range(6):
        reader.vector()  # identity, versions, suites, extensions, proposals, credentials
    reader.take(1 + 16)  # from a key package, with a lifetime
    for _ in range(3):
        reader.vector()  # leaf extensions, leaf signature, extensions
    content = package[: reader.at]
    signer.public_key().verify(reader.vector(), signed_content("KeyPackageTBS", content), ec.ECDSA(SHA256()))
    assert reader.at == len(package)


# the same joiner, with each of the libraries as committer


class Committed(NamedTuple):
    """What a real library made of the recorded proposal, and what it says of the epoch."""

    welcome: bytes
    privacy_code: str
    frames: list[bytes]
    heard: bytes | None
    """What the library decrypted of the joiner's frame."""


PLAIN = [OPUS, b"second frame payload", OPUS]


def join(welcome: bytes) -> Epoch:
    return open_welcome(welcome, recorded("key_package_p"), INIT_KEY)


def commit_with_libdave() -> Committed:
    session = dave.Session()
    session.init(1, GROUP_ID, str(USER_A))
    session.set_external_sender(recorded("external_sender_package_op25_payload"))
    session.get_marshalled_key_package()
    both = session.process_proposals(recorded("op27_payload"), {str(USER_A), str(USER_P)})
    assert both is not None
    commit, welcome = _split(both)
    assert isinstance(session.process_commit(commit), dict)
    authenticator = session.get_last_epoch_authenticator()
    assert authenticator is not None
    encryptor = dave.Encryptor()
    encryptor.assign_ssrc_to_codec(7, dave.Codec.opus)
    own = session.get_key_ratchet(str(USER_A))
    assert own is not None
    encryptor.set_key_ratchet(own)
    frames = [encryptor.encrypt(dave.MediaType.audio, 7, plain) for plain in PLAIN]
    decryptor = dave.Decryptor()
    other = session.get_key_ratchet(str(USER_P))
    assert other is not None
    decryptor.transition_to_key_ratchet(other)
    heard = decryptor.decrypt(dave.MediaType.audio, _from_joiner(welcome))
    code = dave.generate_displayable_code(authenticator, 30, 5)
    return Committed(welcome, code, [frame for frame in frames if frame is not None], heard)


def commit_with_davey() -> Committed:
    session = davey.DaveSession(1, USER_A, GROUP_ID)
    session.set_external_sender(recorded("external_sender_package_op25_payload"))
    session.get_serialized_key_package()
    both = session.process_proposals(
        davey.ProposalsOperationType.append, recorded("op27_payload")[1:], [USER_A, USER_P]
    )
    assert both is not None
    assert both.welcome is not None
    session.process_commit(both.commit)
    frames = [session.encrypt_opus(plain) for plain in PLAIN]
    heard = session.decrypt(USER_P, davey.MediaType.audio, _from_joiner(both.welcome))
    code = session.voice_privacy_code
    assert code is not None
    return Committed(both.welcome, code, frames, heard)


def _from_joiner(welcome: bytes) -> bytes:
    return encrypt_frame(join(welcome).base_secret(USER_P), 1, OPUS)


def _split(both: bytes) -> tuple[bytes, bytes]:
    """Commit and Welcome: a commit that only adds has no path."""
    reader = Reader(both)
    reader.take(4)
    reader.vector()  # group id
    reader.take(8 + 1 + 4)
    reader.vector()  # authenticated data
    reader.take(1)
    reader.vector()  # proposals
    assert reader.take(1) == b"\x00"
    for _ in range(3):
        reader.vector()  # signature, confirmation tag, membership tag
    return both[: reader.at], both[reader.at :]


@pytest.mark.parametrize("commit", [commit_with_libdave, commit_with_davey], ids=["libdave", "davey"])
def test_a_library_that_commits_is_understood(commit: Callable[[], Committed]) -> None:
    """From the recorded proposal each library makes a Welcome, code and frames that the joiner reads, and hears him."""
    committed = commit()
    epoch = join(committed.welcome)
    assert (epoch.group_id, epoch.number) == (recorded("group_id"), 1)
    assert epoch.privacy_code == committed.privacy_code
    secret = epoch.base_secret(USER_A)
    for number, (data, plain) in enumerate(zip(committed.frames, PLAIN, strict=True), start=1):
        assert is_protocol_frame(data)
        frame = parse_frame(data)
        assert (frame.nonce, len(data)) == (number, len(plain) + overhead_bytes(number))
        assert decrypt_frame(secret, frame.nonce, frame.ciphertext, frame.tag) == plain
    assert committed.heard == OPUS
