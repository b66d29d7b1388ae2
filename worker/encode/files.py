"""Files of one folder, asked for as if they were on the web: what they name is found the same way, and not outside.

Used in the encoding child only.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from urllib.parse import unquote

from shared.errors import ErrorCode, SourceError
from worker.encode.answer import READ_BYTES, Answer
from worker.encode.resolve import is_web, resolve_source


class FileAnswer(Answer):
    """The bytes of a file from a place on. What is appended while it is read is read, too."""

    def __init__(self, path: str, first_byte: int) -> None:
        super().__init__(path, path)
        self._file = _opened(path)
        self.length = os.fstat(self._file.fileno()).st_size - first_byte
        self.serves_ranges = True
        self.complete = True  # wherever a reader stops, no more of it is on its way
        self._file.seek(first_byte)

    def read(self, most: int = READ_BYTES) -> bytes:
        try:
            return self._file.read(most)
        except OSError as error:
            raise SourceError(f"{self.shown} breaks off: {error.strerror}", code=ErrorCode.SOURCE_BROKEN) from error

    def wait_longer(self) -> None:
        """Nobody waits for a file."""

    def close(self) -> None:
        self._file.close()


class Files:
    """Opens what lies in `folder` or below it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, url: str, *, first_byte: int = 0) -> Answer:
        """Open a file by its path, or by a `file:` URL.

        Raises: SourceError: missing, empty, not a regular file, not ours to read, or outside the folder.
        """
        if is_web(url):
            raise SourceError("a file names an address on the web as a part of it", code=ErrorCode.SOURCE_FORBIDDEN)
        path = resolve_source(url, self._folder)
        if "%" in path and not Path(path).exists():  # as some lists write it
            path = resolve_source(unquote(url), self._folder)
        return FileAnswer(path, first_byte)


def _opened(path: str) -> io.FileIO:
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{path} is not a file", code=ErrorCode.SOURCE_NOT_AUDIO)
        if not status.st_size:
            raise SourceError(f"{path} is an empty file", code=ErrorCode.SOURCE_EMPTY)
        return io.FileIO(path)
    except PermissionError as error:
        raise SourceError(f"{path} may not be read", code=ErrorCode.SOURCE_FORBIDDEN, retryable=False) from error
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}", code=ErrorCode.SOURCE_NOT_FOUND) from error
