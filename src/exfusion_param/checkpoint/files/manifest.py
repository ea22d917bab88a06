"""manifest.json: what a checkpoint holds, with the size and SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...atomic_files import write_file
from .errors import CheckpointError, read_json
from .processes import Processes

FORMAT = 1
"""The version of the format; a reader refuses those that it does not know."""

_FILE = "manifest.json"


def write_manifest(folder: Path, content: Mapping[str, Any], processes: Processes) -> None:
    """Write down all files of a folder that all ranks have written; they call this together."""
    files = _fingerprints(folder, _files_in(folder), processes)
    content = {"format": FORMAT, **content, "files": files}
    signed = _as_json({**content, "sha256": _checksum(content)})
    processes.on_first(lambda: write_file(folder / _FILE, signed))


def read_manifest(folder: Path, processes: Processes) -> dict[str, Any]:
    """Return the content given to `write_manifest`, after verifying every file.

    Raises:
        CheckpointError: on every rank, if something is damaged, missing or not of this format.
    """
    content = processes.on_first(lambda: _checked(folder))
    found = _fingerprints(folder, list(content["files"]), processes)
    for name, fingerprint in content["files"].items():
        if found[name] != fingerprint:
            raise CheckpointError(f"{folder / name} is damaged: size or checksum does not match.")
    return content


def _checked(folder: Path) -> dict[str, Any]:
    """The manifest, if it is whole and speaks of the files that are there."""
    content = read_json(folder / _FILE)
    checksum = content.pop("sha256", None)
    if checksum != _checksum(content):
        raise CheckpointError(f"{folder / _FILE} is damaged: its checksum does not match.")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} is of format {content.get('format')}, and this version of exfusion_param "
            f"reads format {FORMAT}."
        )
    listed, there = set(content["files"]), set(_files_in(folder))
    if listed != there:
        lacks, more = sorted(listed - there), sorted(there - listed)
        raise CheckpointError(f"{folder} lacks the files {lacks}, and also holds {more}.")
    return content


def _fingerprints(folder: Path, names: list[str], processes: Processes) -> dict[str, Any]:
    """Size and SHA-256 of files; each rank reads its share of them."""
    mine = sorted(names)[processes.rank :: processes.count]
    found = processes.together(lambda: {name: _fingerprint(folder / name) for name in mine})
    return {name: value for part in found for name, value in part.items()}


def _fingerprint(path: Path) -> list[Any]:
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _files_in(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return [path.relative_to(folder).as_posix() for path in files if path != folder / _FILE]


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_as_json(content)).hexdigest()


def _as_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()
