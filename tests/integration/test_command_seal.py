"""`guildcast seal`, as a user's bot calls it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys

from shared.seal import Seal

KEY = base64.b64encode(bytes(range(32))).decode()
GUILD = "123456789012345678"
VOICE = {"user_id": GUILD, "session_id": "the-session", "token": "the-token", "endpoint": "a.discord.media:443"}


def seal(text: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GUILDCAST_")}
    return subprocess.run(
        [sys.executable, "-m", "shared.cli", "seal", "--guild", GUILD],
        input=text,
        env=environment | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_what_the_command_seals_is_opened_for_that_guild() -> None:
    """It prints what stands in a job's `voice`, and nothing of what is in it."""
    done = seal(json.dumps(VOICE), GUILDCAST_SEAL_KEY=KEY)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the-token" not in done.stdout
    assert Seal(KEY).open_voice(done.stdout.strip(), "main", GUILD).token == "the-token"


def test_what_is_wrong_is_said_without_the_secret() -> None:
    """No key, or text that is no credentials."""
    assert "GUILDCAST_SEAL_KEY" in seal(json.dumps(VOICE)).stderr
    wrong = seal(json.dumps(VOICE | {"endpoint": "the-token"[::-1] + "/"}), GUILDCAST_SEAL_KEY=KEY)
    assert wrong.returncode == 78
    assert "endpoint" in wrong.stderr
    assert "the-token" not in wrong.stderr
