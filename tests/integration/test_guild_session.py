"""One guild on a worker: whatever ends its connection is told with a code of its own."""

from __future__ import annotations

import asyncio
import gc
import ssl
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from shared.cli.pool import LOOPBACK
from shared.clock import CommonClock, LocalClock
from shared.errors import ErrorCode
from shared.schema.event import EventType
from shared.schema.records import GuildSpec, GuildStatus, GuildWant, VoiceRecord, WorkerRecord, WorkerStats
from shared.seal import Seal
from shared.store.client import Store
from shared.store.keys import Keys
from shared.voice_servers import VoiceServers
from tests.emulator.client import EmulatorClient
from tests.emulator.local import LocalDiscord
from tests.garbage import look_minutes_later, own_collections_off
from worker.fanout.build import Builder
from worker.fanout.guild import GuildSession
from worker.fanout.programme import Programme
from worker.fanout.rows import RowTable
from worker.fanout.sockets import SocketPool
from worker.membership import Membership
from worker.voice import connection
from worker.voice.commons import VoiceShared
from worker.voice.turns import Turns

GUILD = "323456789012345678"
VOICE = VoiceRecord(user_id=GUILD, session_id="s", token="t", endpoint="voice.example")
SILENT = VoiceRecord(user_id=GUILD, session_id="s", token="t", endpoint="127.0.0.1:9")
"""On this machine, where nobody listens: the session waits at its door."""


class Desk:
    """A worker's parts, as far as a guild needs them before it is connected."""

    def __init__(
        self, exits: AsyncExitStack, http: aiohttp.ClientSession, membership: Membership, store: Store
    ) -> None:
        self._store = store
        self.told: list[GuildStatus] = []
        self.membership = membership
        table = RowTable(1)
        exits.callback(table.close)
        self.builder = Builder(table)
        self.sockets = SocketPool("127.0.0.1", range(0), per_guild=False, on_new=lambda _: None)
        exits.callback(self.sockets.close)
        self.shared = VoiceShared(http, ssl.create_default_context(), VoiceServers(LOOPBACK, LOOPBACK), Turns(None))

    def _tell(self, _session: GuildSession, status: GuildStatus, _kind: EventType | None) -> None:
        self.told.append(status)

    def guild(self, spec: GuildSpec) -> GuildSession:
        return GuildSession(
            GuildWant(spec=spec, generation=1),
            membership=self.membership,
            builder=self.builder,
            sockets=self.sockets,
            shared=self.shared,
            seal=Seal(None),
            programme_of=lambda broadcast: Programme(
                broadcast, self._store, self.membership.keys, CommonClock(LocalClock())
            ),
            tell=self._tell,
        )


@pytest.fixture
async def desk(store: Store, keys: Keys) -> AsyncIterator[Desk]:
    async with AsyncExitStack() as exits:
        record = WorkerRecord(id="w", name="w", role="fanout", host="h", capacity=1, headroom=1)
        membership = Membership(store, keys, record, LocalClock())
        await membership.renew(1, WorkerStats())
        yield Desk(exits, await exits.enter_async_context(aiohttp.ClientSession()), membership, store)


async def test_a_defect_of_ours_is_told_as_such(desk: Desk) -> None:
    """It must not look like a network that is away, which may be tried for ever; nor must its text be told."""
    no_flags: Any = None
    spec = GuildSpec(bot="main", guild=GUILD, channel=GUILD, broadcast="news", voice=VOICE, speaking=no_flags)
    await desk.guild(spec).task
    assert [status.state for status in desk.told] == ["connecting", "failed"]
    assert (desk.told[-1].code, desk.told[-1].message) == (ErrorCode.INTERNAL_ERROR, "TypeError")


async def test_a_session_that_ends_unasked_is_told_as_failed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is played without it; that it looks like an end by order must not leave the guild as it was told last."""
    spec = GuildSpec(bot="main", guild=GUILD, channel=GUILD, broadcast="news", voice=VOICE)

    async def end(_: connection.VoiceConnection) -> None:
        """As if it had been told to."""

    monkeypatch.setattr(connection.VoiceConnection, "run", end)
    await desk.guild(spec).task
    assert (desk.told[-1].state, desk.told[-1].code) == ("failed", ErrorCode.INTERNAL_ERROR)


async def test_a_session_that_is_cancelled_unasked_is_told_as_failed(desk: Desk) -> None:
    """By whatever there is in it: only `stop` may do so."""
    spec = GuildSpec(bot="main", guild=GUILD, channel=GUILD, broadcast="news", voice=SILENT)
    guild = desk.guild(spec)
    await asyncio.sleep(0)
    guild.task.cancel()
    with capture_logs() as logs:
        await asyncio.wait({guild.task})
    assert (desk.told[-1].state, desk.told[-1].code) == ("failed", ErrorCode.INTERNAL_ERROR)
    assert [line["event"] for line in logs] == ["connection.cancelled"]


async def test_a_session_that_is_stopped_is_not_told_as_failed(desk: Desk) -> None:
    guild = desk.guild(GuildSpec(bot="main", guild=GUILD, channel=GUILD, broadcast="news", voice=SILENT))
    await asyncio.sleep(0)
    await guild.stop()
    assert [status.state for status in desk.told] == ["connecting"]


async def freed(desk: Desk, spec: GuildSpec, during: Callable[[GuildSession], Awaitable[None]]) -> bool:
    """Whether a guild whose connection ended is freed, though it was frozen while it lived, and when it had ended."""
    with own_collections_off():
        guild = desk.guild(spec)
        await during(guild)
        gc.freeze()
        await guild.task
        await guild.stop()
        gone = weakref.ref(guild)
        del guild
        await asyncio.sleep(0)  # the loop lets go of the task
        gc.freeze()
        look_minutes_later()
        return gone() is None


async def test_a_guild_that_was_never_connected_is_freed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Usual collections do not look at what was frozen; the announced one finds what ended."""
    monkeypatch.setattr(connection, "JOIN_WITHIN_S", 0.2)
    voice = VoiceRecord(user_id=GUILD, session_id="s", token="t", endpoint="127.0.0.1:9")
    spec = GuildSpec(bot="main", guild=GUILD, channel=GUILD, broadcast="news", voice=voice)
    assert await freed(desk, spec, lambda _: asyncio.sleep(0))
    assert desk.told[-1].code == ErrorCode.VOICE_UNREACHABLE


@pytest.mark.parametrize("code", [4014, 4011])
async def test_a_guild_whose_session_the_server_ended_is_freed(desk: Desk, code: int) -> None:
    """Neither its connection nor its encrypted group stays behind."""
    async with AsyncExitStack() as exits:
        local = await exits.enter_async_context(LocalDiscord())
        discord = await exits.enter_async_context(EmulatorClient(local.control_url))
        desk.shared.tls.load_verify_locations(str(local.ca_file))
        (voice,) = await discord.issue([(GUILD, GUILD)], kind="voice", ghosts=1)
        spec = GuildSpec(
            bot="main",
            guild=GUILD,
            channel=GUILD,
            broadcast="news",
            voice=VoiceRecord(
                user_id=voice.user_id, session_id=voice.session_id, token=voice.token, endpoint=voice.endpoint
            ),
        )

        async def close(guild: GuildSession) -> None:
            async with asyncio.timeout(10):
                while guild.row is None:  # noqa: ASYNC110 - a row wakes nobody
                    await asyncio.sleep(0.005)
            await discord.fault(GUILD, "close", code=code)

        assert await freed(desk, spec, close)
        assert desk.told[-1].close_code == code
