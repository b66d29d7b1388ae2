"""A guild comes, goes, moves its session and gets into trouble on its own: the others go on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.e2e.stack import Stack, ended_cleanly, until
from tests.emulator.records import SessionReport

pytestmark = pytest.mark.asyncio(loop_scope="module")

XCHACHA = "aead_xchacha20_poly1305_rtpsize"


@pytest_asyncio.fixture(loop_scope="module")
async def radio(stack: Stack, music: Path) -> AsyncIterator[str]:
    """A broadcast on air."""
    yield await stack.start(music, loop=True)


async def last_session(stack: Stack, guild: str) -> SessionReport:
    return (await stack.sessions(guild))[-1]


async def wait_ended(stack: Stack, guild: str) -> SessionReport:
    """The guild's first session, once it has ended."""

    async def ended() -> SessionReport | None:
        session = (await stack.sessions(guild))[0]
        return session if session.state == "ended" else None

    session = await until(ended, f"the end of the session of {guild}")
    assert session is not None
    return session


async def assert_undisturbed(stack: Stack, guilds: list[str]) -> None:
    """These guilds still hear all there is, on the session they began with."""
    await stack.hear_more(guilds, 25)
    for guild, row in (await stack.heard(guilds)).items():
        (session,) = row.sessions
        assert not await stack.faults(session), guild
        assert session.state == "live"
        assert session.trailing_silence == 0


async def test_leaving_ends_one_guild_cleanly_and_it_may_come_back(stack: Stack, radio: str) -> None:
    """guild.leave ends one guild with silence, speaking off and a clean close; guild.join brings it back."""
    leaver, *others = await stack.join(4, radio)
    await stack.hear_more([leaver], 25)
    await stack.do("guild.leave", guild=leaver)
    assert ended_cleanly(session := await wait_ended(stack, leaver)), session
    assert not await stack.faults(session)
    assert len(await stack.events("guild.stopped", guild=leaver)) == 1
    await assert_undisturbed(stack, others)
    channel = str(int(leaver) + 10**17)
    await stack.join_these([(leaver, channel)], radio)
    await stack.hear_more([leaver], 25)
    back = await last_session(stack, leaver)
    assert back.ssrc != session.ssrc
    assert not await stack.faults(back)
    await assert_undisturbed(stack, others)


async def test_fresh_credentials_move_the_session(stack: Stack, radio: str) -> None:
    """guild.voice for a playing guild ends the old session and is heard on a new one."""
    mover, *others = await stack.join(3, radio)
    channel = str(int(mover) + 10**17 + 1)
    before = await last_session(stack, mover)
    await stack.do("guild.voice", guild=mover, channel=channel, voice=await stack.voice(mover, channel))

    async def moved() -> bool:
        now = await last_session(stack, mover)
        return now.ssrc != before.ssrc and now.state == "live" and now.audio_packets > 0

    await until(moved, "sound on the new session")
    await stack.hear_more([mover], 25)
    assert not await stack.faults(await last_session(stack, mover))
    await assert_undisturbed(stack, others)


async def test_stopping_a_broadcast_silences_all_its_guilds_and_no_others(
    stack: Stack, radio: str, music: Path
) -> None:
    """broadcast.stop ends in five frames of silence; the guilds stay connected, other broadcasts go on."""
    stopped = await stack.start(music)
    silenced = await stack.join(4, stopped)
    others = await stack.join(2, radio)
    run = await stack.run_of(stopped)
    await stack.wait_lead(run, 10)
    await stack.do("broadcast.stop", broadcast=stopped)
    ended = await stack.wait_event("broadcast.ended", run=run)
    assert ended.reason == "stopped"

    async def silent() -> bool:
        return all(row.sessions[-1].trailing_silence == 5 for row in (await stack.heard(silenced)).values())

    # 30 s are published ahead: what ends within this bound was cut, not played out.
    await until(silent, "silence in all guilds of the broadcast", 5)
    for guild, row in (await stack.heard(silenced)).items():
        (session,) = row.sessions
        assert session.state == "live", guild
        assert not await stack.faults(session), guild
    await stack.wait_state(silenced, "idle")
    await assert_undisturbed(stack, others)


async def test_a_guild_whose_session_is_void_is_heard_again_with_new_credentials(stack: Stack, radio: str) -> None:
    """Close code 4006 asks the outside bot for credentials; guild.voice answers, and the guild is heard again."""
    voided, *others = await stack.join(3, radio)
    await stack.discord.fault(voided, "close", code=4006)
    wanted = await stack.wait_event("guild.voice_wanted", guild=voided)
    assert wanted.close_code == 4006
    assert wanted.deadline_ms
    await stack.do("guild.voice", guild=voided, channel=wanted.channel, voice=await stack.voice(voided, wanted.channel))
    await stack.wait_state([voided], "playing")
    await stack.hear_more([voided], 25)
    first, second = await stack.sessions(voided)
    assert (first.close_code, first.close_by) == (4006, "server")
    assert not await stack.faults(second)
    await assert_undisturbed(stack, others)


async def test_a_guild_whose_bot_was_moved_is_heard_where_it_is_now(stack: Stack, radio: str) -> None:
    """Close code 4014, and guild.voice says where the bot is now: the guild is heard there."""
    moved, *others = await stack.join(3, radio)
    await stack.discord.fault(moved, "close", code=4014)
    wanted = await stack.wait_event("guild.voice_wanted", guild=moved)
    assert (wanted.reason, wanted.close_code, wanted.rejoin) == ("disconnected", 4014, False)
    channel = str(int(moved) + 10**17 + 1)
    await stack.do("guild.voice", guild=moved, channel=channel, voice=await stack.voice(moved, channel))
    await stack.wait_state([moved], "playing")
    await stack.hear_more([moved], 25)
    first, second = await stack.sessions(moved)
    assert (first.close_code, first.close_by) == (4014, "server")
    assert not await stack.faults(second)
    await assert_undisturbed(stack, others)


async def test_guilds_that_are_not_wanted_stay_out_and_touch_no_other(stack: Stack, radio: str) -> None:
    """Kicked and nobody says otherwise, or refused for good: no further session, and the status says why."""
    kicked, refused, *others = await stack.join(4, radio)
    await stack.discord.fault(kicked, "close", code=4014)
    await stack.discord.fault(refused, "close", code=4021)
    failed = await stack.wait_event("guild.failed", guild=refused, final=True)
    assert failed.close_code == 4021
    stopped = await stack.wait_event("guild.stopped", guild=kicked)
    assert (stopped.code, stopped.final) == ("kicked", True)
    await assert_undisturbed(stack, others)
    for guild, state in ((kicked, "stopped"), (refused, "failed")):
        worker, status = await stack.guild(guild)
        assert worker == ""
        assert status is not None
        assert (status.state, status.final) == (state, True)
        assert len(await stack.sessions(guild)) == 1


async def test_a_dropped_websocket_is_resumed_without_a_lost_packet(stack: Stack, radio: str) -> None:
    """A broken TCP connection costs no packet and no session: it is resumed with the same ssrc."""
    dropped, *others = await stack.join(3, radio)
    before = await last_session(stack, dropped)
    await stack.discord.fault(dropped, "drop")

    async def resumed() -> bool:
        return (await last_session(stack, dropped)).resumed == 1

    await until(resumed, "a resumed session")
    await stack.hear_more([dropped], 50)
    (after,) = await stack.sessions(dropped)
    assert after.ssrc == before.ssrc
    assert after.state == "live"
    assert not await stack.faults(after)
    await assert_undisturbed(stack, others)


async def test_a_guild_joins_although_the_first_answer_to_discovery_is_lost(stack: Stack, radio: str) -> None:
    """IP discovery is asked again when nothing comes back."""
    ((guild, channel),) = stack.new_guilds(1)
    await stack.voice(guild, channel)
    await stack.discord.fault(guild, "discovery_lose_first", n=1)
    await stack.join_these([(guild, channel)], radio)
    await stack.wait_state([guild], "playing")
    await stack.hear_more([guild], 25)
    (session,) = await stack.sessions(guild)
    assert not await stack.faults(session)


async def test_a_guild_whose_udp_is_blocked_says_so_and_others_go_on(stack: Stack, radio: str) -> None:
    """Where no datagram comes back, the guild fails with `udp_blocked`; once they do, it is heard."""
    others = await stack.join(2, radio)
    ((guild, channel),) = stack.new_guilds(1)
    await stack.voice(guild, channel)
    await stack.discord.fault(guild, "discovery_silent", on=True)
    await stack.join_these([(guild, channel)], radio)
    failed = await stack.wait_event("guild.failed", guild=guild)
    assert failed.code == "udp_blocked"
    assert "firewall" in failed.message
    await stack.discord.fault(guild, "discovery_silent", on=False)
    await stack.wait_state([guild], "playing")
    await stack.hear_more([guild], 25)
    await assert_undisturbed(stack, others)


async def test_a_guild_that_offers_only_xchacha_is_heard(stack: Stack, radio: str) -> None:
    """A voice server without AES-GCM is served in XChaCha20."""
    ((guild, channel),) = stack.new_guilds(1)
    await stack.voice(guild, channel)
    await stack.discord.fault(guild, "modes", modes=[XCHACHA])
    await stack.join_these([(guild, channel)], radio)
    await stack.wait_state([guild], "playing")
    await stack.hear_more([guild], 50)
    (session,) = await stack.sessions(guild)
    assert session.mode == XCHACHA
    assert not await stack.faults(session)
