"""The one place where Redis clients are made: no automatic retries, every call bounded in time, errors from our tree.

Whoever calls decides what to do about `StoreUnavailable`; there is no second layer that retries.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import redis.asyncio
import stamina
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from shared.errors import StaleId, StoreError, StoreUnavailable
from shared.text import in_words

CALL_TIMEOUT_S = 2.0
_STALE_ID = ("equal or smaller than the target stream top item", "exhausted the last possible ID")
_READ_ONLY = "READONLY"  # Redis 6 wraps the error of a script's command into its text
START_TIMEOUT_S = 30.0
"""How long a process tries to reach Redis at its start."""

Arg = str | bytes | int | float
Command = tuple[Arg, ...]


@cache
def _script(name: str) -> tuple[str, str]:
    text = (files("shared.store") / "scripts" / f"{name}.lua").read_text()
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


@contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except (
        exceptions.ConnectionError,
        exceptions.TimeoutError,
        exceptions.BusyLoadingError,
        exceptions.ReadOnlyError,
        exceptions.ClusterDownError,
        exceptions.OutOfMemoryError,
        OSError,
    ) as error:
        raise StoreUnavailable(in_words(error)) from error
    except exceptions.RedisError as error:
        if _READ_ONLY in str(error):
            raise StoreUnavailable(in_words(error)) from error
        if any(words in str(error) for words in _STALE_ID):
            raise StaleId(in_words(error)) from error
        raise StoreError(in_words(error)) from error


def _from_a_replica(error: BaseException | None) -> bool:
    return isinstance(error, (exceptions.ReadOnlyError, exceptions.MasterDownError)) or _READ_ONLY in str(error)


class Store:
    """One Redis client.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        ca_file: one more CA to trust with `rediss://`.
        raw: replies are bytes (frames) instead of text (everything else).
        block_s: longest that a blocking read of this client waits; a client that blocks serves one reader only.
    """

    def __init__(self, url: str, *, ca_file: Path | None = None, raw: bool = False, block_s: float = 0.0) -> None:
        options: dict[str, Any] = {}
        if url.startswith("rediss://") and ca_file is not None:
            options["ssl_ca_certs"] = str(ca_file)
        self._url = url
        self._ca_file = ca_file
        # Time is kept here: under a socket_timeout redis-py sends within asyncio.wait_for, which in Python 3.11 can
        # swallow a cancellation (cpython issue 86296), and a reader that does not hear it keeps its worker from ending.
        self._timeout_s = CALL_TIMEOUT_S + block_s
        self._redis: redis.asyncio.Redis = redis.asyncio.Redis.from_url(
            url,
            decode_responses=not raw,
            encoding_errors="replace",
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=CALL_TIMEOUT_S,
            protocol=2,
            **options,
        )

    def sibling(self, *, raw: bool = False, block_s: float = 0.0) -> Store:
        """Another client of the same server."""
        return Store(self._url, ca_file=self._ca_file, raw=raw, block_s=block_s)

    @asynccontextmanager
    async def _call(self) -> AsyncIterator[None]:
        """A call: bounded in time, with errors of our tree.

        Connections to a server that is a replica now are closed, so that the next call finds the new primary. Nobody
        else would do it: a demoted server goes on to answer whatever only reads.
        """
        try:
            with _our_errors():
                async with asyncio.timeout(self._timeout_s):
                    yield
        except StoreUnavailable as error:
            if _from_a_replica(error.__cause__):
                with _our_errors():
                    await self._redis.connection_pool.disconnect(inuse_connections=False)  # those in use come here, too
            raise

    async def command(self, *command: Arg) -> Any:
        """Send one command.

        Raises: StoreUnavailable, StoreError.
        """
        async with self._call():
            return await self._redis.execute_command(*command)  # type: ignore[no-untyped-call]

    async def transaction(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands as one MULTI; all happen or none.

        Raises: StoreUnavailable, StoreError.
        """
        return await self._pipeline(commands, transaction=True)

    async def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Send independent commands in one round trip.

        Raises: StoreUnavailable, StoreError.
        """
        return await self._pipeline(commands, transaction=False) if commands else []

    async def _pipeline(self, commands: Sequence[Command], *, transaction: bool) -> list[Any]:
        async with self._call(), self._redis.pipeline(transaction=transaction) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            return list(await pipeline.execute())

    async def script(self, name: str, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Run `scripts/<name>.lua`; every key it touches stands in `keys`.

        Raises: StoreUnavailable, StoreError.
        """
        text, sha = _script(name)
        async with self._call():
            try:
                return await self._redis.execute_command("EVALSHA", sha, len(keys), *keys, *args)  # type: ignore[no-untyped-call]
            except exceptions.NoScriptError:
                return await self._redis.execute_command("EVAL", text, len(keys), *keys, *args)  # type: ignore[no-untyped-call]

    async def scripts(self, name: str, calls: Sequence[tuple[Sequence[str], Sequence[Arg]]]) -> list[Any]:
        """Run `scripts/<name>.lua` once for each of `calls`, keys and arguments, in one round trip.

        A server that does not know the script is told it, and all are sent again: they must be safe to repeat.
        Raises: StoreUnavailable, StoreError: of the first that failed; the others may have been done.
        """
        text, sha = _script(name)
        commands = [("EVALSHA", sha, len(keys), *keys, *args) for keys, args in calls]
        try:
            return await self.pipeline(commands)
        except StoreError as error:
            if not isinstance(error.__cause__, exceptions.NoScriptError):
                raise
        await self.command("SCRIPT", "LOAD", text)
        return await self.pipeline(commands)

    async def hear(self, channels: Sequence[str], every_s: float) -> AsyncGenerator[str | None, None]:
        """Messages of pub/sub channels; and None every `every_s`, however much is said meanwhile.

        The first item is None, as soon as the subscription stands: whatever was said before it must be looked up.
        Raises: StoreUnavailable.
        """
        with _our_errors():
            async with self._redis.pubsub() as pubsub:
                async with asyncio.timeout(self._timeout_s):
                    await pubsub.subscribe(*channels)
                for _ in channels:  # each is confirmed; until then a message may pass unheard
                    if await pubsub.get_message(timeout=CALL_TIMEOUT_S) is None:
                        raise exceptions.TimeoutError("SUBSCRIBE was not answered")
                while True:
                    yield None
                    until_s = time.monotonic() + every_s
                    while (left_s := until_s - time.monotonic()) > 0:
                        message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=left_s)
                        if message is None or message["type"] != "message":
                            continue
                        data = message["data"]
                        yield data if isinstance(data, str) else data.decode(errors="replace")

    async def close(self) -> None:
        with _our_errors():
            await self._redis.aclose()


async def reach(store: Store, stop: asyncio.Event | None = None) -> bool:
    """Wait until Redis answers, 30 s at most; False when `stop` was set meanwhile.

    Raises: StoreUnavailable.
    """
    reaching = asyncio.create_task(_reach(store))
    stopped = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait([reaching, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not reaching.done():
            return False
        reaching.result()
        return True
    finally:
        for task in (reaching, stopped):
            task.cancel()
        await asyncio.gather(reaching, stopped, return_exceptions=True)


async def _reach(store: Store) -> None:
    async for attempt in stamina.retry_context(
        on=StoreUnavailable, timeout=START_TIMEOUT_S, attempts=None, wait_initial=0.1, wait_max=2.0
    ):
        with attempt:
            await store.command("PING")
