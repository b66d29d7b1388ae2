"""The fan-out worker: wires stream readers, builder, sender and guild sessions, and keeps the pace."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import Counter
from collections.abc import Mapping

from shared.clock import NS_PER_MS, NS_PER_S, NS_PER_US, CommonClock, LocalClock, unix_ms
from shared.errors import ErrorCode, StoreError
from shared.life import Life
from shared.logs import get_logger
from shared.protocol.transport_crypto import MODES
from shared.schema.event import EventType, guild_event
from shared.schema.records import GuildStatus, GuildWant, WorkerRecord, WorkerStats
from shared.seal import Seal
from shared.settings import Settings, parse_clock_error
from shared.store.client import Store, reach
from shared.store.keys import Keys
from shared.store.time_sync import TimeSync
from shared.tasks import begin, endless
from shared.voice_servers import VoiceServers
from worker.fanout.admission import Admission, Reading
from worker.fanout.build import Builder
from worker.fanout.garbage import Garbage
from worker.fanout.grid import TICK_NS, tick_at
from worker.fanout.guild import GuildSession
from worker.fanout.programme import Programme
from worker.fanout.rows import (
    CLOCK_OFFSET_NS,
    DROPPED,
    GRANTED,
    MOST_AHEAD_TICKS,
    PRIORITY,
    SENDER_CPU_NS,
    SENT,
    SKIPPED,
    RowTable,
    lateness_quantile_us,
)
from worker.fanout.scratch import BLOCK_TICKS
from worker.fanout.sending import SenderProcess
from worker.fanout.sockets import SocketPool
from worker.membership import LEASE_MS, RENEW_EVERY_MS, Membership
from worker.reporter import Reporter
from worker.voice.commons import VoiceShared, voice_http
from worker.voice.doors import Doors
from worker.voice.turns import Turns

AHEAD_TICKS = 4
"""What is not known before is waited for until 60 to 80 ms before it leaves."""
FAR_TICKS = 7
"""What is known is built at least 120 to 140 ms before it leaves, most of it in blocks and so up to 60 ms sooner: not
more, because a cut comes into force 200 ms after it is told."""
BEGIN_TICKS = 3
"""Whoever begins, or begins anew under other keys, is heard this soon. With less the sender is there first whenever the
loop was late by a tick, and what was taken back to be built again is lost."""
LATE_NS = (FAR_TICKS - 1) * TICK_NS
"""A pace that was held up for longer misses ticks, unless it was told beforehand and built further ahead."""
_PAST_THE_TICK_NS = NS_PER_MS
"""The loop's timers count whole milliseconds and wake early: aimed at the tick itself, they would spin up to it."""
_TURNS_EVERY_PASSES = 4
"""Handshakes and MLS find their code in the caches where several follow each other: a join took 6 % less."""
SPARE_NS = _TURNS_EVERY_PASSES * TICK_NS // 2
"""Half of a core at most goes into them, less where the pace is late: its passes are more than a tick apart then."""
_BEAT_TICKS = RENEW_EVERY_MS * NS_PER_MS // TICK_NS
_FLUSH_WITHIN_S = 0.5
_SPARE_ROWS = 16


class FanoutWorker:
    """One worker process.

    Args:
        record: id, name, role, host and capacity.
        ports: UDP ports dealt to this worker, an empty range for any.
        admission: knows how many guilds the worker can take.
        life: moved on by the pace.
    """

    def __init__(
        self, settings: Settings, record: WorkerRecord, ports: range, admission: Admission, life: Life
    ) -> None:
        self._settings = settings
        self._keys = Keys(settings.namespace)
        self._clock = CommonClock(LocalClock(*parse_clock_error(settings.clock_error)))
        self._store = Store(settings.redis_url, ca_file=settings.tls_ca_file)
        self._frames = (
            Store(settings.frames_redis_url, ca_file=settings.tls_ca_file, raw=True)
            if settings.frames_redis_url
            else self._store.sibling(raw=True)
        )
        self._host = record.host
        self._membership = Membership(self._store, self._keys, record, self._clock.local, life)
        self._reporter = Reporter(self._membership)
        self._admission = admission
        # A row that was given back rests for a second: a full worker needs some to renew its sessions.
        self._table = RowTable(record.capacity + max(_SPARE_ROWS, record.capacity // 8))
        self._builder = Builder(self._table)
        self._garbage = Garbage(self._build_far)
        for mode in MODES:
            if mode not in self._builder.modes:
                get_logger().error("mode.refused", mode=mode, reason="its known packet was sealed wrongly")
        self._sender = SenderProcess(self._table, settings.clock_error, settings.fanout_workers)
        self._sockets = SocketPool(
            settings.udp_address,
            ports,
            per_guild=settings.udp_sockets == "per-guild",
            on_new=self._sender.add_socket,
        )
        tls = ssl.create_default_context()
        if settings.tls_ca_file is not None:
            tls.load_verify_locations(settings.tls_ca_file)
        self._seal = Seal(settings.seal_key.get_secret_value() if settings.seal_key else None)
        servers = VoiceServers(settings.voice_hosts, settings.voice_networks)
        turns = Turns(SPARE_NS, self._build_far, every_passes=_TURNS_EVERY_PASSES)
        self._voice = VoiceShared(
            voice_http(),
            tls,
            servers,
            turns,
            dave_required=settings.dave_required,
            modes=self._builder.modes,
            doors=Doors(settings.fanout_workers),
        )
        self._wants: Mapping[str, GuildWant] = {}
        self._refused: dict[str, int] = {}
        """Generations of guilds that came when there was no room: given to others by now, so never taken up here."""
        self._sessions: dict[str, GuildSession] = {}
        self._changing: set[str] = set()
        """Guilds whose last session is saying goodbye."""
        self._stopping = False
        self._ending: set[asyncio.Task[None]] = set()
        self._programmes: dict[str, Programme] = {}
        self._sessions_opened = self._sessions_ended = 0
        self._priority_told = 0
        self._overloaded = False
        self._least_lead = FAR_TICKS
        """Ticks that were built ahead when the pace came to the next, at least, since the last renewal."""
        self._held_back = False
        """After a stop longer than the lease nothing is built until `want` was read again."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then end every connection cleanly.

        Raises: StoreUnavailable: Redis did not answer at the start.
        """
        try:
            if not await reach(self._store, stop):
                return
            time_sync = TimeSync(self._store, self._keys, self._clock, self._host)
            await time_sync.synchronise()
            self._table.head[CLOCK_OFFSET_NS] = self._clock.offset_ns()
            await self._sender.start()
            await self._membership.join()
            async with asyncio.TaskGroup() as group:
                pace = group.create_task(endless(self._pace), name="pace")
                reporting = group.create_task(endless(self._reporter.run), name="reporter")
                others = [
                    group.create_task(endless(time_sync.follow), name="clock"),
                    group.create_task(endless(self._reconcile_for_ever), name="want"),
                    group.create_task(endless(self._sender.watch), name="sender"),
                ]
                self._garbage.begin(self._clock.local.now_ns())
                get_logger().info("worker.started", capacity=self._admission.capacity)
                await stop.wait()
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)
                await self._end_sessions()
                pace.cancel()
                await self._reporter.flushed(_FLUSH_WITHIN_S)
                reporting.cancel()
            await self._leave()
        finally:
            await self._close()
        get_logger().info("worker.stopped")

    async def _end_sessions(self) -> None:
        self._stopping = True
        await asyncio.gather(*(session.stop() for session in self._sessions.values()), *self._ending)

    async def _leave(self) -> None:
        try:
            await self._membership.leave()
        except StoreError as error:
            get_logger().warning("worker.leave_failed", error=error.message)

    async def _close(self) -> None:
        for programme in self._programmes.values():
            await programme.close()
        await self._sender.stop()
        self._sockets.close()
        await self._voice.http.close()
        await self._frames.close()
        await self._store.close()
        self._table.close()

    # the pace

    async def _pace(self) -> None:
        """Build each tick ahead of its time, and let the lease live from that."""
        builder = self._builder
        last_seen_ns = self._clock.local.now_ns()
        beat_at_tick = 0
        while True:
            self._sender.look()
            self._sender.step_aside()
            now_ns = self._clock.now_ns()
            self._table.head[CLOCK_OFFSET_NS] = self._clock.offset_ns()
            local_ns = self._clock.local.now_ns()
            if local_ns - last_seen_ns > LEASE_MS * NS_PER_MS:
                get_logger().warning("pace.was_stopped", for_ms=(local_ns - last_seen_ns) // NS_PER_MS)
                self._held_back = True
            elif local_ns - last_seen_ns > LATE_NS:
                get_logger().warning("pace.late", by_ms=(local_ns - last_seen_ns) // NS_PER_MS)
            last_seen_ns = local_ns
            due = tick_at(now_ns)
            if builder.last_tick:
                self._least_lead = min(self._least_lead, builder.playing_until - due)
            if not self._held_back:
                self._build_until(due)
            self._voice.turns.passed()
            if due >= beat_at_tick:
                beat_at_tick = due + _BEAT_TICKS
                stats = self._stats()
                self._look_at_load(stats)
                self._membership.beat(self._admission.headroom(self._held), stats)
                for row in builder.worn_out():
                    self._renew_session_of(row)
                self._tell_errors()
                self._look_at_garbage()
                self._tell_priority()
            await asyncio.sleep(((due + 1) * TICK_NS + _PAST_THE_TICK_NS - self._clock.now_ns()) / NS_PER_S)

    def _tell_errors(self) -> None:
        """Tell guilds whose packets could not leave: the sender tells nobody itself."""
        errors = self._table.error
        if errors.any():
            by_row = {session.row: session for session in self._sessions.values()}
            for row in errors.nonzero()[0].tolist():
                number, errors[row] = int(errors[row]), 0
                if row in by_row:
                    by_row[row].datagram_failed(number)

    def _tell_priority(self) -> None:
        """Say once whether the sender goes first: packets of one that does not are late when the host is busy."""
        priority = int(self._table.counters[PRIORITY])
        if priority != self._priority_told:
            self._priority_told = priority
            get_logger().info("sender.prioritised", realtime=priority == GRANTED)

    def _look_at_garbage(self) -> None:
        self._garbage.look(
            self._clock.local.now_ns(),
            sessions=self._held,
            established=self._builder.rows_opened,
            ended=self._sessions_ended + self._voice.counters.websockets_ended,
        )

    def _build_until(self, due: int) -> None:
        builder = self._builder
        before = max(due, builder.last_tick)
        self._revise()
        if builder.playing_until < due + AHEAD_TICKS - 1:  # late: first for all what is due next
            self._build_in_steps(BEGIN_TICKS, FAR_TICKS)
            due = tick_at(self._clock.now_ns())
        builder.build(due + 1, due + AHEAD_TICKS, due + BEGIN_TICKS, due + FAR_TICKS)
        for programme in list(self._programmes.values()):
            state = programme.state
            for tick in range(before + 1, builder.last_tick + 1):
                programme.passed(tick)
            if programme.state != state:
                self._tell_change(programme)

    def _revise(self) -> None:
        """Have built again what is no more true of what is played."""
        for programme in self._programmes.values():
            changed_from = programme.changed_from()
            if changed_from is not None:
                self._builder.revise(programme.lane, changed_from)

    def _build_far(self, for_ns: int) -> None:
        """Build ahead what will be due while the loop is held up for so long."""
        if self._held_back:
            return
        self._revise()
        self._build_in_steps(FAR_TICKS, min(FAR_TICKS + for_ns // TICK_NS, MOST_AHEAD_TICKS - BLOCK_TICKS + 1))

    def _build_in_steps(self, first_ahead: int, last_ahead: int) -> None:
        """Build block by block over all rows: of thousands the first would else be far ahead, and the last run dry."""
        for ahead in (*range(first_ahead, last_ahead, BLOCK_TICKS), last_ahead):
            due = tick_at(self._clock.now_ns())
            self._builder.build(due + 1, max(due + 1, self._builder.last_tick), due + BEGIN_TICKS, due + ahead)

    def _tell_change(self, programme: Programme) -> None:
        if programme.state == "starved":
            get_logger().warning("ring.underran", broadcast=programme.broadcast, run=programme.run)
        for session in self._sessions.values():
            if session.want.spec.broadcast == programme.broadcast:
                session.tell_how_it_is()

    def _renew_session_of(self, row: int) -> None:
        for key, session in list(self._sessions.items()):
            if session.row == row:
                self._renew_session(key)

    @property
    def _held(self) -> int:
        """Guilds that cost something: connected, about to be, or saying goodbye."""
        return len(self._sessions) + len(self._changing)

    def _look_at_load(self, stats: WorkerStats) -> None:
        """Learn what guilds cost, and say when there comes to be no room, or room again."""
        admission, sender_ns = self._admission, int(self._table.counters[SENDER_CPU_NS])
        admission.note(
            Reading(
                at_ns=stats.at_ns,
                worker_cpu_ns=stats.cpu_ns - sender_ns,
                sender_cpu_ns=sender_ns,
                packets=stats.packets_sent,
                ticks_skipped=stats.ticks_skipped,
                lead=self._least_lead,
                opened=self._sessions_opened,
                guilds=stats.guilds,
            )
        )
        self._least_lead = FAR_TICKS
        overloaded = admission.overloaded(self._held)
        if overloaded != self._overloaded:
            self._overloaded = overloaded
            worker_us, sender_us = (round(one_us, 2) for one_us in admission.cost)
            get_logger().info(
                "headroom.gone" if overloaded else "headroom.returned",
                held=self._held,
                limit=admission.limit,
                worker_us=worker_us,
                sender_us=sender_us,
            )

    def _stats(self) -> WorkerStats:
        counters, voice = self._table.counters, self._voice.counters
        return WorkerStats(
            at_ns=time.monotonic_ns(),
            guilds=sum(session.row is not None for session in self._sessions.values()),
            held=len(self._sessions),
            packets_sent=int(counters[SENT]),
            packets_dropped=int(counters[DROPPED]),
            ticks_skipped=self._builder.ticks_skipped + int(counters[SKIPPED]),
            underruns=sum(programme.underruns for programme in self._programmes.values()),
            udp_paths_lost=voice.udp_paths_lost,
            dave_epochs=voice.epochs,
            dave_failures=voice.failures,
            dave_downgrades=voice.downgrades,
            dave_ready_ms_max=voice.ready_ms_max,
            clear_frames_refused=self._builder.unprotected,
            messages_malformed=voice.malformed_messages,
            clock_error_us=self._clock.error_ns // NS_PER_US,
            lateness_p999_us=lateness_quantile_us(self._table.lateness, 0.999),
            cpu_ns=time.process_time_ns() + int(counters[SENDER_CPU_NS]),
        )

    # what shall be done

    async def _reconcile_for_ever(self) -> None:
        restores = self._membership.restores
        async for wants in self._membership.wants(GuildWant):
            if self._membership.want_is_lost:
                continue  # nobody ordered that: all goes on as it is
            before = self._wants
            self._reconcile(wants)
            for name in self._membership.named:
                if name in self._sessions and before.get(name) is wants.get(name):
                    self._sessions[name].tell_again()
            if restores != self._membership.restores:
                restores = self._membership.restores
                for session in self._sessions.values():
                    session.tell_again()
            self._keep_programmes()
            try:
                await self._look_at_broadcasts()
            except StoreError as error:
                get_logger().warning("broadcasts.unreadable", error=error.message)
                continue
            self._held_back = False

    def _reconcile(self, wants: Mapping[str, GuildWant]) -> None:
        if wants is self._wants:
            return
        before, self._wants = self._wants, wants
        for key in [key for key in self._sessions if key not in wants]:
            self._renew_session(key)
        self._refused = {key: generation for key, generation in self._refused.items() if key in wants}
        for key, want in wants.items():
            if before.get(key) is want and key in self._sessions:
                continue
            session = self._sessions.get(key)
            if session is None and not self._admits(key, want):
                continue
            if session is None or session.want.generation != want.generation:
                self._renew_session(key)
            elif session.want != want:
                session.update(want)

    def _admits(self, key: str, want: GuildWant) -> bool:
        """Whether a guild that is not held here may come; of one that may not, that is told once.

        Refused before anything is done for it: a handshake is what a full worker can spare least.
        """
        if key in self._changing:
            return True  # it has its room
        if self._refused.get(key) == want.generation:
            return False
        # Who is saying goodbye makes room in a moment: the rows that are spare are for that.
        staying = len(self._sessions) + sum(one in self._wants for one in self._changing)
        rowless = sum(session.row is None for session in self._sessions.values())
        if not self._admission.refuses(staying) and rowless < self._builder.rows_free:
            return True
        self._refused[key] = want.generation
        limit = self._admission.limit
        get_logger().info("guild.refused", guild=want.spec.guild, generation=want.generation, limit=limit)
        status = GuildStatus(
            state="failed",
            at=unix_ms(),
            worker=self._membership.id,
            code=str(ErrorCode.WORKER_FULL),
            message=f"this worker has no room for one more guild (limit: {limit})",
        )
        self._tell_of(want, status, "guild.failed")
        return False

    def _keep_programmes(self) -> None:
        """Have a programme for each broadcast that guilds are tuned to, and let go of those nobody hears any more."""
        tuned = Counter(session.want.spec.broadcast for session in self._sessions.values())
        for broadcast in tuned:
            self._programme(broadcast)
        for broadcast, programme in list(self._programmes.items()):
            programme.guilds = tuned[broadcast]
            if not programme.guilds and not programme.lane.places:
                del self._programmes[broadcast]
                self._builder.lanes.remove(programme.lane)
                self._keep(begin(programme.close(), f"end of {broadcast}"))

    def _renew_session(self, key: str) -> None:
        """End the session of a guild, if there is one, then begin the one that is wanted, if one is.

        One voice session per guild: the next one begins when the last one has said goodbye.
        """
        if key in self._changing:
            return
        before = self._sessions.pop(key, None)
        if before is None:
            self._open_session(key)
            return
        self._changing.add(key)
        self._keep(begin(self._replace(key, before), f"end of {key}"))

    async def _replace(self, key: str, before: GuildSession) -> None:
        try:
            await before.stop()
        finally:
            self._sessions_ended += 1
            self._changing.discard(key)
        if key in self._wants and not self._stopping:
            self._open_session(key)

    def _open_session(self, key: str) -> None:
        self._sessions_opened += 1
        self._sessions[key] = GuildSession(
            self._wants[key],
            membership=self._membership,
            builder=self._builder,
            sockets=self._sockets,
            shared=self._voice,
            seal=self._seal,
            programme_of=self._programme,
            tell=self._tell,
        )

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _programme(self, broadcast: str) -> Programme:
        programme = self._programmes.get(broadcast)
        if programme is None:
            programme = Programme(broadcast, self._frames, self._keys, self._clock)
            self._programmes[broadcast] = programme
            self._builder.lanes.append(programme.lane)
        return programme

    async def _look_at_broadcasts(self) -> None:
        """Find the runs on air of the broadcasts that guilds here are tuned to."""
        programmes = list(self._programmes.values())
        runs = await self._store.pipeline(
            [("HGET", self._keys.broadcast(programme.broadcast), "run") for programme in programmes]
        )
        retired = any(programme.run and not run for programme, run in zip(programmes, runs, strict=True))
        if retired and not await self._membership.want_stands():
            return  # the store lost its data: nobody took them off air
        for programme, run in zip(programmes, runs, strict=True):
            programme.follow(int(run or 0))

    def _tell(self, session: GuildSession, status: GuildStatus, kind: EventType | None) -> None:
        self._tell_of(session.want, status, kind)

    def _tell_of(self, want: GuildWant, status: GuildStatus, kind: EventType | None) -> None:
        spec, generation = want.spec, want.generation
        event = None
        if kind is not None:
            event = guild_event(spec, status, kind, worker=self._membership.id, generation=generation)
        self._reporter.tell(self._keys.guild(spec.bot, spec.guild), generation, status, event)
