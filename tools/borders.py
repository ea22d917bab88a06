"""Run the tests of what other people's code does to wrapped models, and write docs/borders.md."""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "borders.md"
PATTERNS = (
    "assigned_weights",
    "bank_borders",
    "bank_nesting",
    "empty_banks",
    "first_step",
    "foreign_edits",
    "forward_*",
    "lost_writes",
    "mask_layouts",
    "meo_borders",
    "meo_causality",
    "meo_refusals",
    "odd_models",
    "ordered_sums",
    "param_groups",
    "pipelines",
    "process_groups",
    "sharded_votes",
    "step_*",
    "tensor_parallel",
    "unfilled",
)
NO_BORDERS = {ROOT / "tests" / "test_step_cost.py"}
RIGHT_BEFORE = {
    "assigned_weights": 2,
    "bank_borders": 23,
    "empty_banks": 3,
    "first_step": 5,
    "foreign_edits": 1,
    "forward_adapters": 5,
    "forward_borders": 22,
    "lost_writes": 2,
    "meo_borders": 5,
    "meo_refusals": 18,
    "odd_models": 22,
    "param_groups": 0,
    "unfilled": 22,
}
"""Cases that were right at commit f6fcd37, where modules were given the names they have now."""
HEADER = """# Borders

This page counts cases in which other people's code acts on a wrapped model: training loops,
optimizers, engines, initialization code, adapters, copies, threads. Each case is a test. It
compares with the dense model, with an oracle in float64 (each expert is a separate tensor), or
with one rank; or it expects an error whose way out works. A case is wrong if the result differs
silently, or the error is misleading. [Compatibility](compatibility.md) lists the cases that are
known to be undetected. `make borders` runs the tests and writes this page. The column "right
before" shows how many of the same cases were right before these tests were written. A hyphen
means that this was not counted; cases that need a newer function are not included.

| kind | cases | right before | right | not run here | wrong |
| --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    """Write the page; exit status 1 if a case is wrong."""
    files = sorted(
        {path for name in PATTERNS for path in ROOT.glob(f"tests/test_{name}.py")} - NO_BORDERS,
        key=lambda path: path.name,
    )
    results = _results(files)
    rows = []
    for path in files:
        count = results[path.stem]
        passed = count["cases"] - count["skipped"] - count["wrong"]
        link = f"[{_title(path)}](../tests/{path.name})"
        before = RIGHT_BEFORE.get(path.stem.removeprefix("test_"), "-")
        rows.append(
            f"| {link} | {count['cases']} | {before} | {passed} | {count['skipped']} | "
            f"{count['wrong']} |"
        )
    total = sum(results.values(), Counter())
    passed = total["cases"] - total["skipped"] - total["wrong"]
    rows.append(f"| all | {total['cases']} | | {passed} | {total['skipped']} | {total['wrong']} |")
    PAGE.write_text(HEADER + "\n".join(rows) + "\n")
    sys.exit(bool(total["wrong"]))


def _title(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0].rstrip(".")


def _results(files: list[Path]) -> dict[str, Counter[str]]:
    """For each file how many cases it has, and how many were skipped or went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-n2", "--dist=loadfile"]
        subprocess.run([*command, f"--junit-xml={report}", *map(str, files)], cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))  # our own file
    results: dict[str, Counter[str]] = {path.stem: Counter() for path in files}
    for case in cases:
        count = results[case.attrib["classname"].split(".")[-1]]
        count["cases"] += 1
        count["skipped"] += case.find("skipped") is not None
        count["wrong"] += case.find("failure") is not None or case.find("error") is not None
    return results


if __name__ == "__main__":
    main()
