"""The settings of a run, which its folder remembers."""

import json
from pathlib import Path
from typing import Any


def remember(folder: Path, settings: dict[str, Any]) -> None:
    """Write down a new run's settings; those of a run that continues have to be the same.

    Args:
        folder: of the run.
        settings: plain values.

    Raises:
        SystemExit: the folder holds a run with other settings.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2))
        return
    before = json.loads(path.read_text())
    if changed := sorted(key for key in settings if before.get(key) != settings[key]):
        raise SystemExit(
            f"{folder} holds a run with other settings ({', '.join(changed)}). "
            "Take another --out, or remove that folder."
        )
