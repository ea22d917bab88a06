"""Bytes that a training step sends under TP x FSDP2 and PP x FSDP2: dense against ExFusion.

Command: `OMP_NUM_THREADS=1 PYTHONPATH=examples python benchmarks/parallel_traffic.py`. Four ranks
are processes with gloo, on CPUs.

The model is the Llama of examples/torchtitan_llama.py, split as torchtitan splits one: wrap, tensor
parallelism with sequences split between the linears, activation checkpointing, FSDP2; or stages of
a pipeline (1F1B, two micro-batches), each sharded by FSDP2. collectives.py counts, for a step after
another one. The benchmark stops if a count differs from what is foretold.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import exfusion_param as exf
from collectives import Seen, counted, on_ranks, ring, total
from support.llama import WORDS, Llama, parallelize
from support.llama_parts import TOKENS, loss_of, schedule_of
from tables import environment, markdown_table, write_csv
from traffic import Case, Variant, spread, statistics_of

Layout = Literal["FSDP2", "TP x FSDP2", "PP x FSDP2"]

LAYOUTS: tuple[Layout, ...] = ("TP x FSDP2", "PP x FSDP2")
SHAPES: dict[Layout, tuple[int, int, int]] = {  # of the mesh: stages, data, tensors
    "FSDP2": (1, 4, 1),
    "TP x FSDP2": (1, 2, 2),
    "PP x FSDP2": (2, 2, 1),
}
VARIANTS: tuple[Variant, ...] = ("sw", "dw", "mb")
PHASES = ("forward_and_backward", "step")
RANKS, BATCH = 4, 8


@dataclasses.dataclass
class Settings:
    """Count the bytes of a training step.

    Args:
        dim: width of the Llama, a multiple of 32; its FFNs have 4 times as many hidden units.
        layers: its blocks, an even number.
        num_experts: each N to count.
        folder: where the tables go.
    """

    dim: int = 256
    layers: int = 2
    num_experts: tuple[int, ...] = (4, 16, 64)
    folder: Path = Path(__file__).parent / "results"


@dataclasses.dataclass
class Row:
    """The bytes of the rank that sends most in one step."""

    layout: Layout
    model: str
    num_experts: int
    collectives: int
    forward_and_backward: int
    by_dense: float
    step: int
    total: int
    total_by_dense: float


def mesh_of(layout: Layout) -> DeviceMesh:
    """Of a pipeline's stages, of the data and of tensors."""
    return init_device_mesh("cpu", SHAPES[layout], mesh_dim_names=("pp", "dp", "tp"))


def build(settings: Settings, mesh: DeviceMesh, case: Case) -> Llama:
    """The model of a case, or this rank's stage of it, spread over the ranks."""
    torch.manual_seed(0)
    model = Llama(settings.dim, settings.layers)
    if case.mode == "step":
        exf.wrap(
            model,
            variant=case.variant,
            num_experts=case.num_experts,
            fuse_on="step",
            bank_init="uniform",
            seed=0,
        )
    stage, stages = mesh["pp"].get_local_rank(), mesh["pp"].size()
    for name in [n for n in model.layers if int(n) * stages // settings.layers != stage]:
        del model.layers[name]
    if stage > 0:
        model.tok_embeddings = None
    if stage < stages - 1:
        model.norm = model.output = None
    parallelize(model, mesh)
    return model


def count_step(
    settings: Settings, mesh: DeviceMesh, model: Llama, optimizer: torch.optim.Optimizer
) -> dict[str, Seen]:
    """The collectives of the forward and backward of a step, and of its optimizer's step."""
    stage, stages = mesh["pp"].get_local_rank(), mesh["pp"].size()
    words = torch.randint(WORDS, (BATCH // mesh["dp"].size(), TOKENS + 1))
    schedule: Any = schedule_of(model, mesh, BATCH, settings.dim) if stages > 1 else None

    def forward_and_backward() -> None:
        if schedule is None:
            loss_of(model(words[:, :-1]), words[:, 1:]).backward()
        else:
            inputs = [words[:, :-1]] if stage == 0 else []
            schedule.step(*inputs, target=words[:, 1:] if stage == stages - 1 else None)

    forward_and_backward()
    optimizer.step()  # the first one, at which ranks compare what they train
    optimizer.zero_grad()
    with counted() as training:
        forward_and_backward()
    with counted() as step:
        optimizer.step()
    return {"forward_and_backward": training, "step": step}


def count_cases(
    rank: int, settings: Settings, cases: Sequence[tuple[Layout, Case]]
) -> list[dict[str, Seen]]:
    """What `count_step` gives for each case; a function for `on_ranks`."""
    meshes = {layout: mesh_of(layout) for layout in LAYOUTS}
    results = []
    for layout, case in cases:
        model = build(settings, meshes[layout], case)
        optimizer = torch.optim.AdamW(model.parameters())
        results.append(count_step(settings, meshes[layout], model, optimizer))
    return results


def check(
    layout: Layout, case: Case, dense: dict[str, Seen], seen: dict[str, Seen], settings: Settings
) -> None:
    """Raise unless a rank sends what the dense model does, and what fusion weights need.

    Routers and learned fusion weights are parameters that travel with their block. At the
    optimizer's step there are all-reduces, over each dimension of the weights' mesh.
    """
    count, dimensions = case.num_experts, 2 if layout == "TP x FSDP2" else 1
    own = {"sw": 0, "dw": count, "mb": count * settings.dim}[case.variant] * 4 // 2
    changes = {
        (kind, size - before, kind_before)
        for (kind, size), (kind_before, before) in zip(
            seen["forward_and_backward"], dense["forward_and_backward"], strict=True
        )
    }
    ffns = settings.layers * dimensions // 2  # half of them are in a stage
    several = {"sw": [], "dw": [count] * (dimensions + 2)}.get(
        case.variant, [count + statistics_of(count, settings.dim)] * dimensions
    )
    reduced: Seen = [("all-reduce", ring(2, 4 * floats * ffns)) for floats in several]
    is_same = all(kind == before and change in (0, own) for kind, change, before in changes)
    if not is_same or seen["step"] != reduced or dense["step"]:
        raise RuntimeError(f"{layout}, {case}: {changes} and {seen['step']}, not {reduced}.")


def rows_of(settings: Settings) -> list[Row]:
    """All models under all layouts."""
    models = [Case("step", v, n) for v in VARIANTS for n in settings.num_experts]
    cases = [(layout, case) for layout in LAYOUTS for case in (Case(), *models)]
    by_rank = on_ranks(RANKS, count_cases, settings, cases)
    rows: list[Row] = []
    for index, (layout, case) in enumerate(cases):
        of_case = [results[index] for results in by_rank]
        of_dense = [results[cases.index((layout, Case()))] for results in by_rank]
        for dense, seen in zip(of_dense, of_case, strict=True) if case.mode == "step" else ():
            check(layout, case, dense, seen, settings)
        rows.append(row_of(layout, case, of_dense, of_case))
    return rows


def row_of(
    layout: Layout, case: Case, dense: Sequence[dict[str, Seen]], seen: Sequence[dict[str, Seen]]
) -> Row:
    """A case's row, from what all ranks have sent."""
    training, step = (max(total(s[phase]) for s in seen) for phase in PHASES)
    before = max(total(s["forward_and_backward"]) for s in dense)
    return Row(
        layout=layout,
        model="dense" if case.mode == "dense" else case.variant,
        num_experts=case.num_experts or 1,
        collectives=max(len(s["forward_and_backward"]) for s in seen),
        forward_and_backward=training,
        by_dense=round(training / before, 5),
        step=step,
        total=training + step,
        total_by_dense=round((training + step) / before, 5),
    )


def reading(rows: Sequence[Row]) -> str:
    """What the table says."""
    step = [row for row in rows if row.model != "dense"]
    plain = [row.total_by_dense for row in step if row.model != "mb"]
    bank = [row for row in step if row.model == "mb"]
    return (
        "- Forward and backward make the same collectives in the same order for all models, and "
        "each has the dense model's bytes, plus the routers' or learned weights' where FSDP2 "
        "gathers or scatters their block. No expert travels.\n"
        f"- In all, `sw` and `dw` send {spread(plain, '.4f')} times the dense bytes.\n"
        f"- `mb` sends {spread((row.by_dense for row in bank), '.3f')} times the dense bytes in "
        f"forward and backward, and {spread((row.total_by_dense for row in bank), '.3f')} times "
        "with the router statistics at the optimizer's step, in one all-reduce for each dimension "
        "of the mesh. What routers and statistics weigh beside a block falls with its width, as "
        "[traffic.md](traffic.md) computes.\n"
    )


def report(rows: Sequence[Row], settings: Settings) -> str:
    """The Markdown file."""
    return (
        "# Bytes of a training step under TP x FSDP2 and PP x FSDP2\n\n"
        f"Llama of {settings.layers} blocks, width {settings.dim}, float32, AdamW, "
        '`fuse_on="step"`, on 2 x 2 ranks: sequence parallelism and activation checkpointing as '
        "in torchtitan, or two stages of a pipeline under 1F1B. Counted are the bytes of the rank "
        "that sends most, as in traffic.md, and those that a stage sends to another.\n\n"
        f"{environment()}. Command: `OMP_NUM_THREADS=1 PYTHONPATH=examples python "
        f"benchmarks/parallel_traffic.py`.\n\n{reading(rows)}\n{markdown_table(rows)}\n"
    )


def main(settings: Settings) -> None:
    """Count, and write the tables."""
    rows = rows_of(settings)
    write_csv(settings.folder / "parallel_traffic.csv", rows)
    (settings.folder / "parallel_traffic.md").write_text(report(rows, settings))
    print(report(rows, settings))


if __name__ == "__main__":
    main(tyro.cli(Settings))
