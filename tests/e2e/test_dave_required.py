"""A pool that refuses to send in the clear: a downgrade ends the sound, and encryption brings it back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from shared.errors import ErrorCode
from tests.e2e.stack import Stack, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """The usual pool, told to refuse."""
    folder = tmp_path_factory.mktemp("dave-required")
    async with Stack(folder, settings={"GUILDCAST_DAVE_REQUIRED": "true"}) as stack:
        yield stack


async def test_a_refused_downgrade_is_silent_until_encryption_is_back(stack: Stack, music: Path) -> None:
    """Told as suppressed with its code and an event; no frame leaves in the clear; then the same session plays on."""
    radio = await stack.start(music, loop=True)
    refusing, untouched = await stack.join(2, radio)
    await stack.hear_more([refusing, untouched], 25)

    await stack.discord.fault(refusing, "downgrade")
    (suppressed,) = await stack.wait_state([refusing], "suppressed")
    assert (suppressed.code, suppressed.dave_protocol_version) == (ErrorCode.E2EE_DOWNGRADED, 0)
    await stack.wait_event("guild.dave_downgraded", guild=refusing)
    await stack.wait_event("guild.suppressed", guild=refusing, code=ErrorCode.E2EE_DOWNGRADED)

    async def silent() -> bool:
        return (await stack.sessions(refusing))[-1].trailing_silence == 5

    await until(silent, "closing silence")
    before = (await stack.sessions(refusing))[-1]
    await stack.hear_more([untouched], 50)  # frames that the other one was not sent
    after = (await stack.sessions(refusing))[-1]
    assert after.audio_packets == before.audio_packets
    assert after.in_the_clear == 0

    await stack.discord.fault(refusing, "upgrade")
    (playing,) = await stack.wait_state([refusing], "playing")
    assert (playing.code, playing.dave_protocol_version) == ("", 1)
    await stack.hear_more([refusing], 25)
    (session,) = await stack.sessions(refusing)
    assert (session.state, session.in_the_clear) == ("live", 0)
    assert not await stack.faults(session)
    assert await stack.events("guild.suppressed", guild=untouched) == []
