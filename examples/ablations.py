r"""The paper's ablations: tables VI to XI and figure 5, at any scale, from one command.

    python examples/ablations.py --seeds 0 1 2 --at-once 2
    python examples/ablations.py --data /data/imagenet --scale paper \
        --launcher "torchrun --nproc-per-node 8" --tables VI VIII --out runs/ablations-paper

Stop it and run the same command: runs that have ended stay, others continue.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import timm
import torch
import tyro

import exfusion_param as exf
from exfusion_param import cli, study
from exfusion_param.study.figure import plot
from support.ablation_tables import Table, paper, tables
from support.recipe_runs import Recipe
from support.table import write_table

SMALL = (
    "--image-size 28 --no-augment --drop-path 0 --min-lr 0 --workers 0 --batch-size 128 --lr 32e-3 "
    "--warmup-epochs 0.5 --model-kwargs patch_size 7 embed_dim 64 depth 4 num_heads 4"
)
SCALES = {"small": f"{SMALL} --epochs 3", "paper": "--amp", "smoke": "--smoke"}
DEPTHS = {"small": 4, "paper": 12, "smoke": 2}

TableName = Literal["VI", "VII", "VIII", "IX", "X", "XI"]


@dataclasses.dataclass
class Settings:
    """Run the paper's ablations with examples/imagenet.py.

    Args:
        tables: of the paper. Figure 5 is drawn with whichever of them trains a memory bank.
        seeds: one run of each row for each.
        scale: small: a ViT of 4 blocks on images of 28 pixels, 3 epochs; paper: as in the paper.
        data: of the recipe.
        extra: more arguments of the recipe, as in --extra="--epochs 100".
        out: the folder for runs, tables and plots.
        at_once: runs that go at once, which share the CPU's cores, or have a GPU each.
        launcher: put before the recipe; by default this Python.
        smoke: a moment of one table, to see that everything works.
    """

    tables: tuple[TableName, ...] = ("VI", "VII", "VIII", "IX", "X", "XI")
    seeds: tuple[int, ...] = (0, 1, 2)
    scale: Literal["small", "paper", "smoke"] = "small"
    data: Path | None = None
    extra: str = ""
    out: Path = Path("runs/ablations")
    at_once: int = 1
    launcher: str = sys.executable
    smoke: bool = False


def run(name: str, table: Table, recipe: Recipe, settings: Settings) -> str:
    """Run the rows of a table; the table."""
    found = study.compare(
        recipe,
        table.rows,
        control=table.control,
        out=recipe.out.parent,
        seeds=settings.seeds,
        at_once=1 if table.is_timed else settings.at_once,
        metric="test accuracy, %",
        settings={"arguments": recipe.common},
    )
    rows = [row | {"paper": paper(name).get(row["arm"], "")} for row in found.table()]
    text = write_table(settings.out / f"{name}.md", rows)
    values = {arm: found.values(arm) for arm in found.results}
    plot(settings.out / f"{name}.svg", values, table.control, found.metric, table.title)
    default = next((row for row, arguments in table.rows.items() if not arguments), None)
    if default is not None:  # fusion weights over time, figure 5
        cli.main(["plot", str(recipe.folder(found.results[default][0].run))])
    return f"Table {name}. {table.title}\n\n{text}\n{found.sentence()}\n"


def router_parameters() -> str:
    """What table IX counts: the routers' parameters in DeiT-T."""
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224")
    shared, own = (
        exf.summarize(model, shared_router=is_shared).fusion_parameters
        for is_shared in (True, False)
    )
    return f"Router parameters of DeiT-T: {shared:,} shared, {own:,} one per linear.\n"


def main(settings: Settings) -> None:
    """Run all tables."""
    if settings.smoke:
        settings = dataclasses.replace(settings, tables=("IX",), seeds=(0,), scale="smoke")
    data = f" --data {settings.data}" if settings.data else ""
    common = f"{SCALES[settings.scale]}{data} {settings.extra}"
    ours = tables(DEPTHS[settings.scale])
    for name in settings.tables:
        folder = settings.out / "timed" if ours[name].is_timed else settings.out
        work = folder / "work"
        recipe = Recipe("imagenet.py", common, work, "accuracy", launcher=settings.launcher)
        print(run(name, ours[name], recipe, settings), flush=True)
        if name == "IX":
            print(router_parameters())


if __name__ == "__main__":
    main(tyro.cli(Settings))
