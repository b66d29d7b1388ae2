"""What is wrong is told once, by name and code; the job or process at fault ends, everything else goes on."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from shared.errors import EXIT_CONFIG, EXIT_UNAVAILABLE
from tests.e2e.stack import Finished, Stack, process_environment, python_module, run_to_end, until
from tests.media.web import served

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROCESSES_AT_ONCE = 3
GUILD = "300000000000000001"
CHANNEL = "400000000000000001"
VOICE = {"user_id": GUILD, "session_id": "a-session-id", "token": "a-token", "endpoint": "127.0.0.1:1"}


# sources


@pytest_asyncio.fixture(loop_scope="module")
async def web_server() -> AsyncIterator[str]:
    """Knows one path, which answers 200 and not a byte."""

    async def nothing(_: web.Request) -> web.Response:
        return web.Response(body=b"", content_type="audio/mpeg")

    async with served(("/empty.mp3", nothing)) as base:
        yield base


async def test_bad_sources_end_with_their_code_and_another_broadcast_goes_on(
    stack: Stack, music: Path, web_server: str
) -> None:
    """A file that cannot be played is tried five times, then given up; one that may not be played is not tried at all.

    What is not said to be a file may be a station that is away: it is tried on, and told as stalled.
    """
    good = await stack.start(music, loop=True)
    guilds = await stack.join(4, good)
    (stack.media / "folder").mkdir()
    (stack.media / "text.txt").write_text("This is no music. " * 200)
    locked = stack.media / "locked.ogg"
    locked.write_bytes(b"whatever")
    locked.chmod(0)
    tried = [1, 2, 4]  # of the failures in a row these are told
    cases: dict[str, tuple[str, list[int], str]] = {
        (stack.media / "folder").as_uri(): ("source_not_audio", tried, "folder"),
        (stack.media / "text.txt").as_uri(): ("source_not_audio", tried, "text.txt"),
        (stack.media / "missing.ogg").as_uri(): ("source_not_found", tried, "missing.ogg"),
        f"{web_server}/missing.mp3": ("source_http_status", tried, "404"),
        f"{web_server}/empty.mp3": ("source_empty", tried, "empty.mp3"),
        "file:///etc/hostname": ("source_forbidden", [], "GUILDCAST_MEDIA_DIR"),
    }
    if os.geteuid() != 0:  # root reads everything
        cases[locked.as_uri()] = ("source_forbidden", [], "locked.ogg")
    away = await stack.start(f"{web_server}/missing.mp3")
    broadcasts = {url: await stack.start(url, kind="file") for url in cases}
    found = {}
    for url, broadcast in broadcasts.items():
        ended = await stack.wait_event("broadcast.ended", 30, broadcast=broadcast)
        stalled = await stack.events("broadcast.stalled", broadcast=broadcast)
        assert ended.reason == "source_failed"
        assert {(one.code, one.message) for one in (*stalled, ended)} == {(ended.code, ended.message)}
        word = cases[url][2]
        found[url] = (
            ended.code,
            [one.attempt or 0 for one in stalled],
            word if word in ended.message else ended.message,
        )
        assert not await stack.events("broadcast.playing", broadcast=broadcast)
    assert found == cases
    await stack.wait_event("broadcast.stalled", broadcast=away, attempt=8, code="source_http_status")
    assert (await stack.broadcast(away)).state == "stalled"
    await stack.hear_more(guilds, 25)
    for guild, row in (await stack.heard(guilds)).items():
        (session,) = row.sessions
        assert not await stack.faults(session), guild
        assert session.trailing_silence == 0


# jobs


def job(kind: str, **fields: Any) -> dict[str, Any]:
    return {"v": 1, "type": kind} | fields


BAD_JOBS: dict[str, tuple[str | dict[str, Any], str, str]] = {
    "no JSON": ("play something", "job_unreadable", "JSON"),
    "no object": ("[1, 2]", "job_unreadable", "object"),
    "unknown type": (job("guild.dance"), "job_invalid", "guild.dance"),
    "no type": ({"v": 1}, "job_invalid", "type"),
    "another version": (job("guild.leave", guild=GUILD) | {"v": 2}, "job_invalid", "`v`"),
    "missing field": (job("guild.join", guild=GUILD, broadcast="x"), "job_invalid", "channel"),
    "extra field": (job("guild.leave", guild=GUILD, colour="red"), "job_invalid", "colour"),
    "extra field inside": (
        job("broadcast.start", broadcast="x", source={"url": "a.ogg", "speed": 2}),
        "job_invalid",
        "speed",
    ),
    "snowflake too short": (job("guild.leave", guild="123"), "job_invalid", "guild"),
    "snowflake a number": (job("guild.leave", guild=int(GUILD)), "job_invalid", "guild"),
    "broadcast's name": (job("broadcast.stop", broadcast="../x"), "job_invalid", "broadcast"),
    "out of range": (
        job("broadcast.start", broadcast="x", source={"url": "a.ogg"}, opus={"bitrate": 1}),
        "job_invalid",
        "bitrate",
    ),
    "no source": (job("broadcast.start", broadcast="x", source={}), "job_invalid", "source"),
    "voice without token": (
        job("guild.join", guild=GUILD, channel=CHANNEL, broadcast="x", voice={**VOICE, "token": ""}),
        "job_invalid",
        "token",
    ),
    "not served yet": (job("guild.pause", guild=GUILD), "not_supported_yet", "guild.pause"),
    "unknown guild": (job("guild.leave", guild=GUILD), "guild_unknown", GUILD),
    "unknown broadcast": (job("broadcast.stop", broadcast="nobody"), "broadcast_unknown", "nobody"),
}


@pytest.mark.parametrize("name", BAD_JOBS)
async def test_a_bad_job_fails_alone_and_names_what_is_wrong(stack: Stack, name: str) -> None:
    """A job that cannot be done fails with a code and the name at fault, is kept aside, and the next one is done."""
    body, code, word = BAD_JOBS[name]
    if isinstance(body, str):
        job_id = await stack.send(body)
    else:
        job_id = stack.new_id()
        await stack.send(body | {"id": job_id})
    failed = await stack.outcome(job_id)
    assert (failed.state, failed.code) == ("failed", code)
    assert word in failed.message
    assert "\n" not in failed.message
    (event,) = await stack.events("job.failed", job=job_id)
    assert (event.code, event.message) == (failed.code, failed.message)
    dead = await stack.store.command("XREVRANGE", stack.keys.jobs_dead, "+", "-", "COUNT", 1)
    assert dead[0][1]["code"] == code
    assert VOICE["session_id"] not in dead[0][1]["job"]
    assert (await stack.submit("broadcast.start", broadcast="next", source={"url": "none.ogg"})).state == "done"


async def test_a_job_sent_twice_is_done_once(stack: Stack, music: Path) -> None:
    """The same id with the same meaning is one job, however its JSON is spaced."""
    body = job("broadcast.start", broadcast="twice", source={"url": music.as_uri()}) | {"id": stack.new_id()}
    await stack.send(body)
    await stack.send(str(body).replace("'", '"') + " ")
    assert (await stack.outcome(body["id"])).state == "done"

    async def all_read() -> bool:
        return not int(await stack.store.command("XLEN", stack.keys.jobs))

    await until(all_read, "the second one read")
    assert len(await stack.events("job.done", job=body["id"])) == 1
    assert not await stack.events("job.failed", job=body["id"])


async def test_an_id_used_by_another_job_is_a_conflict(stack: Stack, music: Path) -> None:
    """The same id with another body fails `job_conflict`, and what the first one did stands."""
    body = job("broadcast.start", broadcast="first", source={"url": music.as_uri()}) | {"id": stack.new_id()}
    await stack.send(body)
    assert (await stack.outcome(body["id"])).state == "done"
    await stack.send(body | {"broadcast": "second"})
    failed = await stack.wait_event("job.failed", job=body["id"])
    assert failed.code == "job_conflict"
    assert (await stack.outcome(body["id"])).state == "done"
    assert await stack.store.command("SMEMBERS", stack.keys.broadcasts) == {"first"}


async def test_a_broadcast_that_is_running_cannot_be_started_again(stack: Stack, music: Path) -> None:
    """broadcast.start with the id of a running one fails `broadcast_exists`."""
    broadcast = await stack.start(music)
    again = await stack.submit("broadcast.start", broadcast=broadcast, source={"url": music.as_uri()})
    assert (again.state, again.code) == ("failed", "broadcast_exists")
    assert broadcast in again.message


# settings

BAD_SETTINGS = [
    ("REDIS_URL", "http://127.0.0.1"),
    ("REDIS_URL", ""),
    ("FRAMES_REDIS_URL", "nearby"),
    ("NAMESPACE", "Upper Case"),
    ("TLS_CA_FILE", "/nowhere/ca.pem"),
    ("UDP_PORTS", "many"),
    ("UDP_PORTS", "50010-50000"),
    ("UDP_PORTS", "80-90"),
    ("UDP_ADDRESS", "localhost"),
    ("FANOUT_WORKERS", "-1"),
    ("FANOUT_WORKERS", "two"),
    ("ENCODE_WORKERS", "1000"),
    ("WORKER_CAPACITY", "0"),
    ("LOG_LEVEL", "loud"),
    ("SEAL_KEY", "c2hvcnQ="),
    ("CLOCK_ERROR", "late"),
    ("CONFIG_FILE", "/nowhere/guildcast.toml"),
    ("REDIS_ULR", "redis://127.0.0.1"),
    ("DISCORD_TOKEN", "a-secret-token"),
]
NOT_SHOWN = ("SEAL_KEY", "REDIS_ULR", "DISCORD_TOKEN")
"""Secrets, and whatever stands under a name that is not known."""
MODULES = ("coordinator", "worker")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def refusals(running: Stack) -> dict[tuple[str, str], Finished]:
    """How coordinator and supervisor, in turn, end with each bad setting; a few processes at a time."""
    places = asyncio.Semaphore(PROCESSES_AT_ONCE)

    async def start(module: str, name: str, value: str) -> Finished:
        settings = {"GUILDCAST_REDIS_URL": running.redis.url, "GUILDCAST_NAMESPACE": "refused"}
        async with places:
            return await run_to_end(python_module(module), process_environment(settings | {f"GUILDCAST_{name}": value}))

    cases = [(module, name, value) for (name, value), module in zip(BAD_SETTINGS, cycle(MODULES), strict=False)]
    ended = await asyncio.gather(*(start(*case) for case in cases))
    return dict(zip(BAD_SETTINGS, ended, strict=True))


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS)
async def test_a_wrong_setting_is_refused_by_name(
    refusals: dict[tuple[str, str], Finished], name: str, value: str
) -> None:
    """A process with a wrong setting ends with status 78 and one line that names the variable, never a secret."""
    ended = refusals[name, value]
    assert ended.status == EXIT_CONFIG, ended.err
    (line,) = ended.err.splitlines()
    assert f"GUILDCAST_{name}" in line
    assert "config_invalid" in line
    assert value in line or name in NOT_SHOWN
    assert value not in line or name not in NOT_SHOWN
    assert not ended.out


async def supervise(stack: Stack, ports: str) -> Finished:
    settings = {"GUILDCAST_REDIS_URL": stack.redis.url, "GUILDCAST_NAMESPACE": "refused", "GUILDCAST_UDP_PORTS": ports}
    return await run_to_end(python_module("worker"), process_environment(settings))


async def test_udp_ports_in_use_are_refused(running: Stack) -> None:
    """A port of the range that somebody else uses is named, with its code."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("0.0.0.0", 0))
        port = taken.getsockname()[1]
        ended = await supervise(running, f"{port - 1}-{port}")
    assert ended.status == EXIT_CONFIG, ended.err
    (line,) = ended.err.splitlines()
    assert "udp_ports_in_use" in line
    assert "GUILDCAST_UDP_PORTS" in line
    assert str(port) in line


async def test_too_few_udp_ports_are_refused(running: Stack) -> None:
    """Two fan-out workers need two ports."""
    ended = await supervise(running, "50000-50000")
    assert ended.status == EXIT_CONFIG, ended.err
    (line,) = ended.err.splitlines()
    assert "udp_ports_too_few" in line
    assert "GUILDCAST_UDP_PORTS" in line


@pytest.mark.parametrize("module", MODULES)
async def test_a_process_without_redis_gives_up_with_a_status_of_its_own(
    processes_without_redis: dict[str, subprocess.Popen[str]], module: str
) -> None:
    """Where Redis never answers, a process ends after 30 s with status 75 and the setting's name."""
    process = processes_without_redis[module]

    async def ended() -> bool:
        return process.poll() is not None

    await until(ended, f"the end of {module}", 45)
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.returncode == EXIT_UNAVAILABLE, err
    line = err.splitlines()[-1]
    assert "GUILDCAST_REDIS_URL" in line
    assert "redis_unreachable" in line
    assert "Traceback" not in err
