"""What comes when something is asked for by its URL: from the web, or from a folder of this machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

from shared.errors import ErrorCode, SourceError

READ_BYTES = 32 * 1024


class Readable(Protocol):
    """What FFmpeg reads from."""

    def read(self, most: int, /) -> bytes: ...


@runtime_checkable
class Seekable(Readable, Protocol):
    """What can be sought in, if it says so."""

    def seekable(self) -> bool: ...

    def seek(self, offset: int, whence: int = 0) -> int: ...

    def tell(self) -> int: ...


class Answer(ABC):
    """One body, read as it comes.

    Attributes:
        url: where it came from, behind all redirects; an absolute path, where that is a file.
        shown: the same as it may stand in a message.
        content_type: as the server says; empty: not at all.
        length: of the body in bytes, None: not told.
        serves_ranges: it may be asked for from a place on.
        is_station: it is the answer of a radio station.
        complete: its end was reached, and is one for certain.
    """

    def __init__(self, url: str, shown: str) -> None:
        self.url = url
        self.shown = shown
        self.content_type = ""
        self.length: int | None = None
        self.serves_ranges = self.is_station = self.complete = False

    @abstractmethod
    def read(self, most: int = READ_BYTES) -> bytes:
        """What has come, at most so many bytes; nothing at the end.

        Raises: SourceError.
        """

    @abstractmethod
    def wait_longer(self) -> None:
        """It has begun: what follows may take as long as sound may."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""

    def read_all(self, most: int) -> bytes:
        """The whole body.

        Raises: SourceError: also where it is longer than that.
        """
        found = bytearray()
        while part := self.read():
            found += part
            if len(found) > most:
                raise SourceError(f"{self.shown} is longer than {most:,} bytes", code=ErrorCode.SOURCE_TOO_LARGE)
        return bytes(found)


class Getter(Protocol):
    """Whoever can be asked."""

    def get(self, url: str, *, first_byte: int = 0) -> Answer:
        """Ask for a URL, or for what it has from a byte on.

        Raises: SourceError with the code that says why there is no answer of use.
        """
