"""Line 1: tests/test_cuda.py, each test's outcome written down as it ends."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_lines.results import Line, Row, say

ROOT = Path(__file__).parents[2]
NEEDS = ("pytest", "hypothesis")
LOG = "EXFUSION_OUTCOMES"
"""Names the file that the plugin below appends to."""
PROCESSES = 6


def pytest_runtest_logreport(report: Any) -> None:
    """Called by pytest, whose plugin this module is, as each part of a test ends."""
    if report.when == "call" or not report.passed:
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        with Path(os.environ[LOG]).open("a") as file:
            file.write(json.dumps(row) + "\n")


def run(line: Line) -> None:
    """Run the tests that have not passed yet, until the time is over."""
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        say(f"tests: not run; not installed: {', '.join(missing)}")
        return
    log = line.results.path.with_suffix(".jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    passed = [f"--deselect={name}" for name, r in line.results.rows.items() if r["is passed"]]
    at_once = PROCESSES if importlib.util.find_spec("xdist") and not line.is_dry else 0
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", __name__]
    command += ["-p", "xdist.plugin", f"-n{at_once}", "--dist=worksteal"] if at_once else []
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), LOG: str(log.resolve())}
    variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whose warnings would be errors
    command += ["tests/test_cuda.py", *passed]
    tests = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables)
    try:
        tests.wait(max(1.0, line.until - time.time()))
    except subprocess.TimeoutExpired:
        tests.terminate()
        tests.wait()
        say("tests: the time is over; the same command continues")
    for text in log.read_text().splitlines() if log.exists() else ():
        row = json.loads(text)
        seconds = round(row["seconds"], 1)
        outcome = {"outcome": row["outcome"], "seconds": seconds}
        line.results.add(row["test"], outcome | {"is passed": row["outcome"] == "passed"})


def tables(rows: dict[str, Row]) -> list[list[Row]]:
    """How many tests ended how, and those that failed by name."""
    outcomes = [row["outcome"] for row in rows.values()]
    counts = [{"outcome": o, "tests": outcomes.count(o)} for o in dict.fromkeys(outcomes)]
    failed = [{"failed": name} for name, row in rows.items() if row["outcome"] == "failed"]
    return [counts, failed]
