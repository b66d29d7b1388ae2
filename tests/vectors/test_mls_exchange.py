"""The local Discord reads and writes one recorded MLS exchange byte for byte.

Source: `mls_recorded` of the reference's vectors: a gateway, a committer on davey and a joiner of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.emulator.dave.codec import MlsFormatError, reference, verify
from tests.emulator.dave.commit import read_welcome, split
from tests.emulator.dave.external_sender import ExternalSender, Proposal, append_body, revoke_body
from tests.emulator.dave.key_package import check_key_package, key_package_reference

RECORDED: dict[str, str] = json.loads(Path(__file__).with_name("mls-exchange.json").read_text())
GROUP = int(RECORDED["group_id_int"])


def octets(name: str) -> bytes:
    """A recorded field."""
    return bytes.fromhex(RECORDED[f"{name}_hex"])


@pytest.fixture
def sender() -> ExternalSender:
    """The recorded gateway."""
    private = int(RECORDED["external_sender_private_hex"], 16)
    return ExternalSender(ec.derive_private_key(private, ec.SECP256R1()))


def test_the_external_sender_is_written_as_recorded(sender: ExternalSender) -> None:
    """Op 25."""
    assert sender.package == octets("external_sender_package_op25_payload")


@pytest.mark.parametrize("owner", ["a", "p"])
def test_recorded_key_packages_pass(owner: str) -> None:
    """Op 26 of both clients is in order, and no byte of it may change."""
    body, user = octets(f"key_package_{owner}"), int(RECORDED[f"user_{owner}"])
    check_key_package(body, user)
    for at in range(len(body)):
        with pytest.raises(MlsFormatError):
            check_key_package(body[:at] + bytes((body[at] ^ 1,)) + body[at + 1 :], user)


def test_names_are_as_recorded() -> None:
    """Key packages and proposals have the names that commits and Welcomes use."""
    assert key_package_reference(octets("key_package_p")) == octets("key_package_ref_p")
    assert reference(b"Proposal Reference", octets("proposal_mlsmessage")[2:]) == octets("proposal_ref")


def test_a_proposal_is_written_as_recorded(sender: ExternalSender) -> None:
    """An Add differs from the recorded one in its signature only, which the recorded key verifies."""
    made, recorded = sender.add(GROUP, 0, octets("key_package_p")), octets("proposal_mlsmessage")
    content_bytes = recorded.index(octets("key_package_p")) + len(octets("key_package_p"))
    assert made.message[:content_bytes] == recorded[:content_bytes]
    point = sender.package[2:67]
    for message in (made.message, recorded):
        verify(point, b"FramedContentTBS", message[:content_bytes], message[content_bytes + 2 :])


def test_op_27_is_written_as_recorded() -> None:
    """Proposals stand in one vector, revoked ones by their names."""
    proposal = Proposal(octets("proposal_mlsmessage"), octets("proposal_ref"))
    assert append_body([proposal]) == octets("op27_payload")
    assert revoke_body([proposal.reference]) == octets("op27_revoke_payload")


def test_op_28_is_split_as_recorded() -> None:
    """The commit ends where its fields end, and the Welcome holds the joiner's secret."""
    offered = split(octets("op28_payload"))
    assert (offered.commit, offered.welcome) == (octets("commit"), octets("welcome"))
    assert (offered.mls_epoch, offered.leaf, offered.references) == (0, 0, (octets("proposal_ref"),))
    welcome = read_welcome(offered.welcome)
    assert list(welcome.secrets) == [octets("key_package_ref_p")]
    assert welcome.for_one(octets("key_package_ref_p")) == offered.welcome
