"""The peers: small programs around the voice clients of others, how they are started, and what they need.

Each takes a file of Opus frames, reads voice credentials from its standard input, joins all guilds, plays the frames in
each as soon as it is in, over and over, says `playing` when it is in all, and ends when its input does. What stands
under `setting` is what was measured to cost that peer the least.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.emulator.records import ChannelKind

_HERE = Path(__file__).parent
_RUN = _HERE.parents[2] / ".run"
_PYTHON = _RUN / "interop" / "python"
_NODE = _RUN / "interop" / "node"
_BUILT = _RUN / "bench" / "peers"
"""A folder for each peer; `make` writes to `absent` in it why it could not be built."""
_SONGBIRD = _BUILT / "songbird" / "target" / "release" / "songbird-peer"
_DISGO = _BUILT / "disgo" / "disgo-peer"

_INSTALLERS_PUT = (str(Path.home() / ".cargo" / "bin"), "/usr/local/go/bin")

_SONGBIRD_THREADS = 1
"""Of tokio, which does everything but the sending."""
_SONGBIRD_GUILDS_PER_THREAD = 256
"""Its own default is 16, with which a thread wakes, and runs late, for few packets at a time."""


class Absent(Exception):
    """A peer that cannot be measured here; the text says why."""


@dataclass(frozen=True)
class Peer:
    """One peer.

    Args:
        installed: the file that is there once it was installed or built.
        tools: programs without which that cannot be done, besides Python.
        setting: with what it was let do its best.
        version: reads its version from the lock or from what was installed.
        command: starts it, given the file of frames.
        ca_variable: environment variable that names the CA to trust.
        environment: more variables.
        no_dave: why it cannot join encrypted calls; empty if it can.
        logs_in: token and address of the REST interface are two more arguments.
    """

    name: str
    installed: Path
    tools: Sequence[str]
    setting: str
    version: Callable[[], str]
    command: Callable[[Path], Sequence[str | Path]]
    ca_variable: str = "SSL_CERT_FILE"
    environment: Mapping[str, str] = field(default_factory=dict)
    no_dave: str = ""
    logs_in: bool = False

    def demand(self, kind: ChannelKind = "stage") -> None:
        """Raises: Absent: it cannot be measured here, or not in calls of this kind."""
        if kind == "voice" and self.no_dave:
            raise Absent(self.no_dave)
        reason = _BUILT / self.name / "absent"
        if self.installed.exists() and not reason.exists():
            return
        if lacking := self.lacking_tools():
            raise Absent(f"not built, because this machine lacks {' and '.join(lacking)}")
        if reason.exists():
            raise Absent(f"not built: {' '.join(reason.read_text(errors='replace').split())}")
        raise Absent("not built: run make bench-peers")

    def lacking_tools(self) -> list[str]:
        """Those of its tools that are neither on PATH nor where their own installers put them."""
        path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_INSTALLERS_PUT))
        return [tool for tool in self.tools if not shutil.which(tool, path=path)]


def _version_of_wheel(package: str) -> str:
    found = max(_PYTHON.glob(f"lib/python3*/site-packages/{package}-*.dist-info"), default=Path("unknown"))
    return found.name.removesuffix(".dist-info").rpartition("-")[2]


def _version_in(file: str, before: str, after: str) -> str:
    return (_HERE / file).read_text().partition(before)[2].partition(after)[0]


def _discord_js(frames: Path) -> list[str | Path]:
    # Node looks for packages beside the importing file, so the program goes where they are.
    program = shutil.copy(_HERE / "discord_js_player.mjs", _NODE / "player.mjs")
    return [_NODE / "node", "--max-semi-space-size=64", program, frames]


_ALL = (
    Peer(
        name="discord.py",
        installed=_PYTHON / "installed",
        tools=(),
        setting="one player thread a guild",
        version=lambda: _version_of_wheel("discord_py"),
        command=lambda frames: [_PYTHON / "bin" / "python", _HERE / "discord_py_player.py", frames],
        logs_in=True,
    ),
    Peer(
        name="discordjs",
        installed=_NODE / "installed",
        tools=("npm",),
        setting="one AudioPlayer for all, 64 MiB semi-space",
        version=lambda: json.loads((_NODE / "node_modules/@discordjs/voice/package.json").read_text())["version"],
        command=_discord_js,
        ca_variable="NODE_EXTRA_CA_CERTS",
    ),
    Peer(
        name="songbird",
        installed=_SONGBIRD,
        tools=("cargo", "cmake", "cc"),
        setting=f"{_SONGBIRD_GUILDS_PER_THREAD} guilds a mixer thread, tokio on {_SONGBIRD_THREADS}",
        version=lambda: _version_in("songbird/Cargo.lock", 'name = "songbird"\nversion = "', '"'),
        command=lambda frames: [_SONGBIRD, frames, str(_SONGBIRD_THREADS), str(_SONGBIRD_GUILDS_PER_THREAD)],
    ),
    Peer(
        name="disgo",
        installed=_DISGO,
        tools=("go",),
        setting="a goroutine a guild, GOMAXPROCS=1",
        version=lambda: _version_in("disgo/go.mod", "github.com/disgoorg/disgo v", "\n"),
        command=lambda frames: [_DISGO, frames],
        environment={"GOMAXPROCS": "1"},
        no_dave="its DAVE needs libdave as a C library, which Go modules do not bring",
    ),
)
PEERS = {peer.name: peer for peer in _ALL}
