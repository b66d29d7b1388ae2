"""End-to-end encryption (DAVE) of one voice session: follows the group of its channel and says how frames leave.

    no group ──op 29/30──▶ next keys ready ──op 22, or transition 0──▶ frames encrypted with them
    (op 24 of epoch 1, or a commit or Welcome that cannot be used, begins again without a group)

While a protocol version of 1 or more is in force nothing leaves in the clear: without keys there is no way to send,
which is what `ready` says. Old keys stay in use until the transition to the next ones is executed.

MLS work holds the interpreter for milliseconds, so it is done in turns that the pace gives out (`turns.py`).

Source: voice protocol reference, sections 6.2 to 6.5, 6.7 and 6.10; libdave through `dave.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import dave
from structlog.typing import FilteringBoundLogger

from shared.errors import ErrorCode, ProtocolError, VoiceError
from shared.protocol.mls import read_commit
from shared.protocol.voice_gateway import (
    CommitAnnounced,
    Event,
    ExecuteTransition,
    ExternalSender,
    HeartbeatAcked,
    PrepareEpoch,
    PrepareTransition,
    Proposals,
    Resumed,
    SessionDescription,
    VoiceGateway,
    Welcomed,
)
from worker.voice.commons import VoiceCounters
from worker.voice.turns import Turns

MAX_VERSION = dave.get_max_supported_protocol_version()
_NEW_GROUP_EPOCH = 1
_RECOVERIES = 6
_RECOVERIES_WITHIN_S = 60.0
"""A group that cannot be entered this often in a minute ends the session: somebody else decides when to try again."""
_LARGEST_TRANSITIONS = 64
"""Transitions that may be prepared and not executed; more of them only a broken server has."""
_CODE_DIGITS, _CODE_GROUP = 30, 5
_OLD_KEYS_S = 10.0
EXECUTED_WITHIN_S = 5.0
"""A gateway waits 2 s for whoever is not ready, then executes. Who is still without op 22 after this takes it for lost:
the keys before are heard for 10 s only, and by newcomers not at all."""

Protect = Callable[[bytes], bytes | None]


class Timer(Protocol):
    """What `asyncio.AbstractEventLoop.call_later` gives."""

    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]


class _Prepared(NamedTuple):
    """A transition that waits for its execution."""

    version: int
    ratchet: dave.IKeyRatchet | None
    """Our next keys."""
    overdue: Timer


@cache
def _signature_key() -> dave.SignatureKeyPair:
    """One key for all simultaneous connections, made anew at each start (section 6.3)."""
    return dave.SignatureKeyPair.generate(MAX_VERSION)


class Dave:
    """The encryption of one voice session.

    Args:
        gateway: takes what is answered.
        user_id, channel_id: of this session; the channel names the group.
        counters: of the worker.
        turns: of the worker, taken for MLS work.
        required: refuse to send without end-to-end encryption.
        receiving: follow the keys of the others, too, for `decrypt`.
        on_change: called when `version`, `ready`, `protect` or `privacy_code` may have changed.
        call_later: of the event loop.
    """

    def __init__(
        self,
        gateway: VoiceGateway,
        user_id: str,
        channel_id: str,
        *,
        counters: VoiceCounters,
        turns: Turns,
        required: bool,
        receiving: bool,
        on_change: Callable[[], None],
        call_later: CallLater,
        log: FilteringBoundLogger,
    ) -> None:
        self._gateway = gateway
        self._user_id = user_id
        self._channel_id = int(channel_id)
        self._counters = counters
        self._turns = turns
        self._required = required
        self._decryptors: dict[str, dave.Decryptor] | None = {} if receiving else None
        self._on_change = on_change
        self._call_later = call_later
        self._log = log
        self._session: dave.Session | None = None
        self._encryptor = dave.Encryptor()
        self._encrypt: Protect | None = None
        self._external_sender = b""
        """Waits for op 4 where it comes before it."""
        self._negotiated = 0
        """Version of the group that is being made."""
        self._pending: dict[int, _Prepared] = {}
        """By transition, the one prepared last at the end."""
        self._replaying = False
        """The session was resumed, and what it missed is on its way."""
        self._applied: set[int] = set()
        """Epochs of commits that were applied to this group: the same one may be announced again."""
        self._others: set[str] = set()
        self._recoveries: deque[float] = deque(maxlen=_RECOVERIES)
        self._waiting_since_s: float | None = None
        self.version: int | None = None
        """Protocol version in force, None before op 4."""
        self.mls_epoch: int | None = None
        self.privacy_code = ""
        """Equal at all members of the group; empty without one."""

    @property
    def ready(self) -> bool:
        """Whether frames may leave: end-to-end encrypted, or in the clear where the protocol has no encryption."""
        return self.version == 0 or (self.version is not None and self._encryptor.has_key_ratchet())

    @property
    def protect(self) -> Protect | None:
        """What a frame goes through before it leaves; None: nothing. Only while `ready`."""
        return self._encrypt if self.version else None

    def decrypt(self, user_id: str, frame: bytes) -> bytes | None:
        """The Opus frame that a member sent; None where it cannot be decrypted, or receiving was not asked for."""
        if self.version == 0:
            return frame
        decryptor = (self._decryptors or {}).get(user_id)
        return decryptor.decrypt(dave.MediaType.audio, frame) if decryptor else None

    def members(self, others: set[str]) -> None:
        """Take over who else is in the channel: nobody else may be proposed for the group."""
        self._others = others
        self._wait_or_not()

    async def take(self, event: Event) -> None:
        """Follow an event of the gateway; what is not the group's business does nothing.

        Raises: VoiceError: e2ee_downgraded, where encryption is required; e2ee_failed, after too many attempts.
        """
        match event:
            case PrepareTransition():
                self._prepare(event.transition_id, event.protocol_version, None)
            case ExecuteTransition():
                self._execute_prepared(event.transition_id)
            case Resumed():
                self._replaying = True
                return
            case HeartbeatAcked() if not self._replaying:
                return
            case (
                SessionDescription()
                | ExternalSender()
                | Proposals()
                | CommitAnnounced()
                | Welcomed()
                | PrepareEpoch()
                | HeartbeatAcked()
            ):
                await self._turns.group()
                began_ns = time.monotonic_ns()
                try:
                    self._work_on(event)
                finally:
                    self._turns.spent(time.monotonic_ns() - began_ns)
            case _:
                return
        self._on_change()

    def close(self) -> None:
        """The session is over: nothing is executed any more."""
        self._drop_all()

    def _work_on(self, event: Event) -> None:
        """What takes milliseconds."""
        match event:
            case SessionDescription():
                self._describe(event.dave_protocol_version)
            case ExternalSender():
                self._set_external_sender(event.package)
            case Proposals():
                self._propose(event.body)
            case CommitAnnounced():
                self._commit(event.transition_id, event.commit)
            case Welcomed():
                self._welcome(event.transition_id, event.welcome)
            case PrepareEpoch():
                self._prepare_epoch(event.mls_epoch, event.protocol_version)
            case HeartbeatAcked():
                # The heartbeat was sent after Resume, so all that was missed is here now.
                self._replaying = False
                self._offer_again()

    # the session

    def _describe(self, version: int) -> None:
        """Op 4. A later one changes the transport's key; the group stays unless the version changes."""
        if version == self.version or (version and self._session is not None):
            return
        ssrc = self._gateway.ssrc
        assert ssrc is not None
        self._encryptor.assign_ssrc_to_codec(ssrc, dave.Codec.opus)
        self._encrypt = partial(self._encryptor.encrypt, dave.MediaType.audio, ssrc)
        if not version:
            self._execute(0, None)
            return
        self.version = version
        self._begin(version)
        if self._external_sender:
            self._set_external_sender(self._external_sender)
        self._wait_or_not()

    def _begin(self, version: int) -> None:
        """Begin without a group: a fresh state, and a key package by which others add us."""
        if version > MAX_VERSION:
            raise VoiceError(
                f"the server wants version {version} of end-to-end encryption, known is {MAX_VERSION}",
                code=ErrorCode.E2EE_REQUIRED,
                retryable=False,
            )
        if self._session is None:
            self._session = dave.Session(self._note_failure)
        else:
            self._session.reset()
        self._negotiated = version
        self._applied.clear()
        self._session.init(version, self._channel_id, self._user_id, _signature_key())
        self._offer(self._session)

    def _offer(self, session: dave.Session) -> None:
        package = session.get_marshalled_key_package()
        if package is None:
            raise VoiceError("no key package could be made", code=ErrorCode.E2EE_FAILED)
        self._gateway.key_package(package)

    def _offer_again(self) -> None:
        """Who is in no group after a resume does not know whether the server has its key package: what was said last
        went down with the WebSocket before, and a resume brings back only what the server said.
        """
        if self._session is not None and not self._session.has_established_group():
            self._offer(self._session)

    def _note_failure(self, source: str, reason: str) -> None:
        self._log.debug("mls.refused", source=source, reason=reason)

    def _fail(self, what: str) -> None:
        self._counters.failures += 1
        self._log.info("dave.message_refused", message=what)

    def _set_external_sender(self, package: bytes) -> None:
        if not package:  # libdave would read beyond it
            self._fail("external sender")
        elif self._session is None:
            self._external_sender = package
        else:
            self._session.set_external_sender(package)

    # the group

    def _recognised(self) -> set[str]:
        return self._others | {self._user_id}

    def _propose(self, body: bytes) -> None:
        if self._session is None or not body:
            self._fail("proposals")
            return
        made = self._session.process_proposals(body, self._recognised())
        if made is None:
            return
        try:
            empty = read_commit(made).empty
        except ProtocolError:
            self._fail("proposals")
            return
        if not empty:  # revoking the last proposal leaves an empty commit
            self._gateway.commit_welcome(made)

    def _commit(self, transition_id: int, commit: bytes) -> None:
        try:
            mls_epoch = read_commit(commit).mls_epoch
        except ProtocolError:
            self._recover(transition_id, "commit")
            return
        answer: Any = dave.RejectType.failed
        if self._session is not None:
            answer = self._session.process_commit(commit)
        if answer is dave.RejectType.ignored:
            return
        if answer is dave.RejectType.failed:
            if mls_epoch not in self._applied:  # else it is told again
                self._recover(transition_id, "commit")
            return
        self._applied.add(mls_epoch)
        self.mls_epoch = mls_epoch + 1
        self._entered(transition_id, answer)

    def _welcome(self, transition_id: int, welcome: bytes) -> None:
        changes = self._session.process_welcome(welcome, self._recognised()) if self._session is not None else None
        if changes is None:
            self._recover(transition_id, "welcome")
            return
        self._entered(transition_id, changes)

    def _entered(self, transition_id: int, changes: dict[int, list[int]]) -> None:
        """A group or epoch was entered; `changes` are those of its members, without a key where one is gone."""
        assert self._session is not None
        ratchet = self._session.get_key_ratchet(self._user_id)
        authenticator = self._session.get_last_epoch_authenticator()
        if ratchet is None or authenticator is None:
            self._recover(transition_id, "group without keys")
            return
        self.privacy_code = dave.generate_displayable_code(authenticator, _CODE_DIGITS, _CODE_GROUP)
        if self._decryptors is not None:
            self._follow_others(self._session, self._decryptors, changes)
        self._prepare(transition_id, self._negotiated, ratchet)

    def _follow_others(
        self, session: dave.Session, decryptors: dict[str, dave.Decryptor], changes: dict[int, list[int]]
    ) -> None:
        """Receivers take the next keys at once and keep those before for 10 s; senders switch in between."""
        for number, key in changes.items():
            user_id = str(number)
            if not key:
                decryptors.pop(user_id, None)
            elif user_id != self._user_id:
                decryptors.setdefault(user_id, dave.Decryptor())
        for user_id, decryptor in decryptors.items():
            ratchet = session.get_key_ratchet(user_id)
            if ratchet is not None:
                decryptor.transition_to_key_ratchet(ratchet, _OLD_KEYS_S)

    def _recover(self, transition_id: int, what: str) -> None:
        """Say that a message could not be used, and begin again; the others take us out and in again."""
        self._fail(what)
        if self._session is None:
            return
        now_s = time.monotonic()
        if len(self._recoveries) == _RECOVERIES and now_s - self._recoveries[0] < _RECOVERIES_WITHIN_S:
            raise VoiceError(
                f"the encrypted group could not be entered {_RECOVERIES} times in {_RECOVERIES_WITHIN_S:g} s",
                code=ErrorCode.E2EE_FAILED,
            )
        self._recoveries.append(now_s)
        self._gateway.invalid_commit_welcome(transition_id)
        self._begin(self._negotiated)

    def _prepare_epoch(self, mls_epoch: int, version: int) -> None:
        """Op 24: epoch 1 is a new group; a later one changes the version of the one there is."""
        if mls_epoch != _NEW_GROUP_EPOCH or not version:
            self._negotiated = version or self._negotiated
            return
        self.mls_epoch = None
        self.privacy_code = ""
        self._begin(version)

    # transitions

    def _prepare(self, transition_id: int, version: int, ratchet: dave.IKeyRatchet | None) -> None:
        if transition_id == 0:
            self._drop_all()
            self._execute(version, ratchet)
            return
        if not version:
            for decryptor in (self._decryptors or {}).values():
                decryptor.transition_to_passthrough_mode(True)
        while len(self._pending) >= _LARGEST_TRANSITIONS:
            self._drop(next(iter(self._pending)))
        if transition_id in self._pending:
            ratchet = ratchet or self._pending[transition_id].ratchet
            self._drop(transition_id)
        overdue = self._call_later(EXECUTED_WITHIN_S, partial(self._execute_overdue, transition_id))
        self._pending[transition_id] = _Prepared(version, ratchet, overdue)
        self._gateway.transition_ready(transition_id)

    def _drop(self, transition_id: int) -> None:
        self._pending.pop(transition_id).overdue.cancel()

    def _drop_all(self) -> None:
        for transition_id in list(self._pending):
            self._drop(transition_id)

    def _execute_prepared(self, transition_id: int) -> None:
        """Op 22; of an unknown transition it does nothing."""
        prepared = self._pending.get(transition_id)
        if prepared is None:
            return
        for earlier in list(self._pending):  # what was prepared before this one is passed over, or it would lead back
            self._drop(earlier)
            if earlier == transition_id:
                break
        self._execute(prepared.version, prepared.ratchet)

    def _execute_overdue(self, transition_id: int) -> None:
        """No op 22 came. Encryption is never given up on such a guess."""
        if not self._pending[transition_id].version:
            return
        self._fail("execution that did not come")
        self._execute_prepared(transition_id)
        self._on_change()

    def _execute(self, version: int, ratchet: dave.IKeyRatchet | None) -> None:
        """Have a version, and keys, come into force."""
        if not version and self.version:
            self._counters.downgrades += 1
            self._log.warning("dave.downgraded", refused=self._required)
        if not version and self._required:
            raise VoiceError("the server ordered to send without end-to-end encryption", code=ErrorCode.E2EE_DOWNGRADED)
        self.version = version
        for decryptor in (self._decryptors or {}).values():
            decryptor.transition_to_passthrough_mode(not version)
        if not version:
            self.privacy_code = ""
            self._encryptor.set_key_ratchet(None)
            return
        if ratchet is not None:
            self._encryptor.set_key_ratchet(ratchet)
            self._counters.epochs += 1
        elif self._session is not None and not self._session.has_established_group():
            self._encryptor.set_key_ratchet(None)  # the last one in the channel: there is nobody to encrypt for
        self._wait_or_not()

    def _wait_or_not(self) -> None:
        """Measure the time from somebody to talk to until frames can leave."""
        now_s = time.monotonic()
        if self.ready and self._waiting_since_s is not None:
            waited_ms = int((now_s - self._waiting_since_s) * 1_000)
            self._counters.ready_ms_max = max(self._counters.ready_ms_max, waited_ms)
            self._waiting_since_s = None
        elif not self.ready and self._others and self._waiting_since_s is None:
            self._waiting_since_s = now_s
