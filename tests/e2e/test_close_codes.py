"""Each close code of the voice gateway, closed by the server while music plays: what the table says is what happens.

All guilds of this module meet their fate at once, one code each, and the tests look at what became of them.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import pytest_asyncio

from shared.protocol.close_codes import CLOSE_CODES, Action, action_for
from shared.schema.event import Event
from shared.schema.records import GuildStatus
from tests.e2e.outside_bot import outside_bot
from tests.e2e.stack import Stack, until
from tests.emulator.records import SessionReport
from tests.media.make_programme import PROGRAMME

pytestmark = pytest.mark.asyncio(loop_scope="module")

CUT, BELOW_4000, UNKNOWN = 1006, 3000, 4099
KICKED, MOVED = 4014, 4022
ALL_CODES = [*CLOSE_CODES, CUT, BELOW_4000, UNKNOWN]
SETTLED_WITHIN_S = 45.0


@dataclass
class Fate:
    """What became of one guild."""

    code: int
    audible_after_s: float | None = None
    sessions: list[SessionReport] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    """Of a session that was to be resumed."""
    wanted: list[Event] = field(default_factory=list)
    status: GuildStatus | None = None
    after_repeat: GuildStatus | None = None


async def close(stack: Stack, guild: str, code: int) -> None:
    if code == CUT:
        await stack.discord.fault(guild, "drop")
    else:
        await stack.discord.fault(guild, "close", code=code)


async def sound(stack: Stack, guild: str) -> list[int]:
    """Arrivals of all sound in all sessions of a guild, ns."""
    recorded = (await stack.packets(guild)).sessions
    return [at for session in recorded for at in session.arrival_ns]


async def longest_gap_s(stack: Stack, guild: str) -> float:
    arrivals = await sound(stack, guild)
    return max(after - before for before, after in pairwise(arrivals)) / 1e9


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fates(running: Stack) -> AsyncIterator[dict[int, Fate]]:
    """Close one guild with each code, let an outside bot answer, and wait until all is settled."""
    stack = running
    await asyncio.to_thread(shutil.copy, PROGRAMME, stack.media)
    radio = await stack.start(stack.media / PROGRAMME.name, loop=True)
    guilds = dict(zip(ALL_CODES, await stack.join(len(ALL_CODES), radio), strict=True))
    await stack.hear_more(guilds.values(), 50)
    fates = {code: Fate(code) for code in guilds}
    async with outside_bot(stack, {guilds[KICKED]}):
        for code, guild in guilds.items():
            await close(stack, guild, code)
        stopped = {code for code in guilds if action_for(code) is Action.STOP} | {KICKED}

        async def settled() -> bool:
            for code, guild in guilds.items():
                _, status = await stack.guild(guild)
                if code in stopped:
                    if status is None or not status.final:  # the worker's own word is not yet what is done about it
                        return False
                elif not await heard_since(stack, guild, code):
                    return False
            return True

        await until(settled, "every guild heard again, or given up", SETTLED_WITHIN_S, 0.2)
        for code, guild in guilds.items():
            fates[code].sessions = await stack.sessions(guild)
            fates[code].status = (await stack.guild(guild))[1]
            fates[code].wanted = await stack.events("guild.voice_wanted", guild=guild)
            if action_for(code) is Action.RESUME:
                fates[code].faults = await stack.faults(fates[code].sessions[0])
            if code not in stopped:
                fates[code].audible_after_s = await longest_gap_s(stack, guild)
        again = {code: guild for code, guild in guilds.items() if action_for(code) is Action.FIX_ONCE}
        for code, guild in again.items():
            await close(stack, guild, code)
        for code, guild in again.items():
            await stack.wait_event("guild.failed", guild=guild, final=True)
            fates[code].after_repeat = (await stack.guild(guild))[1]
        yield fates


async def heard_since(stack: Stack, guild: str, code: int) -> bool:
    """Whether a guild plays on after what happened to it: a session resumed, or a newer one with a second of sound."""
    sessions = await stack.sessions(guild)
    newest = sessions[-1]
    if action_for(code) is Action.RESUME:
        return newest.resumed > 0 and newest.state == "live"
    return len(sessions) > 1 and newest.audio_packets > 50


def of_action(action: Action) -> list[int]:
    return [code for code in ALL_CODES if action_for(code) is action and code != KICKED]


def tell(fate: Fate, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n  {fate.code}: {action_for(fate.code)}, longest silence {fate.audible_after_s or 0:.2f} s", end=" ")


@pytest.mark.parametrize("code", of_action(Action.RESUME))
async def test_a_session_that_may_go_on_is_resumed_and_nothing_is_lost(
    fates: dict[int, Fate], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same ssrc, no question to anybody, no packet missing but those that the pool itself says it skipped."""
    fate = fates[code]
    (session,) = fate.sessions
    assert session.resumed == 1
    assert not fate.faults
    assert fate.wanted == []
    tell(fate, capsys)


@pytest.mark.parametrize("code", [*of_action(Action.NEW_CREDENTIALS), *of_action(Action.FIX_ONCE)])
async def test_a_session_that_is_gone_is_heard_again_with_new_credentials(
    fates: dict[int, Fate], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The outside bot is asked once, told why, and its answer is used."""
    fate = fates[code]
    (wanted,) = fate.wanted
    assert (wanted.close_code, wanted.rejoin, wanted.leave_first) == (code, True, True)
    first, second = fate.sessions
    assert (first.close_code, first.close_by) == (code, "server")
    assert second.state == "live"
    assert fate.status is not None
    assert fate.status.state == "playing"
    tell(fate, capsys)


@pytest.mark.parametrize("code", of_action(Action.FIX_ONCE))
async def test_a_mistake_of_ours_is_tried_once_and_no_more(fates: dict[int, Fate], code: int) -> None:
    """The same code again: the guild is given up until somebody asks for it anew."""
    status = fates[code].after_repeat
    assert status is not None
    assert (status.close_code, status.final) == (code, True)


@pytest.mark.parametrize("code", of_action(Action.STOP))
async def test_what_cannot_help_is_not_tried(fates: dict[int, Fate], code: int) -> None:
    """One session, no question, a final status that says so."""
    fate = fates[code]
    assert fate.status is not None
    assert (fate.status.state, fate.status.close_code, fate.status.final) == ("failed", code, True)
    assert len(fate.sessions) == 1
    assert fate.wanted == []


async def test_a_bot_that_was_kicked_stays_out(fates: dict[int, Fate]) -> None:
    """Asked for word, not to rejoin; no word: the guild is left alone, with a code of its own."""
    fate = fates[KICKED]
    (wanted,) = fate.wanted
    assert (wanted.close_code, wanted.rejoin) == (KICKED, False)
    assert fate.status is not None
    assert (fate.status.code, fate.status.final) == ("kicked", True)
    assert len(fate.sessions) == 1


async def test_a_bot_that_was_moved_follows(fates: dict[int, Fate], capsys: pytest.CaptureFixture[str]) -> None:
    """The same question, answered: it is heard again."""
    fate = fates[MOVED]
    (wanted,) = fate.wanted
    assert (wanted.close_code, wanted.rejoin) == (MOVED, False)
    assert len(fate.sessions) == 2
    assert fate.status is not None
    assert fate.status.state == "playing"
    tell(fate, capsys)


async def test_every_code_of_the_table_is_tried_here(fates: dict[int, Fate]) -> None:
    """A new code in the table is tested with it."""
    assert set(CLOSE_CODES) <= set(fates)
