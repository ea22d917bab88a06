"""Files and folders that appear as a whole or not at all, whatever happens while they are written.

They are written under another name, flushed to disk, and renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""The suffix of files and folders that are not complete yet."""


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name to write a file or a folder under; if all goes well it becomes `path`."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a file."""
    with appearing(path) as partial:
        partial.write_bytes(content)


def sync(path: Path) -> None:
    """Flush a file, or a folder with all that is in it, to disk."""
    for inner in (*path.rglob("*"), path):
        _flush(inner)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
