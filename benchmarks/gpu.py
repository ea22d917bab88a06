"""Everything that a GPU has to show, in nine minutes: tests, step times and memory, evidence.

    make gpu                                      # or, without make:
    PYTHONPATH=src:tests:examples:benchmarks python benchmarks/gpu.py
    make gpu ARGS="--data FOLDER --seconds 900"

It needs one GPU, torch and this repository; a package that is missing costs what needs it, and the
script says which. Each line stops when its share of the time is over. Its results are on disk as
soon as they are measured, and the same command continues with what is not yet in --out.
The evidence wants all of Fashion-MNIST (31 MB; Debian's package dataset-fashion-mnist). Elsewhere
put its four IDX files into runs/fashion-mnist; without them it trains on the repository's subset.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import torch

from gpu_lines import evidence, steps, suite
from gpu_lines.results import Line, Results, Row, markdown, say
from support import fashion
from tables import environment

LINES: dict[str, tuple[ModuleType, float]] = {
    "tests": (suite, 0.18),
    "steps": (steps, 0.38),
    "evidence": (evidence, 0.44),
}
"""In their order, each with its share of the time."""
GRACE = 30.0  # seconds after which a line that does not stop by itself is ended
FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("runs/fashion-mnist"))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=540, help="of all lines together")
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="for the results")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--dry", action="store_true", help="all at toy size, on this CPU or GPU")
    parser.add_argument("--here", action="store_true", help="one line in this process")
    return parser.parse_args(arguments)


def data_folder(given: Path | None) -> Path:
    """Fashion-MNIST in full, or the subset with a word on it.

    Raises:
        SystemExit: the folder that was given holds no IDX files.
    """
    if given is not None and not fashion.is_in(given):
        raise SystemExit(f"--data {given} holds no train-images-idx3-ubyte, plain, .gz or .xz.")
    for folder in (given, *FOLDERS):
        if folder is not None and fashion.is_in(folder):
            return folder
    say("evidence: no full Fashion-MNIST in runs/fashion-mnist; 12,000 images train instead")
    return fashion.EMBEDDED


def run_here(name: str, given: argparse.Namespace) -> None:
    """One line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = fashion.EMBEDDED if given.dry else data_folder(given.data)
    results = Results(given.out / f"{name}.json")
    line = Line(results, given.seconds, device, data, is_dry=given.dry)
    LINES[name][0].run(line)


def run_apart(name: str, given: argparse.Namespace, seconds: float) -> None:
    """One line in a process of its own, whose end leaves the others their GPU and their time."""
    command = [sys.executable, __file__, "--here", "--lines", name, "--seconds", f"{seconds:.0f}"]
    command += ["--out", str(given.out)]
    command += ["--data", str(given.data)] if given.data else []
    process = subprocess.Popen(command, start_new_session=True)
    try:
        if ended := process.wait(seconds + GRACE):
            say(f"{name}: ended with {ended}; the other lines go on")
    except subprocess.TimeoutExpired:
        say(f"{name}: ended, as it did not stop {GRACE:.0f} s after its time")
    finally:  # what it has started would take from the next line's GPU
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def report(out: Path, command: str) -> str:
    """The tables of what is complete, with hardware, versions and command, written to gpu.md."""
    stored = {name: Results(out / f"{name}.json").rows for name in LINES}
    parts = [f"# On a GPU\n\n{environment()}. Command: `{command}`."]
    for name, rows in stored.items():
        parts += [f"## {name}", *([] if rows else ["Not measured."])]
        parts += [markdown(table) for table in tables_of(name, rows) if table]
    text = "\n\n".join(parts) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.md").write_text(text)
    return text


def tables_of(name: str, rows: dict[str, Row]) -> list[list[Row]]:
    """Of one line's results."""
    found: list[list[Row]] = LINES[name][0].tables(rows)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the lines one after another."""
    given = parsed(arguments)
    if given.here:
        run_here(given.lines[0], given)
        return
    if not given.dry and not torch.cuda.is_available():
        say(f"torch {torch.__version__} sees no GPU: nothing was measured. See make gpu-dry.")
        return
    ends = time.time() + given.seconds
    for place, name in enumerate(given.lines):
        shares = [LINES[other][1] for other in given.lines[place:]]
        seconds = (ends - time.time()) * shares[0] / sum(shares)
        if given.dry:
            run_here(name, given)
        else:
            run_apart(name, given, seconds)
        text = report(given.out, "make gpu-dry" if given.dry else "make gpu")
    print(text)


if __name__ == "__main__":
    main()
