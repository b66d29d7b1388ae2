"""A bot of the user's own that holds the main gateway: it answers `guild.voice_wanted`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress

from shared.schema import event as events
from tests.e2e.stack import Stack


class OutsideBot:
    """Answers `guild.voice_wanted` as a user's own bot does; it was thrown out of the guilds in `kicked`."""

    def __init__(self, stack: Stack, kicked: Collection[str]) -> None:
        self._stack = stack
        self._kicked = kicked

    async def run(self) -> None:
        last = "-"
        while True:
            new = await self._stack.store.command("XRANGE", self._stack.keys.events, last, "+")
            for entry_id, fields in new:
                last = f"({entry_id}"
                event = events.decode(fields[events.FIELD])
                if event.type == "guild.voice_wanted" and event.guild not in self._kicked:
                    voice = await self._stack.voice(event.guild, event.channel, kind=None)
                    await self._stack.send(
                        {"v": 1, "id": self._stack.new_id("bot"), "type": "guild.voice", "guild": event.guild}
                        | {"channel": event.channel, "voice": voice}
                    )
            await asyncio.sleep(0.02)  # the events stream is polled by bots, too


@asynccontextmanager
async def outside_bot(stack: Stack, kicked: Collection[str] = ()) -> AsyncIterator[None]:
    """Such a bot is there, from here to there. Raises what made it end before."""
    bot = asyncio.create_task(OutsideBot(stack, kicked).run())
    try:
        yield
    finally:
        bot.cancel()
        with suppress(asyncio.CancelledError):
            await bot
