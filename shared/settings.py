"""Settings: read once, in each `__main__`, from the environment or a TOML file, into one frozen record.

Every name below is `GUILDCAST_<NAME>` in the environment, `<name>` in the TOML file that `GUILDCAST_CONFIG_FILE` names.
The environment wins. A wrong value is a `ConfigError` of one line: name, value, what is allowed.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import os
import re
import socket
import ssl
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from shared.errors import ConfigError
from shared.text import in_words
from shared.voice_servers import VOICE_HOSTS, parse_hosts, parse_networks

PREFIX = "GUILDCAST_"
CONFIG_FILE = PREFIX + "CONFIG_FILE"
LOWEST_PORT = 1024

_NOT_YET = {"DISCORD_TOKEN", "DISCORD_TOKEN_FILE", "DISCORD_API", "HTTP_BIND", "HTTP_TOKEN", "MEDIA_ALLOW"} | {
    "DRAIN_DEADLINE_MS"
}


def _redis_url(value: str) -> str:
    if not re.match(r"^(redis|rediss|unix)://", value):
        raise ValueError("allowed: redis://host:port/db, rediss://host:port/db, unix:///path")
    return value


def _readable_by(parse: Callable[[str], object]) -> AfterValidator:
    """Leave a text as it is, once it can be read. `parse` raises ValueError saying what is allowed."""

    def check(value: str) -> str:
        parse(value)
        return value

    return AfterValidator(check)


def _folder(value: Path | None) -> Path | None:
    if value is not None and not value.is_dir():
        raise ValueError("allowed: a folder that exists")
    return value


def parse_ports(value: str) -> range:
    """Ports of `0` (an empty range: the system picks) or `low-high`, both ends included.

    Raises: ValueError saying what is allowed.
    """
    if value == "0":
        return range(0)
    found = re.fullmatch(r"(\d{1,5})-(\d{1,5})", value)
    if found:
        low, high = int(found[1]), int(found[2])
        if LOWEST_PORT <= low <= high <= 65_535:
            return range(low, high + 1)
    raise ValueError(f"allowed: 0, or low-high within {LOWEST_PORT}-65535 such as 50000-50031")


def _ip_address(value: str) -> str:
    try:
        socket.inet_pton(socket.AF_INET, value)
    except OSError:
        raise ValueError("allowed: an IPv4 address of this host, 0.0.0.0 for all") from None
    return value


def _ca_file(value: Path | None) -> Path | None:
    if value is not None:
        try:
            ssl.create_default_context(cafile=value)
        except OSError as error:  # SSLError is one
            raise ValueError(
                f"{error.strerror or in_words(error)}, allowed: a readable file of certificates (PEM)"
            ) from None
    return value


def _seal_key(value: SecretStr) -> SecretStr:
    try:
        key = base64.b64decode(value.get_secret_value(), validate=True)
    except binascii.Error:
        key = b""
    if len(key) != 32:
        raise ValueError("allowed: 32 bytes in base64, as `openssl rand -base64 32` prints")
    return value


def parse_clock_error(value: str) -> tuple[float, float]:
    """(seconds, ppm) of `seconds,ppm`.

    Raises: ValueError saying what is allowed.
    """
    try:
        offset_s, drift_ppm = (float(part) for part in value.split(","))
    except ValueError:
        raise ValueError("allowed: seconds,ppm such as 5,200") from None
    return offset_s, drift_ppm


class Settings(BaseSettings):
    """Effective settings of one process."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=False)

    redis_url: Annotated[
        str, AfterValidator(_redis_url), Field(description="Redis 6.2 or newer that holds jobs, state and leases.")
    ] = "redis://127.0.0.1:6379/0"
    frames_redis_url: Annotated[
        str | None,
        AfterValidator(lambda value: value if value is None else _redis_url(value)),
        Field(description="A nearby replica that fan-out workers read frames from; default: the one above."),
    ] = None
    namespace: Annotated[
        str,
        Field(pattern=r"^[a-z0-9-]{1,32}$", description="Word in braces before all control keys."),
    ] = "guildcast"
    tls_ca_file: Annotated[
        Path | None,
        AfterValidator(_ca_file),
        Field(description="One more CA to trust (PEM): voice servers and Redis."),
    ] = None
    udp_ports: Annotated[
        str,
        _readable_by(parse_ports),
        Field(description="UDP ports of this host, dealt to its fan-out workers: 0 (any) or low-high."),
    ] = "0"
    udp_address: Annotated[
        str, AfterValidator(_ip_address), Field(description="Local address that UDP sockets bind to.")
    ] = "0.0.0.0"  # noqa: S104 - voice servers are reached from any interface
    udp_sockets: Annotated[
        Literal["shared", "per-guild"], Field(description="Share sockets between guilds, or one socket each.")
    ] = "shared"
    dave_required: Annotated[
        bool,
        Field(
            description="Refuse a voice server's order to go on without end-to-end encryption in a session that had it."
        ),
    ] = False
    voice_hosts: Annotated[
        str,
        _readable_by(parse_hosts),
        Field(description="Domains (and networks) of the voice servers that credentials may go to."),
    ] = VOICE_HOSTS
    voice_networks: Annotated[
        str,
        _readable_by(parse_networks),
        Field(description="IPv4 networks that a voice server may have sound sent to, besides public addresses."),
    ] = ""
    media_dir: Annotated[
        Path | None,
        AfterValidator(_folder),
        Field(description="The only folder that sources which are files may come from."),
    ] = None
    fanout_workers: Annotated[int, Field(ge=0, le=256, description="Fan-out workers of this host.")] = 2
    encode_workers: Annotated[int, Field(ge=0, le=256, description="Encode workers of this host.")] = 1
    worker_capacity: Annotated[
        int | None,
        Field(ge=1, le=20_000, description="Guilds (or sources) that one worker takes at most; default: measured."),
    ] = None
    region: Annotated[str, Field(max_length=32, description="Free word shown with this host's workers.")] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="Lowest level that is logged.")
    ] = "info"
    log_format: Annotated[Literal["console", "json"], Field(description="For eyes or for machines.")] = "console"
    seal_key: Annotated[
        SecretStr | None,
        AfterValidator(lambda value: value if value is None else _seal_key(value)),
        Field(description="Key that seals credentials before they are stored: 32 bytes in base64."),
    ] = None
    clock_error: Annotated[
        str,
        _readable_by(parse_clock_error),
        Field(description="For tests: seconds and ppm by which this process's own clock is wrong."),
    ] = "0,0"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        path = os.environ.get(CONFIG_FILE)
        if path:
            sources += (TomlConfigSettingsSource(settings_cls, toml_file=path),)
        return sources

    def shown(self) -> dict[str, Any]:
        """All settings with secrets hidden, for people."""
        return {
            name: ("(set)" if value else "(not set)") if name == "seal_key" else _without_password(value)
            for name, value in self.model_dump(mode="python").items()
        }


def _without_password(value: Any) -> Any:
    """The value with user and password of a URL hidden."""
    return re.sub(r"//[^/]*@", "//(hidden)@", value) if isinstance(value, str) else value


def load_settings() -> Settings:
    """Settings of this process.

    Raises: ConfigError in one line: name, value and what is allowed.
    """
    _refuse_unknown(os.environ)
    path = os.environ.get(CONFIG_FILE)
    if path and not Path(path).is_file():
        raise ConfigError(f"{CONFIG_FILE}: {path!r} is no readable file")
    try:
        return Settings()
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{CONFIG_FILE}: {path!r}: {in_words(error)}") from None


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    known = {name.upper() for name in Settings.model_fields} | {"CONFIG_FILE"}
    for name in sorted(environment):
        word = name.removeprefix(PREFIX)
        if not name.startswith(PREFIX) or word in known:
            continue
        if word in _NOT_YET:
            raise ConfigError(f"{name}: this version does not serve it yet, unset it")
        near = difflib.get_close_matches(word, known, n=1)
        hint = f", did you mean {PREFIX}{near[0]}?" if near else ", `guildcast config` lists all"
        raise ConfigError(f"{name}: no such setting{hint}")


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    field = Settings.model_fields.get(name)
    # Under a name that is not known there may stand a secret, too.
    value = "(hidden)" if field is None or name == "seal_key" else repr(_without_password(first["input"]))
    message = first["msg"].removeprefix("Value error, ")
    where = PREFIX + name.upper() if field else f"{CONFIG_FILE}: {name}"
    told = f" ({field.description})" if field and field.description else ""
    return f"{where}: {value}: {message}{told}"
