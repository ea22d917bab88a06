"""Count the FFNs that `wrap` finds in every model of timm and transformers.

    make coverage                       # about 20 minutes; goes on where it was stopped
    python tools/coverage.py "swin*"    # some models, printed and not written

What to expect is in `expected_ffns.py`, from the libraries' own names. Models are built on the meta
device (`zoo.py`). Writes docs/coverage.md; what was counted so far is in runs/coverage.json.
"""

import collections
import dataclasses
import datetime
import fnmatch
import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import timm
import transformers
from torch import nn

import expected_ffns
import zoo
from exfusion_param.finding.discovery import find_ffns
from exfusion_param.finding.left_out import left_out
from exfusion_param.finding.selection import select_groups

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "coverage.md"
SO_FAR = ROOT / "runs" / "coverage.json"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One model: its FFNs, expected and found.

    Args:
        library: timm or transformers.
        name: of the model, or of its type.
        expected: number of FFNs that the library names so.
        right: how many of them are found, with just their linears.
        wrong: what is found and not expected, by its linears.
        left: the warnings of what is left dense.
        refused: why `wrap` refuses the model; empty if it does not.
        unbuilt: why the library cannot build it on the meta device; empty if it can.
        is_mixture: its library holds experts in it.
    """

    library: str
    name: str
    expected: int = 0
    right: int = 0
    wrong: Sequence[str] = ()
    left: int = 0
    refused: str = ""
    unbuilt: str = ""
    is_mixture: bool = False

    @property
    def is_right(self) -> bool:
        """Whether nothing is missed, nothing else is taken, and mixtures are refused."""
        if self.is_mixture:
            return "mixture of experts" in self.refused
        return self.right == self.expected and not self.wrong

    @property
    def verdict(self) -> str:
        """For the document."""
        if self.unbuilt:
            return f"not built: {self.unbuilt}"
        if self.refused:
            return f"refused: {self.refused}"
        problems = [f"WRONG: {', '.join(self.wrong)}"] if self.wrong else []
        problems += [f"{self.left} kinds left, with a warning"] if self.left else []
        return "; ".join([f"{self.right} of {self.expected} found", *problems])


def outcome(library: str, name: str) -> Outcome:
    """Build a model and search it."""
    try:
        model = zoo.build(library, name)
    except Exception as error:
        return Outcome(library, name, unbuilt=_first_words(str(error)))
    return outcome_of(library, name, model)


def outcome_of(library: str, name: str, model: nn.Module) -> Outcome:
    """Search a model."""
    expected = expected_ffns.expected_ffns(model)
    groups = find_ffns(model)
    found = {frozenset(group.linears) for group in groups}
    refused, left = "", 0
    try:
        select_groups(model, None, None)
        left = len(
            left_out(model, {linear for group in groups for linear in group.linears.values()})
        )
    except ValueError as error:
        refused = _first_words(str(error))
    return Outcome(
        library,
        name,
        len(expected),
        len(expected & found),
        sorted(" + ".join(sorted(names)) for names in found - expected),
        left,
        refused,
        is_mixture=expected_ffns.is_mixture(model),
    )


def sample_of(day: datetime.date, size: int) -> list[tuple[str, str]]:
    """Some models, others each day."""
    return random.Random(day.toordinal()).sample(zoo.names(), size)


def _first_words(text: str, most: int = 100) -> str:
    line = text.strip().partition("\n")[0].partition(". ")[0].replace("|", "/")
    return line if len(line) <= most else f"{line[:most]}..."


def sweep() -> list[Outcome]:
    """All models; what was counted before is taken from a file."""
    versions = {"timm": timm.__version__, "transformers": transformers.__version__}
    stored = json.loads(SO_FAR.read_text()) if SO_FAR.exists() else {}
    known = {tuple(key.split(" ", 1)): each for key, each in stored.get("outcomes", {}).items()}
    if stored.get("versions") != versions:
        known = {}
    for count, key in enumerate(zoo.names()):
        if key not in known:
            known[key] = dataclasses.asdict(outcome(*key))
        if count % 50 == 49 or count == len(zoo.names()) - 1:
            SO_FAR.parent.mkdir(exist_ok=True)
            outcomes = {" ".join(key): each for key, each in known.items()}
            SO_FAR.write_text(json.dumps({"versions": versions, "outcomes": outcomes}))
            print(f"{count + 1} of {len(zoo.names())}", file=sys.stderr)
    return [Outcome(**known[key]) for key in zoo.names()]


def _figures(outcomes: Iterable[Outcome]) -> str:
    built = [each for each in outcomes if not each.unbuilt]
    mixtures = [each for each in built if each.is_mixture]
    dense = [each for each in built if not each.is_mixture]
    expected, right = sum(e.expected for e in dense), sum(e.right for e in dense)
    cells = (
        len(built),
        sum(e.expected > 0 for e in dense),
        f"{right:,} of {expected:,} ({right / max(expected, 1):.2%})",
        sum(len(e.wrong) for e in dense),
        f"{sum(e.is_right for e in mixtures)} of {len(mixtures)}",
        sum(e.left > 0 for e in dense),
    )
    return " | ".join(map(str, cells))


def document(outcomes: Sequence[Outcome]) -> str:
    """docs/coverage.md."""
    by_library: dict[str, list[Outcome]] = collections.defaultdict(list)
    for one in outcomes:
        by_library[one.library].append(one)
    lines = [
        "# The FFNs that `wrap` finds",
        "",
        f"This page counts the FFNs that `wrap` finds in the models of timm {timm.__version__} and "
        f"the model types of transformers {transformers.__version__},",
        "built on the meta device. `make coverage` writes it. `tools/expected_ffns.py` lists the",
        "expected FFNs by the names that the libraries give to their modules. Both that list and",
        "`wrap` were written with these models at hand, so the percentages show how far the two",
        "agree, not what to expect of unseen models. A test checks a daily sample.",
        "",
        "| library | names counted | models built | with FFNs | FFNs found | wrong choices "
        "| mixtures refused | models with something left, and a warning |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for library, each in by_library.items():
        names = sum(name[0] == library for name in zoo.names())
        lines.append(f"| {library} | {len(each)} of {names} | {_figures(each)} |")
    for library, each in by_library.items():
        lines += ["", f"## {library}", "", "| model | FFNs |", "|---|---|"]
        lines += [f"| `{one.name}` | {one.verdict} |" for one in each]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    if globs := sys.argv[1:]:
        for key in zoo.names():
            if any(fnmatch.fnmatchcase(key[1], glob) for glob in globs):
                print(*key, outcome(*key).verdict, flush=True)
    else:
        DOCUMENT.write_text(document(sweep()))
