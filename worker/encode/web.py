"""HTTP as stations and other servers speak it: one answer, read as it comes. Used in the encoding child only.

What is not standard here is standard in the field: Shoutcast's `ICY 200 OK`, titles among the sound (`icy-metaint`),
servers that let in only what looks like a browser. Nothing is tried again here but a refusal, once, as a browser;
opening anew is the feeder's.
"""

from __future__ import annotations

import base64
import http.client
import re
import socket
import ssl
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from shared.errors import ErrorCode, SourceError
from shared.text import in_words
from shared.urls import shown
from worker.encode.answer import READ_BYTES, Answer

IO_TIMEOUT_S = 8.0
"""For connecting, and for every single read."""
MOST_REDIRECTS = 10
AGENT = "guildcast"
BROWSER = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"
_REFUSALS = frozenset({400, 401, 403, 405, 406, 415, 416, 451, 503})
"""What servers say to an agent that they do not like."""
_LETTING_IN = frozenset({"Authorization", "Cookie"})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LONGEST_TITLE = 500
_ICY_BLOCK_BYTES = 16
_MOST_SKIPPED_BYTES = 16 * 1024 * 1024
_RANGE = re.compile(r"\s*bytes\s+(\d{1,15})-")
_UNSAFE = re.compile(r"[^\x21-\x7e]")
_STREAM_TITLE = re.compile(rb"StreamTitle='(.*?)';", re.DOTALL)


class _StatusLine:
    """Reads the head of an answer; Shoutcast's first line is made HTTP."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self._first = True

    def readline(self, limit: int = -1) -> bytes:
        line = bytes(self.file.readline(limit))
        if self._first:
            self._first = False
            if line.startswith(b"ICY "):
                return b"HTTP/1.0 " + line.removeprefix(b"ICY ")
        return line

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp: Any = _StatusLine(self.fp)

    def begin(self) -> None:
        super().begin()
        if isinstance(self.fp, _StatusLine):
            self.fp = self.fp.file  # the body comes in many small pieces


class _Exchange(NamedTuple):
    connection: http.client.HTTPConnection
    sock: socket.socket
    response: http.client.HTTPResponse

    def close(self) -> None:
        self.response.close()
        self.connection.close()


class WebAnswer(Answer):
    """An answer with status 200 or 206.

    Its end is `complete` where it was as long as was told: any server can end chunks politely.
    """

    def __init__(self, url: str, exchange: _Exchange, on_title: Callable[[str], None], timeout_s: float) -> None:
        super().__init__(url, shown(url))
        self._timeout_s = timeout_s
        self._exchange = exchange
        self._response = response = exchange.response
        self._on_title = on_title
        headers = response.headers
        self.content_type = (headers.get_content_type() if headers.get("Content-Type") else "").lower()
        is_packed = "gzip" in headers.get("Content-Encoding", "")
        self.length = None if is_packed else response.length
        self.serves_ranges = response.status == 206 or headers.get("Accept-Ranges", "").strip().lower() == "bytes"
        names = [name.lower() for name in headers]
        server = headers.get("Server", "").lower()
        self.is_station = any(name.startswith(("icy-", "ice-")) for name in names) or (
            self.length is None and server.startswith(("icecast", "shoutcast"))
        )
        interval = headers.get("icy-metaint", "")
        self._title_every = int(interval) if interval.isdecimal() and 0 < int(interval) < 1 << 24 else 0
        self._until_title = self._title_every
        self._gzip = zlib.decompressobj(16 + zlib.MAX_WBITS) if is_packed else None
        self._packed = b""

    def read(self, most: int = READ_BYTES) -> bytes:
        if self._gzip is not None:
            return self._unpacked(most)
        if not self._title_every:
            return self._raw(most)
        if not self._until_title:
            self._take_title()
        found = self._raw(min(most, self._until_title))
        self._until_title -= len(found)
        return found

    def skip(self, count: int) -> None:
        """Leave out what comes first: what was asked for begins behind it.

        Raises: SourceError: it does not, or too far behind.
        """
        if not 0 <= count <= _MOST_SKIPPED_BYTES:
            raise SourceError(f"{self.shown} cannot be read from a place on", code=ErrorCode.SOURCE_BROKEN)
        while count and (part := self.read(min(count, READ_BYTES))):
            count -= len(part)

    def wait_longer(self) -> None:
        if not self._response.isclosed():  # read to its end, it has let go of the socket
            self._exchange.sock.settimeout(self._timeout_s)

    def close(self) -> None:
        self._exchange.close()

    def _raw(self, most: int) -> bytes:
        try:
            found = self._response.read1(most)
        except (http.client.HTTPException, OSError) as error:
            raise _reading_failed(error, self.shown) from error
        if not found and most:
            if self._response.length:  # what was told did not come
                raise SourceError(f"{self.shown} breaks off", code=ErrorCode.SOURCE_BROKEN)
            self.complete = self.length is not None
        return found

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count and (part := self._raw(count - len(found))):
            found += part
        return found

    def _take_title(self) -> None:
        self._until_title = self._title_every
        size = self._exactly(1)
        if not size or not size[0]:
            return
        match = _STREAM_TITLE.search(self._exactly(size[0] * _ICY_BLOCK_BYTES))
        if match:
            self._on_title(title_of(match.group(1)))

    def _unpacked(self, most: int) -> bytes:
        assert self._gzip is not None
        try:
            while not self._gzip.eof:
                packed = self._packed or self._raw(READ_BYTES)
                if not packed:
                    return b""
                found = self._gzip.decompress(packed, most)
                self._packed = self._gzip.unconsumed_tail
                if found:
                    return found
        except zlib.error as error:
            raise SourceError(
                f"{self.shown} says that it is packed with gzip, and is not", code=ErrorCode.SOURCE_NOT_AUDIO
            ) from error
        return b""


def title_of(raw: bytes) -> str:
    """A title in whatever encoding it came, on one line."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", "replace")
    return " ".join(text.split())[:_LONGEST_TITLE]


class Web:
    """Asks for what one source consists of.

    Args:
        timeout_s: for connecting, and for every single read.
        on_title: told of titles among the sound.
        headers: sent with each request, in place of those that are always sent; what lets one in, to the first origin
            alone that is asked.
    Attributes:
        answers_within_s: how long connecting and the head of an answer may take.
    """

    def __init__(
        self,
        *,
        timeout_s: float = IO_TIMEOUT_S,
        on_title: Callable[[str], None] = lambda _: None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._timeout_s = self.answers_within_s = timeout_s
        self._on_title = on_title
        given = headers or {}
        self._headers = {name: value for name, value in given.items() if name not in _LETTING_IN}
        self._letting_in = {name: value for name, value in given.items() if name in _LETTING_IN}
        """Until the first origin is known."""
        self._agent = AGENT
        self._tls = ssl.create_default_context()
        self._credentials: dict[tuple[str, str | None, int | None], dict[str, str]] = {}
        """By scheme, host and port: what is fetched later (segments, ranges) may need them; nobody else gets them."""

    def get(self, url: str, *, first_byte: int = 0) -> Answer:
        """Ask for a URL, or for what it has from a byte on.

        Raises: SourceError with the code that says why there is no answer of use.
        """
        if not url.lower().startswith(("http://", "https://")):
            raise SourceError(f"{shown(url)} is not on the web", code=ErrorCode.SOURCE_UNREACHABLE)
        try:
            return self._follow(url, first_byte)
        except ValueError as error:  # what urllib says of a URL that is none
            message = f"{shown(url)} is no URL, or leads to one that is none"
            raise SourceError(message, code=ErrorCode.SOURCE_UNREACHABLE) from error

    def _follow(self, url: str, first_byte: int) -> Answer:
        begun_at = url
        for _ in range(MOST_REDIRECTS + 1):
            url, own = _without_credentials(url)
            parts = urlsplit(url)
            origin = (parts.scheme, parts.hostname, parts.port)
            own, self._letting_in = own | self._letting_in, {}
            if own:
                self._credentials[origin] = self._credentials.get(origin, {}) | own
                if parts.scheme == "http" and parts.port is None:  # the same host, made secure
                    self._credentials["https", parts.hostname, None] = self._credentials[origin]
            exchange = self._asked(url, first_byte, self._credentials.get(origin, {}))
            response = exchange.response
            if response.status not in _REDIRECTS or not response.headers.get("Location"):
                return self._judged(url, exchange, first_byte)
            exchange.close()
            target = urljoin(url, response.headers["Location"])
            if not target.lower().startswith(("http://", "https://")):
                raise SourceError(f"{shown(url)} leads away from the web", code=ErrorCode.SOURCE_UNREACHABLE)
            url = target
        message = f"{shown(begun_at)} leads from address to address, and nowhere in {MOST_REDIRECTS} of them"
        raise SourceError(message, code=ErrorCode.SOURCE_REDIRECTS)

    def _asked(self, url: str, first_byte: int, credentials: dict[str, str]) -> _Exchange:
        """Ask; where that is refused, once more as a browser, and once for all of it instead of a part."""
        exchange = self._ask(url, first_byte, credentials)
        if exchange.response.status in _REFUSALS and self._agent != BROWSER and "User-Agent" not in self._headers:
            exchange.close()
            self._agent = BROWSER
            exchange = self._ask(url, first_byte, credentials)
            if exchange.response.status in _REFUSALS:
                self._agent = AGENT
        if exchange.response.status in _REFUSALS and first_byte:
            exchange.close()
            exchange = self._ask(url, 0, credentials)
        return exchange

    def _judged(self, url: str, exchange: _Exchange, first_byte: int) -> Answer:
        response, status = exchange.response, exchange.response.status
        if status in (200, 206):
            answer = WebAnswer(url, exchange, self._on_title, self._timeout_s)
            try:
                answer.skip(first_byte - _begins_at(response))
            except BaseException:
                answer.close()
                raise
            return answer
        exchange.close()
        if 200 <= status < 300:
            raise SourceError(f"{shown(url)} answers with nothing: HTTP status {status}", code=ErrorCode.SOURCE_EMPTY)
        message = f"{shown(url)} answers with HTTP status {status} {response.reason}".rstrip()
        raise SourceError(message, code=ErrorCode.SOURCE_HTTP_STATUS)

    def _connection(self, url: str) -> http.client.HTTPConnection:
        parts = urlsplit(url)
        host, secure = parts.hostname, parts.scheme == "https"
        if not host:
            raise SourceError(shown(url), code=ErrorCode.SOURCE_UNREACHABLE)
        port = parts.port or (443 if secure else 80)
        if secure:
            return http.client.HTTPSConnection(host, port, timeout=self.answers_within_s, context=self._tls)
        return http.client.HTTPConnection(host, port, timeout=self.answers_within_s)

    def _ask(self, url: str, first_byte: int, credentials: dict[str, str]) -> _Exchange:
        try:
            connection = self._connection(url)
        except http.client.InvalidURL as error:
            raise _asking_failed(error, url) from error
        parts = urlsplit(url)
        connection.response_class = _Response
        headers = {"User-Agent": self._agent, "Accept": "*/*", "Icy-MetaData": "1", "Connection": "close"}
        headers |= self._headers
        if first_byte:
            headers["Range"] = f"bytes={first_byte}-"
        path = urlunsplit(("", "", parts.path or "/", parts.query, ""))
        try:
            connection.request("GET", path, headers=headers | credentials)
            sock = connection.sock  # the connection lets go of it with the answer
            return _Exchange(connection, sock, connection.getresponse())
        except (http.client.HTTPException, OSError, UnicodeError) as error:
            connection.close()
            raise _asking_failed(error, url) from error


def _begins_at(response: http.client.HTTPResponse) -> int:
    """Which byte of the whole a body begins with: servers may answer with more than they were asked for."""
    match = _RANGE.match(response.headers.get("Content-Range", "")) if response.status == 206 else None
    return int(match.group(1)) if match else 0


def _without_credentials(url: str) -> tuple[str, dict[str, str]]:
    """A URL with its scheme in small letters and without user and password, and the header that says those."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    bare = urlunsplit((parts.scheme.lower(), host, _escaped(parts.path), _escaped(parts.query), ""))
    if not at:
        return bare, {}
    name, _, password = user.partition(":")
    said = f"{unquote(name)}:{unquote(password)}".encode()
    return bare, {"Authorization": f"Basic {base64.b64encode(said).decode()}"}


def _escaped(text: str) -> str:
    """What may not stand in a request as it is, as people write it."""
    return _UNSAFE.sub(lambda one: "".join(f"%{byte:02X}" for byte in one.group().encode("utf-8", "replace")), text)


def _asking_failed(error: BaseException, url: str) -> SourceError:
    if isinstance(error, ssl.SSLCertVerificationError):
        message = f"{shown(url)}: its certificate is not trusted: {error.verify_message}"
        return SourceError(message, code=ErrorCode.SOURCE_CERTIFICATE)
    if isinstance(error, ssl.SSLError):
        message = f"{shown(url)}: no encrypted connection: {error.reason or in_words(error)}"
        return SourceError(message, code=ErrorCode.SOURCE_CERTIFICATE)
    if isinstance(error, socket.gaierror):
        message = f"{shown(url)}: there is no host of this name: {error.strerror}"
        return SourceError(message, code=ErrorCode.SOURCE_HOST_UNKNOWN)
    if isinstance(error, TimeoutError):
        return SourceError(f"{shown(url)} does not answer in time", code=ErrorCode.SOURCE_STALLED)
    if isinstance(error, http.client.BadStatusLine | http.client.LineTooLong | http.client.HTTPException):
        return SourceError(f"{shown(url)} does not answer as a web server does", code=ErrorCode.SOURCE_UNREACHABLE)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return SourceError(f"{shown(url)} cannot be reached: {reason}", code=ErrorCode.SOURCE_UNREACHABLE)


def _reading_failed(error: BaseException, who: str) -> SourceError:
    if isinstance(error, TimeoutError):
        return SourceError(f"{who} sends nothing any more", code=ErrorCode.SOURCE_STALLED)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "its answer is cut short"
    return SourceError(f"{who} breaks off: {reason}", code=ErrorCode.SOURCE_BROKEN)
