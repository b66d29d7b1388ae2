"""guildcast's own side of a DAVE group, gateway machine included, for tests: messages in, messages out."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

import structlog

from shared.protocol.voice_gateway import Credentials, Event, VoiceGateway
from worker.voice.commons import VoiceCounters
from worker.voice.dave import Dave
from worker.voice.turns import Turns

Reply = tuple[int, bytes | dict[str, int]]
SSRC = 7
_KEY = [0] * 32


@dataclass
class Alarm:
    """A timer of the member's, that goes off when a test says so."""

    after_s: float
    ring: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class ProductMember:
    """Follows the group as a worker does."""

    def __init__(self, user: str, channel_id: int, *, required: bool = False, turns: Turns | None = None) -> None:
        self.user = user
        self.counters = VoiceCounters()
        self.changes = 0
        self.alarms: list[Alarm] = []
        self.gateway = VoiceGateway(Credentials("1", str(channel_id), user, "session", "token"))
        self.dave = Dave(
            self.gateway,
            user,
            str(channel_id),
            counters=self.counters,
            turns=turns or Turns(None),
            required=required,
            receiving=True,
            on_change=self._changed,
            call_later=self._call_later,
            log=structlog.get_logger(),
        )
        self._others: set[str] = set()
        self._seq = 0
        self._now_ms = 0
        self.gateway.connected()
        self._tell(2, {"ssrc": SSRC, "ip": "127.0.0.1", "port": 9, "modes": ["aead_aes256_gcm_rtpsize"]})
        self.gateway.select_protocol("127.0.0.1", 10, "aead_aes256_gcm_rtpsize")
        self.gateway.data_to_send()

    def _changed(self) -> None:
        self.changes += 1

    def _call_later(self, after_s: float, ring: Callable[[], None]) -> Alarm:
        self.alarms.append(Alarm(after_s, ring))
        return self.alarms[-1]

    def wait(self) -> list[Reply]:
        """So long that every timer goes off."""
        alarms, self.alarms = self.alarms, []
        for alarm in alarms:
            if not alarm.cancelled:
                alarm.ring()
        return self._take([])

    def resume(self) -> list[Reply]:
        """The WebSocket broke, and the session goes on over another one; what was missed is replayed by the caller."""
        self.gateway.disconnected(None)
        self.gateway.connected()
        self.gateway.data_to_send()
        return self._tell(9, None)

    def heartbeat(self) -> list[Reply]:
        """A heartbeat, and its answer."""
        self._now_ms += 1
        self.gateway.heartbeat(self._now_ms)
        self.gateway.data_to_send()
        return self._tell(6, {"t": self._now_ms})

    @property
    def ready(self) -> bool:
        """Whether it may send."""
        return self.dave.ready

    @property
    def executed(self) -> int:
        """Groups and epochs that came into force."""
        return self.counters.epochs

    @property
    def users(self) -> set[str]:
        """The members it recognises: no other may be in its group."""
        return self._others | {self.user}

    @property
    def version(self) -> int:
        return self.dave.version or 0

    @property
    def privacy_code(self) -> str:
        return self.dave.privacy_code

    def connected(self, users: Iterable[str]) -> None:
        """Op 11."""
        self._others |= set(users) - {self.user}
        self.dave.members(self._others)

    def disconnected(self, user: str) -> None:
        """Op 13."""
        self._others.discard(user)
        self.dave.members(self._others)

    def start(self, version: int = 1) -> list[Reply]:
        """Op 4."""
        return self.hear_text(self.description(version))

    def description(self, version: int = 1) -> str:
        """Op 4 as the gateway says it."""
        mode = "aead_aes256_gcm_rtpsize"
        return json.dumps({"op": 4, "d": {"mode": mode, "secret_key": _KEY, "dave_protocol_version": version}})

    def hear(self, op: int, body: bytes | dict[str, int]) -> list[Reply]:
        """Answer one message of the gateway."""
        if isinstance(body, dict):
            return self._tell(op, body)
        self._seq += 1
        return self._take(self.gateway.receive_binary(self._seq.to_bytes(2, "big") + bytes([op]) + body))

    def hear_text(self, text: str) -> list[Reply]:
        """Answer one text frame of the gateway."""
        return self._take(self.gateway.receive_text(text))

    def encrypt(self, frame: bytes) -> bytes:
        """Send an Opus frame as a worker would."""
        protect = self.dave.protect
        made = protect(frame) if protect else frame
        assert made is not None
        return made

    def decrypt(self, user: str, frame: bytes) -> bytes | None:
        """An Opus frame of another member, None where it cannot be decrypted."""
        return self.dave.decrypt(user, frame)

    def _tell(self, op: int, data: object) -> list[Reply]:
        return self.hear_text(json.dumps({"op": op, "d": data}))

    def check(self) -> list[Reply]:
        """What a heartbeat looks after."""
        self.dave.check()
        return self._take([])

    def _take(self, events: list[Event]) -> list[Reply]:
        for event in events:
            _at_once(self.dave.take(event))
        replies: list[Reply] = []
        for message in self.gateway.data_to_send():
            if isinstance(message, bytes):
                replies.append((message[0], message[1:]))
            else:
                said = json.loads(message)
                replies.append((said["op"], said["d"]))
        return replies


def _at_once(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that has nothing to wait for: nobody else holds the turn."""
    try:
        work.send(None)
    except StopIteration:
        return
    work.close()
    raise AssertionError("it waits for something")
