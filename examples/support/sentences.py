"""Sentences with a rating, to fine-tune on: movie reviews, fetched from the package index."""

import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SOURCE = "vaderSentiment==3.2.1"  # its source distribution carries the ratings of Hutto & Gilbert
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

Sentences = list[tuple[str, int]]


def load(path: Path | None) -> Sentences:
    """Sentences with label 1 if they are rated above zero, else 0.

    Args:
        path: a file with lines of number, rating and text, separated by tabs; None fetches 10,605
            snippets of movie reviews, which belong to their authors and are not kept.
    """
    text = path.read_text() if path else _fetch()
    rows = [line.split("\t", 2) for line in text.splitlines() if line.strip()]
    return [(sentence.strip(), int(float(rating) > 0)) for _, rating, sentence in rows]


def _fetch() -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
        ]
        subprocess.run([*command, "--no-binary", ":all:", SOURCE], check=True)
        (outer,) = Path(folder).glob("*.tar.gz")
        inner = _member(outer.read_bytes(), ARCHIVE)
    return _member(inner, RATINGS).decode(errors="replace")


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = next(member for member in tar.getmembers() if member.name.endswith(name))
        content = tar.extractfile(member)
        assert content is not None
        return content.read()
