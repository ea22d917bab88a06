"""What the results of a study depend on besides its runs, which its folder remembers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..atomic_files import write_file


def remembered(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write down the settings of a new study; those that it was begun with, as JSON has them."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(settings, indent=1).encode())
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def require_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError if a folder holds a study with other settings."""
    before = remembered(folder / "settings.json", settings)
    now: dict[str, Any] = json.loads(json.dumps(settings))
    keys = sorted(before.keys() | now.keys())
    if changed := [key for key in keys if before.get(key) != now.get(key)]:
        raise ValueError(
            f"{folder} holds a study with other settings ({', '.join(changed)} differ). "
            "Take another folder for out."
        )
