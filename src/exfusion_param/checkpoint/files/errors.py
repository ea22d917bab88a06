"""The error of all checkpoints, and JSON files, which can do no worse than raise it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

JSON_BYTES = 10**8
"""How large a JSON file may be; safetensors sets the same bound to its headers."""


class CheckpointError(ValueError):
    """A checkpoint on disk cannot be read, or does not fit its description."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it is not one, or too large to be one of a checkpoint.
    """
    try:
        if (size := path.stat().st_size) > JSON_BYTES:
            raise ValueError(f"{size} bytes are too many")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content
