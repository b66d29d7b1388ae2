"""What each job does to the desired state. One function a job; none waits for what becomes of it.

Source: design section 4, "Jobs in".
"""

from __future__ import annotations

import time
from dataclasses import replace

import msgspec

from coordinator.election import Leadership
from coordinator.recovery import ATTEMPTS_WITHIN_S, Recovery
from coordinator.registry import Broadcast, Change, Guild, Registry, released
from shared.clock import unix_ms
from shared.errors import ErrorCode, JobError
from shared.schema.event import broadcast_event, guild_event
from shared.schema.job import BroadcastStart, BroadcastStop, GuildJoin, GuildLeave, GuildVoice, ServedJob, Voice
from shared.schema.records import (
    BroadcastSpec,
    BroadcastStatus,
    GuildSpec,
    GuildStatus,
    OpusRecord,
    SourceRecord,
    VoiceRecord,
    kept,
)
from shared.seal import Seal
from shared.voice_servers import VoiceServers


class JobEffects:
    """Turns a job into a change of the registry."""

    def __init__(
        self, registry: Registry, leadership: Leadership, seal: Seal, servers: VoiceServers, recovery: Recovery
    ) -> None:
        self._registry = registry
        self._leadership = leadership
        self._seal = seal
        self._servers = servers
        self._recovery = recovery

    async def apply(self, job: ServedJob, change: Change) -> None:
        """Add a job's effect to a change.

        Raises: JobError: nothing was added. LeaseLost, StoreUnavailable.
        """
        match job:
            case BroadcastStart():
                await self._broadcast_start(job, change)
            case BroadcastStop():
                await self._broadcast_stop(job, change)
            case GuildJoin():
                self._guild_join(job, change)
            case GuildVoice():
                self._guild_voice(job, change)
            case GuildLeave():
                self._guild_leave(job, change)

    async def _broadcast_start(self, job: BroadcastStart, change: Change) -> None:
        before = self._registry.broadcasts.get(job.broadcast)
        if before is not None and not before.stopping:
            raise JobError(f"broadcast: {job.broadcast!r} is running", code=ErrorCode.BROADCAST_EXISTS)
        run = await self._leadership.draw()
        if before is not None:  # its worker has not said so yet, and will have no say in it any more
            ended = BroadcastStatus(state="ended", at=unix_ms())
            change.event(broadcast_event(before.spec, ended, reason="stopped"))
        source, opus = kept(job.source, SourceRecord), kept(job.opus, OpusRecord)
        spec = BroadcastSpec(broadcast=job.broadcast, run=run, source=source, opus=opus, job=job.id)
        spec = self._seal.seal_source(spec)
        change.put_broadcast(Broadcast(spec, status=BroadcastStatus(state="starting", at=unix_ms())))
        change.wake_all()

    async def _broadcast_stop(self, job: BroadcastStop, change: Change) -> None:
        broadcast = self._registry.broadcasts.get(job.broadcast)
        if broadcast is None:
            raise JobError(f"broadcast: no {job.broadcast!r} is running", code=ErrorCode.BROADCAST_UNKNOWN)
        if broadcast.worker:
            change.put_broadcast(replace(broadcast, term=await self._leadership.draw(), stopping=True))
        else:
            change.drop_broadcast(broadcast)
            spec = msgspec.structs.replace(broadcast.spec, job=job.id)
            change.event(broadcast_event(spec, BroadcastStatus(state="ended", at=unix_ms()), reason="stopped"))
        if job.leave:
            for guild in self._registry.guilds.values():
                if guild.spec.broadcast == job.broadcast:
                    self._drop_guild(guild, job.id, change)

    def _guild_join(self, job: GuildJoin, change: Change) -> None:
        before = self._registry.guilds.get((job.bot, job.guild))
        voice = self._kept_voice(job) if job.voice is not None else None
        if voice is None and before is not None and before.spec.channel == job.channel:
            voice = before.spec.voice
        spec = GuildSpec(
            bot=job.bot,
            guild=job.guild,
            channel=job.channel,
            broadcast=job.broadcast,
            speaking=job.speaking,
            on_kick=job.on_kick,
            voice=voice,
            job=job.id,
        )
        if before is not None and self._goes_on(before, spec) and before.spec.speaking == job.speaking:
            change.put_guild(replace(before, spec=spec))
        else:
            self._put_anew(spec, before, change)

    def _guild_voice(self, job: GuildVoice, change: Change) -> None:
        before = self._guild(job.bot, job.guild)
        voice = self._kept_voice(job)
        spec = msgspec.structs.replace(before.spec, channel=job.channel, voice=voice, job=job.id)
        if self._goes_on(before, spec):
            change.put_guild(replace(before, spec=msgspec.structs.replace(before.spec, job=job.id)))
        else:
            self._put_anew(spec, before, change)

    def _goes_on(self, before: Guild, spec: GuildSpec) -> bool:
        """Whether the session that a worker holds is the one that is wanted: same channel, same credentials.

        Bots forward every VOICE_SERVER_UPDATE: what is in use already is no reason for another session.
        """
        if not before.worker or before.spec.channel != spec.channel:
            return False
        return self._seal.is_same_voice(before.spec.voice, spec.voice, spec.bot, spec.guild)

    def _kept_voice(self, job: GuildJoin | GuildVoice) -> VoiceRecord | str:
        """Credentials as they are stored. What came sealed is looked at by the worker that opens it.

        Raises: JobError: they are for a server that is not allowed.
        """
        voice = job.voice
        assert voice is not None
        if isinstance(voice, Voice) and (reason := self._servers.refusal_of_endpoint(voice.endpoint)):
            raise JobError(f"voice.endpoint: {reason}")
        return self._seal.seal_voice(voice, job.bot, job.guild)

    def _put_anew(self, spec: GuildSpec, before: Guild | None, change: Change) -> None:
        """Store a spec that needs a session of its own: the planner places it under a new generation."""
        guild = replace(released(before), spec=spec) if before is not None else Guild(spec)
        wait_s = self._recovery.renewed(guild, time.monotonic())
        status = GuildStatus(state="wanted", at=unix_ms())
        if wait_s:
            status = msgspec.structs.replace(
                status,
                code=str(ErrorCode.TOO_MANY_ATTEMPTS),
                message=f"too many attempts within {ATTEMPTS_WITHIN_S / 60:.0f} min: the next in {wait_s:.0f} s",
                retry_at=status.at + round(wait_s * 1_000),
            )
        change.put_guild(replace(guild, status=status))

    def _guild_leave(self, job: GuildLeave, change: Change) -> None:
        self._drop_guild(self._guild(job.bot, job.guild), job.id, change)

    def _guild(self, bot: str, guild: str) -> Guild:
        found = self._registry.guilds.get((bot, guild))
        if found is None:
            raise JobError(f"guild: {guild} was not joined", code=ErrorCode.GUILD_UNKNOWN)
        return found

    def _drop_guild(self, guild: Guild, job_id: str, change: Change) -> None:
        self._recovery.forget(guild.key)
        change.drop_guild(guild)
        spec = msgspec.structs.replace(guild.spec, job=job_id)
        change.event(guild_event(spec, GuildStatus(state="stopped", at=unix_ms()), worker=guild.worker))
