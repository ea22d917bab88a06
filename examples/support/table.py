"""Tables of results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from exfusion_param.study.comparison import markdown


def write_table(path: Path, rows: Sequence[Mapping[str, str]]) -> str:
    """Write rows with the same columns as a table in Markdown; its text."""
    text = markdown(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return text
