"""Bytes that a training step sends under FSDP2: the dense model against ExFusion.

Command: `OMP_NUM_THREADS=1 python benchmarks/traffic.py`. Ranks are processes with gloo, on CPUs.

collectives.py counts, for a step after two others. The benchmark stops if the dense model's bytes
are not those that its parameters foretell.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, distributed, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

import exfusion_param as exf
from collectives import Seen, counted, on_ranks, ring, total
from exfusion_param.tensors import functional
from tables import environment, markdown_table, write_csv

Mode = Literal["dense", "step", "forward"]
Variant = Literal["sw", "dw", "mb"]

VARIANTS: tuple[Variant, ...] = ("sw", "dw", "mb")
MODES: tuple[Mode, ...] = ("step", "forward")
PATCH, CLASSES = 48, 16


@dataclasses.dataclass
class Settings:
    """Count the bytes of a training step.

    Args:
        dim: width of the Transformer; its FFNs have 4 times as many hidden units.
        depth: its blocks.
        num_experts: each N to count.
        ranks: each number of ranks to count; it has to divide `dim` and 16.
        folder: where the tables go.
    """

    dim: int = 64
    depth: int = 3
    num_experts: tuple[int, ...] = (2, 4, 16, 64)
    ranks: tuple[int, ...] = (2, 4)
    folder: Path = Path(__file__).parent / "results"


@dataclasses.dataclass
class Case:
    """A model to train, by default the dense one."""

    mode: Mode = "dense"
    variant: Variant = "sw"
    num_experts: int = 0


@dataclasses.dataclass
class Row:
    """The bytes of one rank in one step."""

    ranks: int
    mode: Mode
    variant: str
    num_experts: int
    forward: int
    backward: int
    step: int
    total: int
    ratio_to_dense: float
    all_reduces: int
    router_statistics: int
    router_statistics_to_dense: float


class Classifier(nn.Module):
    """A small Transformer on flat patches, shape (B, T, PATCH)."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, 2, 4 * dim, dropout=0.0, batch_first=True)
        self.embed = nn.Linear(PATCH, dim)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, CLASSES)."""
        logits: Tensor = self.head(self.encoder(self.embed(x)).mean(dim=1))
        return logits


def sharded(dim: int, depth: int, case: Case) -> Classifier:
    """The model of a case, sharded over all ranks of the job, block by block."""
    torch.manual_seed(0)
    model = Classifier(dim, depth)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    if case.mode == "dense":
        for module in (*model.encoder.layers, model):
            fsdp.fully_shard(module, mesh=mesh)
        return model
    exf.wrap(
        model,
        variant=case.variant,
        num_experts=case.num_experts,
        fuse_on=case.mode,
        bank_init="uniform",
        seed=0,
    )
    return exf.fully_shard(model, mesh=mesh)


def count_step(model: nn.Module) -> dict[str, Seen]:
    """The collectives of a step's forward, backward and optimizer, after two other steps."""
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(2, 8, PATCH)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with counted() as forward:
        loss = model(x).square().mean()
    with counted() as backward:
        loss.backward()
    with counted() as step:
        optimizer.step()
    return {"forward": forward, "backward": backward, "step": step}


def count_cases(rank: int, dim: int, depth: int, cases: Sequence[Case]) -> list[dict[str, Seen]]:
    """What `count_step` gives for each case; a function for `on_ranks`."""
    result = []
    for case in cases:
        model = sharded(dim, depth, case)
        expected = foretold(model) if case.mode == "dense" else None
        seen = count_step(model)
        if expected is not None and total(*seen.values()) != expected:
            raise RuntimeError(f"Dense: {total(*seen.values())} bytes counted, not {expected}.")
        result.append(seen)
    return result


def foretold(model: Classifier) -> int:
    """The dense model's bytes: all parts gathered, the blocks again, all gradients scattered."""
    ranks = distributed.get_world_size()
    every = sum(parameter.nbytes for parameter in model.parameters())
    blocks = sum(parameter.nbytes for parameter in model.encoder.parameters())
    return (2 * every + blocks) * (ranks - 1) // ranks


def rows_of(ranks: int, settings: Settings) -> list[Row]:
    """All models on so many ranks."""
    cases = [Case()] + [
        Case(mode, variant, num_experts)
        for variant in VARIANTS
        for num_experts in settings.num_experts
        for mode in MODES
    ]
    first, *others = on_ranks(ranks, count_cases, settings.dim, settings.depth, cases)
    if any(other != first for other in others):
        raise RuntimeError("Ranks differ in what they send.")
    dense = total(*first[0].values())
    return [
        row_of(ranks, case, seen, dense, settings.depth)
        for case, seen in zip(cases, first, strict=True)
    ]


def row_of(ranks: int, case: Case, seen: dict[str, Seen], dense: int, depth: int) -> Row:
    """A case's row; what it all-reduces beyond dL/dw, N floats per FFN, are statistics."""
    parts = list(seen.values())
    reduced = total(*parts, kind="all-reduce")
    is_bank = case.mode == "step" and case.variant == "mb"
    statistics = reduced - ring(ranks, 4 * case.num_experts * depth) if is_bank else 0
    is_dense = case.mode == "dense"
    return Row(
        ranks=ranks,
        mode=case.mode,
        variant="" if is_dense else case.variant,
        num_experts=case.num_experts or 1,
        **{phase: total(part) for phase, part in seen.items()},
        total=total(*parts),
        ratio_to_dense=round(total(*parts) / dense, 5),
        all_reduces=sum(kind == "all-reduce" for part in parts for kind, _ in part),
        router_statistics=statistics,
        router_statistics_to_dense=round(statistics / dense, 5),
    )


def spread(values: Iterable[float], form: str) -> str:
    """The least and the greatest of some values."""
    low, high = min(values := list(values)), max(values)
    return f"{low:{form}} to {high:{form}}"


def statistics_of(num_experts: int, features: int) -> int:
    """The numbers of router statistics that an FFN group has (functional.py)."""
    inputs = functional.rows_of_statistics(num_experts, features)
    return num_experts + inputs * features + 1


def check(row: Row, dense: Row, settings: Settings) -> None:
    """Raise unless a row under `fuse_on="step"` is as `reading` expects.

    Routers and learned fusion weights are parameters that FSDP2 gathers twice and scatters once. At
    the optimizer's step each variant has its all-reduces, those of `dw` for its sharded vectors.
    """
    ranks, count = row.ranks, row.num_experts
    reduced = {"sw": 0, "dw": 3 * count, "mb": count + statistics_of(count, settings.dim)}
    own = {"sw": 0, "dw": 1, "mb": settings.dim}[row.variant] * -(-count // ranks) * ranks
    foretold = dense.total + 3 * 4 * own * settings.depth * (ranks - 1) // ranks
    foretold += ring(ranks, 4 * reduced[row.variant] * settings.depth)
    if row.total != foretold or row.all_reduces != {"sw": 0, "dw": 3, "mb": 1}[row.variant]:
        raise RuntimeError(f"Not the {foretold} bytes that were foretold: {row}.")


def reading(rows: Sequence[Row], settings: Settings) -> str:
    """What the table says."""
    step = [row for row in rows if row.mode == "step"]
    plain = [row.ratio_to_dense for row in step if row.variant != "mb"]
    bank = [row for row in step if row.variant == "mb"]
    without = [row.ratio_to_dense - row.router_statistics_to_dense for row in bank]
    forward = [row.ratio_to_dense for row in rows if row.mode == "forward"]
    n, dim = max(settings.num_experts), 768
    share = 2 * statistics_of(n, dim) / (3 * (12 * dim**2 + 13 * dim))
    return (
        f'- `fuse_on="step"` sends {spread(plain, ".4f")} times the dense bytes under `sw` and '
        "`dw`, in as many all-gathers and reduce-scatters.\n"
        f"- Under `mb` it sends {spread(without, '.4f')} times the dense bytes, routers included, "
        "and the router statistics, "
        f"{spread((row.router_statistics_to_dense for row in bank), '.2%')} of the "
        "dense bytes, which share one all-reduce with the N floats of dL/dw per FFN.\n"
        "- Those statistics are N + N (N - 1) / 2 D + 1 floats per FFN while N^2 D is at most "
        f"{functional.EXACT_ROUTER_STATISTICS:,}, and N + N D + 1 above it; D = {settings.dim} "
        "here. Against "
        f"the 12 D^2 + 13 D parameters of a block, sent three times, they become small as D grows: "
        f"{share:.2%} for N = {n} and D = {dim} (computed, not measured).\n"
        f'- `fuse_on="forward"` sends {spread(forward, ".2f")} times the dense bytes, as the '
        "experts travel.\n"
    )


def report(rows: Sequence[Row], settings: Settings) -> str:
    """The Markdown file."""
    return (
        "# Bytes of a training step under FSDP2\n\n"
        f"Transformer of {settings.depth} blocks, width {settings.dim}, float32, AdamW, no "
        "gradient clipping; each block and the root sharded with FSDP2's defaults. "
        "Mode: the dense model, or `fuse_on`. "
        "Counted are bytes that one rank receives (all-gather) or sends (reduce-scatter), and "
        "2 (k - 1) / k S for an all-reduce of S bytes among k ranks. Columns forward, backward, "
        "step (the optimizer's) and total are bytes. `router statistics` are a part of `step`.\n\n"
        f"{environment()}. Command: `OMP_NUM_THREADS=1 python benchmarks/traffic.py`.\n\n"
        f"{reading(rows, settings)}\n{markdown_table(rows)}\n"
    )


def main(settings: Settings) -> None:
    """Count, and write the tables."""
    rows = [row for ranks in settings.ranks for row in rows_of(ranks, settings)]
    dense = {row.ranks: row for row in rows if row.mode == "dense"}
    for row in rows:
        if row.mode == "step":
            check(row, dense[row.ranks], settings)
    write_csv(settings.folder / "traffic.csv", rows)
    (settings.folder / "traffic.md").write_text(report(rows, settings))
    print(report(rows, settings))


if __name__ == "__main__":
    main(tyro.cli(Settings))
