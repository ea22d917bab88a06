"""Bytes that each rank holds under FSDP2, against the number of ranks: dense and ExFusion.

Command: `OMP_NUM_THREADS=1 python benchmarks/sharded_memory.py`. Ranks are processes with gloo.

Counted are the bytes of the tensors that a rank keeps, only its part of those that are sharded;
not activations, nor the blocks that FSDP2 gathers for the moment. The greatest of all ranks counts.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from collectives import on_ranks
from exfusion_param.fusion.lookup import groups_of
from exfusion_param.tensors.shards import local
from experts import expert_stacks
from tables import environment, markdown_table, write_csv
from traffic import PATCH, Case, Classifier, Variant, sharded


@dataclasses.dataclass
class Settings:
    """Measure what each rank keeps.

    Args:
        dim: width of the Transformer; its FFNs have 4 times as many hidden units.
        depth: its blocks.
        variant: where the fusion weights come from.
        num_experts: each N to measure.
        ranks: each number of ranks to measure.
        folder: where the tables go.
    """

    dim: int = 64
    depth: int = 3
    variant: Variant = "mb"
    num_experts: tuple[int, ...] = (4, 16)
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    folder: Path = Path(__file__).parent / "results"


@dataclasses.dataclass
class Row:
    """The bytes of one rank, the greatest over the ranks.

    Args:
        mode: "dense", or what `fuse_on` is.
        num_experts: N, and 1 for the dense model.
        ranks: how many there are.
        stacks: expert stacks.
        ffn_states: AdamW's states of the experts, or of the dense FFNs.
        ffn_weights: of the FFNs, fused or dense.
        ffn_copies: of the fused weights, by which writes from outside are found.
        ffn_gradients: theirs, after a backward.
        rest: all other parameters and buffers, their states and their gradients.
        total: of all columns.
        total_to_one_rank: this total by that of one rank.
    """

    mode: str
    num_experts: int
    ranks: int
    stacks: int
    ffn_states: int
    ffn_weights: int
    ffn_copies: int
    ffn_gradients: int
    rest: int
    total: int
    total_to_one_rank: float = 1.0


def held(tensors: Iterable[Any]) -> int:
    """The bytes that this rank holds of some tensors; other objects count zero."""
    return sum(local(tensor).nbytes for tensor in tensors if isinstance(tensor, Tensor))


def states_of(optimizer: torch.optim.Optimizer, parameters: Iterable[Any]) -> list[Any]:
    """What an optimizer keeps of some parameters."""
    return [value for p in parameters for value in optimizer.state.get(p, {}).values()]


def parts_of(model: Classifier) -> tuple[list[nn.Parameter], list[Tensor]]:
    """The weights and biases of the FFNs, fused or dense; all other parameters and buffers."""
    named = model.named_parameters()
    ffns = [p for name, p in named if ".linear1." in name or ".linear2." in name]
    known = set(map(id, ffns))
    others = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in known]
    return ffns, others


def measure(model: Classifier) -> dict[str, int]:
    """The bytes of a rank after two steps and a backward."""
    optimizer = torch.optim.AdamW(model.parameters())
    ffns, others = parts_of(model)
    x = torch.randn(2, 8, PATCH)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    after = [t.grad for t in others]
    stacks = expert_stacks(model)
    fused: list[Any] = [fused for weights in groups_of(model) for fused in weights.fused]
    return {
        "stacks": held(stacks),
        "ffn_states": held(states_of(optimizer, ffns)) - held(stacks),
        "ffn_weights": held(ffns),
        "ffn_copies": held(each.writes.recorded for each in fused),
        "ffn_gradients": held(parameter.grad for parameter in ffns),
        "rest": held([*others, *after, *states_of(optimizer, others)]),
    }


def measure_cases(rank: int, dim: int, depth: int, cases: Sequence[Case]) -> list[dict[str, int]]:
    """What `measure` gives for each case; a function for `on_ranks`."""
    return [measure(sharded(dim, depth, case)) for case in cases]


def rows_of(settings: Settings) -> list[Row]:
    """All models on all numbers of ranks, in the order of the table."""
    cases = [Case(), *(Case("step", settings.variant, n) for n in settings.num_experts)]
    rows: list[list[Row]] = [[] for _ in cases]
    for ranks in settings.ranks:
        results = on_ranks(ranks, measure_cases, settings.dim, settings.depth, cases)
        for index, case in enumerate(cases):
            totals = [sum(result[index].values()) for result in results]
            largest = {key: max(r[index][key] for r in results) for key in results[0][index]}
            row = Row(case.mode, case.num_experts or 1, ranks, **largest, total=max(totals))
            rows[index].append(row)
            row.total_to_one_rank = round(row.total / rows[index][0].total, 4)
    return [row for of_case in rows for row in of_case]


def check(rows: Sequence[Row]) -> None:
    """Raise unless stacks, weights and gradients divide by the number of ranks exactly."""
    for row in rows:
        one = next(r for r in rows if (r.mode, r.num_experts) == (row.mode, row.num_experts))
        for column in ("stacks", "ffn_weights", "ffn_copies", "ffn_gradients"):
            if getattr(row, column) * row.ranks != getattr(one, column) * one.ranks:
                raise RuntimeError(f"{column} do not divide by {row.ranks}: {row}.")


def reading(rows: Sequence[Row]) -> str:
    """What the table says."""
    last = [row for row in rows if row.ranks == rows[-1].ranks]
    totals = "; ".join(
        f"{row.mode}, N = {row.num_experts}: {row.total_to_one_rank:.3f}" for row in last
    )
    return (
        "- Stacks, fused weights and their gradients divide exactly by the number of ranks, and "
        "so do AdamW's states but for a step counter of each tensor.\n"
        f"- The whole on {last[0].ranks} ranks as a share of that on {rows[0].ranks}: {totals}. "
        "Memory banks and step counters are on every rank, which is what keeps the share above "
        f"1/{last[0].ranks}.\n"
    )


def report(rows: Sequence[Row], settings: Settings) -> str:
    """The Markdown file."""
    return (
        "# Bytes that a rank holds under FSDP2\n\n"
        f"Transformer of {settings.depth} blocks, width {settings.dim}, float32, AdamW, variant "
        f'`{settings.variant}` under `fuse_on="step"`. Columns in bytes, of the rank that holds '
        "most: expert stacks; AdamW's states of the experts, or of the dense FFNs; the FFNs' "
        "weights, fused or dense; the copies of them by which writes from outside are found; "
        "their gradients after a backward; all other parameters and buffers with their states and "
        "gradients. Not counted: activations, blocks that FSDP2 "
        "gathers for the moment, and the gradient of one stack at a time within the step.\n\n"
        f"{environment()}. Command: `OMP_NUM_THREADS=1 python benchmarks/sharded_memory.py`.\n\n"
        f"{reading(rows)}\n{markdown_table(rows)}\n"
    )


def main(settings: Settings) -> None:
    """Measure, and write the tables."""
    rows = rows_of(settings)
    check(rows)
    write_csv(settings.folder / "sharded_memory.csv", rows)
    (settings.folder / "sharded_memory.md").write_text(report(rows, settings))
    print(report(rows, settings))


if __name__ == "__main__":
    main(tyro.cli(Settings))
