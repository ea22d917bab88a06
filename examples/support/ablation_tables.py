"""What the paper's ablations compare, as arguments of a recipe."""

from typing import NamedTuple

from support.paper import TABLES


class Table(NamedTuple):
    """One ablation.

    Args:
        title: what it asks.
        rows: what is compared, and the arguments of it; those without any are the paper's default.
        control: the row that the others are compared with, seed by seed.
        is_timed: it measures time, so its runs go one after another.
    """

    title: str
    rows: dict[str, str]
    control: str
    is_timed: bool = False


CONTROL = "--method control"


def paper(number: str) -> dict[str, str]:
    """What a table of the paper has in its first column, by the names of its rows."""
    return TABLES[number].column(TABLES[number].columns[0])


def tables(depth: int) -> dict[str, Table]:
    """The paper's tables VI to XI, for a model of this many FFNs; its figures are in paper.py."""

    def layers(chosen: range) -> str:
        return f"--layers {' '.join(map(str, chosen))}"

    counts = {f"N = {n}": f"--num-experts {n}" for n in (8, 16)}
    controls = {f"control of N = {n}": f"{CONTROL} --num-experts {n}" for n in (8, 16)}
    momenta = {f"{delta:.2f}": f"--momentum {delta:.2f}" for delta in (0.90, 0.92, 0.98)}
    return {
        "VI": Table(
            "Where do fusion weights come from?",
            {
                "dense": "--method dense",
                "control": CONTROL,
                "sw": "--variant sw",
                "dw": "--variant dw",
                "mb": "",
            },
            control="control",
        ),
        "VII": Table(
            "How many experts?",
            {"control of N = 4": CONTROL, "N = 4": "", **controls, **counts},
            control="control of N = 4",
        ),
        "VIII": Table(
            "Which momentum?", {"control": CONTROL, "0.95": "", **momenta}, control="control"
        ),
        "IX": Table(
            "One router for an FFN, or one for each linear?",
            {"control": CONTROL, "shared": "", "one per linear": "--no-shared-router"},
            control="control",
        ),
        "X": Table(
            "Which FFNs?",
            {
                "control": CONTROL,
                "all": "",
                "first half": layers(range(depth // 2)),
                "second half": layers(range(depth // 2, depth)),
                "every second": layers(range(1, depth, 2)),
                "every second, from the first": layers(range(0, depth, 2)),
            },
            control="control",
        ),
        "XI": Table(
            "What does training cost?",
            {
                "dense": "--method dense",
                "N = 4": "",
                "N = 8": "--num-experts 8",
                "N = 128": "--num-experts 128",
                'N = 4, "step"': "--fuse-on step",
                'N = 8, "step"': "--num-experts 8 --fuse-on step",
                'N = 128, "step"': "--num-experts 128 --fuse-on step",
            },
            control="dense",
            is_timed=True,
        ),
    }
