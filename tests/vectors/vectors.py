"""The recorded vectors, read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("transport-vectors.json").read_text())
KEY = bytes.fromhex(VECTORS["key_hex"])
