"""One source, end to end: a real child, real Opus, a real web server on the loopback."""

from __future__ import annotations

import asyncio
import datetime
import gc
import ipaddress
import json
import os
import select
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import uvloop
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from numpy.typing import NDArray

from shared.errors import ErrorCode, SourceError
from shared.protocol.opus import SILENCE_FRAME
from shared.schema.job import OpusOptions
from tests.media.audio import (
    PROGRAMME,
    RATE,
    Pcm,
    align,
    border_clicks,
    decode_file,
    decode_opus,
    resampled,
    write_audio,
)
from tests.media.web import Handler, served
from worker.encode import source
from worker.encode.decode import decode
from worker.encode.records import HEADER_BYTES, SILENT_DB, ChildOrder, Kind, Looks, pack, unpack_header
from worker.encode.source import EncodedFrame, SourceChild, Told, child_environment

FRAME_SAMPLES = 960
PATIENCE_S = 30.0
"""For what must happen; no test depends on how soon."""


@pytest.fixture(scope="module")
def music() -> Pcm:
    return decode_file(PROGRAMME)


async def _all_frames(order: ChildOrder) -> list[EncodedFrame]:
    async with await SourceChild.start(order) as child:
        told = await _told(child)
        assert await child.read() is None
    return [one for one in told if isinstance(one, EncodedFrame)]


async def _told(child: SourceChild) -> list[Told]:
    """All that a child says up to its end."""
    found = []
    while (one := await child.read()) is not None:
        found.append(one)
    return found


async def _some_frames(order: ChildOrder, count: int) -> list[EncodedFrame]:
    async with await SourceChild.start(order) as child:
        frames: list[EncodedFrame] = []
        while len(frames) < count and (one := await child.read()) is not None:
            frames += [one] if isinstance(one, EncodedFrame) else []
    return frames


async def _drain(child: SourceChild) -> int:
    """Read to the end; returns the number of frames."""
    count = 0
    while await child.read() is not None:
        count += 1
    return count


async def _error_of(order: ChildOrder, *, frame_timeout_s: float = PATIENCE_S) -> SourceError:
    async with await SourceChild.start(order, frame_timeout_s=frame_timeout_s) as child:
        with pytest.raises(SourceError) as caught:
            await _drain(child)
    return caught.value


def _likeness(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.dot(one, other) / np.sqrt(np.dot(one, one) * np.dot(other, other)))


def _sound(frames: list[EncodedFrame]) -> Pcm:
    return decode_opus(frame.packet for frame in frames)


@pytest.mark.parametrize(("peak", "level_db"), [(1.0, 0), (0.5, -6), (0.01, -40), (1e-9, -127), (0.0, SILENT_DB)])
async def test_each_frame_says_how_loud_it_is(peak: float, level_db: int, tmp_path: Path) -> None:
    """Peak of what was encoded, in dB of full scale; zeros are told from what is merely quiet."""
    pcm = np.zeros((4_800, 2), np.float32)
    pcm[::100] = -peak
    path = write_audio(tmp_path / "a.wav", pcm, codec="pcm_f32le")
    frames = await _all_frames(ChildOrder(url=str(path)))
    assert {frame.level_db for frame in frames[:5]} == {level_db}


async def test_sound_beyond_all_measure_is_played(tmp_path: Path) -> None:
    """Files of floating point may hold anything."""
    pcm = np.full((9_600, 2), np.inf, np.float32)
    pcm[::7] = np.nan
    pcm[::3] = 1e30
    path = write_audio(tmp_path / "a.wav", pcm, codec="pcm_f32le")
    assert len(await _all_frames(ChildOrder(url=str(path)))) >= 10


@asynccontextmanager
async def _raw_server(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A server that says what it likes and then hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await talk(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"


def _folder(path: Path) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(path / request.match_info["path"])

    return handler


# What is heard


async def test_a_programme_goes_through_and_sounds_the_same(music: Pcm) -> None:
    """Every frame of the file, in order, correlates with the file; the length is the same to two frames."""
    frames = await _all_frames(ChildOrder(url=str(PROGRAMME)))
    assert [frame.position_samples for frame in frames] == [k * FRAME_SAMPLES for k in range(len(frames))]
    assert {frame.item for frame in frames} == {0}
    heard = _sound(frames)
    offset, ncc = align(music, heard)
    assert ncc > 0.98
    assert abs(offset) < RATE // 50
    assert abs(len(heard) - len(music)) <= RATE * 40 // 1000
    reference = np.concatenate([np.zeros((-offset, 2), np.float32), music])
    assert not border_clicks(heard[: len(music) - RATE], reference).audible


async def test_left_stays_left(music: Pcm) -> None:
    """Channels are neither swapped nor mixed."""
    heard = _sound(await _all_frames(ChildOrder(url=str(PROGRAMME))))
    offset, _ = align(music, heard)
    ours = heard[-offset : len(music) - offset]
    theirs = music[: len(ours)]
    for channel in (0, 1):
        same = _likeness(ours[:, channel], theirs[:, channel])
        other = _likeness(ours[:, channel], theirs[:, 1 - channel])
        assert same > 0.98 > 0.6 > other


@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout"),
    [
        ("a.mp3", "libmp3lame", 44_100, "mono"),
        ("a.wav", "pcm_s16le", 8_000, "mono"),
        ("a.flac", "flac", 96_000, "stereo"),
        ("a.wav", "pcm_s16le", 48_000, "5.1"),
        ("a.m4a", "aac", 44_100, "stereo"),
    ],
)
async def test_any_rate_and_layout_over_http(
    name: str, codec: str, rate: int, layout: str, music: Pcm, tmp_path: Path
) -> None:
    """A file on a web server sounds as it does here."""
    part = music[: 6 * RATE]
    write_audio(tmp_path / name, resampled(part, rate, layout), rate=rate, layout=layout, codec=codec)
    async with served(("/{path:.*}", _folder(tmp_path))) as base:
        heard = _sound(await _all_frames(ChildOrder(url=f"{base}/{name}")))
    reference = np.repeat(part.mean(axis=1, keepdims=True), 2, axis=1) if layout == "mono" else part
    assert align(reference, heard)[1] > (0.93 if rate == 8_000 else 0.98)


async def test_a_segmented_stream_over_http(music: Pcm, tmp_path: Path) -> None:
    """A playlist with segments (HLS) is one source."""
    part = music[: 10 * RATE]
    write_audio(tmp_path / "list.m3u8", part, codec="aac", container_format="hls", options={"hls_playlist_type": "vod"})
    assert _entries(tmp_path) > 3
    async with served(("/{path:.*}", _folder(tmp_path))) as base:
        heard = _sound(await _all_frames(ChildOrder(url=f"{base}/list.m3u8")))
    assert align(part, heard)[1] > 0.98
    assert abs(len(heard) - len(part)) < RATE // 10


async def test_a_loop_has_no_click_at_its_seam_and_positions_begin_again(tmp_path: Path) -> None:
    """A tone that fits its file goes on over the seam like inside the file."""
    samples = 2 * RATE + 100
    wave = 0.5 * np.sin(2 * np.pi * 882 * np.arange(samples) / samples)
    write_audio(tmp_path / "tone.wav", np.repeat(wave.astype(np.float32)[:, None], 2, axis=1), codec="pcm_f32le")
    frames = await _some_frames(ChildOrder(url=str(tmp_path / "tone.wav"), loop=True), 300)
    positions = [frame.position_samples for frame in frames]
    assert positions == [k * FRAME_SAMPLES % samples for k in range(300)]
    heard = _sound(frames)
    time = np.arange(len(heard)) - 312
    tone = (0.5 * np.sin(2 * np.pi * 882 * time / samples)).astype(np.float32)
    assert np.abs(heard[RATE:, 0] - tone[RATE:]).max() < 0.02
    begin = 20 * FRAME_SAMPLES
    assert not border_clicks(heard[begin:], np.repeat(tone[begin:, None], 2, axis=1)).audible


async def test_a_start_is_exact(music: Pcm) -> None:
    """Beginning at n sounds like the file from n on."""
    start = 17 * RATE + 4_321
    frames = await _some_frames(ChildOrder(url=str(PROGRAMME), start_samples=start), 200)
    assert frames[0].position_samples == start
    offset, ncc = align(music, _sound(frames))
    assert offset == start - 312
    assert ncc > 0.98


async def test_options_reach_the_encoder() -> None:
    """Constant bit rate gives packets of the one length, fec is accepted."""
    order = ChildOrder(url=str(PROGRAMME), opus=OpusOptions(bitrate=64_000, vbr=False, fec=True, expected_loss=5))
    frames = await _some_frames(order, 100)
    assert {len(frame.packet) for frame in frames} == {64_000 // 8 // 50}


def test_the_handle_works_on_uvloop_too() -> None:
    """The worker runs on uvloop: frames, end and close are the same there."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        frames = runner.run(_all_frames(ChildOrder(url=str(PROGRAMME), start_samples=38 * RATE)))
        error = runner.run(_error_of(ChildOrder(url="/nowhere")))
    assert len(frames) == 101
    assert error.code is ErrorCode.SOURCE_NOT_FOUND


# What goes wrong


async def test_each_unusable_file_has_its_code(tmp_path: Path) -> None:
    """The child's code comes through, and such things may come back."""
    (tmp_path / "empty.mp3").touch()
    (tmp_path / "text.txt").write_text("no sound here\n" * 500)
    for name, code in [
        ("missing.mp3", ErrorCode.SOURCE_NOT_FOUND),
        ("empty.mp3", ErrorCode.SOURCE_EMPTY),
        ("text.txt", ErrorCode.SOURCE_NOT_AUDIO),
    ]:
        error = await _error_of(ChildOrder(url=str(tmp_path / name)))
        assert (error.code, error.retryable) == (code, True)
        assert name in error.message


@pytest.mark.parametrize("status", [403, 404, 410, 500, 503])
async def test_an_http_status_is_told(status: int) -> None:
    """404 is a status of its own; for the rest at least the class of it is in the message."""

    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status)

    async with served(("/{path:.*}", refuse)) as base:
        error = await _error_of(ChildOrder(url=f"{base}/a.mp3"))
    assert error.code is ErrorCode.SOURCE_HTTP_STATUS
    assert f"HTTP status {str(status)[0]}" in error.message


async def test_user_password_and_query_stay_out_of_messages() -> None:
    """What may be secret in a URL is not in an error."""

    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.Response(status=404)

    async with served(("/{path:.*}", refuse)) as base:
        url = base.replace("http://", "http://anna:hunter2@") + "/a.mp3?key=swordfish"
        error = await _error_of(ChildOrder(url=url))
    assert "/a.mp3" in error.message
    assert not {word for word in ("anna", "hunter2", "swordfish") if word in error.message}


async def test_a_port_where_nobody_listens_and_a_name_that_nobody_has_are_told_apart() -> None:
    """What to do about them is another thing."""
    async with served(("/{path:.*}", _folder(Path("/nowhere")))) as base:
        pass
    assert (await _error_of(ChildOrder(url=f"{base}/a.mp3"))).code is ErrorCode.SOURCE_UNREACHABLE
    unknown = await _error_of(ChildOrder(url="http://no-such-host.invalid/a.mp3"))
    assert unknown.code is ErrorCode.SOURCE_HOST_UNKNOWN
    assert "no-such-host.invalid" in unknown.message


async def test_a_server_that_hangs_up_at_once_is_unreachable() -> None:
    """No answer is no source."""

    async def say_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with _raw_server(say_nothing) as base:
        assert (await _error_of(ChildOrder(url=f"{base}/a.mp3"))).code is ErrorCode.SOURCE_UNREACHABLE


async def test_a_server_that_says_nothing_is_stalled() -> None:
    """The worker waits as long as it was told, and not longer; the child is gone afterwards."""
    asked = asyncio.Event()
    released = asyncio.Event()

    async def never(_: web.Request) -> web.StreamResponse:
        asked.set()
        await released.wait()
        return web.Response()

    async with served(("/{path:.*}", never)) as base:
        child = await SourceChild.start(ChildOrder(url=f"{base}/a.mp3"), frame_timeout_s=0.3)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asked.wait()
            with pytest.raises(SourceError, match=r"sends no sound") as caught:
                await child.read()
        finally:
            await child.close()
            released.set()
    assert caught.value.code is ErrorCode.SOURCE_STALLED
    _assert_reaped(child.pid)


@pytest.mark.parametrize("share", [0.0, 0.6])
async def test_the_child_itself_gives_up_on_a_server_that_stalls(share: float, music: Pcm, tmp_path: Path) -> None:
    """Before the answer or in the middle of it: every read has its own time-out."""
    data = write_audio(tmp_path / "a.mp3", music[: 10 * RATE], codec="libmp3lame").read_bytes()
    released = asyncio.Event()

    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if share:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data[: int(share * len(data))])
        await released.wait()

    async with _raw_server(stall) as base:
        try:
            with pytest.raises(SourceError) as caught:
                await asyncio.to_thread(list, decode(f"{base}/a.mp3", io_timeout_s=0.3))
        finally:
            released.set()
    assert caught.value.code is ErrorCode.SOURCE_STALLED


async def test_a_server_that_breaks_off_is_broken(music: Pcm, tmp_path: Path) -> None:
    """What came is heard, then the break is told."""
    data = write_audio(tmp_path / "a.mp3", music[: 10 * RATE], codec="libmp3lame").read_bytes()

    async def two_thirds(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data[: len(data) * 2 // 3])
        await writer.drain()

    async with (
        _raw_server(two_thirds) as base,
        await SourceChild.start(ChildOrder(url=f"{base}/a.mp3")) as child,
    ):
        for _ in range(200):
            assert await child.read() is not None
        for _ in range(2):
            with pytest.raises(SourceError) as caught:
                await _drain(child)
            assert caught.value.code is ErrorCode.SOURCE_BROKEN


async def test_a_redirect_cannot_lead_to_a_file() -> None:
    """The web may lead to the web only."""

    async def redirect(_: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": f"file://{PROGRAMME}"})

    async with served(("/{path:.*}", redirect)) as base:
        await _error_of(ChildOrder(url=f"{base}/a.ogg"))


async def test_a_playlist_from_the_web_cannot_name_a_file(tmp_path: Path) -> None:
    """Nor may a segment be a file of this machine."""
    (tmp_path / "list.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:40\n#EXTINF:40,\nfile://{PROGRAMME}\n#EXT-X-ENDLIST\n"
    )
    async with served(("/{path:.*}", _folder(tmp_path))) as base:
        await _error_of(ChildOrder(url=f"{base}/list.m3u8"))


async def test_a_certificate_nobody_trusts_is_refused(tmp_path: Path, music: Pcm) -> None:
    """https means that the server is who it says it is."""
    write_audio(tmp_path / "a.mp3", music[:RATE], codec="libmp3lame")
    async with served(("/{path:.*}", _folder(tmp_path)), tls=_self_signed(tmp_path)) as base:
        await _error_of(ChildOrder(url=f"{base}/a.mp3"))


def _self_signed(folder: Path) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "server.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


# The child as a process


def _proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def _entries(folder: Path) -> int:
    return len(list(folder.iterdir()))


def _assert_reaped(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def _wait_until_gone(pidfd: int) -> None:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    assert poller.poll(PATIENCE_S * 1000), "the process lives on"


async def test_a_killed_child_is_told_by_its_signal() -> None:
    """A death without a word is a broken source, and the message says how it died."""
    async with await SourceChild.start(ChildOrder(url=str(PROGRAMME), loop=True)) as child:
        await child.read()
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(SourceError, match="SIGKILL") as caught:
            await _drain(child)
    assert caught.value.code is ErrorCode.SOURCE_BROKEN
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("says", "match"),
    [
        (b"", "exit status 3"),
        (b"\x09" + bytes(HEADER_BYTES - 1), "no record"),
        (pack(Kind.FRAME, SILENCE_FRAME)[:-1], "exit status 3"),
        (pack(Kind.FRAME, b""), "no frame"),
        (pack(Kind.FRAME, b"\x00" * 10), "no frame"),
        (pack(Kind.FRAME, b"\xf8" + bytes(2_000)), "no frame"),
        (pack(Kind.ERROR, b"{"), "did not say why"),
        (pack(Kind.ERROR, json.dumps({"code": "new_one", "message": "?"}).encode()), "did not say why"),
    ],
)
async def test_a_child_that_talks_nonsense_is_broken(says: bytes, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A malformed record or frame never reaches the stream."""
    program = f"import os; os.write(1, {pack(Kind.FRAME, SILENCE_FRAME) + says!r}); os._exit(3)"
    monkeypatch.setattr(source, "CHILD_ARGUMENTS", ("-c", program))
    async with await SourceChild.start(ChildOrder(url="/a")) as child:
        first = await child.read()
        assert first == EncodedFrame(packet=SILENCE_FRAME, item=0, position_samples=0)
        for _ in range(2):
            with pytest.raises(SourceError, match=match) as caught:
                await child.read()
            assert caught.value.code is ErrorCode.SOURCE_BROKEN


@pytest.mark.parametrize(("chunk_ms", "outcome"), [(0, "stalled"), (30_000, "played")])
async def test_what_comes_in_long_chunks_is_waited_for_as_long(
    chunk_ms: int, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child knows how long a pause may be; this side does not kill it before."""
    looks = pack(Kind.OPENED, msgspec.json.encode(Looks(live=True, chunk_ms=chunk_ms)))
    frame = pack(Kind.FRAME, SILENCE_FRAME)
    program = f"import os, time; os.write(1, {looks + frame!r}); time.sleep(2); os.write(1, {frame!r}); time.sleep(60)"
    monkeypatch.setattr(source, "CHILD_ARGUMENTS", ("-c", program))
    async with await SourceChild.start(ChildOrder(url="/a"), frame_timeout_s=1, first_frame_timeout_s=30) as child:
        assert isinstance(await child.read(), Looks)
        assert isinstance(await child.read(), EncodedFrame)
        try:
            assert isinstance(await child.read(), EncodedFrame)
            found = "played"
        except SourceError as error:
            found = error.code.removeprefix("source_")
    assert found == outcome


async def test_a_child_that_stands_still_is_killed_soon() -> None:
    """It dies to nobody, and nothing else tells it from a source that has nothing to say."""
    async with await SourceChild.start(ChildOrder(url=str(PROGRAMME), loop=True)) as child:
        await child.read()
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(SourceError) as caught:
            await _drain(child)
    assert (caught.value.code, caught.value.retryable) == (ErrorCode.SOURCE_BROKEN, True)
    assert "stood still" in caught.value.message


async def test_a_child_that_waits_for_a_slow_source_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life come while it reads what does not come; so they do while it waits for the next order."""
    monkeypatch.setattr(source, "_LOOKS_WITHOUT_LIFE", 1)

    async def never(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "audio/mpeg"})
        await answer.prepare(request)
        await asyncio.sleep(3)
        return answer

    async with served(("/a", never)) as url, await SourceChild.start(ChildOrder(url=f"{url}/a")) as child:
        with pytest.raises(SourceError) as caught:
            await child.read()
        assert caught.value.code != ErrorCode.SOURCE_BROKEN
        assert child.waits
        await asyncio.sleep(1)
        child.again(ChildOrder(url=str(PROGRAMME)))
        assert isinstance(await child.read(), Looks)


async def test_a_forbidden_source_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the child may not open will not be allowed later."""
    says = pack(Kind.ERROR, json.dumps({"code": "source_forbidden", "message": "no"}).encode())
    monkeypatch.setattr(source, "CHILD_ARGUMENTS", ("-c", f"import os; os.write(1, {says!r})"))
    error = await _error_of(ChildOrder(url="/a"))
    assert (error.code, error.retryable) == (ErrorCode.SOURCE_FORBIDDEN, False)


async def test_a_read_that_is_cancelled_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a record waits for its other half."""
    record = pack(Kind.FRAME, SILENCE_FRAME, item=1, position_samples=2)
    program = f"""
import os, signal
os.write(1, {record[:16]!r})
os.kill(os.getpid(), signal.SIGSTOP)
os.write(1, {record[16:]!r})
"""
    monkeypatch.setattr(source, "CHILD_ARGUMENTS", ("-c", program))
    async with await SourceChild.start(ChildOrder(url="/a"), frame_timeout_s=PATIENCE_S) as child:
        reading = asyncio.create_task(child.read())
        # The child stops itself after the first half; only this test lets it go on.
        stopped = await asyncio.to_thread(os.waitid, os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        assert stopped is not None
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        os.kill(child.pid, signal.SIGCONT)
        assert await child.read() == EncodedFrame(packet=SILENCE_FRAME, item=1, position_samples=2)


async def test_close_leaves_nothing_behind_however_often_and_whenever() -> None:
    """Close works at once, in the middle, while reading, after the end, and twice at a time."""
    order = ChildOrder(url=str(PROGRAMME), loop=True)
    at_once = await SourceChild.start(order)
    await at_once.close()
    midway = await SourceChild.start(order)
    await midway.read()
    await asyncio.gather(midway.close(), midway.close())
    await midway.close()
    reading = await SourceChild.start(ChildOrder(url=str(PROGRAMME), loop=True))
    task = asyncio.create_task(_drain(reading))
    await reading.close()
    with pytest.raises(SourceError):
        await task
    done = await SourceChild.start(ChildOrder(url="/nowhere"))
    with pytest.raises(SourceError):
        await done.read()
    await done.close()
    for child in (at_once, midway, reading, done):
        _assert_reaped(child.pid)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4, 5, 7, 10, 20, 1000])
def test_a_child_is_reaped_however_often_its_start_and_close_are_cancelled(
    turns: int, times: int, recwarn: pytest.WarningsRecorder
) -> None:
    """A run that is stopped, then closed, cancels whoever waits for the child twice; the loop's end does it again."""

    async def start_and_close() -> None:
        async with await SourceChild.start(ChildOrder(url=str(PROGRAMME), loop=True)) as child:
            await _drain(child)

    async def cancelled_in_the_middle() -> None:
        task = asyncio.create_task(start_and_close())
        for _ in range(turns):
            await asyncio.sleep(0)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled_in_the_middle())
    gc.collect()  # a process that nobody waited for to its end says so when it is freed
    assert not [str(told.message) for told in recwarn]


async def test_starting_and_closing_leaks_no_descriptor() -> None:
    """A worker may start children for months."""
    await _some_frames(ChildOrder(url=str(PROGRAMME)), 1)
    before = _entries(Path("/proc/self/fd"))
    for _ in range(5):
        await _some_frames(ChildOrder(url=str(PROGRAMME)), 1)
    assert _entries(Path("/proc/self/fd")) == before


async def test_the_pipe_paces_the_child() -> None:
    """Nobody reading, the child stops encoding: it comes to rest, and goes on when it is read again."""
    async with await SourceChild.start(ChildOrder(url=str(PROGRAMME), loop=True)) as child:
        await child.read()
        await asyncio.to_thread(_wait_until_at_rest, child.pid)
        after = [await child.read() for _ in range(2_000)]
    assert None not in after


def _wait_until_at_rest(pid: int) -> None:
    """Until the process is asleep and has used no processor time over several looks."""
    last, quiet = "", 0
    with select.epoll() as pause:
        for _ in range(int(PATIENCE_S * 20)):
            pause.poll(0.05)
            state, *rest = _proc(pid, "stat").rpartition(")")[2].split()
            used = "+".join(rest[10:12])
            quiet = quiet + 1 if state == "S" and used == last else 0
            last = used
            if quiet == 5:
                return
    pytest.fail("the child never came to rest")


@contextmanager
def _running_child(order: bytes) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as file:
        file.write(order + b"\n")
        file.flush()
        with subprocess.Popen(
            [sys.executable, *source.CHILD_ARGUMENTS, str(os.getpid())],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(),
            cwd="/",
        ) as child:
            try:
                yield child
            finally:
                child.kill()


def test_a_closed_reader_ends_the_child_quietly() -> None:
    """Without a reader there is nothing to do, and that is no error."""
    with _running_child(msgspec.json.encode(ChildOrder(url=str(PROGRAMME), loop=True))) as child:
        assert child.stdout
        assert child.stderr
        header = unpack_header(child.stdout.read(HEADER_BYTES))
        assert header.kind is Kind.OPENED
        child.stdout.close()
        assert child.wait(PATIENCE_S) == 0
        assert child.stderr.read() == b""


def test_an_unreadable_order_is_an_error_record() -> None:
    """Worker and child of two versions fail in words."""
    with _running_child(b'{"url": "/a", "unknown": 1}') as child:
        assert child.stdout
        header = unpack_header(child.stdout.read(HEADER_BYTES))
        assert header.kind is Kind.ERROR
        assert b"config_invalid" in child.stdout.read(header.length_bytes)


async def test_a_child_that_has_failed_or_ended_carries_out_the_next_order(tmp_path: Path) -> None:
    """The same process: a station that is away is opened each second, and to start one costs far more than that."""
    path = write_audio(tmp_path / "a.wav", np.full((9_600, 2), 0.5, np.float32))
    async with await SourceChild.start(ChildOrder(url=str(tmp_path / "none.wav"))) as child:
        pid = child.pid
        for _ in range(3):
            with pytest.raises(SourceError) as caught:
                await child.read()
            assert caught.value.code is ErrorCode.SOURCE_NOT_FOUND
            assert child.waits
            child.again(ChildOrder(url=str(tmp_path / "none.wav")))
        with pytest.raises(SourceError):
            await child.read()
        for start in (0, 4_800):
            child.set_rate(1_000)
            child.again(ChildOrder(url=str(path), start_samples=start))
            frames = [one for one in await _told(child) if isinstance(one, EncodedFrame)]
            assert frames[0].position_samples == start
            assert child.complete
        assert child.pid == pid
        assert _proc(pid, "stat")


async def test_a_child_is_not_used_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """What libraries leave behind goes with it."""
    monkeypatch.setattr(source, "_MOST_ORDERS", 2)
    async with await SourceChild.start(ChildOrder(url="/none")) as child:
        for waits in (True, False):
            with pytest.raises(SourceError):
                await child.read()
            assert child.waits is waits
            if waits:
                child.again(ChildOrder(url="/none"))


async def test_a_child_that_died_while_it_waited_is_told() -> None:
    """Whoever has another order for it starts another one."""
    async with await SourceChild.start(ChildOrder(url="/none")) as child:
        with pytest.raises(SourceError):
            await child.read()
        os.kill(child.pid, signal.SIGKILL)
        await child._process.wait()
        with pytest.raises(ProcessLookupError):
            child.again(ChildOrder(url="/none"))
        assert not child.waits


def test_a_child_of_another_parent_refuses_to_start() -> None:
    """It would outlive its worker."""
    done = subprocess.run(
        [sys.executable, *source.CHILD_ARGUMENTS, "1" if os.getpid() != 1 else "2"],
        input=b"",
        capture_output=True,
        env=child_environment(),
        cwd="/",
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == b""


_PARENT = """
import asyncio, sys
from worker.encode.records import ChildOrder
from worker.encode.source import SourceChild

async def main():
    child = await SourceChild.start(ChildOrder(url=sys.argv[1], loop=True))
    await child.read()
    print(child.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_killed_parent_takes_the_child_with_it() -> None:
    """A worker that dies at once leaves no encoder running."""
    with subprocess.Popen([sys.executable, "-c", _PARENT, str(PROGRAMME)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            _wait_until_gone(pidfd)
        finally:
            os.close(pidfd)


async def test_a_child_sees_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither settings nor secrets nor proxies: only what an interpreter needs."""
    for name in ("GUILDCAST_DISCORD_TOKEN", "AWS_SECRET_ACCESS_KEY", "http_proxy", "HOME"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    async with await SourceChild.start(ChildOrder(url=str(PROGRAMME), loop=True)) as child:
        await child.read()
        entries = _proc(child.pid, "environ").split("\0")
    names = {entry.partition("=")[0] for entry in entries if entry}
    assert names <= {"PATH", "LANG", "LC_ALL", "LC_CTYPE", "PYTHONPATH", "OPENBLAS_NUM_THREADS"} | {
        name for name in os.environ if name.startswith("LC_")
    }
    assert "secret" not in "".join(entries)


async def test_a_child_is_confined() -> None:
    """Memory is limited, there are no cores, it holds no descriptor of ours, and its session is its own."""
    async with await SourceChild.start(ChildOrder(url=str(PROGRAMME), loop=True)) as child:
        await child.read()
        limits = _proc(child.pid, "limits").splitlines()
        found = {line[:25].strip(): line[26:].split()[:2] for line in limits}
        descriptors = _entries(Path(f"/proc/{child.pid}/fd"))
        session = os.getsid(child.pid)
    assert found["Max core file size"] == ["0", "0"]
    assert found["Max address space"] == [str(1024**3)] * 2
    assert descriptors <= 6  # three standard ones, the pipe, the source, one to spare
    assert session == child.pid


def test_the_media_are_what_the_script_makes() -> None:
    """The programme has no clipping, two different sides, and no long silence."""
    pcm = decode_file(PROGRAMME)
    assert len(pcm) == 40 * RATE
    assert 0.65 < np.abs(pcm).max() < 0.8
    assert np.abs(pcm).reshape(-1, RATE // 10 * 2).max(axis=1).min() > 0.02
    assert _likeness(pcm[:, 0], pcm[:, 1]) < 0.6
