"""`guildcast`: the command line."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

import msgspec

from shared.cli.bench import bench_here
from shared.cli.run import DEFAULT_SOURCE, Demo
from shared.cli.schema import schema
from shared.cli.seal import seal_for_job
from shared.errors import EXIT_CONFIG, ConfigError
from shared.settings import PREFIX, load_settings


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("allowed: a whole number from 1 on")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="guildcast", description="One audio programme, thousands of voice channels.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="broadcast to the local Discord on this machine and sum up what was heard")
    run.add_argument("--source", default=str(DEFAULT_SOURCE), help="a file or an http(s) URL")
    run.add_argument("--guilds", type=_positive, default=100)
    run.add_argument("--duration", type=_positive, default=None, help="seconds; without it until Ctrl-C")
    bench = commands.add_parser(
        "bench", help="say how many guilds a core of this machine carries, and what limits them"
    )
    bench.add_argument("--here", action="store_true", required=True, help="measure on this machine alone")
    bench.add_argument("--seconds", type=_positive, default=10, help="how long to measure")
    seal = commands.add_parser("seal", help="seal voice credentials (JSON on standard input) for a job")
    seal.add_argument("--guild", required=True)
    seal.add_argument("--bot", default="main")
    commands.add_parser("config", help="print the effective settings, secrets hidden")
    commands.add_parser("schema", help="print the JSON Schema of all records on Redis")
    return parser


def main() -> None:
    options = _parser().parse_args()
    try:
        settings = load_settings()
        if options.command == "schema":
            sys.stdout.write(msgspec.json.format(msgspec.json.encode(schema())).decode() + "\n")
        elif options.command == "config":
            for name, value in settings.shown().items():
                sys.stdout.write(f"{PREFIX}{name.upper()} = {value}\n")
        elif options.command == "seal":
            sys.stdout.write(seal_for_job(settings, sys.stdin.read(), options.bot, options.guild) + "\n")
        elif options.command == "bench":
            sys.exit(bench_here(settings, options.seconds))
        else:
            demo = Demo(
                settings,
                own_redis=PREFIX + "REDIS_URL" not in os.environ,
                source=options.source,
                guilds=options.guilds,
                duration_s=options.duration,
            )
            sys.exit(asyncio.run(demo.run()))
    except ConfigError as error:
        sys.stderr.write(f"guildcast: {error}\n")
        sys.exit(EXIT_CONFIG)


if __name__ == "__main__":
    main()
