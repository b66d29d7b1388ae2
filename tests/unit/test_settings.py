"""Settings: one line for each mistake, the environment over the file, secrets never shown."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.settings import Settings, load_settings, parse_clock_error, parse_ports

KEY = base64.b64encode(bytes(range(32))).decode()


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine that runs the tests."""
    for name in [name for name in os.environ if name.startswith("GUILDCAST_")]:
        monkeypatch.delenv(name)


def refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> str:
    """The line that a setting is refused with."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    return caught.value.message


def test_nothing_set_is_a_working_setting() -> None:
    """Every setting has a default."""
    settings = load_settings()
    assert settings.redis_url == "redis://127.0.0.1:6379/0"
    assert settings.namespace == "guildcast"
    assert settings.seal_key is None


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("REDIS_URL", "http://127.0.0.1:6379", "redis://"),
        ("FRAMES_REDIS_URL", "127.0.0.1:6379", "rediss://"),
        ("NAMESPACE", "Guild Cast", "^[a-z0-9-]{1,32}$"),
        ("NAMESPACE", "{a}", "^[a-z0-9-]{1,32}$"),
        ("UDP_PORTS", "50000", "50000-50031"),
        ("UDP_PORTS", "50031-50000", "50000-50031"),
        ("UDP_PORTS", "80-90", "1024-65535"),
        ("UDP_PORTS", "50000-70000", "1024-65535"),
        ("UDP_ADDRESS", "localhost", "IPv4 address"),
        ("UDP_SOCKETS", "one", "'shared' or 'per-guild'"),
        ("DAVE_REQUIRED", "perhaps", "boolean"),
        ("FANOUT_WORKERS", "-1", "greater than or equal to 0"),
        ("FANOUT_WORKERS", "many", "integer"),
        ("ENCODE_WORKERS", "257", "less than or equal to 256"),
        ("WORKER_CAPACITY", "0", "greater than or equal to 1"),
        ("REGION", "r" * 33, "at most 32"),
        ("LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("LOG_FORMAT", "xml", "'console' or 'json'"),
        ("CLOCK_ERROR", "5", "seconds,ppm"),
        ("CLOCK_ERROR", "5,x", "seconds,ppm"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    """The line names the variable, the value and what is allowed."""
    line = refused(monkeypatch, "GUILDCAST_" + name, value)
    assert "\n" not in line
    assert line.startswith(f"GUILDCAST_{name}: {value!r}: ")
    assert allowed in line


@pytest.mark.parametrize("value", ["not base64 at all", base64.b64encode(bytes(31)).decode(), "", "schlüssel"])
def test_a_wrong_seal_key_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """The line names the variable and what is allowed; a secret that is wrong is a secret all the same."""
    line = refused(monkeypatch, "GUILDCAST_SEAL_KEY", value)
    assert line.startswith("GUILDCAST_SEAL_KEY: (hidden): ")
    assert "32 bytes in base64" in line
    assert "\n" not in line
    assert not value or value not in line


def test_the_seal_key_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what people are shown nor a representation in a log has the key."""
    monkeypatch.setenv("GUILDCAST_SEAL_KEY", KEY)
    settings = load_settings()
    assert settings.seal_key is not None
    assert settings.seal_key.get_secret_value() == KEY
    assert KEY not in repr(settings) + str(settings) + repr(settings.shown())
    assert settings.shown()["seal_key"] == "(set)"
    assert Settings(seal_key=None).shown()["seal_key"] == "(not set)"


@pytest.mark.parametrize(("value", "required"), [("true", True), ("1", True), ("false", False), ("0", False)])
def test_falling_back_from_encryption_is_refused_where_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, value: str, required: bool
) -> None:
    """The protocol is followed, a server's downgrade included, unless the operator says otherwise."""
    assert load_settings().dave_required is False
    monkeypatch.setenv("GUILDCAST_DAVE_REQUIRED", value)
    assert load_settings().dave_required is required


def test_shown_settings_are_the_effective_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting stands in what people are shown, with the value in force."""
    monkeypatch.setenv("GUILDCAST_WORKER_CAPACITY", "7")
    shown = load_settings().shown()
    assert set(shown) == set(Settings.model_fields)
    assert shown["worker_capacity"] == 7


def test_an_unknown_name_is_refused_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt setting is no setting: it is refused, and the name that was meant is told."""
    line = refused(monkeypatch, "GUILDCAST_REDIS_ULR", "redis://somewhere")
    assert line == "GUILDCAST_REDIS_ULR: no such setting, did you mean GUILDCAST_REDIS_URL?"


def test_an_unknown_name_like_no_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no name is near, the line says how to list them all; the value, maybe a secret, is not in it."""
    line = refused(monkeypatch, "GUILDCAST_XQZ", "hunter2")
    assert line.startswith("GUILDCAST_XQZ: no such setting")
    assert "guildcast config" in line
    assert "hunter2" not in line


def test_names_of_others_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only names with our prefix are ours to refuse."""
    monkeypatch.setenv("GUILDCASTER_REDIS_ULR", "x")
    monkeypatch.setenv("XGUILDCAST_REDIS_ULR", "x")
    load_settings()


@pytest.mark.parametrize("name", ["DISCORD_TOKEN", "HTTP_BIND", "MEDIA_ALLOW", "DRAIN_DEADLINE_MS"])
def test_a_name_not_served_yet_says_so(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A setting of a later version is refused and not ignored; its value, maybe a token, is not told."""
    line = refused(monkeypatch, "GUILDCAST_" + name, "a-secret-token")
    assert line.startswith(f"GUILDCAST_{name}: this version does not serve it yet")
    assert "a-secret-token" not in line


def config_file(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str | bytes) -> Path:
    path = folder / "guildcast.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setenv("GUILDCAST_CONFIG_FILE", str(path))
    return path


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What stands in both is taken from the environment, the rest from the file, the rest from the defaults."""
    config_file(monkeypatch, tmp_path, 'namespace = "from-file"\nregion = "north"\n')
    monkeypatch.setenv("GUILDCAST_NAMESPACE", "from-env")
    settings = load_settings()
    assert (settings.namespace, settings.region, settings.log_level) == ("from-env", "north", "info")


def test_a_wrong_value_of_the_file_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A value of the file is held to the same rules."""
    config_file(monkeypatch, tmp_path, "worker_capacity = 0\n")
    with pytest.raises(ConfigError, match=r"^config_invalid: GUILDCAST_WORKER_CAPACITY: 0: [^\n]*$"):
        load_settings()


def test_an_unknown_name_of_the_file_is_refused_without_its_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The line names the file's variable and the name; what stands there may be a secret under a misspelt name."""
    config_file(monkeypatch, tmp_path, f'seal_kee = "{KEY}"\n')
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "GUILDCAST_CONFIG_FILE: seal_kee" in caught.value.message
    assert KEY not in caught.value.message


@pytest.mark.parametrize("text", ["namespace = \n", b'region = "\xff"\n', "[namespace]\nx = 1\n"])
def test_a_broken_file_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | bytes) -> None:
    """A file that is no TOML, no UTF-8, or has a table where a value belongs ends in the same one line."""
    config_file(monkeypatch, tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert caught.value.message.startswith("GUILDCAST_")
    assert "\n" not in caught.value.message


def test_a_missing_file_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that was named and is not there is no reason to run on defaults."""
    line = refused(monkeypatch, "GUILDCAST_CONFIG_FILE", str(tmp_path / "nothing.toml"))
    assert line.startswith("GUILDCAST_CONFIG_FILE: ")
    assert "nothing.toml" in line


@pytest.mark.parametrize(
    ("value", "ports"),
    [("0", range(0)), ("50000-50031", range(50_000, 50_032)), ("1024-1024", range(1_024, 1_025))],
)
def test_port_ranges_include_both_ends(value: str, ports: range) -> None:
    """`low-high` has high - low + 1 ports; 0 is any."""
    assert parse_ports(value) == ports


def test_a_clock_error_is_seconds_and_ppm() -> None:
    """Both may be negative and broken."""
    assert parse_clock_error("-1.5,200") == (-1.5, 200.0)
