"""Our place in the MLS group of a channel: the group that has us, and the key packages by which it may take us in.

    offer() ──op 26──▶ the others add us ──op 30──▶ welcome() ──▶ established
                       or we make the group: propose() ──op 28, 29──▶ commit() ──▶ established

Each key package has a state of its own, and the Welcome for it may come when the next one has long been offered. So a
few of them are kept beside the group, and whichever a message is for becomes the group. Until then the one before goes
on: whoever hears us by its keys hears us still.

Source: voice protocol reference, sections 6.3 to 6.5 and 11 (1 to 3); libdave through `dave.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from hashlib import sha256

import dave

from shared.errors import ErrorCode, ProtocolError, VoiceError
from shared.protocol.mls import read_commit

MAX_VERSION = dave.get_max_supported_protocol_version()
_OFFERS_KEPT = 3
"""Each is answered within a round trip, or never."""

Changes = dict[int, list[int]]
"""By user id the members that came, with a key, or went, without one."""


class Refusal(Enum):
    """Why a commit or Welcome changed nothing."""

    TOLD_AGAIN = "it is known"
    NOT_OURS = "it is for another group, or for members of one, and we are in none"
    UNUSABLE = "it does not fit what we have"


@cache
def _signature_key() -> dave.SignatureKeyPair:
    """One key for all simultaneous connections, made anew at each start (section 6.3)."""
    return dave.SignatureKeyPair.generate(MAX_VERSION)


class Group:
    """The group of one channel as one of its members sees it.

    Args:
        channel_id: names the group.
        user_id: ours.
        note: told by libdave where and why it refused something.

    Attributes:
        version: protocol version of the group that is made next; 0 before the first.
        mls_epoch: of the group that has us; None without one, and after a Welcome until the next proposals tell it.
        key_package: offered last.
        offered_s: when that was, on the monotonic clock.
    """

    def __init__(self, channel_id: str, user_id: str, note: Callable[[str, str], None]) -> None:
        self._channel_id = int(channel_id)
        self._user_id = user_id
        self._note = note
        self._session: dave.Session | None = None
        """Has us."""
        self._offers: deque[dave.Session] = deque(maxlen=_OFFERS_KEPT)
        """Each waits to be taken in by its key package, the newest at the end."""
        self._external_sender = b""
        """The newest; a group that is there goes on with the one it began with."""
        self._taken_welcome = b""
        """Digest of the Welcome to this group: it may be told again."""
        self.version = 0
        self.mls_epoch: int | None = None
        self.key_package = b""
        self.offered_s = 0.0

    @property
    def established(self) -> bool:
        """Whether there is a group that has us, as far as we were told."""
        return self._session is not None

    @property
    def awaits_welcome(self) -> bool:
        """Whether a key package was offered that has not been used."""
        return bool(self._offers)

    def begin(self, version: int) -> None:
        """Begin without a group, and offer a key package by which others add us.

        Raises: VoiceError: e2ee_failed.
        """
        self.forget()
        self.version = version
        self.offer()

    def forget(self) -> None:
        """Be in no group, and wait for none."""
        self._session = None
        self._offers.clear()
        self._taken_welcome = b""
        self.mls_epoch = None

    def offer(self) -> None:
        """Make another key package; what we are in stays until somebody has used it.

        Raises: VoiceError: e2ee_failed.
        """
        session = dave.Session(self._note)
        if self._external_sender:
            session.set_external_sender(self._external_sender)
        session.init(self.version, self._channel_id, self._user_id, _signature_key())
        package = session.get_marshalled_key_package()
        if package is None:
            raise VoiceError("no key package could be made", code=ErrorCode.E2EE_FAILED)
        self._offers.append(session)
        self.key_package = package
        self.offered_s = time.monotonic()

    def set_external_sender(self, package: bytes) -> None:
        """Take over whose proposals count in the group that is made next."""
        if package == self._external_sender:
            return  # told again: a group that is being made stays
        self._external_sender = package
        for session in self._offers:
            session.set_external_sender(package)

    def propose(self, proposals: bytes, recognised: set[str]) -> bytes | None:
        """Answer proposals.

        Args:
            proposals: body of op 27.
            recognised: user ids that may be in the group.
        Returns: body of op 28, empty where there is nothing to commit; None: the proposals are refused.
        """
        for session in self._asked():
            made = session.process_proposals(proposals, recognised)
            if made is None:
                continue
            try:
                commit = read_commit(made)
            except ProtocolError:
                continue
            if session is self._session:
                self.mls_epoch = commit.mls_epoch
            return b"" if commit.empty else made  # revoking the last proposal leaves an empty commit
        return None

    def commit(self, commit: bytes) -> Changes | Refusal:
        """Follow a commit that was announced."""
        try:
            mls_epoch = read_commit(commit).mls_epoch
        except ProtocolError:
            return Refusal.UNUSABLE
        answers: list[dave.RejectType] = []
        for session in self._asked():
            answer = session.process_commit(commit)
            if not isinstance(answer, dave.RejectType):
                self._establish(session)
                self.mls_epoch = mls_epoch + 1
                return answer
            answers.append(answer)
        if answers and answers[0] is dave.RejectType.ignored:
            return Refusal.NOT_OURS
        if self.mls_epoch is not None and mls_epoch < self.mls_epoch:
            return Refusal.TOLD_AGAIN
        return Refusal.UNUSABLE

    def welcome(self, welcome: bytes, recognised: set[str]) -> Changes | Refusal:
        """Enter the group by a Welcome for one of our key packages."""
        digest = sha256(welcome).digest()
        if digest == self._taken_welcome:
            return Refusal.TOLD_AGAIN
        for session in reversed(self._offers):
            changes = session.process_welcome(welcome, recognised)
            if changes is not None:
                self._establish(session)
                self._taken_welcome, self.mls_epoch = digest, None
                return changes
        return Refusal.UNUSABLE

    def ratchet(self, user_id: str) -> dave.IKeyRatchet | None:
        """The keys of a member in this epoch."""
        return self._session.get_key_ratchet(user_id) if self._session is not None else None

    def authenticator(self) -> bytes | None:
        """What all members have alike in this epoch."""
        return self._session.get_last_epoch_authenticator() if self._session is not None else None

    def _asked(self) -> Iterator[dave.Session]:
        """Who a message may be for: the group that has us, else the one that the others are making with us."""
        if self._session is not None:
            yield self._session
        if self._offers:
            yield self._offers[-1]

    def _establish(self, session: dave.Session) -> None:
        """Be in this group; a key package that was offered after it will be used next."""
        if session is self._session:
            return
        while self._offers and self._offers.popleft() is not session:
            pass
        self._session = session
