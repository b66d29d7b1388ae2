"""Each fault of a voice server and of its encrypted groups, on a guild of its own: what becomes of the sound.

All guilds meet their fate at once, and the tests look at what became of them. At the end somebody joins every channel
that is still played to, and must hear us: a fault that is survived, but spoils the group, is found there. What happens
is told in `connection_faults.py` and `group_faults.py`.

Source: voice protocol reference, sections 6.9 (fault injection list) and 8 (right column).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import pytest_asyncio

from shared.schema.event import Event
from shared.schema.records import GuildStatus
from tests.e2e import connection_faults, group_faults
from tests.e2e.fault_room import LOOK_EVERY_S, SECOND, SETTLED_WITHIN_S, Case, Due, Room, Watch, hearing_of, member_of
from tests.e2e.outside_bot import outside_bot
from tests.e2e.stack import Stack
from tests.emulator.payloads import SILENCE_ID
from tests.emulator.records import GuildPackets, GuildReport, HearingReport, SessionReport
from tests.media.make_programme import PROGRAMME

pytestmark = pytest.mark.asyncio(loop_scope="module")

CASES = {
    name: one
    for module in (connection_faults, group_faults)
    for name, one in vars(module).items()
    if isinstance(one, Case)
}


def of(due: Due) -> list[str]:
    return [name for name, one in CASES.items() if one.due is due]


@dataclass
class Fate:
    """What became of one guild."""

    guild: str = ""
    error: str = ""
    sessions: list[SessionReport] = field(default_factory=list)
    stayed: list[HearingReport] = field(default_factory=list)
    """What those who were there from the start got."""
    newcomer: HearingReport | None = None
    codes_equal: bool | None = None
    wanted: list[Event] = field(default_factory=list)
    status: GuildStatus | None = None
    frames: set[bytes] = field(default_factory=set)
    """All that members could decrypt, silence left out."""
    joined_s: float = 0.0
    silence_s: float = 0.0
    back_s: float = 0.0


_STORIES_AT_ONCE = 40
"""All together they would ask more of a small machine than it has, and be judged for that."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Each guild has a voice server of its own: some faults befall whoever connects there next."""
    async with Stack(tmp_path_factory.mktemp("pool"), emulator=("--endpoint-guilds", "1")) as stack:
        yield stack


@dataclass
class Told:
    """What became of all guilds: of those that were struck, by their stories, and of those that were not."""

    fates: dict[str, Fate]
    published: set[bytes]
    bystanders: list[GuildReport]
    workers: int
    """Those that hold bystanders."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def told(running: Stack) -> AsyncIterator[Told]:
    """Let every story happen, many at once; then let somebody join wherever we still play."""
    stack = running
    (stack.media / PROGRAMME.name).write_bytes(await asyncio.to_thread(PROGRAMME.read_bytes))
    radio = await stack.start(stack.media / PROGRAMME.name, loop=True)
    watch = Watch(stack)
    rooms: dict[str, Room] = {}
    for (name, one), (guild, channel) in zip(CASES.items(), stack.new_guilds(len(CASES)), strict=True):
        await stack.discord.issue([(guild, channel)], kind=one.kind, members=one.members, ghosts=one.ghosts)
        rooms[name] = Room(stack, watch, radio, guild, channel, one.kind)
        (there,) = await stack.discord.listen(guild)
        rooms[name].stayed = [member.user for member in there.members]
    fates = {name: Fate(rooms[name].guild) for name in CASES}
    bystanders = await stack.join(4, radio)
    await stack.hear_more(bystanders, SECOND // 2)
    async with watch.looking(), outside_bot(stack, {rooms["kicked_for_good"].guild}):
        turns = asyncio.Semaphore(_STORIES_AT_ONCE)
        await asyncio.gather(*(_live(fates[name], rooms[name], CASES[name], turns) for name in CASES))
        entries = await stack.published(await stack.run_of(radio))
        yield Told(
            fates,
            published={packet for entry in entries for packet in entry.packets},
            bystanders=list((await stack.heard(bystanders)).values()),
            workers=len(await stack.by_worker(bystanders)),
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fates(told: Told) -> dict[str, Fate]:
    return told.fates


async def _live(fate: Fate, room: Room, one: Case, turns: asyncio.Semaphore) -> None:
    """One story to its end; that it went wrong is told by its test."""
    given_up: GuildStatus | None = None
    await turns.acquire()
    try:
        await one.story(room)
        if one.due is Due.FAILED:
            given_up = await _given_up(room, one.code)
        else:
            newcomer = await room.join_member()
            await room.heard_by(newcomer)
            row = await room.look()
            members = [member for channel in row.channels for member in channel.members]
            stayed = [hearing_of(member) for member in members if member.user in room.stayed]
            fate.stayed = [hearing for hearing in stayed if hearing is not None]
            fate.newcomer = hearing_of(member_of(row, newcomer))
            fate.back_s = room.back_s
            fate.codes_equal = row.channels[-1].codes_equal
            heard = await room.stack.packets(room.guild)
            fate.joined_s, fate.silence_s = _silences_s(heard, room.joined_ns)
            fate.frames = {frame for name, frame in heard.payloads.items() if name > SILENCE_ID}
        row = await room.look()
        fate.sessions = row.sessions
    except Exception as error:  # noqa: BLE001 - one guild's fault must not spoil the others' tests
        fate.error = f"{type(error).__name__}: {error}"
    finally:
        turns.release()
    fate.status = given_up or await room.status()  # it may be tried again by now
    fate.wanted = await room.stack.events("guild.voice_wanted", guild=room.guild)


async def _given_up(room: Room, code: str) -> GuildStatus:
    """Wait until the guild's status says that, and why."""
    try:
        async with asyncio.timeout(SETTLED_WITHIN_S):
            while (status := await room.status()) is None or status.code != code:  # noqa: ASYNC110 - set by others
                await asyncio.sleep(LOOK_EVERY_S)
            return status
    except TimeoutError:
        raise AssertionError(f"not within {SETTLED_WITHIN_S:g} s: {code}, but {status}") from None


def _silences_s(heard: GuildPackets, joined_ns: int) -> tuple[float, float]:
    """From the job to the first sound, and the longest silence after that: of what members could decrypt."""
    arrivals = sorted(
        at
        for session in heard.sessions
        for at, payload in zip(session.arrival_ns, session.payload, strict=True)
        if payload > SILENCE_ID
    )
    longest_ns = max((after - before for before, after in pairwise(arrivals)), default=0)
    return (arrivals[0] - joined_ns) / 1e9, longest_ns / 1e9


def tell(name: str, fate: Fate, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        code = f", {fate.status.code}" if fate.status is not None and fate.status.code else ""
        sound = f"; heard {fate.joined_s:.2f} s after the job, longest silence {fate.silence_s:.2f} s"
        back = f", audible {fate.back_s:.2f} s after somebody came" if fate.back_s else ""
        print(f"\n  {name}: {CASES[name].due.value}{code}{sound if fate.joined_s else ''}{back}", end=" ")


async def assert_heard(stack: Stack, fate: Fate, voided: int = 0) -> None:
    """Played to at the end, by a session without a fault, encrypted where it must be; the newcomer missed nothing."""
    assert not fate.error, fate.error
    assert fate.status is not None
    assert fate.status.state == "playing"
    newest = fate.sessions[-1]
    assert newest.state == "live"
    for session in fate.sessions:
        found = await stack.faults(session)
        assert found.pop("lost", 0) <= voided
        assert not found
        assert session.in_the_clear == 0
    if newest.dave_version:
        assert fate.codes_equal
    assert fate.newcomer is not None
    assert fate.newcomer.failed == fate.newcomer.failed_at_start


def assert_missed_nothing(fate: Fate) -> None:
    """Whoever was there from the start could decrypt every frame."""
    assert fate.stayed
    for hearing in fate.stayed:
        assert (hearing.failed, hearing.decrypted) == (0, hearing.received)


@pytest.mark.parametrize("name", of(Due.NOTHING))
async def test_nothing_is_heard_of(
    running: Stack, fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same session, nothing lost, nobody asked, and every member decrypts every frame."""
    fate = fates[name]
    tell(name, fate, capsys)
    await assert_heard(running, fate, CASES[name].voided)
    (session,) = fate.sessions
    assert session.resumed == 0
    assert session.told is None or session.told.invalid == 0
    assert fate.wanted == []
    assert_missed_nothing(fate)


@pytest.mark.parametrize("name", of(Due.RESUMED))
async def test_is_resumed(
    running: Stack, fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same session over another WebSocket: nothing lost, nobody asked, the group unharmed."""
    fate = fates[name]
    tell(name, fate, capsys)
    await assert_heard(running, fate, CASES[name].voided)
    (session,) = fate.sessions
    assert session.resumed >= 1
    assert session.told is None or session.told.invalid == 0
    assert fate.wanted == []
    assert_missed_nothing(fate)


@pytest.mark.parametrize("name", of(Due.RECOVERED))
async def test_the_group_is_entered_anew(
    running: Stack, fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Op 31 and another key package, on the same session."""
    fate = fates[name]
    tell(name, fate, capsys)
    await assert_heard(running, fate, CASES[name].voided)
    (session,) = fate.sessions
    assert session.resumed == 0
    assert fate.wanted == []


@pytest.mark.parametrize("name", of(Due.RESUMED_ANEW))
async def test_who_was_taken_out_of_the_group_is_heard_again(
    running: Stack, fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the same session, within seconds of the resume, and by those who were there all the while."""
    fate = fates[name]
    tell(name, fate, capsys)
    await assert_heard(running, fate, CASES[name].voided)
    (session,) = fate.sessions
    assert session.resumed >= 1
    assert fate.wanted == []


@pytest.mark.parametrize("name", of(Due.AGAIN))
async def test_is_identified_again(
    running: Stack, fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A handshake that the server broke off says nothing against the credentials: nobody is asked."""
    fate = fates[name]
    tell(name, fate, capsys)
    await assert_heard(running, fate, CASES[name].voided)
    assert fate.wanted == []


@pytest.mark.parametrize("name", of(Due.ASKED))
async def test_the_bot_is_asked(
    running: Stack, fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, and its answer is heard."""
    fate = fates[name]
    tell(name, fate, capsys)
    await assert_heard(running, fate, CASES[name].voided)
    assert len(fate.wanted) == 1
    assert fate.wanted[0].close_code in (4006, 4014, 4022)


@pytest.mark.parametrize("name", of(Due.PAUSED))
async def test_nobody_is_played_to(
    running: Stack, fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silence at the end, then no packets; on the same session, sound again for whoever comes."""
    fate = fates[name]
    tell(name, fate, capsys)
    await assert_heard(running, fate, CASES[name].voided)
    (session,) = fate.sessions
    assert session.resumed == 0
    assert fate.wanted == []


@pytest.mark.parametrize("name", of(Due.FAILED))
async def test_is_given_up(fates: dict[str, Fate], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The status says why, in a word that is stable and in a sentence."""
    fate = fates[name]
    tell(name, fate, capsys)
    assert not fate.error, fate.error
    assert fate.status is not None
    assert fate.status.code == CASES[name].code
    assert fate.status.message
    assert fate.status.state in ("failed", "stopped")


async def test_whose_sound_was_lost_is_told_once(running: Stack, told: Told) -> None:
    """With the code of why; of nobody else."""
    events = {event.guild: event.code for event in await running.events("guild.udp_lost")}
    lost = {name: events.get(told.fates[name].guild) for name in told.fates if told.fates[name].guild in events}
    assert lost == {
        "sound_vanishes_for_a_while": "udp_lost",
        "sound_vanishes_on_this_way": "udp_lost",
        "sound_is_refused_for_a_while": "udp_refused",
    }


async def test_what_is_heard_is_what_was_published(told: Told) -> None:
    """In every guild, encrypted or in the clear, before its fault and after it: these frames and no others."""
    heard = {name: fate for name, fate in told.fates.items() if CASES[name].due is not Due.FAILED}
    assert {name for name, fate in heard.items() if not fate.frames or fate.frames - told.published} == set()


async def test_guilds_that_were_not_struck_hear_nothing_of_all_that(
    running: Stack, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the same workers as those that were: one session, no packet lost, every frame decrypted."""
    assert told.workers == 2
    longest_ms = 0.0
    for row in told.bystanders:
        (session,) = row.sessions
        assert not await running.faults(session)
        assert (session.state, session.resumed, session.in_the_clear) == ("live", 0, 0)
        (hearing,) = (hearing_of(member) for channel in row.channels for member in channel.members)
        assert hearing is not None
        assert (hearing.failed, hearing.decrypted) == (0, hearing.received)
        longest_ms = max(longest_ms, hearing.longest_gap_ms)
    with capsys.disabled():
        print(f"\n  {len(told.bystanders)} others: longest silence {longest_ms / 1_000:.2f} s", end=" ")


async def test_unreadable_messages_are_counted_all_and_logged_once_of_each_kind(running: Stack, told: Told) -> None:
    """A flood of them does not become a flood of log lines."""
    assert not told.fates["messages_that_cannot_be_read"].error
    stats = await running.worker_stats()
    assert sum(one.messages_malformed for one in stats) > 5_000
    assert 10 < running.logged("message.malformed") < 64
