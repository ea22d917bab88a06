"""Check the English of the project: words that read oddly to a native reader do not come back.

    python tools/words.py

Prints each place with a way to put it, and fails if there is one.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS = {
    r"(\b|_)anew(\b|_)": "again",
    r"(?<=\w )alone(?=[;,]? [a-z]|[.;,](\s|$|\"\"))": "only, or by itself",
    r"(?<![Tt]here )\bis no\b (?!longer)": "is not a",
    r"\b(say|says|said) of\b": "describes, or reports",
    r"\b(each|all|none|some) of which\b|, of which\b": "a second sentence",
    r"\bmay stay\b": "works unchanged",
}
FILES = ("*.md", "docs/**/*.md", "{}/**/*.py", "{}/**/*.md")
FOLDERS = ("src", "tests", "tools", "examples", "benchmarks")


def pages() -> list[Path]:
    """All files with prose, but for this one."""
    globs = [glob.format(folder) for glob in FILES for folder in FOLDERS]
    found = {path for glob in globs for path in ROOT.glob(glob)}
    return sorted(found - {Path(__file__).resolve()})


def places(text: str) -> list[str]:
    """`line: the words (how to put them)` for each place in a text."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, instead in WORDS.items():
            found += [f"{number}: {m[0]!r} ({instead})" for m in re.finditer(pattern, line)]
    return found


def main() -> None:
    """Print all places; exit with 1 if there are any."""
    found = [f"{p.relative_to(ROOT)}:{place}" for p in pages() for place in places(p.read_text())]
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
