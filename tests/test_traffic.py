"""What sharded training sends and keeps, counted as the benchmarks count it."""

import copy
from typing import Any

import pytest
import torch
from torch import distributed, nn

import collectives
import exfusion_param as exf
import sharded_memory
import traffic
from exfusion_param.tensors.shards import local
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_threads
from exfusion_testing.sharded import mesh_of
from experts import expert_stacks

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")

DIM, DEPTH, RANKS = 16, 2, 2
CASES = [(variant, n) for variant in ("sw", "dw", "mb") for n in (2, 16)]


def count(rank: int, cases: list[Any]) -> Any:
    """Each case's collectives, and the error for one that the benchmark does not know."""
    seen = traffic.count_cases(rank, DIM, DEPTH, cases)
    with pytest.raises(RuntimeError) as refused, collectives.counted():
        distributed.broadcast(torch.zeros(1), src=0)
    memory = [sharded_memory.measure(traffic.sharded(DIM, DEPTH, case)) for case in cases[:2]]
    return seen, str(refused.value), memory


@pytest.fixture(scope="module")
def results() -> Any:
    cases = [traffic.Case(), *(traffic.Case("step", *case) for case in CASES)]
    return collectives.on_ranks(RANKS, count, cases)


def of_kind(seen: list[tuple[str, int]], *kinds: str) -> list[int]:
    return [size for kind, size in seen if kind in kinds]


@pytest.mark.processes
@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{v}-{n}" for v, n in CASES])
def test_experts_never_travel(results: Any, index: int) -> None:
    variant, n = CASES[index]
    reduced = {"sw": [], "dw": 3 * [n], "mb": [n + (n + n * (n - 1) // 2 * DIM + 1)]}[variant]
    own = {"sw": 0, "dw": n, "mb": n * DIM}[variant]  # floats of a block's fusion weights
    for (dense, *cases), *_ in results:
        seen = cases[index]
        for phase in ("forward", "backward"):
            assert len(seen[phase]) == len(dense[phase])
            for ours, theirs in zip(seen[phase], dense[phase], strict=True):
                is_block = theirs[1] == max(size for _, size in dense[phase])
                assert ours == (theirs[0], theirs[1] + is_block * 4 * own * (RANKS - 1) // RANKS)
        assert dense["step"] == of_kind(seen["step"], "all-gather", "reduce-scatter") == []
        expected = [collectives.ring(RANKS, 4 * floats * DEPTH) for floats in reduced]
        assert of_kind(seen["step"], "all-reduce") == expected


@pytest.mark.processes
def test_a_collective_that_is_not_counted_is_noticed(results: Any) -> None:
    for _, message, _ in results:
        assert message == "The backends ran 1 collectives, and 0 were counted."


@pytest.mark.processes
def test_stacks_and_weights_are_divided(results: Any) -> None:
    for *_, (dense, step) in results:
        assert step["ffn_weights"] == step["ffn_gradients"] == dense["ffn_weights"]
        assert (step["ffn_copies"], dense["ffn_copies"]) == (dense["ffn_weights"], 0)
        assert step["stacks"] == 2 * dense["ffn_weights"]
        whole = sum(p.nbytes for block in ffns() for p in block.parameters())
        assert dense["ffn_weights"] == whole / RANKS


def ffns() -> list[nn.Module]:
    layers = traffic.Classifier(DIM, DEPTH).encoder.layers
    return [linear for layer in layers for linear in (layer.linear1, layer.linear2)]


def parts_of_stacks(rank: int, dense: nn.Module) -> Any:
    model = exf.wrap(
        copy.deepcopy(dense), num_experts=3, fuse_on="step", bank_init="uniform", seed=1
    )
    mesh = mesh_of(distributed.get_world_size())
    exf.fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model, inputs()).backward()
    optimizer.step()
    stacks = expert_stacks(model)
    states = [state for state in optimizer.state.values() if "experts" in state]
    names = ("experts", "experts.exp_avg", "experts.exp_avg_sq")
    kept = [[state[name] for name in names] for state in states]
    sizes = [[local(tensor).numel() for tensor in tensors] for tensors in kept]
    storages = [[local(t).untyped_storage().nbytes() // 8 for t in tensors] for tensors in kept]
    return [tuple(stack.shape) for stack in stacks], sizes, storages


@pytest.mark.parametrize("ranks", [2, 4])  # 4 do not divide the 6 rows of a first linear
def test_no_rank_holds_more_than_its_share(ranks: int) -> None:
    results = on_threads(ranks, parts_of_stacks, FFNs().double())
    for index, (n, rows, *rest) in enumerate(results[0][0]):
        share = n * -(-rows // ranks) * torch.Size(rest).numel()
        for which in range(3):
            sizes = [sizes[index][which] for _, sizes, _ in results]
            assert sum(sizes) == torch.Size([n, rows, *rest]).numel()
            assert max(sizes) <= share
            assert sizes == [storages[index][which] for *_, storages in results]
