"""End-to-end encryption (DAVE) of one voice session: follows the group of its channel and says how frames leave.

    no group ──op 29/30──▶ next keys ready ──op 22, or transition 0──▶ frames encrypted with them
    (op 24 of epoch 1, or a commit or Welcome that cannot be used, begins again without a group)

While a protocol version of 1 or more is in force nothing leaves in the clear: without keys there is no way to send,
which is what `ready` says. Old keys stay in use until the transition to the next ones is executed, also where the group
they come from is gone: as long as somebody is there, they are what the others have.

A client that is cut off may be taken out of the group meanwhile, told or not (section 11, 1). So after each resume a
new key package is offered as soon as the replay is over: it takes who is in the group out and in again, and who is not,
in. The group and the keys before stay in use until then: nobody who hears us well loses a frame by that.

MLS work holds the interpreter for milliseconds, so it is done in turns that the pace gives out (`turns.py`).

Source: voice protocol reference, sections 6.2 to 6.5, 6.7 and 6.10; libdave through `dave.py`.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Protocol

import dave
from structlog.typing import FilteringBoundLogger

from shared.errors import ErrorCode, VoiceError
from shared.protocol.voice_gateway import (
    ClientsConnected,
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
    State,
    VoiceGateway,
    Welcomed,
)
from worker.voice.commons import VoiceCounters
from worker.voice.group import MAX_VERSION, Changes, Group, Refusal
from worker.voice.turns import Turns

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

DOWNGRADED_WITHIN_S = 24.0
"""So long an order to go on without encryption is waited for, and others may begin to send in the clear."""
GROUP_WITHIN_S = 40.0
"""With others in the channel and no keys for so long, the session is given up: it would be silent for good."""
_OFFERED_AGAIN_AFTER_S = 10.0
_TAKEN_IN_WITHIN_S = 2.0
"""Of a key package: a commit that comes later to who is in no group is for a place that is ours no more."""
LISTED_WITHIN_S = 2.0
"""So long what cannot be used is kept where op 11, or the Welcome for a key package on its way, may come behind it."""
_KEPT_PROPOSALS = 8
_NS_PER_MEMBER, _NS_PER_NEWCOMER = 1_200_000, 1_800_000
"""The most that one message may take: a change to a group of 100 is 40 to 120 ms, making or entering it 140 to 260."""

Protect = Callable[[bytes], bytes | None]


class Timer(Protocol):
    """What `asyncio.AbstractEventLoop.call_later` gives."""

    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]


class _Keys(NamedTuple):
    """Ours in one epoch. Numbers grow with the epochs, over all groups."""

    number: int
    ratchet: dave.IKeyRatchet


class _PutOff(NamedTuple):
    """A commit or Welcome that was refused, and may be understood, or be of no interest, in a moment."""

    event: CommitAnnounced | Welcomed
    overdue: Timer


class _Prepared(NamedTuple):
    """A transition that waits for its execution."""

    version: int
    keys: _Keys | None
    overdue: Timer


class Dave:
    """The encryption of one voice session.

    Args:
        gateway: takes what is answered.
        user_id, channel_id: of this session; the channel names the group.
        counters: of the worker.
        turns: of the worker, taken for MLS work.
        required: send nothing in a session that had encryption and was ordered to go on without.
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
        self._counters = counters
        self._turns = turns
        self._required = required
        self._decryptors: dict[str, dave.Decryptor] | None = {} if receiving else None
        self._on_change = on_change
        self._call_later = call_later
        self._log = log
        self._group = Group(channel_id, user_id, partial(_note_refusal, log))
        self._encryptor = dave.Encryptor()
        self._encrypt: Protect | None = None
        self._described: int | None = None
        """The version that op 4, or a transition after it, said last."""
        self._untaken: deque[Event] = deque()
        """Waits for its turn. It outlives the WebSocket: a resume does not bring again what was received."""
        self._failed: Counter[str] = Counter()
        self._unlisted: list[Proposals] = []
        """Refused in this epoch: they may name somebody of whom op 11 will tell."""
        self._put_off: _PutOff | None = None
        self._in_doubt = False
        """A resume: we may have been taken out of the group, or our key package been lost on its way."""
        self._pending: dict[int, _Prepared] = {}
        """By transition, the one prepared last at the end."""
        self._keys_made = 0
        self._keys_in_force = 0
        self._privacy_code = ""
        self._others: set[str] = set()
        self._members_before = 0
        """Others in the channel when the group was last entered or changed."""
        self._recoveries: deque[float] = deque(maxlen=_RECOVERIES)
        self._waiting_since_s: float | None = None
        self.version: int | None = None
        """Protocol version in force, None before op 4."""
        self.was_encrypted = False
        """A version of 1 or more was in force once."""
        self.refused = False
        """The server ordered to go on without encryption, and that is not done: nothing leaves until it returns."""
        self._downgraded = False
        """Such an order came, and nobody said so: who is alone is heard by nobody (section 11, 9)."""

    @property
    def mls_epoch(self) -> int | None:
        """Epoch of the group; None without one, and after a Welcome until the next proposals tell it."""
        return self._group.mls_epoch if self.version else None

    @property
    def privacy_code(self) -> str:
        """Equal at all members of the group; empty without one."""
        return self._privacy_code if self.version else ""

    @property
    def ready(self) -> bool:
        """Whether frames may leave: end-to-end encrypted, or in the clear where the protocol has no encryption."""
        if self.version == 0:
            return not self.refused
        return self.version is not None and self._encryptor.has_key_ratchet()

    @property
    def protect(self) -> Protect | None:
        """What a frame goes through before it leaves; None: nothing, which is enough only while `ready`."""
        return self._encrypt if self.version else None

    def decrypt(self, user_id: str, frame: bytes) -> bytes | None:
        """The Opus frame that a member sent; None where it cannot be decrypted, or receiving was not asked for.

        Around a change of the version a member's frames come in the clear or encrypted, whatever we have in force.
        """
        decryptor = (self._decryptors or {}).get(user_id)
        if decryptor is not None:
            return decryptor.decrypt(dave.MediaType.audio, frame)
        return frame if self.version == 0 else None

    def members(self, others: set[str]) -> None:
        """Take over who else is in the channel: nobody else may be proposed for the group."""
        newcomers = others - self._others
        self._others = others
        if newcomers:
            self._try_again()
            if self._downgraded:  # what is due now is the way back
                self._call_later(EXECUTED_WITHIN_S, self._note_downgrade)
        self._drop_keys_for_nobody()
        self._wait_or_not()

    async def take(self, event: Event) -> None:
        """Follow an event of the gateway; what is not the group's business does nothing.

        Raises: VoiceError: e2ee_failed, after too many attempts; e2ee_required, where the server wants a version
            that is not known here.
        """
        if self.version is None and isinstance(event, PrepareEpoch | PrepareTransition | ExecuteTransition):
            return  # op 4 will say what is in force, and begins the group
        match event:
            case PrepareTransition():
                _check_version(event.protocol_version)
                self._prepare(event.transition_id, event.protocol_version, None)
            case ExecuteTransition():
                self._execute_prepared(event.transition_id)
            case Resumed():
                self._in_doubt = self._group.version > 0
                await self._work()
            case HeartbeatAcked() if not self._in_doubt:
                return
            case HeartbeatAcked():  # of a heartbeat behind the resume: what the server had to say again has come
                self._untaken.append(event)
                await self._work()
            case SessionDescription():
                self._follow_order(event.dave_protocol_version)
                self._untaken.append(event)
                await self._work()
            case ClientsConnected() if not self._untaken:
                return
            case ClientsConnected():  # who explains what was refused
                await self._work()
            case ExternalSender() | Proposals() | CommitAnnounced() | Welcomed() | PrepareEpoch():
                self._untaken.append(event)
                await self._work()
            case _:
                return
        self._on_change()

    def check(self) -> None:
        """Called with each heartbeat: a group that is not formed is asked for again, then given up.

        Raises: VoiceError: e2ee_failed.
        """
        if self._waiting_since_s is None:
            return
        waited_s = time.monotonic() - self._waiting_since_s
        if waited_s > GROUP_WITHIN_S:
            raise VoiceError(
                f"others are in the channel, and no encrypted group was formed in {GROUP_WITHIN_S:g} s",
                code=ErrorCode.E2EE_FAILED,
            )
        if waited_s > _OFFERED_AGAIN_AFTER_S and not self._group.established and self._group.key_package:
            self._gateway.key_package(self._group.key_package)

    def close(self) -> None:
        """The session is over: nothing is executed any more."""
        for transition_id in list(self._pending):
            self._drop(transition_id)
        self._untaken.clear()
        self._forget_refused()
        self._group.forget()
        self._downgraded = False
        self._call_later = _never

    async def _work(self) -> None:
        """Do in turns what takes milliseconds."""
        while self._untaken:
            await self._turns.group(self._expected_ns(self._untaken[0]))
            began_ns = time.monotonic_ns()
            try:
                self._work_on(self._untaken.popleft())
            finally:
                self._turns.spent(time.monotonic_ns() - began_ns)

    def _expected_ns(self, event: Event) -> int:
        """How long work on an event may take: what touches the tree of a group grows with its members."""
        if not isinstance(event, Proposals | CommitAnnounced | Welcomed):
            return 0
        members = len(self._others)
        return members * _NS_PER_MEMBER + max(0, members - self._members_before) * _NS_PER_NEWCOMER

    def _work_on(self, event: Event) -> None:
        match event:
            case SessionDescription():
                self._describe(event.dave_protocol_version)
            case HeartbeatAcked():
                self._ask_to_be_taken_in()
            case ExternalSender():
                self._set_external_sender(event.package)
            case Proposals():
                self._propose(event)
            case CommitAnnounced():
                self._commit(event)
            case Welcomed():
                self._welcome(event)
            case PrepareEpoch():
                self._prepare_epoch(event.mls_epoch, event.protocol_version)

    # the session

    def _follow_order(self, version: int) -> None:
        """What of op 4 must not wait for a turn: nothing more leaves in the clear once it says so."""
        _check_version(version)
        if version and self.version == 0:
            self.version, self.refused = version, False
            self._on_change()

    def _describe(self, version: int) -> None:
        """Op 4. A later one changes the transport's key; the group stays unless the version changes."""
        if version == self._described:
            return
        self._described = version
        if self._encrypt is None:
            self._renew_encrypt()
        if not version:
            self._guess_nothing(self._pending)
            self._execute(0, None)
            return
        self.version, self.refused = version, False
        self._begin(version)
        self._wait_or_not()

    def _renew_encrypt(self) -> None:
        """A function of its own for each set of keys: whoever holds it sees by it that they changed."""
        ssrc = self._gateway.ssrc
        assert ssrc is not None
        self._encryptor.assign_ssrc_to_codec(ssrc, dave.Codec.opus)
        self._encrypt = partial(self._encryptor.encrypt, dave.MediaType.audio, ssrc)

    def _begin(self, version: int) -> None:
        """Begin without a group."""
        self._members_before = 0
        self._privacy_code = ""
        self._forget_refused()
        self._group.begin(version)
        self._offered()

    def _ask_to_be_taken_in(self) -> None:
        """After a resume: go on in the group that we know, and be taken in by another key package."""
        if self._in_doubt:
            self._group.offer()
            self._offered()

    def _offered(self) -> None:
        self._in_doubt = False
        self._gateway.key_package(self._group.key_package)

    def _fail(self, what: str) -> None:
        self._counters.failures += 1
        self._failed[what] += 1
        if self._failed[what].bit_count() == 1:  # of many, the first, second, fourth ..
            self._log.info("dave.message_refused", message=what, times=self._failed[what])

    def _set_external_sender(self, package: bytes) -> None:
        if not package:  # libdave would read beyond it
            self._fail("external sender")
            return
        self._group.set_external_sender(package)

    # the group

    def _recognised(self) -> set[str]:
        return self._others | {self._user_id}

    def _propose(self, event: Proposals) -> None:
        if not self._group.version or not event.body:
            self._fail("proposals")
            return
        commit_welcome = self._group.propose(event.body, self._recognised())
        if commit_welcome:
            self._gateway.commit_welcome(commit_welcome)
        elif commit_welcome is None and len(self._unlisted) < _KEPT_PROPOSALS:
            self._unlisted.append(event)

    def _commit(self, event: CommitAnnounced) -> None:
        match self._group.commit(event.commit):
            case Refusal.TOLD_AGAIN:
                return
            case Refusal.NOT_OURS:
                awaited = time.monotonic() - self._group.offered_s <= _TAKEN_IN_WITHIN_S
                if not self._group.established and not awaited:
                    self._recover(event.transition_id, "commit for another place")
            case Refusal.UNUSABLE if self._unlisted or self._group.awaits_welcome:
                self._put_it_off(event, "commit")
            case Refusal.UNUSABLE:
                self._recover(event.transition_id, "commit")
            case changes:
                self._entered(event.transition_id, changes)

    def _welcome(self, event: Welcomed) -> None:
        match self._group.welcome(event.welcome, self._recognised()):
            case Refusal.TOLD_AGAIN:
                return
            case Refusal():
                # a second time in a row it may name somebody of whom we were not told yet
                again = bool(self._recoveries) and time.monotonic() - self._recoveries[-1] < LISTED_WITHIN_S
                if again:
                    self._put_it_off(event, "welcome")
                else:
                    self._recover(event.transition_id, "welcome")
            case changes:
                self._entered(event.transition_id, changes)

    # what the next messages may explain

    def _put_it_off(self, event: CommitAnnounced | Welcomed, what: str) -> None:
        """Look at it again when somebody is listed; when nobody is for a while, recover."""
        if self._put_off is not None:
            self._put_off.overdue.cancel()
        overdue = self._call_later(LISTED_WITHIN_S, partial(self._nobody_was_listed, event, what))
        self._put_off = _PutOff(event, overdue)

    def _nobody_was_listed(self, event: CommitAnnounced | Welcomed, what: str) -> None:
        self._put_off = None
        if self._gateway.state is State.CLOSED:  # nobody can be told now; a resume may bring op 11
            self._put_it_off(event, what)
            return
        self._recover(event.transition_id, what)
        self._on_change()

    def _try_again(self) -> None:
        """Have what was refused done anew, in its turn."""
        self._untaken.extend(self._unlisted)
        self._unlisted.clear()
        put_off, self._put_off = self._put_off, None
        if put_off is not None:
            put_off.overdue.cancel()
            self._untaken.append(put_off.event)

    def _forget_refused(self) -> None:
        """It was of another epoch."""
        self._unlisted.clear()
        if self._put_off is not None:
            self._put_off.overdue.cancel()
            self._put_off = None

    def _entered(self, transition_id: int, changes: Changes) -> None:
        """A group or epoch was entered; `changes` are those of its members, without a key where one is gone."""
        ratchet, authenticator = self._group.ratchet(self._user_id), self._group.authenticator()
        if ratchet is None or authenticator is None:
            self._recover(transition_id, "group without keys")
            return
        self._forget_refused()
        self._privacy_code = dave.generate_displayable_code(authenticator, _CODE_DIGITS, _CODE_GROUP)
        if self._decryptors is not None:
            self._follow_others(self._decryptors, changes)
        self._members_before = len(self._others)
        self._keys_made += 1
        self._prepare(transition_id, self._group.version, _Keys(self._keys_made, ratchet))

    def _follow_others(self, decryptors: dict[str, dave.Decryptor], changes: Changes) -> None:
        """Receivers take the next keys at once and keep those before for 10 s; senders switch in between."""
        for number, key in changes.items():
            user_id = str(number)
            if not key:
                decryptors.pop(user_id, None)
            elif user_id != self._user_id and user_id not in decryptors:
                decryptors[user_id] = dave.Decryptor()
                decryptors[user_id].transition_to_passthrough_mode(self._clear_frames_may_come)
        for user_id, decryptor in decryptors.items():
            ratchet = self._group.ratchet(user_id)
            if ratchet is not None:
                decryptor.transition_to_key_ratchet(ratchet, _OLD_KEYS_S)

    def _recover(self, transition_id: int, what: str) -> None:
        """Say that a message could not be used, and begin again; the others take us out and in again."""
        self._fail(what)
        if not self._group.version:
            return
        now_s = time.monotonic()
        if len(self._recoveries) == _RECOVERIES and now_s - self._recoveries[0] < _RECOVERIES_WITHIN_S:
            raise VoiceError(
                f"the encrypted group could not be entered {_RECOVERIES} times in {_RECOVERIES_WITHIN_S:g} s",
                code=ErrorCode.E2EE_FAILED,
            )
        self._recoveries.append(now_s)
        self._gateway.invalid_commit_welcome(transition_id)
        self._begin(self._group.version)

    def _prepare_epoch(self, mls_epoch: int, version: int) -> None:
        """Op 24: epoch 1 is a new group; a later one changes the version of the one there is."""
        _check_version(version)
        if mls_epoch != _NEW_GROUP_EPOCH or not version:
            self._group.version = version or self._group.version
            return
        self._begin(version)
        self._drop_keys_for_nobody()

    # transitions

    @property
    def _clear_frames_may_come(self) -> bool:
        """No encryption is in force, or about to be."""
        return not self.version or any(not prepared.version for prepared in self._pending.values())

    def _prepare(self, transition_id: int, version: int, keys: _Keys | None) -> None:
        if transition_id == 0:
            self._guess_nothing(self._pending)
            self._execute(version, keys)
            return
        if not version:
            for decryptor in (self._decryptors or {}).values():
                decryptor.transition_to_passthrough_mode(True)
        while len(self._pending) >= _LARGEST_TRANSITIONS:
            self._drop(next(iter(self._pending)))
        if transition_id in self._pending:
            before = self._drop(transition_id)
            keys = keys or before.keys
        within_s = EXECUTED_WITHIN_S if version else DOWNGRADED_WITHIN_S
        overdue = self._call_later(within_s, partial(self._execute_overdue, transition_id))
        self._pending[transition_id] = _Prepared(version, keys, overdue)
        self._gateway.transition_ready(transition_id)

    def _drop(self, transition_id: int) -> _Prepared:
        """Take a transition off the list."""
        prepared = self._pending.pop(transition_id)
        prepared.overdue.cancel()
        return prepared

    def _execute_prepared(self, transition_id: int) -> None:
        """Op 22; of an unknown transition it does nothing."""
        if transition_id not in self._pending:
            return
        earlier = list(itertools.takewhile(lambda one: one != transition_id, self._pending))
        self._guess_nothing(earlier)
        prepared = self._drop(transition_id)
        for one in earlier:
            if prepared.keys is None and self._pending[one].keys is None:
                self._drop(one)  # an older order about the version: it would lead back
        self._execute(prepared.version, prepared.keys)

    def _guess_nothing(self, earlier: Iterable[int]) -> None:
        """Leave transitions to the server that were prepared before the one that comes into force now."""
        for transition_id in earlier:
            self._pending[transition_id].overdue.cancel()

    def _execute_overdue(self, transition_id: int) -> None:
        """No op 22 came. Encryption is never given up on such a guess: then nobody's frames in the clear are due."""
        self._fail("execution that did not come")
        if self._pending[transition_id].version:
            self._execute_prepared(transition_id)
            self._on_change()
            return
        self._drop(transition_id)
        self._let_clear_frames_pass(0.0)

    def _execute(self, version: int, keys: _Keys | None) -> None:
        """Have a version, and keys, come into force; never keys that were made before those in force."""
        if not version and self.version:
            self.refused = self._required
            self._downgraded = True
            if self._others:
                self._note_downgrade()
        elif version:
            self.refused = self._downgraded = False
        self.version = self._described = version
        self.was_encrypted |= version > 0
        self._let_clear_frames_pass()
        if not version:
            self._encryptor.set_key_ratchet(None)
        elif keys is not None and keys.number > self._keys_in_force:
            self._keys_in_force = keys.number
            self._encryptor.set_key_ratchet(keys.ratchet)
            self._renew_encrypt()
            self._counters.epochs += 1
        self._drop_keys_for_nobody()
        self._wait_or_not()

    def _note_downgrade(self) -> None:
        """Say that others hear us without encryption, or not at all, unless that is over."""
        if self._downgraded and self._others:
            self._downgraded = False
            self._counters.downgrades += 1
            self._log.warning("dave.downgraded", refused=self._required)

    def _let_clear_frames_pass(self, within_s: float = _OLD_KEYS_S) -> None:
        """Have receivers take frames in the clear, or no more after a while, as it is due."""
        passthrough = self._clear_frames_may_come
        for decryptor in (self._decryptors or {}).values():
            decryptor.transition_to_passthrough_mode(passthrough, within_s)

    def _drop_keys_for_nobody(self) -> None:
        """Without a group and without anybody in the channel there is nobody to encrypt for."""
        if not self._group.established and not self._others:
            self._encryptor.set_key_ratchet(None)

    def _wait_or_not(self) -> None:
        """Measure the time from somebody to talk to until frames can leave."""
        now_s = time.monotonic()
        if not self._others:
            self._waiting_since_s = None
        elif not self.ready:
            self._waiting_since_s = self._waiting_since_s or now_s
        elif self._waiting_since_s is not None:
            waited_ms = int((now_s - self._waiting_since_s) * 1_000)
            self._counters.ready_ms_max = max(self._counters.ready_ms_max, waited_ms)
            self._waiting_since_s = None


def _note_refusal(log: FilteringBoundLogger, source: str, reason: str) -> None:
    """Where and why libdave refused something; a method would tie us to the group and the group to us."""
    log.debug("mls.refused", source=source, reason=reason)


def _never(_delay_s: float, _do: Callable[[], None]) -> Timer:
    """For a session that is over."""
    raise RuntimeError("the session is over")


def _check_version(version: int) -> None:
    """Raises: VoiceError: e2ee_required; a version that is not known here."""
    if version > MAX_VERSION:
        raise VoiceError(
            f"the server wants version {version} of end-to-end encryption, known is {MAX_VERSION}",
            code=ErrorCode.E2EE_REQUIRED,
            retryable=False,
        )
