"""Who a child of the supervisor is: given on its command line, the same for both kinds of worker."""

from __future__ import annotations

import argparse
import re
import socket
from typing import NamedTuple


class Identity(NamedTuple):
    """Command line of a worker process.

    Attributes:
        id: new at every start.
        name: stable, `<host>-<role>-<n>`.
        parent: pid of the supervisor.
        ports: first and last UDP port dealt to it, empty for any.
        life: descriptor of the memory for its signs of life; None: nobody looks for them.
    """

    id: str
    name: str
    parent: int
    ports: range
    life: int | None = None

    def arguments(self) -> list[str]:
        ports = f"{self.ports.start}-{self.ports.stop - 1}" if self.ports else "0"
        named = ["--id", self.id, "--name", self.name, "--parent", str(self.parent), "--ports", ports]
        return named if self.life is None else [*named, "--life", str(self.life)]


def read_identity(arguments: list[str]) -> Identity:
    parser = argparse.ArgumentParser()
    parser.add_argument("--id", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--ports", default="0")
    parser.add_argument("--life", type=int)
    known = parser.parse_args(arguments)
    low, _, high = known.ports.partition("-")
    ports = range(int(low), int(high) + 1) if high else range(0)
    return Identity(known.id, known.name, known.parent, ports, known.life)


def host_name() -> str:
    """This host's name in the letters that names may have."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:32].lstrip("._-") or "host"
