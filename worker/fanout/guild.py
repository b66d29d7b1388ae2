"""One guild under one generation: its voice connection, its row, and what is told about it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec import structs

from shared.clock import unix_ms
from shared.errors import ErrorCode, GuildcastError, TaskEnded, VoiceClosed, VoiceError
from shared.logs import get_logger
from shared.protocol.voice_gateway import Credentials
from shared.schema.event import EventType
from shared.schema.records import GuildState, GuildStatus, GuildWant
from shared.seal import Seal
from shared.tasks import begin
from worker.fanout.build import Builder, Target
from worker.fanout.programme import Programme
from worker.fanout.sockets import SocketPool
from worker.membership import Membership
from worker.voice.commons import VoiceShared
from worker.voice.connection import Media, VoiceConnection, speaking_bits

_SILENT_WITHIN_S = 1.0
"""Closing silence: a few ticks until it begins, five frames, and room for a late sender."""
_POLL_S = 0.02
EMPTY_AFTER_S = 10.0
"""A channel that is known to be empty for so long gets no packets until somebody comes."""

Tell = Callable[["GuildSession", GuildStatus, EventType | None], None]
"""Takes a guild's status and the kind of event that goes with it: none for a mere detail."""


class GuildSession:
    """Connects, plays a lane, ends with silence.

    Args:
        want: what the coordinator asked for.
        programme_of: the programme of a broadcast.
        tell: told of each change.
    """

    def __init__(
        self,
        want: GuildWant,
        *,
        membership: Membership,
        builder: Builder,
        sockets: SocketPool,
        shared: VoiceShared,
        seal: Seal,
        programme_of: Callable[[str], Programme],
        tell: Tell,
    ) -> None:
        self.want = want
        self._membership = membership
        self._builder = builder
        self._sockets = sockets
        self._shared = shared
        self._seal = seal
        self._programme_of = programme_of
        self._tell = tell
        self._row: int | None = None
        self._media: Media | None = None
        self._connection: VoiceConnection | None = None
        self._told: GuildStatus | None = None
        self._linked = True
        self._path_lost: VoiceError | None = None
        self._deserted = False
        self._desertion: asyncio.TimerHandle | None = None
        self._stopping = False
        self._log = get_logger().bind(guild=want.spec.guild, generation=want.generation)
        self.task = begin(self._run(), f"guild {want.spec.guild}")

    @property
    def row(self) -> int | None:
        """The row of an established connection."""
        return self._row

    @property
    def slot(self) -> int | None:
        return None if self._row is None else self._builder.slot_of(self._row)

    async def _run(self) -> None:
        spec = self.want.spec
        self.tell("connecting")
        try:
            if spec.voice is None:
                raise VoiceError("no voice credentials came with this guild", code=ErrorCode.VOICE_CREDENTIALS_MISSING)
            voice = self._seal.open_voice(spec.voice, spec.bot, spec.guild)
            self._connection = VoiceConnection(
                Credentials(spec.guild, spec.channel, voice.user_id, voice.session_id, voice.token),
                voice.endpoint,
                shared=self._shared,
                lease_port=self._sockets.lease,
                may_open=self._membership.wait_clearance,
                owner=self,
                speaking=speaking_bits(spec.speaking),
            )
            await self._connection.run()
            if not self._stopping:
                raise TaskEnded("the connection ended by itself")
        except asyncio.CancelledError:
            if not self._stopping:  # a guild without its session must not be told as one that plays
                self._log.error("connection.cancelled", code=ErrorCode.INTERNAL_ERROR)
                self.tell("failed", TaskEnded("the connection was cancelled"))
            raise
        except GuildcastError as error:
            close_code = error.close_code if isinstance(error, VoiceClosed) else None
            self._log.warning("connection.failed", code=error.code, error=error.message, close_code=close_code)
            self.tell("failed", error)
        except Exception as error:  # noqa: BLE001
            # One guild's defect must not become another's: it ends this connection, loudly.
            self._log.exception("connection.crashed")
            self.tell("failed", VoiceError(type(error).__name__, code=ErrorCode.INTERNAL_ERROR))
        finally:
            if self._desertion is not None:
                self._desertion.cancel()
            if self._row is not None:
                self._builder.close(self._row)
                self._row = None
            self._connection = None  # it knows us, too: what has ended must be gone without a collection

    # told by the connection

    def media(self, media: Media) -> None:
        """A key is there: take a row, or go on in it under the new key."""
        if media == self._media:
            return  # told again: under the same key the nonce goes on counting
        self._media = media
        target = Target(media.ssrc, media.remote, media.socket_number, media.mode, media.secret_key)
        if self._row is not None:
            self._builder.rekey(self._row, target)
            return
        self._row = self._builder.open(target)
        self._log.info("connection.opened", slot=self.slot, mode=media.mode)
        self.changed()

    def link(self, up: bool) -> None:
        """Sound goes on while the WebSocket is resumed; that it is gone is told all the same."""
        self._linked = up
        self.tell_how_it_is()

    def path(self, lost: VoiceError | None) -> None:
        """Sound that is sent and does not arrive is silence, whatever else stands."""
        self._path_lost = lost
        if lost is None:
            self._log.info("udp_path.returned")
            self.tell_how_it_is()
            return
        self._shared.counters.udp_paths_lost += 1
        self._log.warning("udp_path.lost", code=lost.code, error=lost.message)
        self.tell_how_it_is()
        if self._told is not None:
            self._tell(self, self._told, "guild.udp_lost")

    def datagram_failed(self, number: int) -> None:
        """A packet of this guild could not leave (errno)."""
        if self._connection is not None:
            self._connection.datagram_failed(number)

    def changed(self) -> None:
        """Encryption or members changed: frames leave when they may, and where somebody hears them."""
        connection = self._connection
        if connection is None:
            return
        if self._row is not None:
            # also before there are keys: what was built in the clear is void once encryption is in force
            self._builder.protect(self._row, connection.dave.protect)
        if self._stopping:
            return
        self._watch_for_desertion(connection.others)
        if self._row is None:
            return
        audible = connection.dave.ready and not self._deserted
        self._builder.tune(self._row, self._programme_of(self.want.spec.broadcast).lane if audible else None)
        self.tell_how_it_is()

    def _watch_for_desertion(self, others: set[str] | None) -> None:
        """Note an empty channel, but not before it has been so for a while. Unknown is not empty."""
        if others is None or others:
            self._deserted = False
            if self._desertion is not None:
                self._desertion.cancel()
                self._desertion = None
        elif self._desertion is None and not self._deserted:
            self._desertion = asyncio.get_running_loop().call_later(EMPTY_AFTER_S, self._desert)

    def _desert(self) -> None:
        self._desertion = None
        self._deserted = True
        self.changed()

    # what is told

    def tell_how_it_is(self) -> None:
        """Report what an established connection does."""
        connection = self._connection
        if connection is None or self._row is None:
            return
        if self._path_lost is not None:
            self.tell("reconnecting", self._path_lost)
        elif not self._linked:
            self.tell("reconnecting")
        elif connection.dave.refused:
            message = "the server ordered to go on without end-to-end encryption, which GUILDCAST_DAVE_REQUIRED refuses"
            self.tell("suppressed", VoiceError(message, code=ErrorCode.E2EE_DOWNGRADED))
        elif self._is_alone(connection):
            self.tell("alone")
        elif not connection.dave.ready:
            self.tell("connecting")
        elif self._deserted:
            self.tell("idle")
        else:
            self._tell_what_plays()

    def _is_alone(self, connection: VoiceConnection) -> bool:
        """Whether nobody is there to be encrypted for. A call of one may go on without encryption (section 11, 9)."""
        if connection.others != set():
            return False
        encryption = connection.dave
        return not encryption.ready or (not encryption.version and (encryption.was_encrypted or not self._deserted))

    def _tell_what_plays(self) -> None:
        match self._programme_of(self.want.spec.broadcast).state:
            case "playing":
                self.tell("playing")
            case "idle":
                self.tell("idle")
            case "starved":
                self.tell("idle", self._programme_of(self.want.spec.broadcast).why_starved)

    def tell(self, state: GuildState, error: GuildcastError | None = None) -> None:
        """Report a state once, and details as they change: the number of listeners with an event of its own."""
        before, status = self._told, self._status(state, error)
        if before is not None and status == structs.replace(before, at=status.at):
            return
        self._told = status
        new_state = before is None or status.state != before.state
        self._tell(self, status, f"guild.{state}" if new_state else None)  # type: ignore[arg-type]
        if status.listeners is not None and (before is None or status.listeners != before.listeners):
            self._tell(self, status, "guild.listeners")
        downgraded = before is not None and before.dave_protocol_version and status.dave_protocol_version == 0
        if downgraded and status.listeners != 0:  # else nobody hears it
            self._tell(self, status, "guild.dave_downgraded")

    def tell_again(self) -> None:
        """Report the status once more: where it stood it may be lost, and what must follow from it with it."""
        if self._told is not None:
            self._tell(self, self._told, "guild.failed" if self._told.state == "failed" else None)

    def _status(self, state: GuildState, error: GuildcastError | None) -> GuildStatus:
        status = GuildStatus(
            state=state,
            at=unix_ms(),
            worker=self._membership.id,
            slot=self.slot,
            code=str(error.code) if error else "",
            message=error.message if error else "",
            close_code=error.close_code if isinstance(error, VoiceClosed) else None,
        )
        connection = self._connection
        if connection is None or state == "failed":
            return status
        return structs.replace(
            status,
            listeners=None if connection.others is None else len(connection.others),
            dave_protocol_version=connection.dave.version,
            privacy_code=connection.dave.privacy_code,
            mls_epoch=connection.dave.mls_epoch,
            gateway_version=connection.gateway_version,
            backend_version=connection.backend_version,
        )

    def update(self, want: GuildWant) -> None:
        """Take over what may change under the same generation: the broadcast."""
        self.want = want
        self.changed()

    async def stop(self) -> None:
        """End with five silence frames, speaking off and a clean close."""
        if not self._stopping:
            self._stopping = True
            row = self._row
            if row is not None:
                self._builder.tune(row, None)
                await self._until_silent(row)
            if self._connection is not None:
                await self._connection.close()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _until_silent(self, row: int) -> None:
        try:
            async with asyncio.timeout(_SILENT_WITHIN_S):
                # The sender tells its progress in shared memory only: it wakes nobody.
                while self._row == row and not self._builder.silent(row):  # noqa: ASYNC110
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            self._log.warning("connection.silence_cut", reason="the sender did not get through in time")
