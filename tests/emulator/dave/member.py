"""A member of a DAVE group as a client would be, on `davey`. Pure: messages in, messages out.

Source: reference sections 6.5 (procedures) and 6.6 (davey).
"""

from collections.abc import Iterable
from typing import NamedTuple

import davey

from tests.emulator.dave.group import DaveOp


class Reply(NamedTuple):
    """A message to the gateway: bytes that follow the opcode, or the `d` of a JSON message."""

    op: DaveOp
    body: bytes | dict[str, int]


class DaveyMember:
    """Follows the group, decrypts what others send and encrypts what it sends itself.

    `version` is the protocol version in force for it: 0 until its first transition was executed, and again whenever it
    has to begin anew.
    """

    def __init__(self, user: str, channel_id: int) -> None:
        self.user = user
        self.version = 0
        self.executed = 0
        """Transitions that came into force."""
        self.downgraded = False
        """Whether the gateway turned encryption off."""
        self._channel_id = channel_id
        self._recognised = {int(user)}
        self._pending: dict[int, int] = {}
        self._session = davey.DaveSession(davey.DAVE_PROTOCOL_VERSION, int(user), channel_id)

    @property
    def ready(self) -> bool:
        """Whether it is in a group that is in force."""
        return self.version > 0 and self._session.ready

    @property
    def mls_epoch(self) -> int | None:
        """Epoch of its group."""
        return self._session.epoch

    @property
    def users(self) -> set[str]:
        """The members of its group."""
        return set(self._session.get_user_ids())

    @property
    def privacy_code(self) -> str | None:
        """Equal at all members that are in the same group and epoch."""
        return self._session.voice_privacy_code

    def connected(self, users: Iterable[str]) -> None:
        """Op 11."""
        self._recognised.update(int(user) for user in users)

    def disconnected(self, user: str) -> None:
        """Op 13."""
        self._recognised.discard(int(user))

    def start(self) -> list[Reply]:
        """Op 4 with a protocol version above 0."""
        return [self._key_package()]

    def hear(self, op: DaveOp, body: bytes | dict[str, int]) -> list[Reply]:
        """Answer one message of the gateway."""
        if isinstance(body, dict):
            return self._hear_json(op, body)
        if op is DaveOp.EXTERNAL_SENDER:
            self._session.set_external_sender(body)
        elif op is DaveOp.PROPOSALS:
            return self._propose(body)
        elif op in (DaveOp.ANNOUNCE_COMMIT, DaveOp.WELCOME):
            return self._enter(op, int.from_bytes(body[:2], "big"), body[2:])
        return []

    def encrypt(self, frame: bytes) -> bytes:
        """Encrypt an Opus frame for the group."""
        return bytes(self._session.encrypt_opus(frame))

    def decrypt(self, user: str, frame: bytes) -> bytes | None:
        """An Opus frame of another member, None where it cannot be decrypted."""
        try:
            return bytes(self._session.decrypt(int(user), davey.MediaType.audio, frame))
        except ValueError:
            return None

    def _hear_json(self, op: DaveOp, body: dict[str, int]) -> list[Reply]:
        if op is DaveOp.PREPARE_TRANSITION:
            transition_id, version = body["transition_id"], body["protocol_version"]
            if version == 0:
                self._session.set_passthrough_mode(True)
            return self._prepare(transition_id, version)
        if op is DaveOp.EXECUTE_TRANSITION:
            version = self._pending.pop(body["transition_id"], -1)
            if version >= 0:
                self._execute(version)
        elif op is DaveOp.PREPARE_EPOCH and body["epoch"] == 1:
            return [self._begin_anew()]
        return []

    def _propose(self, body: bytes) -> list[Reply]:
        operation = davey.ProposalsOperationType.revoke if body[0] else davey.ProposalsOperationType.append
        try:
            made = self._session.process_proposals(operation, body[1:], list(self._recognised))
        except ValueError:
            return []  # not for this state of ours: a commit or a Welcome follows, or nothing
        return [] if made is None else [Reply(DaveOp.COMMIT_WELCOME, made.commit + (made.welcome or b""))]

    def _enter(self, op: DaveOp, transition_id: int, body: bytes) -> list[Reply]:
        try:
            if op is DaveOp.WELCOME:
                self._session.process_welcome(body)
            else:
                self._session.process_commit(body)
        except ValueError:
            return [Reply(DaveOp.INVALID_COMMIT_WELCOME, {"transition_id": transition_id}), self._begin_anew()]
        return self._prepare(transition_id, davey.DAVE_PROTOCOL_VERSION)

    def _prepare(self, transition_id: int, version: int) -> list[Reply]:
        if transition_id == 0:
            self._execute(version)
            return []
        self._pending[transition_id] = version
        return [Reply(DaveOp.TRANSITION_READY, {"transition_id": transition_id})]

    def _execute(self, version: int) -> None:
        self.version = version
        self.downgraded = version == 0
        self.executed += 1
        if version:
            self._session.set_passthrough_mode(False)

    def _begin_anew(self) -> Reply:
        self.version = 0
        self.downgraded = False
        self._pending.clear()
        self._session.reinit(davey.DAVE_PROTOCOL_VERSION, int(self.user), self._channel_id)
        return self._key_package()

    def _key_package(self) -> Reply:
        return Reply(DaveOp.KEY_PACKAGE, bytes(self._session.get_serialized_key_package()))
