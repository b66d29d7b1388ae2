"""What was measured, put together for the control interface."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from tests.emulator import analysis
from tests.emulator.channel import Channel
from tests.emulator.members import Hearing, Member
from tests.emulator.recorder import Recorder
from tests.emulator.records import (
    ChannelReport,
    GuildPackets,
    GuildReport,
    HearingReport,
    MemberReport,
    Percentiles,
    Report,
    SessionPackets,
    SessionReport,
    ToldReport,
)
from tests.emulator.server import VoiceServer
from tests.emulator.session import Guild, VoiceSession

_NS_PER_MS = 1e6

Recording = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Recordings:
    """Copies of all recordings: of every session, and of the sessions of each sampled guild once more by guild."""

    sessions: list[Recording]
    sampled_guilds: list[list[Recording]]


@dataclass(frozen=True, slots=True)
class Timing:
    """What `measure_timing` found."""

    skew: Percentiles
    spread: Percentiles
    lateness: Percentiles
    gap: Percentiles


def copy_recordings(server: VoiceServer, recorder: Recorder) -> Recordings:
    """Copies, so that the analysis may run in a thread."""
    sessions: list[Recording] = []
    sampled_guilds: list[list[Recording]] = []
    for guild in server.guilds.values():
        own = [recorder.ledger.recording(session.row) for session in guild.sessions]
        sessions.extend(own)
        if guild.sampled:
            sampled_guilds.append(own)
    return Recordings(sessions, sampled_guilds)


def measure_timing(recordings: Recordings) -> Timing:
    """Lateness and gaps over all guilds, skew and spread over the sampled ones."""
    lateness = [analysis.lateness_ms(each["timestamp"], each["arrival_ns"]) for each in recordings.sessions]
    gaps = [
        analysis.gaps_ms(each["timestamp"], each["arrival_ns"], each["after_pause"]) for each in recordings.sessions
    ]
    heard = [(_joined(guild, "payload"), _joined(guild, "arrival_ns")) for guild in recordings.sampled_guilds]
    table = analysis.arrivals_ms(heard)
    return Timing(
        skew=analysis.skew_percentiles(table),
        spread=analysis.percentiles(analysis.spread_ms(table)),
        lateness=analysis.percentiles(np.concatenate([np.zeros(0), *lateness])),
        gap=analysis.percentiles(np.concatenate([np.zeros(0), *gaps])),
    )


def _joined(recordings: Sequence[Recording], column: str) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *(each[column].astype(np.int64) for each in recordings)])


def count(server: VoiceServer, recorder: Recorder, timing: Timing, *, with_guilds: bool) -> Report:
    """The report as of now, with the timing found."""
    recorder.drain()
    at_ns = time.monotonic_ns()
    rows = [_guild_report(server, guild, recorder) for guild in server.guilds.values()]
    sums = {
        name: before + sum(int(getattr(session, name)) for row in rows for session in row.sessions)
        for name, before in server.retired.items()
    }
    return Report(
        at_ns=at_ns,
        guilds=len(rows),
        connected=sum(row.connected for row in rows),
        heard=sum(row.heard for row in rows),
        unknown_ssrc=recorder.unknown_ssrc,
        unreadable=recorder.unreadable,
        kernel_drops=recorder.kernel_drops,
        skew_ms=timing.skew,
        spread_ms=timing.spread,
        lateness_ms=timing.lateness,
        gap_ms=timing.gap,
        guild_rows=rows if with_guilds else None,
        **sums,
    )


def _guild_report(server: VoiceServer, guild: Guild, recorder: Recorder) -> GuildReport:
    sessions = [_session_report(session, recorder) for session in guild.sessions]
    return GuildReport(
        guild=guild.guild,
        channel=server.seat(guild.guild, None).channel.channel if guild.seats else "",
        endpoint=guild.endpoint_name,
        sampled=guild.sampled,
        connected=any(session.connected for session in guild.sessions),
        heard=guild.heard_before or any(session.audio_packets for session in sessions),
        sessions=sessions,
        channels=listening(guild),
    )


def listening(guild: Guild) -> list[ChannelReport]:
    """The channels of a guild, and what the members in them heard."""
    return [_channel_report(channel) for channel in guild.channels.values()]


def _channel_report(channel: Channel) -> ChannelReport:
    group = channel.group
    gone = [_member_report(member, gone=True) for member in channel.gone]
    here = [_member_report(member, gone=False) for member in channel.members.values()]
    codes = {each.privacy_code for each in here if each.since_ns is not None}
    return ChannelReport(
        channel=channel.channel,
        kind=channel.kind,
        users=channel.users,
        ghosts=len(channel.ghosts),
        dave_version=channel.dave_version,
        mls_epoch=None if group is None else group.mls_epoch,
        in_transition=group is not None and group.in_transition,
        group=[] if group is None else list(group.members.values()),
        commits_dropped=0 if group is None else group.commits_dropped,
        codes_equal=len(codes) == 1 if codes and group is not None else None,
        members=gone + here,
    )


def _member_report(member: Member, *, gone: bool) -> MemberReport:
    dave = member.dave
    return MemberReport(
        user=member.user,
        ssrc=member.ssrc,
        gone=gone,
        since_ns=member.since_ns,
        executed_ns=member.executed_ns or None,
        mls_epoch=None if dave is None else dave.mls_epoch,
        group_size=0 if dave is None else len(dave.users),
        privacy_code=None if dave is None else dave.privacy_code,
        said=member.said,
        speaking=bool(member.to_say) and not gone,
        hearing={sender: _hearing_report(hearing) for sender, hearing in member.hearing.items()},
    )


def _hearing_report(hearing: Hearing) -> HearingReport:
    return HearingReport(
        received=hearing.received,
        decrypted=hearing.decrypted,
        failed=hearing.failed,
        failed_at_start=hearing.failed_at_start,
        early=hearing.early,
        first_decrypted_ns=hearing.first_decrypted_ns or None,
        last_decrypted_ns=hearing.last_decrypted_ns or None,
        last_failed_ns=hearing.last_failed_ns or None,
        longest_gap_ms=hearing.longest_gap_ns / _NS_PER_MS,
    )


def _session_report(session: VoiceSession, recorder: Recorder) -> SessionReport:
    ledger, row, closing, told = recorder.ledger, session.row, session.closing, session.told
    audible_ns = session.audible_ns - session.described_ns
    return SessionReport(
        user=session.user,
        channel=session.channel.channel,
        ssrc=session.ssrc,
        state=session.state,
        mode=session.mode,
        resumed=session.resumed,
        forwarded=0 if session.downlink is None else session.downlink.sent,
        not_taken=0 if session.downlink is None else session.downlink.not_taken,
        heartbeats=session.heartbeats,
        dave_version=session.dave_version,
        told=None if told is None else ToldReport(**dataclasses.asdict(told)),
        audible_after_ms=audible_ns / _NS_PER_MS if session.audible_ns else None,
        first_arrival_ns=int(ledger.first_arrival_ns[row]) or None,
        last_arrival_ns=int(ledger.last_arrival_ns[row]) or None,
        first_sound_ns=int(ledger.first_sound_ns[row]) or None,
        last_sound_ns=int(ledger.last_sound_ns[row]) or None,
        speaking=list(session.speaking),
        close_code=None if closing is None else closing.code,
        close_by=None if closing is None else closing.by,
        close_clean=None if closing is None else closing.clean,
        trailing_silence=int(ledger.silence_run[row]),
        **{name: int(counter[row]) for name, counter in ledger.counts.items()},
    )


def packets(guild: Guild, recorder: Recorder) -> bytes:
    """The recordings of a sampled guild as MessagePack of `GuildPackets`."""
    sessions = []
    ids: set[int] = set()
    for session in guild.sessions:
        columns = {name: column.tolist() for name, column in recorder.ledger.recording(session.row).items()}
        ids.update(columns["payload"])
        sessions.append(SessionPackets(ssrc=session.ssrc, **columns))
    return msgspec.msgpack.encode(
        GuildPackets(guild=guild.guild, sessions=sessions, payloads=recorder.payloads.frames(ids))
    )
