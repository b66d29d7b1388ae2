"""`make interop`: each client goes through each scene; prints a table, exits with 1 if anything failed."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from shared.logs import configure
from tests.emulator.client import EmulatorClient, EmulatorError, EmulatorProcess
from tests.interop.led import ClientError, Kind, LedClient, kinds
from tests.interop.ours import hear_each_other
from tests.interop.scenes import FAULTS, Failed, Outcome, Scene, new_place, suffer, talk
from worker.voice.library_log import LibraryLog

_SCENE_S = 90.0
_TALK = "talk and listen"
_OURS = "with our worker"
_REFERENCE_MS: dict[str, dict[str, float]] = {
    "discord.py": {
        "region change": 85,
        "move": 80,
        "close 4006": 1800,
        "close 1006": 92,
        "null endpoint 1 s": 1100,
        "damaged commit": 50,
        "epoch reset": 85,
    },
    "@discordjs/voice": {
        "region change": 125,
        "move": 130,
        "close 4006": 85,
        "close 1006": 22,
        "close 4015": 22,
        "null endpoint 1 s": 1100,
        "damaged commit": 60,
        "epoch reset": 93,
    },
}
"""Longest silence heard when these clients were watched before (reference section 10)."""

_GIVES_UP = {"discord.py": {"close 4015"}}
"""It asks for new credentials, passes over the answer, and leaves when its time is up."""


class Row(NamedTuple):
    """One line of the table."""

    client: str
    scene: str
    passed: bool
    outcome: Outcome


async def _play(kind: Kind, name: str, folder: Path) -> Row:
    """One scene, in a local Discord of its own."""
    log = folder / f"{kind.name.replace('/', '-')}-{name.replace(' ', '-')}.log"
    try:
        async with asyncio.timeout(_SCENE_S):
            return Row(kind.name, name, True, await _act(kind, name, folder, log))
    except (Failed, ClientError, EmulatorError, AssertionError) as error:
        return Row(kind.name, name, False, Outcome(str(error)))
    except TimeoutError:
        return Row(kind.name, name, False, Outcome(f"not within {_SCENE_S:g} s"))


async def _act(kind: Kind, name: str, folder: Path, log: Path) -> Outcome:
    if name == _OURS:
        return await hear_each_other(kind, folder, log)
    async with EmulatorProcess() as process, EmulatorClient(process.control_url) as emulator:
        place = await new_place(emulator)
        async with LedClient(kind, place.bot, process.ca_file, log) as client:
            scene = Scene(emulator, client, place)
            if name == _TALK:
                return await talk(scene, folder)
            return await suffer(scene, FAULTS[name], gives_up=name in _GIVES_UP.get(kind.name, ()))


async def _play_all(kind: Kind, names: list[str], folder: Path) -> list[Row]:
    """All scenes of one client, one after the other; two clients may be at it at the same time."""
    rows = []
    for name in names:
        row = await _play(kind, name, folder)
        _print_row(row)
        rows.append(row)
    return rows


def _print_row(row: Row) -> None:
    heard, before = row.outcome.silence_ms, _REFERENCE_MS[row.client].get(row.scene)
    silence = "" if heard is None else f"{heard:.0f} ms"
    known = "" if before is None else f"{before:.0f} ms"
    verdict = "ok" if row.passed else "FAILED"
    print(f"{row.client:17} {row.scene:18} {verdict:7} {silence:>9} {known:>9}  {row.outcome.remark}", flush=True)


async def _run(options: argparse.Namespace) -> int:
    chosen = [kind for kind in kinds(options.environment) if options.client in (None, kind.name)]
    names = [name for name in (_TALK, *FAULTS, _OURS) if options.scene in (None, name)]
    folder = options.environment / "last-run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    print(f"{'client':17} {'scene':18} {'result':7} {'silence':>9} {'known':>9}  remark", flush=True)
    done = await asyncio.gather(*(_play_all(kind, names, folder) for kind in chosen))
    rows = [row for each in done for row in each]
    failed = [row for row in rows if not row.passed]
    if failed:
        print(f"what the clients said is in {folder}", file=sys.stderr)
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed or not rows else 0


def _absolute(text: str) -> Path:
    return Path(text).resolve()


def main() -> None:
    """Run what was asked for."""
    configure("error", "console")
    LibraryLog("dave").install()
    parser = argparse.ArgumentParser(prog="python -m tests.interop", description="Clients of others are heard.")
    parser.add_argument("--environment", type=_absolute, default=".run/interop", help="where they are installed")
    parser.add_argument("--client", default=None, help="only this one")
    parser.add_argument("--scene", default=None, help="only this one")
    sys.exit(asyncio.run(_run(parser.parse_args())))


if __name__ == "__main__":
    main()
