"""One known packet per mode: who seals it wrongly is not used. What breaks a mode is the real cipher of another."""

from __future__ import annotations

from contextlib import closing

import pytest
from nacl._sodium import lib
from structlog.testing import capture_logs

from shared.errors import ErrorCode, VoiceError
from shared.life import Life
from shared.protocol import packet_seal, transport_crypto
from shared.protocol.transport_crypto import AES_GCM, MODES, XCHACHA, choose_mode, open_packet
from shared.schema.records import WorkerRecord
from shared.settings import Settings
from tests.vectors.vectors import KEY, VECTORS
from worker.fanout import known_answers
from worker.fanout.admission import Admission
from worker.fanout.app import FanoutWorker
from worker.fanout.build import Builder, Target
from worker.fanout.known_answers import FRAME, known_packet
from worker.fanout.rows import RowTable

BASIC = {
    vector["mode"]: bytes.fromhex(vector["packet_hex"])
    for vector in VECTORS["transport_rtp"]
    if vector["case"] == "basic"
}


def builder() -> Builder:
    with closing(RowTable(1)) as table:
        return Builder(table)


def break_mode(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Have a mode sealed by the cipher of another one, as a library that was built wrongly might."""
    wrong = lib.crypto_aead_chacha20poly1305_ietf_encrypt
    if mode in (AES_GCM, XCHACHA):
        monkeypatch.setitem(packet_seal._FUNCTIONS, mode, wrong)
        return
    rule, other = transport_crypto._MODES[mode], AES_GCM if "xsalsa" in mode else XCHACHA
    broken = rule._replace(seal=transport_crypto._MODES[other].seal)
    monkeypatch.setitem(transport_crypto._MODES, mode, broken)


@pytest.mark.parametrize("mode", MODES)
def test_the_known_packet_is_right_by_others(mode: str) -> None:
    """It is the vector; where that has a nonce at random, the receiver's code opens it all the same."""
    assert open_packet(mode, KEY, known_packet(mode)) == FRAME
    if mode != transport_crypto.XSALSA_SUFFIX:
        assert known_packet(mode) == BASIC[mode]


def test_every_mode_answers_rightly_here() -> None:
    assert builder().modes == MODES


def test_a_processor_without_aes_answers_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plain functions, which then seal in production."""
    monkeypatch.setattr(packet_seal, "_has_aes", lambda: False)
    assert builder().modes == MODES


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_answers_wrongly_is_not_used(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one that the server offers is; the others are not touched."""
    break_mode(monkeypatch, mode)
    usable = builder().modes
    assert usable == tuple(one for one in MODES if one != mode)
    assert choose_mode(MODES, usable) == (AES_GCM if mode != AES_GCM else XCHACHA)


def test_a_mode_that_raises_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that the library of this machine was built without."""

    def raise_it(*_: object) -> int:
        raise NotImplementedError

    monkeypatch.setitem(packet_seal._FUNCTIONS, AES_GCM, raise_it)
    assert builder().modes == MODES[1:]


@pytest.mark.parametrize("mode", [XCHACHA, MODES[2]])
def test_one_byte_is_enough(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one of the tag, say."""
    sealed = known_answers.SEALED[mode]
    monkeypatch.setitem(known_answers.SEALED, mode, sealed[:-1] + bytes([sealed[-1] ^ 1]))
    assert mode not in builder().modes


def test_where_no_mode_is_left_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the code of a server that offers none: it is not tried again."""
    for mode in MODES:
        break_mode(monkeypatch, mode)
    usable = builder().modes
    assert usable == ()
    with pytest.raises(VoiceError) as refused:
        choose_mode(MODES, usable)
    assert (refused.value.code, refused.value.retryable) == (ErrorCode.VOICE_MODE_UNSUPPORTED, False)
    assert refused.value.message.endswith("supported are none")


def test_no_row_is_opened_in_a_mode_that_seals_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it was chosen."""
    break_mode(monkeypatch, AES_GCM)
    one = builder()
    with pytest.raises(VoiceError) as refused:
        one.open(Target(1, ("192.0.2.1", 50_000), 0, AES_GCM, KEY))
    assert refused.value.code == ErrorCode.VOICE_MODE_UNSUPPORTED


async def test_a_worker_tells_once_which_mode_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no connection of it ever chooses that one."""
    break_mode(monkeypatch, AES_GCM)
    record = WorkerRecord(id="w", name="w", role="fanout", host="h", capacity=4, headroom=4)
    with capture_logs() as logs:
        worker = FanoutWorker(Settings(), record, range(0), Admission(4, 1.0, 0.5), Life())
    try:
        assert [(line["event"], line["mode"]) for line in logs if line["event"] == "mode.refused"] == [
            ("mode.refused", AES_GCM)
        ]
        assert worker._voice.modes == MODES[1:]
    finally:
        await worker._close()
