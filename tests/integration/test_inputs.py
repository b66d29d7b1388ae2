"""What a URL leads to, as it is found on the web: HLS of any make, lists, stations, and answers that are none."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from shared.errors import ErrorCode, SourceError
from shared.schema.job import SourceKind
from tests.media.audio import PROGRAMME, RATE, decode_file, resampled, write_audio
from tests.media.hls import HlsServer, write_hls
from tests.media.radio import find_marks, marks
from tests.media.web import Handler, served
from worker.encode.decode import Hooks, decode
from worker.encode.pcm import FRAME_SAMPLES, Pcm
from worker.encode.records import Looks

PATIENCE_S = 30.0


class Seen(Hooks):
    """Remembers what was told."""

    def __init__(self) -> None:
        self.looks: list[Looks] = []
        self.titles: list[str] = []
        self.places: list[int] = []
        self.complete: list[bool] = []

    def opened(self, looks: Looks) -> None:
        self.looks.append(looks)

    def titled(self, title: str) -> None:
        self.titles.append(title)

    def placed(self, number: int) -> None:
        self.places.append(number)

    def ended(self, *, complete: bool) -> None:
        self.complete.append(complete)


async def heard(
    url: str,
    seconds: float | None = None,
    *,
    kind: SourceKind = "auto",
    place: int | None = None,
    hooks: Hooks | None = None,
    start_samples: int = 0,
    io_timeout_s: float = 8.0,
) -> Pcm:
    """Sound of a URL: so many seconds of it, or up to its end."""

    def decoded() -> Pcm:
        blocks = decode(
            url, kind=kind, place=place, hooks=hooks, start_samples=start_samples, io_timeout_s=io_timeout_s
        )
        some = islice(blocks, None if seconds is None else round(seconds * RATE / FRAME_SAMPLES))
        return np.concatenate([block.pcm for block in some])

    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.to_thread(decoded)


async def error_of(url: str, *, kind: SourceKind = "auto", io_timeout_s: float = 8.0) -> SourceError:
    with pytest.raises(SourceError) as caught:
        await heard(url, kind=kind, io_timeout_s=io_timeout_s)
    return caught.value


def seconds_of(pcm: Pcm) -> list[int]:
    """Which seconds of the programme are heard, in order."""
    return [second for _, second in find_marks(pcm)]


def assert_in_a_row(seconds: list[int]) -> None:
    assert seconds == list(range(seconds[0], seconds[0] + len(seconds)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, bool], tuple[Path, list[str]]]:
    """HLS of 12 s, made once for each kind."""
    known: dict[tuple[str, int, bool], tuple[Path, list[str]]] = {}

    def make(kind: str, segment_s: int = 1, key: bool = False) -> tuple[Path, list[str]]:
        if (kind, segment_s, key) not in known:
            folder = tmp_path_factory.mktemp(f"{kind}-{segment_s}-{key}")
            known[kind, segment_s, key] = folder, write_hls(folder, 12, segment_s, kind, key=key)
        return known[kind, segment_s, key]

    return make


Made = Callable[..., tuple[Path, list[str]]]
NAMES: dict[str, Callable[[str], str]] = {
    "as usual": lambda name: name,
    "with a query": lambda name: f"{name}?sid=1&token=a%2Fb",
    "without extension": lambda name: name.rpartition(".")[0] + "?sid=7",
    "php": lambda name: name.rpartition(".")[0] + ".php",
    "jpg": lambda name: name.rpartition(".")[0] + ".jpg",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["mpegts", "fmp4"])
async def test_hls_is_heard_whole_whatever_its_segments_are_called(made: Made, kind: str, name: str) -> None:
    """What something is follows from what is in it."""
    async with HlsServer(*made(kind)) as server:
        server.rename = NAMES[name]
        seen = Seen()
        assert seconds_of(await heard(server.url, hooks=seen)) == list(range(1, 12))
    assert seen.looks == [Looks(live=False, certain=True)]
    assert seen.complete == [True]


@pytest.mark.parametrize("kind", ["mpegts", "fmp4"])
async def test_hls_with_a_seam_before_each_segment_is_heard_whole(made: Made, kind: str) -> None:
    """Each is opened anew, and none is lost."""
    async with HlsServer(*made(kind, 2)) as server:
        server.seams = True
        found = seconds_of(await heard(server.url))
    assert found == list(range(1, 12))


async def test_encrypted_hls_is_heard_with_its_key_and_refused_without(made: Made) -> None:
    """AES-128, with the key where the playlist says."""
    async with HlsServer(*made("mpegts", 1, True)) as server:
        assert seconds_of(await heard(server.url)) == list(range(1, 12))
        server.missing.add("key")
        error = await error_of(server.url)
    assert error.code is ErrorCode.SOURCE_ENCRYPTED
    assert "key" in error.message


@pytest.mark.parametrize("missing", [{"seg4.ts"}, {"seg4.ts", "seg5.ts", "seg6.ts"}, {"seg11.ts"}])
async def test_a_segment_that_is_missing_costs_only_itself(made: Made, missing: set[str]) -> None:
    """What comes behind it is heard."""
    async with HlsServer(*made("mpegts")) as server:
        server.missing = missing
        found = seconds_of(await heard(server.url))
    lost = {int(name[3:-3]) for name in missing}
    assert set(range(1, 12)) - set(found) <= lost | {number + 1 for number in lost}
    assert found == sorted(found)


async def test_hls_without_any_segment_that_can_be_had_says_why(made: Made) -> None:
    """Nothing heard is no end."""
    async with HlsServer(*made("mpegts")) as server:
        server.missing = {f"seg{number}.ts" for number in range(12)}
        error = await error_of(server.url)
    assert error.code is ErrorCode.SOURCE_HTTP_STATUS
    assert "404" in error.message


async def test_live_hls_begins_near_its_end_and_follows_it(made: Made) -> None:
    """Three segments back, then as they come; what is asked for is what is heard."""
    async with HlsServer(*made("mpegts"), live_window=5) as server:
        seen = Seen()
        found = seconds_of(await heard(server.url, 6.0, hooks=seen))
        assert_in_a_row(found)
        assert found[0] in (2, 3)
        (looks,) = seen.looks
        assert (looks.live, looks.certain) == (True, True)
        assert 1_500 <= looks.chunk_ms <= 3_000  # FFmpeg rounds its target up
        segments = [name for name in server.asked if name.endswith(".ts")]
        assert len(segments) == len(set(segments))
        assert seen.places == sorted(set(seen.places))


async def test_live_hls_that_is_opened_again_repeats_nothing(made: Made) -> None:
    """The place that was told is begun behind, even where the playlist did not go on meanwhile."""
    async with HlsServer(*made("mpegts"), live_window=5) as server:
        server.frozen = True
        first = Seen()
        begun = await heard(server.url, 2.5, kind="live", hooks=first)
        server.frozen = False
        second = await heard(server.url, 2.0, kind="live", place=first.places[-1])
    before, after = seconds_of(begun), seconds_of(second)
    assert set(after).isdisjoint(before[:-1])


async def test_a_live_playlist_that_counts_anew_is_followed(made: Made) -> None:
    """An encoder that was restarted begins at 0 again."""
    async with HlsServer(*made("mpegts"), live_window=5) as server:
        assert len(await heard(server.url, 1.0, kind="live", place=4_000))


async def test_a_live_playlist_with_nothing_new_is_stalled(made: Made) -> None:
    """After three target durations, eight seconds at least, it says so."""
    async with HlsServer(*made("mpegts"), live_window=5) as server:
        server.frozen = True
        error = await error_of(server.url, kind="live")
    assert error.code is ErrorCode.SOURCE_STALLED
    assert "nothing new" in error.message


async def test_a_live_playlist_that_has_ended_is_not_begun_again(made: Made) -> None:
    """Known to be live, it is waited for; from its beginning all would be heard twice."""
    async with HlsServer(*made("mpegts")) as server:
        error = await error_of(server.url, kind="live")
    assert error.code is ErrorCode.SOURCE_ENDED


# lists


@pytest.fixture(scope="module")
def mp3(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    music = decode_file(PROGRAMME)[: 4 * RATE]
    return write_audio(tmp_path_factory.mktemp("mp3") / "a.mp3", music, codec="libmp3lame").read_bytes()


def text(body: str, content_type: str) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        said = body.replace("BASE", str(request.url.origin()))
        return web.Response(body=said.encode(), headers={"Content-Type": content_type})

    return handler


def sound(body: bytes, **headers: str) -> Handler:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, headers={"Content-Type": "audio/mpeg"} | headers)

    return handler


LISTS = {
    "m3u": ("#EXTM3U\n#EXTINF:-1,Station\nBASE/music.mp3\n", "audio/x-mpegurl"),
    "m3u without head": ("BASE/music.mp3\r\n", "audio/x-mpegurl"),
    "m3u with a mark": ("\ufeff#EXTM3U\nmusic.mp3\n", "text/plain"),
    "m3u8 that is no HLS": ("#EXTM3U\n#EXTINF:123,Somebody - Something\nmusic.mp3\n", "application/vnd.apple.mpegurl"),
    "second entry": ("#EXTM3U\nBASE/gone.mp3\nBASE/music.mp3\n", "audio/mpegurl"),
    "pls": ("[playlist]\nNumberOfEntries=1\nFile1=BASE/music.mp3\nTitle1=x\nLength1=-1\nVersion=2\n", "audio/x-scpls"),
    "pls out of order": ("[Playlist]\nfile2 = BASE/gone.mp3\nFile1 = BASE/music.mp3\n", "text/html"),
    "xspf": (
        '<?xml version="1.0"?><playlist xmlns="http://xspf.org/ns/0/"><location>BASE/music.mp3</location></playlist>',
        "application/xspf+xml",
    ),
    "list of a list": ("#EXTM3U\nBASE/inner.pls\n", "audio/x-mpegurl"),
}


@pytest.mark.parametrize("name", LISTS)
async def test_what_people_call_a_stream_url_is_followed(name: str, mp3: bytes) -> None:
    """A list with the URL of the stream in it, of any kind."""
    routes = [
        ("/listen", text(*LISTS[name])),
        ("/inner.pls", text(*LISTS["pls"])),
        ("/music.mp3", sound(mp3)),
    ]
    async with served(*routes) as base:
        assert abs(len(await heard(f"{base}/listen")) - 4 * RATE) < RATE // 4


async def test_lists_that_name_each_other_come_to_an_end() -> None:
    """And say so."""
    async with served(("/a.m3u", text("#EXTM3U\nBASE/a.m3u\n", "audio/x-mpegurl"))) as base:
        error = await error_of(f"{base}/a.m3u")
    assert error.code is ErrorCode.SOURCE_NOT_AUDIO
    assert "lists" in error.message


@pytest.mark.parametrize("target", ["file:///etc/passwd", "/etc/passwd", "ftp://127.0.0.1/a.mp3"])
async def test_a_list_from_the_web_leads_to_the_web_only(target: str) -> None:
    """Nothing of this machine is read, and no other protocol is spoken."""
    async with served(("/a.m3u", text(f"#EXTM3U\n{target}\n", "audio/x-mpegurl"))) as base:
        error = await error_of(f"{base}/a.m3u")
    assert error.code in (ErrorCode.SOURCE_UNREACHABLE, ErrorCode.SOURCE_HTTP_STATUS)


async def test_one_variant_of_a_master_playlist_is_fetched(made: Made) -> None:
    """The best sound up to 256 kbit/s; nothing of the others is asked for."""
    folder, lines = made("mpegts")
    master = (
        '#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=2500000,RESOLUTION=1280x720,CODECS="avc1.4d401f,mp4a.40.2"\nvideo.m3u8\n'
        '#EXT-X-STREAM-INF:BANDWIDTH=64000,CODECS="mp4a.40.5"\nlow.m3u8\n'
        '#EXT-X-STREAM-INF:BANDWIDTH=192000,CODECS="mp4a.40.2"\nlist.m3u8\n'
        '#EXT-X-STREAM-INF:BANDWIDTH=320000,CODECS="mp4a.40.2"\nhigh.m3u8\n'
    )
    async with HlsServer(folder, lines) as server:
        async with served(("/master.m3u8", text(master.replace("list.m3u8", server.url), "text/plain"))) as base:
            assert seconds_of(await heard(f"{base}/master.m3u8")) == list(range(1, 12))
        assert server.asked[0] == "list.m3u8"
        assert len(server.asked) == len(set(server.asked))


# what a server says of what it sends


@pytest.mark.parametrize(
    ("headers", "looks"),
    [
        ({}, Looks(live=False, certain=False)),
        ({"Accept-Ranges": "bytes"}, Looks(live=False, certain=True)),
        ({"icy-name": "Radio"}, Looks(live=True, certain=True)),
        ({"Icy-Br": "128", "Accept-Ranges": "bytes"}, Looks(live=True, certain=True)),
    ],
)
async def test_a_length_is_one_sign_of_several(headers: dict[str, str], looks: Looks, mp3: bytes) -> None:
    """What calls itself a station is one, whatever length it tells; a file that serves ranges is a file."""
    async with served(("/a.mp3", sound(mp3, **headers))) as base:
        seen = Seen()
        await heard(f"{base}/a.mp3", hooks=seen)
    assert seen.looks == [looks]


@contextmanager
def raw(talk: Callable[[socket.socket, bytes], None]) -> Iterator[str]:
    """A server that says what it likes; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                request = b""
                while b"\r\n\r\n" not in request and (part := connection.recv(4_096)):
                    request += part
                try:
                    talk(connection, request)
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(PATIENCE_S)


async def test_a_shoutcast_server_is_understood(mp3: bytes) -> None:
    """`ICY 200 OK`, and its titles are told and not heard."""
    interval = 4_096

    def talk(connection: socket.socket, request: bytes) -> None:
        assert b"icy-metadata: 1" in request.lower()
        connection.sendall(b"ICY 200 OK\r\nicy-metaint:%d\r\nicy-name:R\r\ncontent-type:audio/mpeg\r\n\r\n" % interval)
        titles = iter([b"StreamTitle='Ren\xe9 - It\\'s; here';StreamUrl='';", "StreamTitle='Zoë - Two';".encode()])
        for at in range(0, len(mp3), interval):
            block = next(titles, b"")
            size = -(-len(block) // 16)
            connection.sendall(mp3[at : at + interval] + bytes([size]) + block.ljust(size * 16, b"\0"))

    with raw(talk) as base:
        seen = Seen()
        found = await heard(f"{base}/", hooks=seen)
    assert abs(len(found) - 4 * RATE) < RATE // 4
    assert seen.titles == ["René - It\\'s; here", "Zoë - Two"]
    assert seen.looks == [Looks(live=True, certain=True)]


@pytest.mark.parametrize("status", [400, 401, 403, 406, 416])
async def test_a_refusal_is_tried_once_more_as_a_browser(status: int, mp3: bytes) -> None:
    """Many servers let in what they know; nothing is asked for from a byte on unless that is needed."""
    asked: list[str] = []

    async def picky(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers["User-Agent"])
        assert "Range" not in request.headers
        if not request.headers["User-Agent"].startswith("Mozilla"):
            return web.Response(status=status)
        return web.Response(body=mp3, content_type="audio/mpeg")

    async with served(("/a.mp3", picky)) as base:
        assert len(await heard(f"{base}/a.mp3"))
    assert [one.partition("/")[0] for one in asked] == ["guildcast", "Mozilla"]


async def test_an_agent_that_a_job_names_is_the_only_one() -> None:
    """A refusal stands: to ask the same once more changes nothing."""
    asked: list[str] = []

    async def refusing(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers["User-Agent"])
        return web.Response(status=403)

    async with served(("/a.mp3", refusing)) as base:
        blocks = decode(f"{base}/a.mp3", headers={"User-Agent": "Radio/1"})
        with pytest.raises(SourceError):
            await asyncio.to_thread(lambda: list(blocks))
    assert asked == ["Radio/1"]


async def test_credentials_of_a_url_are_said_to_its_host_alone(mp3: bytes) -> None:
    """Not in the request line, not to another host, and in no message."""
    seen: list[str | None] = []

    async def locked(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers.get("Authorization"))
        return web.Response(body=mp3, content_type="audio/mpeg")

    async def away(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers.get("Authorization"))
        return web.Response(
            status=302, headers={"Location": str(request.url.with_host("localhost").with_path("/a.mp3"))}
        )

    async with served(("/a.mp3", locked), ("/away", away)) as base:
        inner = base.removeprefix("http://")
        await heard(f"HTTP://us%20er:se%3Acret@{inner}/a.mp3")
        await heard(f"http://us%20er:se%3Acret@{inner}/away")
        error = await error_of(f"http://us%20er:se%3Acret@{inner}/gone")
    assert seen == ["Basic dXMgZXI6c2U6Y3JldA==", "Basic dXMgZXI6c2U6Y3JldA==", None]
    assert "cret" not in error.message
    assert "us%20er" not in error.message


async def test_credentials_are_said_again_for_all_that_belongs_to_a_stream(made: Made) -> None:
    """A playlist behind a password has segments behind it, too."""
    folder, lines = made("mpegts")

    async def locked(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != "Basic dTpw":
            return web.Response(status=401)
        name = request.match_info["name"]
        if name.endswith(".m3u8"):
            return web.Response(text="\n".join(lines), content_type="application/vnd.apple.mpegurl")
        return web.FileResponse(folder / name)

    async with served(("/{name:.*}", locked)) as base:
        url = f"http://u:p@{base.removeprefix('http://')}/list.m3u8"
        assert seconds_of(await heard(url)) == list(range(1, 12))


async def test_headers_of_a_source_are_sent_and_secrets_to_its_own_host_alone() -> None:
    """What lets one in is for the first address, the rest for all that belongs to the stream."""
    seen: list[tuple[str, str | None, str | None, str | None]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        headers = request.headers
        seen.append((request.path, headers.get("Cookie"), headers.get("Referer"), headers.get("User-Agent")))
        if request.path == "/away":
            raise web.HTTPFound(request.url.with_host("localhost").with_path("/there"))
        return web.Response(status=404)

    given = {"Cookie": "cret", "Referer": "https://a.example/", "User-Agent": "Radio/1"}
    async with served(("/{name}", handler)) as base:
        blocks = decode(f"{base}/away", headers=given)
        with pytest.raises(SourceError) as caught:
            await asyncio.to_thread(lambda: list(blocks))
    assert "cret" not in caught.value.message
    assert seen == [
        ("/away", "cret", "https://a.example/", "Radio/1"),
        ("/there", None, "https://a.example/", "Radio/1"),
    ]


@pytest.mark.parametrize(
    "url",
    [
        "http://user:pass/cret@127.0.0.1/stream",
        "http://user:pass@127.0.0.1:1/cret@x",
        "http:///x?token=cret",
        "http://[cret/",
        "http://127.0.0.1:99999/?cret",
        "http://a b/?cret",
        "http://[::1]:1/?cret",
    ],
)
async def test_an_unreadable_url_is_one_clear_error_without_its_secrets(url: str) -> None:
    """Whatever is wrong with it."""
    error = await error_of(url)
    assert "cret" not in error.message
    assert "pass" not in error.message
    assert error.code in (ErrorCode.SOURCE_UNREACHABLE, ErrorCode.SOURCE_HTTP_STATUS)


@pytest.mark.parametrize("kind", ["mpegts", "fmp4"])
async def test_the_first_segment_may_be_missing(made: Made, kind: str) -> None:
    """What a decoder needs first comes before the first that is there."""
    async with HlsServer(*made(kind)) as server:
        server.missing = {"seg0.ts", "seg0.m4s", "seg5.m4s"}
        found = seconds_of(await heard(server.url))
    assert found[-1] == 11
    assert len(found) >= 8


async def test_a_file_is_sought_in_where_its_server_serves_ranges(tmp_path: Path) -> None:
    """An MP4 with its index at the end, begun in the middle: not all of it is fetched."""
    music = np.tile(decode_file(PROGRAMME), (6, 1))
    path = write_audio(tmp_path / "long.m4a", music, codec="aac", container_format="mp4", bitrate=192_000)
    sent = 0

    async def counted(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        first = int(request.http_range.start or 0)
        body = path.read_bytes()
        status, headers = (206, {"Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"}) if first else (200, {})
        response = web.StreamResponse(status=status, headers=headers | {"Accept-Ranges": "bytes"})
        response.content_length = len(body) - first
        await response.prepare(request)
        for at in range(first, len(body), 65_536):
            await response.write(body[at : at + 65_536])
            sent += 65_536
        return response

    async with served(("/long.m4a", counted)) as base:
        start = 200 * RATE
        found = await heard(f"{base}/long.m4a", 2.0, start_samples=start)
    assert np.array_equal(found, await heard(str(path), 2.0, start_samples=start))
    assert sent < path.stat().st_size * 3


async def test_nothing_is_read_up_to_a_place_at_its_own_pace(mp3: bytes) -> None:
    """What comes no faster than it is heard goes on from where it is: to wait would be as much silence."""

    def talk(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nContent-Length: 1073741824\r\n\r\n")
        for _again in range(40):
            for at in range(0, len(mp3), 4_000):
                connection.sendall(mp3[at : at + 4_000])
                time.sleep(0.2)

    with raw(talk) as base:
        begun_s = time.monotonic()
        assert len(await heard(f"{base}/a.mp3", 1.0, start_samples=3_600 * RATE)) == RATE
        assert time.monotonic() - begun_s < PATIENCE_S / 2


# answers that are none


async def redirects(request: web.Request) -> web.StreamResponse:
    return web.Response(status=302, headers={"Location": str(request.url)})


async def gzip_that_is_none(_: web.Request) -> web.StreamResponse:
    return web.Response(body=b"\xff\xfb" * 50_000, headers={"Content-Encoding": "gzip"})


def status(code: int) -> Handler:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(status=code)

    return handler


ANSWERS: dict[str, tuple[Handler, ErrorCode, str]] = {
    "redirect to itself": (redirects, ErrorCode.SOURCE_REDIRECTS, "from address to address"),
    "204": (status(204), ErrorCode.SOURCE_EMPTY, "204"),
    "404": (status(404), ErrorCode.SOURCE_HTTP_STATUS, "404"),
    "403": (status(403), ErrorCode.SOURCE_HTTP_STATUS, "403"),
    "503": (status(503), ErrorCode.SOURCE_HTTP_STATUS, "503"),
    "nothing": (sound(b""), ErrorCode.SOURCE_EMPTY, "nothing"),
    "gzip that is none": (gzip_that_is_none, ErrorCode.SOURCE_NOT_AUDIO, "gzip"),
    "HTML": (text("<!DOCTYPE html><html><body>404</body></html>", "audio/mpeg"), ErrorCode.SOURCE_NOT_AUDIO, "HTML"),
    "JSON": (text('{"error": "no such station"}', "application/json"), ErrorCode.SOURCE_NOT_AUDIO, "JSON"),
    "picture": (sound(b"\x89PNG\r\n\x1a\n" + bytes(5_000)), ErrorCode.SOURCE_NOT_AUDIO, "PNG"),
    "text": (text("no sound here\n" * 500, "text/plain"), ErrorCode.SOURCE_NOT_AUDIO, "audio"),
    "empty list": (text("#EXTM3U\n", "audio/x-mpegurl"), ErrorCode.SOURCE_NOT_AUDIO, "names nothing"),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_that_is_no_sound_says_what_it_is(name: str) -> None:
    """Each with a code of its own kind, and with the word that helps."""
    handler, code, word = ANSWERS[name]
    async with served(("/a", handler)) as base:
        error = await error_of(f"{base}/a?token=secret")
    assert error.code is code
    assert word in error.message
    assert "secret" not in error.message


async def test_a_connection_that_is_reset_is_broken(mp3: bytes) -> None:
    """What came is heard, then it is told."""

    def talk(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: audio/mpeg\r\n\r\n" + mp3[: len(mp3) // 2])
        time.sleep(0.3)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with raw(talk) as base:
        assert (await error_of(f"{base}/a.mp3")).code is ErrorCode.SOURCE_BROKEN


async def test_a_station_that_says_nothing_any_more_is_stalled(mp3: bytes) -> None:
    """After the time-out of a read, and not before what came is heard."""
    over = threading.Event()

    def talk(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: audio/mpeg\r\n\r\n" + mp3)
        over.wait(PATIENCE_S)

    with raw(talk) as base:
        error = await error_of(f"{base}/a.mp3", io_timeout_s=0.5)
        over.set()
    assert error.code is ErrorCode.SOURCE_STALLED


async def test_entries_of_a_list_that_hang_do_not_keep_from_one_that_plays(mp3: bytes) -> None:
    """Each is given up after seconds, and what plays may then pause for longer than that."""
    over = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        number = int(request.match_info["number"])
        if number < 3:
            await over.wait()
        response = web.StreamResponse(headers={"Content-Type": "audio/mpeg"})
        await response.prepare(request)
        await response.write(mp3[: len(mp3) // 2])
        await asyncio.sleep(4)
        await response.write(mp3[len(mp3) // 2 :])
        return response

    entries = text("".join(f"BASE/{number}\n" for number in range(4)), "audio/x-mpegurl")
    async with served(("/list.m3u", entries), ("/{number}", handler)) as base:
        pcm = await heard(f"{base}/list.m3u")
        over.set()
    assert len(pcm) > 3.5 * RATE


async def test_an_encrypted_segment_that_is_cut_short_costs_only_itself(made: Made) -> None:
    """It is no sign that the key is wrong."""
    folder, lines = made("mpegts", 1, True)

    async def handler(request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name.endswith(".m3u8"):
            return web.Response(text="\n".join(lines), content_type="application/vnd.apple.mpegurl")
        body = (folder / name).read_bytes()
        return web.Response(body=body[:-7] if name == "seg4.ts" else body)

    async with served(("/{name}", handler)) as base:
        found = seconds_of(await heard(f"{base}/list.m3u8"))
    assert set(found) >= set(range(1, 12)) - {4, 5}


async def test_a_segment_that_breaks_before_its_first_byte_was_not_heard(made: Made) -> None:
    """Whoever opens the stream again begins with it."""
    folder, lines = made("mpegts")
    lines = [line for line in lines if "ENDLIST" not in line]

    async def handler(request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name.endswith(".m3u8"):
            return web.Response(text="\n".join(lines), content_type="application/vnd.apple.mpegurl")
        if name == "seg11.ts":
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            assert request.transport is not None
            request.transport.abort()
            return response
        return web.FileResponse(folder / name)

    async with served(("/{name}", handler)) as base:
        seen = Seen()
        with pytest.raises(SourceError):
            await heard(f"{base}/list.m3u8", hooks=seen, io_timeout_s=1)
    assert seen.places
    assert 11 not in seen.places


@pytest.mark.parametrize("target", ["file:///{path}", "{path}"])
async def test_a_master_playlist_of_the_web_leads_to_the_web_only(target: str, tmp_path: Path) -> None:
    """A station cannot put a file of this machine on air."""
    path = write_audio(tmp_path / "a.wav", marks(0, RATE))
    master = "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n" + target.format(path=path) + "\n"
    async with served(("/live", text(master, "application/vnd.apple.mpegurl"))) as base:
        error = await error_of(f"{base}/live")
    assert error.code in (ErrorCode.SOURCE_UNREACHABLE, ErrorCode.SOURCE_HTTP_STATUS)


async def test_entries_that_answer_and_send_nothing_do_not_keep_from_one_that_plays(mp3: bytes) -> None:
    """The head of an answer alone is no station. At a station's own patience, five of them would take too long here."""
    over = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "audio/mpeg"})
        await response.prepare(request)
        if int(request.match_info["number"]) < 5:
            await over.wait()
        await response.write(mp3)
        return response

    entries = text("".join(f"BASE/{number}\n" for number in range(6)), "audio/x-mpegurl")
    async with served(("/list.m3u", entries), ("/{number}", handler)) as base:
        assert len(await heard(f"{base}/list.m3u")) > 3.5 * RATE
        over.set()


# stations that hand on file after file


def station(pieces: list[bytes], content_type: str) -> Handler:
    """Sends them all, each when the one before is out, without a length, and ends politely."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type, "icy-name": "Station"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        return response

    return handler


def _songs(folder: Path, forms: list[tuple[str, str, int, str]]) -> list[bytes]:
    """Four seconds of the programme each, with its number for a title."""
    found = []
    for number, (ending, codec, rate, layout) in enumerate(forms):
        pcm = resampled(marks(number * 4 * RATE, 4 * RATE), rate, layout)
        tags = {"title": f"Song {number}"}
        path = write_audio(folder / f"a.{ending}", pcm, rate=rate, layout=layout, codec=codec, tags=tags)
        found.append(path.read_bytes())
    return found


STATIONS: dict[str, tuple[str, list[tuple[str, str, int, str]]]] = {
    "MP3": ("audio/mpeg", [("mp3", "libmp3lame", 44_100, "stereo")] * 3),
    "MP3 of other rates": (
        "audio/mpeg",
        [("mp3", "libmp3lame", 44_100, "stereo"), ("mp3", "libmp3lame", 48_000, "mono")],
    ),
    "AAC of other rates": ("audio/aacp", [("aac", "aac", 44_100, "stereo"), ("aac", "aac", 32_000, "mono")]),
    "Ogg Opus": ("application/ogg", [("ogg", "libopus", RATE, "stereo"), ("ogg", "libopus", RATE, "mono")] * 2),
    "Ogg FLAC": ("audio/ogg", [("oga", "flac", 44_100, "stereo"), ("oga", "flac", 48_000, "mono")]),
}


@pytest.mark.parametrize("name", STATIONS)
async def test_a_station_whose_songs_are_of_other_kinds_is_heard_whole(name: str, tmp_path: Path) -> None:
    """Over each border, whatever changes there, and with a picture between the songs where the format has room."""
    content_type, forms = STATIONS[name]
    songs = _songs(tmp_path, forms)
    picture = np.random.default_rng(7).bytes(100_000) if "ogg" not in content_type else b""
    pieces = [piece for song in songs for piece in (picture, song)]
    async with served(("/live", station(pieces, content_type))) as base:
        seen = Seen()
        pcm = await heard(f"{base}/live", hooks=seen)
    assert seconds_of(pcm) == [second for second in range(4 * len(songs)) if second]
    assert seen.looks == [Looks(live=True, certain=True)]
    if "ogg" in content_type:
        assert seen.titles == [f"Song {number}" for number in range(len(songs))]


async def test_a_list_on_disk_leads_to_a_station(tmp_path: Path, mp3: bytes) -> None:
    """What a station's page hands out is played as the station."""
    async with served(("/live", station([mp3], "audio/mpeg"))) as base:
        (tmp_path / "station.pls").write_text(f"[playlist]\nFile1={base}/live\n")
        seen = Seen()
        assert len(await heard(str(tmp_path / "station.pls"), hooks=seen)) > 3.5 * RATE
    assert seen.looks == [Looks(live=True, certain=True)]


@pytest.mark.parametrize("length_ms", [1, 100, 3_000])
async def test_a_short_loop_asks_for_its_source_once(length_ms: int, tmp_path: Path) -> None:
    """However short it is, it costs no more requests than a long one; each pass is heard to its end."""
    sound = marks(0, 48 * length_ms)
    body = write_audio(tmp_path / "a.wav", sound).read_bytes()
    asked: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        return web.Response(body=body, headers={"Content-Type": "audio/wav"})

    async with served(("/a.wav", handler)) as base:
        url = f"{base}/a.wav"
        blocks = await asyncio.to_thread(lambda: list(islice(decode(url, loop=True), 500)))
    assert len(asked) == 1
    pcm = np.concatenate([block.pcm for block in blocks])
    assert np.allclose(pcm, np.resize(sound, pcm.shape), atol=1e-3)
    assert [block.position_samples for block in blocks] == [k * FRAME_SAMPLES % len(sound) for k in range(500)]


RANGES: dict[str, Callable[[int, bytes], web.Response]] = {
    "served": lambda first, body: web.Response(
        status=206, body=body[first:], headers={"Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"}
    ),
    "more than was asked for": lambda first, body: web.Response(
        status=206,
        body=body[first // 2 :],
        headers={"Content-Range": f"bytes {first // 2}-{len(body) - 1}/{len(body)}"},
    ),
    "not served": lambda _, body: web.Response(body=body),
    "refused": lambda _, __: web.Response(status=416),
    "forbidden": lambda _, __: web.Response(status=403),
}


@pytest.mark.parametrize("way", RANGES)
async def test_a_server_that_promises_ranges_may_lie(way: str, tmp_path: Path) -> None:
    """A file whose index stands at its end is played all the same."""
    sound = marks(0, 20 * RATE) + np.random.default_rng(3).normal(0, 0.01, (20 * RATE, 2)).astype(np.float32)
    body = write_audio(tmp_path / "a.m4a", sound, codec="alac").read_bytes()
    assert len(body) > 1_000_000

    async def handler(request: web.Request) -> web.StreamResponse:
        first = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        answer = RANGES[way](first, body) if first else web.Response(body=body)
        answer.headers["Accept-Ranges"] = "bytes"
        return answer

    async with served(("/a.m4a", handler)) as base:
        assert seconds_of(await heard(f"{base}/a.m4a", 5))[:2] == [1, 2]
