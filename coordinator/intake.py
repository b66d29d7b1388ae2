"""Takes jobs in order, each once: effect, job status, event and the entry's end are one change.

What was taken leaves the stream in the same change, so the oldest entry is always the next job. It is asked for and not
waited for: a blocking read would bring whatever comes, and one job of some hundred megabytes would be the end of each
leader that reads it. The server tells the length first.

Source: design section 4, "Jobs in".
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec

from coordinator.election import Leadership
from coordinator.jobs import JobEffects
from coordinator.registry import Change, Registry
from shared.clock import unix_ms
from shared.errors import ErrorCode, JobError
from shared.logs import get_logger
from shared.schema.event import Event
from shared.schema.job import JOB_FIELDS, UNREADABLE, check_sense, decode_job, digest, job_id_of, unserved
from shared.store.client import Store
from shared.text import cut
from shared.urls import HIDDEN, shown

FIELD = "job"
_LOOK_EVERY_S = 0.02
LARGEST_JOB_BYTES = 1 << 20
_FUTURE_MS = 3_600_000
"""An id that lies further ahead was not made by this server's clock."""
STATUS_KEPT_S = 24 * 3_600
DEAD_KEPT = 1_000
_READ_AT_ONCE = 100
_DEAD_BODY_CHARS = 4_096
_SECRETS = "voice|token|session|header|auth|cookie|passw|secret|credential"
"""A field with one of these in its name holds what nobody may read, also where its name is wrong."""
_SECRET_NAME = re.compile(f"(?i){_SECRETS}")
_SECRET = re.compile(
    rf"""(?i)((?:{_SECRETS})[\w-]{{0,40}}\\*["']?\s*[:=]\s*)"""  # the name, quoted in whatever way
    r"""(\\*"(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|\{[^}]*\}?|\[[^\]]*\]?|[^\s,}\]]+)"""
)
_URL = re.compile(r"""(?i)([a-z][a-z0-9+.-]{0,15}:\\*/\\*/)([^"\n]*)""")
"""To the end of the string or line: a password may hold anything."""


class Intake:
    """Reads the job stream from its beginning: what was done is gone from it.

    Args:
        store: client of Redis.
        lock: held while the desired state changes.
        changed: set after each job.
    """

    def __init__(
        self,
        store: Store,
        registry: Registry,
        leadership: Leadership,
        effects: JobEffects,
        lock: asyncio.Lock,
        changed: asyncio.Event,
    ) -> None:
        self._store = store
        self._registry = registry
        self._leadership = leadership
        self._effects = effects
        self._lock = lock
        self._changed = changed
        self._keys = registry.keys

    async def run(self) -> None:
        """Take jobs for ever.

        Raises: LeaseLost, StoreUnavailable.
        """
        while True:
            entries = await self._store.script("jobs", [self._keys.jobs], [FIELD, LARGEST_JOB_BYTES, _READ_AT_ONCE])
            for entry_id, body, length in entries:
                async with self._lock:
                    if body is None:
                        await self._refuse(entry_id, length)
                    else:
                        await self._take(entry_id, body)
                self._changed.set()
            if not entries:
                await asyncio.sleep(_LOOK_EVERY_S)

    async def _refuse(self, entry_id: str, length: int) -> None:
        """Put a job away that is too large to be looked at."""
        change = Change(self._registry)
        error = JobError(f"the job has {length} bytes, allowed are {LARGEST_JOB_BYTES}")
        self._failed(change, entry_id, "", error, "", entry_id, keep_status=False)
        await self._finish(entry_id, change)

    async def _take(self, entry_id: str, body: str) -> None:
        job_id = job_id_of(body) or entry_id
        said = digest(body)
        seen: dict[str, Any] = await self._store.command("HGETALL", self._keys.job(job_id))
        change = Change(self._registry)
        if seen.get("digest") == said:
            get_logger().info("job.repeated", job=job_id)
        else:
            try:
                if seen:
                    raise JobError(f"id: {job_id!r} was used by another job", code=ErrorCode.JOB_CONFLICT)
                await self._do(body, change)
                self._done(change, job_id, said)
            except JobError as error:
                change = Change(self._registry)  # half an effect is none
                self._failed(change, job_id, said, error, body, entry_id, keep_status=bool(seen))
        await self._finish(entry_id, change)

    async def _finish(self, entry_id: str, change: Change) -> None:
        """Carry it out, and with it the end of the entry."""
        change.transaction.add("XDEL", self._keys.jobs, entry_id)
        await change.commit(self._leadership)
        if int(entry_id.partition("-")[0]) > unix_ms() + _FUTURE_MS:
            await self._set_back()

    async def _set_back(self) -> None:
        """Have the stream number its entries by the clock again: after the highest id it would take no more.

        Raises: StoreUnavailable.
        """
        if await self._store.script("renumber", [self._keys.jobs], []):
            get_logger().warning("jobs.numbered_anew")

    async def _do(self, body: str, change: Change) -> None:
        job = decode_job(body)
        missing = unserved(job)
        if missing is not None:
            raise JobError(f"{missing} is not served by this version", code=ErrorCode.NOT_SUPPORTED_YET)
        check_sense(job)
        await self._effects.apply(job, change)  # type: ignore[arg-type]

    def _done(self, change: Change, job_id: str, said: str) -> None:
        self._status(change, job_id, said, "done", None)
        change.event(Event(type="job.done", at=unix_ms(), job=job_id))

    def _failed(
        self, change: Change, job_id: str, said: str, error: JobError, body: str, entry_id: str, *, keep_status: bool
    ) -> None:
        get_logger().warning("job.failed", job=job_id, code=error.code, error=error.message)
        if not keep_status:
            self._status(change, job_id, said, "failed", error)
        change.event(Event(type="job.failed", at=unix_ms(), job=job_id, code=str(error.code), message=error.message))
        change.transaction.add(
            *("XADD", self._keys.jobs_dead, "MAXLEN", "~", DEAD_KEPT, "*", FIELD, without_credentials(body)),
            *("entry", entry_id, "code", str(error.code), "message", error.message),
        )

    def _status(self, change: Change, job_id: str, said: str, state: str, error: JobError | None) -> None:
        key = self._keys.job(job_id)
        change.transaction.add(
            *("HSET", key, "state", state, "at", unix_ms(), "digest", said),
            *("code", str(error.code) if error else "", "message", error.message if error else ""),
        )
        change.transaction.add("EXPIRE", key, STATUS_KEPT_S)


def without_credentials(body: str) -> str:
    """A job's text without credentials, those in its URLs included, also where it is no JSON."""
    try:
        return msgspec.json.encode(_bare(msgspec.json.decode(body))).decode()[:_DEAD_BODY_CHARS]
    except UNREADABLE:
        return cut(_without_secrets(body[:_DEAD_BODY_CHARS]))


def _without_secrets(text: str) -> str:
    return _SECRET.sub(r'\1"(removed)"', _URL.sub(_bare_url, text))


def _bare_url(match: re.Match[str]) -> str:
    """Host and path, as far as they can be told from what lets one in."""
    begin, rest = match.groups()
    seen = shown("http://" + rest.replace("\\/", "/"))
    return f"{begin}(removed)" if seen == HIDDEN else begin + seen.removeprefix("http://")


def _may_be_kept(name: str) -> bool:
    """Whether a field is one of ours, and no secret: under a name that is not known there may stand one."""
    return name in JOB_FIELDS and not _SECRET_NAME.search(name)


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {cut(name): _bare(inner) if _may_be_kept(name) else "(removed)" for name, inner in value.items()}
    if isinstance(value, list):
        return [_bare(inner) for inner in value]
    return cut(_without_secrets(value[:_DEAD_BODY_CHARS])) if isinstance(value, str) else value
