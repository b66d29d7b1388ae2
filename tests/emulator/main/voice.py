"""What the main gateway asks of the voice servers."""

from tests.emulator.main.world import Channel
from tests.emulator.records import Voice
from tests.emulator.server import VoiceServer
from tests.emulator.session import VoiceSession


class VoiceLink:
    """Credentials and sessions by guild and user."""

    def __init__(self, server: VoiceServer) -> None:
        self._server = server

    async def open(self, channel: Channel) -> None:
        """Let a channel exist, with those who are to be there. Raises: FullError, TakenError."""
        plan = channel.plan
        guild = await self._server.open_guild(channel.guild)
        self._server.open_channel(guild, channel.channel, plan.kind, plan.members, plan.ghosts)

    async def admit(self, channel: Channel, user_id: str, session_id: str) -> Voice:
        """Fresh credentials; older ones are void, but their voice session goes on until `expel`."""
        guild = await self._server.open_guild(channel.guild)
        room = self._server.open_channel(guild, channel.channel)
        seat = self._server.take_seat(guild, room, user_id)
        seat.renew(room, session_id)
        return seat.voice()

    def line(self, guild: str, user_id: str) -> VoiceSession | None:
        """The voice session of a user that has not ended."""
        known = self._server.guilds.get(guild)
        seat = None if known is None else known.seats.get(user_id)
        return None if seat is None else seat.current

    def is_live(self, line: VoiceSession) -> bool:
        """Whether it has a WebSocket."""
        return line.conversation is not None

    def expel(self, line: VoiceSession, code: int) -> None:
        """Close a voice session for good."""
        self._server.expel(line, code, "Disconnected.")

    def revoke(self, guild: str, user_id: str) -> None:
        """Void the credentials of a user."""
        seat = self._server.guilds[guild].seats.get(user_id)
        if seat is not None:
            seat.renew(seat.channel)

    async def relocate(self, guild: str) -> None:
        """The guild's next credentials are for another voice server."""
        await self._server.relocate(self._server.guild(guild))
