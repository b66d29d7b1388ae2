"""Runs a target in a process of its own, because what it calls may crash: a crash is a find like any other.

The child notes each input in a file before it takes it, and what is written to a file outlives the process. Turns are
asked for on its standard input, one line each, and answered on its standard output.

    parent: seed of the turn, seconds                                          child: executions, or find and trace
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, TextIO

import structlog

from tests.fuzz.target import Target

_START_S = 60.0
_LAST_WORDS_S = 5.0


class Isolated:
    """The child of one target, from `with` to its end.

    Args:
        target: says in `where` under which name a child imports it.
        stuck_after_s: a turn that takes longer by so much is a find.
    """

    def __init__(self, target: Target, stuck_after_s: float) -> None:
        self._target = target
        self._stuck_after_s = stuck_after_s

    def __enter__(self) -> Isolated:
        self._folder = tempfile.TemporaryDirectory(prefix="guildcast-fuzz-")
        self._note = Path(self._folder.name, "input")
        self._errors = Path(self._folder.name, "errors")
        with self._errors.open("wb") as errors:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.isolated", self._target.where, self._note],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        if self._answer(_START_S) is None:
            raise RuntimeError(f"the process of {self._target.name} did not start: {self._end()}")
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()
        self._folder.cleanup()

    def turn(self, seed: int, seconds: float) -> tuple[int, bytes | None, str]:
        """Executions in this turn, the input of a find or None, and its trace."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # it died: read below how
            self._child.stdin.write(f"{seed} {seconds}\n")
            self._child.stdin.flush()
        answer = self._answer(seconds + self._stuck_after_s)
        if answer is not None:
            found = answer["found"]
            return answer["executions"], None if found is None else bytes.fromhex(found), answer["trace"]
        trace = self._end()
        return 0, self._note.read_bytes(), trace

    def _end(self) -> str:
        """How the child ended, by itself or now."""
        try:
            status = self._child.wait(timeout=_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            return "it did not come back"
        how = signal.strsignal(-status) if status < 0 else f"exit status {status}"
        return f"the process ended: {how}\n{self._errors.read_text(errors='replace')}"

    def _answer(self, timeout_s: float) -> dict[str, Any] | None:
        """The next line of the child, None where it does not come."""
        assert self._child.stdout is not None
        ready, _, _ = select.select([self._child.stdout], [], [], timeout_s)
        line = self._child.stdout.readline() if ready else ""
        answer: dict[str, Any] | None = json.loads(line) if line.endswith("\n") else None
        return answer


def main() -> None:
    """The child."""
    faulthandler.enable()
    logging.disable()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    where, note_path = sys.argv[1:]
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # whatever libraries print is no answer
        module, _, name = where.partition(":")
        target: Target = getattr(import_module(module), name)
        note = os.open(note_path, os.O_CREAT | os.O_WRONLY)
        _tell(answers, 0, None, "")
        for line in sys.stdin:
            seed, seconds = line.split()
            _tell(answers, *_turn(target, Random(int(seed)), float(seconds), note))


def _turn(target: Target, random: Random, seconds: float, note: int) -> tuple[int, bytes | None, str]:
    executions = 0
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s or not executions:
        data = target.make(random)
        os.ftruncate(note, 0)
        os.pwrite(note, data, 0)
        try:
            target.take(data)
        except Exception:  # noqa: BLE001 - whatever it is, it is the find
            return executions, data, traceback.format_exc()
        executions += 1
    return executions, None, ""


def _tell(answers: TextIO, executions: int, found: bytes | None, trace: str) -> None:
    text = json.dumps({"executions": executions, "found": None if found is None else found.hex(), "trace": trace})
    answers.write(text + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
