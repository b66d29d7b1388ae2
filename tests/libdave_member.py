"""A member of a DAVE group on `dave.py` (libdave), for tests: messages in, messages out.

Source: reference section 6.7.
"""

from __future__ import annotations

from collections.abc import Iterable

import dave

JSON_OPS = (21, 22, 23, 24, 31)
Reply = tuple[int, bytes | dict[str, int]]


class LibdaveMember:
    """Follows the group; switches its own sending at op 22, as clients shall."""

    def __init__(self, user: str, channel_id: int, ssrc: int = 1) -> None:
        self.user, self.ssrc = user, ssrc
        self.version = 0
        self.executed = 0
        self._channel_id = channel_id
        self._recognised = {user}
        self._roster: set[str] = set()
        self._pending: dict[int, int] = {}
        self._encryptor = dave.Encryptor()
        self._encryptor.assign_ssrc_to_codec(ssrc, dave.Codec.opus)
        self._decryptors: dict[str, dave.Decryptor] = {}
        self._session = dave.Session()
        self._init()

    @property
    def ready(self) -> bool:
        """Whether it may send."""
        return self.version > 0 and self._encryptor.has_key_ratchet()

    @property
    def users(self) -> set[str]:
        """The members of its group."""
        return self._roster

    @property
    def privacy_code(self) -> str | None:
        """Equal at all members that are in the same group and epoch."""
        authenticator = self._session.get_last_epoch_authenticator()
        return dave.generate_displayable_code(authenticator, 30, 5) if authenticator else None

    def connected(self, users: Iterable[str]) -> None:
        """Op 11."""
        self._recognised.update(users)

    def disconnected(self, user: str) -> None:
        """Op 13."""
        self._recognised.discard(user)

    def start(self) -> list[Reply]:
        """Op 4 with version 1."""
        return [self._key_package()]

    def hear(self, op: int, body: bytes | dict[str, int]) -> list[Reply]:
        """Answer one message of the gateway."""
        if isinstance(body, dict):
            return self._hear_json(op, body)
        if op == 25:
            self._session.set_external_sender(body)
        elif op == 27:
            made = self._session.process_proposals(body, self._recognised)
            return [(28, made)] if made else []
        elif op in (29, 30):
            transition_id = int.from_bytes(body[:2], "big")
            changes: object
            if op == 29:
                changes = self._session.process_commit(body[2:])
            else:
                changes = self._session.process_welcome(body[2:], self._recognised)
            if not isinstance(changes, dict):
                self._init()
                return [(31, {"transition_id": transition_id}), self._key_package()]
            for user, key in changes.items():  # a member without a key is gone
                (self._roster.add if key else self._roster.discard)(str(user))
            self._hear_others()
            return self._prepare(transition_id, 1)
        return []

    def encrypt(self, frame: bytes) -> bytes:
        """Encrypt an Opus frame for the group."""
        made = self._encryptor.encrypt(dave.MediaType.audio, self.ssrc, frame)
        assert made is not None
        return made

    def decrypt(self, user: str, frame: bytes) -> bytes | None:
        """An Opus frame of another member, None where it cannot be decrypted."""
        decryptor = self._decryptors.get(user)
        return decryptor.decrypt(dave.MediaType.audio, frame) if decryptor else None

    def _hear_json(self, op: int, body: dict[str, int]) -> list[Reply]:
        if op == 21:
            if body["protocol_version"] == 0:
                for decryptor in self._decryptors.values():
                    decryptor.transition_to_passthrough_mode(True)
            return self._prepare(body["transition_id"], body["protocol_version"])
        if op == 22 and body["transition_id"] in self._pending:
            self._execute(self._pending.pop(body["transition_id"]))
        elif op == 24 and body["epoch"] == 1:
            self._init()
            return [self._key_package()]
        return []

    def _prepare(self, transition_id: int, version: int) -> list[Reply]:
        if transition_id == 0:
            self._execute(version)
            return []
        self._pending[transition_id] = version
        return [(23, {"transition_id": transition_id})]

    def _execute(self, version: int) -> None:
        self.version = version
        self.executed += 1
        ratchet = self._session.get_key_ratchet(self.user) if self._session.has_established_group() else None
        if version and ratchet:
            self._encryptor.set_key_ratchet(ratchet)
            for decryptor in self._decryptors.values():
                decryptor.transition_to_passthrough_mode(False)

    def _hear_others(self) -> None:
        self._decryptors = {user: self._decryptors.get(user) or dave.Decryptor() for user in self._roster}
        for user, decryptor in self._decryptors.items():
            ratchet = self._session.get_key_ratchet(user)
            if ratchet is not None and user != self.user:
                decryptor.transition_to_key_ratchet(ratchet, 10.0)

    def _init(self) -> None:
        """Begin anew. The library goes on telling changes of the last roster it told, so that is kept."""
        self._session.reset()
        self._session.init(1, self._channel_id, self.user)

    def _key_package(self) -> Reply:
        made = self._session.get_marshalled_key_package()
        assert made is not None
        return 26, made
