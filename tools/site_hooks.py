"""Hooks of mkdocs: links to files of the repository, and formulas as MathML.

A page may link to any file of the repository by a relative link, which works on GitHub. The site
gets a copy of that file below `source/`; a link to a file that does not exist stays, and fails the
strict build. Formulas are MathML, which browsers show without a script. Notes in docstrings begin
with their names.
"""

import html
import re
from os.path import relpath
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
IMAGES = {".svg", ".png"}
LINK = re.compile(r"(\]\()(\.\.?/[^)#\s]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
NOTE = re.compile(r"<p>Note \[([^]]+)]")


def linked(page: Path, link: str) -> Path | None:
    """The file outside of docs/ that a page links to, from the root; of a folder, its README."""
    target = (page.parent / link).resolve()
    if target.is_dir():
        target /= "README.md"
    if not target.is_file() or not target.is_relative_to(ROOT):
        return None
    return None if target.is_relative_to(ROOT / "docs") else target.relative_to(ROOT)


def copied(path: Path) -> str:
    """Where the site has it. Text stays text: links within it lead into the repository."""
    return f"source/{path}" + ("" if path.suffix in IMAGES else ".txt")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to."""
    pages = [Path(str(page.abs_src_path)) for page in files.documentation_pages()]
    found = {linked(page, link) for page in pages for _, link in LINK.findall(page.read_text())}
    for path in filter(None, found):
        content = (ROOT / path).read_bytes()
        files.append(File.generated(config, copied(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links that leave docs/ to the copies."""
    source, here = Path(str(page.file.abs_src_path)), Path(page.file.src_uri).parent

    def to_copy(match: re.Match[str]) -> str:
        path = linked(source, match[2])
        return match[1] + (relpath(copied(path), here) if path else match[2])

    return LINK.sub(to_copy, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas as MathML, and the names of notes in bold."""

    def to_mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]), display=display)

    return NOTE.sub(r"<p><strong>\1.</strong>", FORMULA.sub(to_mathml, content))
