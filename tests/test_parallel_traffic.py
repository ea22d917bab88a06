"""What ranks send and hold under FSDP2, TP x FSDP2 and PP x FSDP2, counted and computed."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import exfusion_param as exf
import footprint
import parallel_traffic as benchmark
import scaling_tables
from collectives import total
from exfusion_param.fusion.lookup import groups_of
from exfusion_param.tensors.shards import local
from exfusion_testing.ranks import on_ranks
from support.llama import WORDS, Llama
from traffic import Case

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")
SETTINGS = benchmark.Settings(dim=32)
SHAPES = footprint.Llama(dim=32, hidden=128, layers=2, keys=32, words=WORDS)
FFN = re.compile(r"feed_forward\.w\d\.(weight|parametrizations\.weight\.original)$")
N = 4
MODELS = [Case("step", "sw", 64), Case("step", "mb", N)]
LAYOUTS: list[Any] = list(benchmark.SHAPES)
CASES = [
    *((layout, case) for layout in LAYOUTS for case in (Case(), Case("step", "mb", N))),
    *((layout, Case("step", "sw", 64)) for layout in benchmark.LAYOUTS),
    ("FSDP2", Case("forward", "mb", N)),
]


def stacks_sharded(mesh: Any) -> Llama:
    torch.manual_seed(0)
    model = exf.wrap(Llama(32, 2), num_experts=N, bank_init="uniform", seed=0)
    for name, layer in model.layers.items():
        model.layers[name] = checkpoint_wrapper(layer)
    return exf.fully_shard(model, mesh=mesh["dp"])


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The bytes of a rank that `footprint.Memory` has, as tensors have them."""
    ffns = {p for name, p in model.named_parameters() if FFN.search(name)}
    states = [
        (p in ffns, name, value)
        for p, state in optimizer.state.items()
        for name, value in state.items()
        if name != "step"
    ]
    fused: list[Any] = [fused for weights in groups_of(model) for fused in weights.fused]
    parts = {
        "weights": model.parameters(),
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "copies": [each.writes.recorded for each in fused],
        "experts": [value for _, name, value in states if name == "experts"],
        "expert_states": [v for is_ffn, name, v in states if is_ffn and name != "experts"],
        "other_states": [value for is_ffn, _, value in states if not is_ffn],
        "banks": model.buffers(),
    }
    return {name: bytes_of(*tensors) for name, tensors in parts.items()}


def bytes_of(*tensors: Tensor) -> int:
    """Of plain tensors, of this rank's part of others, and of torchao's 8-bit states."""
    parts = [
        part
        for tensor in map(local, tensors)
        for part in ([tensor] if type(tensor) is Tensor else [tensor.codes, tensor.scale])
    ]
    return sum(part.nbytes for part in parts)


def count(rank: int) -> list[Any]:
    meshes = {layout: benchmark.mesh_of(layout) for layout in LAYOUTS}
    results = []
    for layout, case in CASES:
        mesh = meshes[layout]
        by_forward = case.mode == "forward"
        model = stacks_sharded(mesh) if by_forward else benchmark.build(SETTINGS, mesh, case)
        optimizer = torch.optim.AdamW(model.parameters())
        seen = benchmark.count_step(SETTINGS, mesh, model, optimizer)
        results.append((mesh["pp"].get_local_rank(), seen, held(model, optimizer)))
    return results


@pytest.fixture(scope="module")
def results() -> Any:
    return on_ranks(benchmark.RANKS, count)


@pytest.mark.processes
@pytest.mark.parametrize("case", MODELS, ids=[case.variant for case in MODELS])
@pytest.mark.parametrize("layout", benchmark.LAYOUTS)
def test_experts_never_travel(layout: Any, case: Case, results: Any) -> None:
    for of_rank in results:
        _, dense, _ = of_rank[CASES.index((layout, Case()))]
        _, seen, _ = of_rank[CASES.index((layout, case))]
        benchmark.check(layout, case, dense, seen, SETTINGS)
        if case.variant == "sw":
            assert seen == dense
        sent_more = copy.deepcopy(seen)
        kind, size = sent_more["forward_and_backward"][0]
        sent_more["forward_and_backward"][0] = (kind, size + 4)
        with pytest.raises(RuntimeError, match=r"PP|TP"):
            benchmark.check(layout, case, dense, sent_more, SETTINGS)


COMPUTED = [
    index for index, (_, case) in enumerate(CASES) if case.variant == "mb" or not case.num_experts
]


@pytest.mark.processes
@pytest.mark.parametrize(
    "index", COMPUTED, ids=[f"{CASES[i][0]}-{CASES[i][1].mode}" for i in COMPUTED]
)
def test_bytes_are_what_is_computed(index: int, results: Any) -> None:
    layout, case = CASES[index]
    stages, data, tensor = benchmark.SHAPES[layout]
    tokens = benchmark.BATCH * benchmark.TOKENS
    spread = footprint.Layout(data, tensor, stages, 2 if stages > 1 else 1, tokens, 4, 4)
    method = footprint.Method(case.mode, N)
    for of_rank in results:
        stage, seen, memory = of_rank[index]
        job = footprint.Job(SHAPES, spread, method, stage)
        assert total(*seen.values()) == job.wire().total
        assert memory == vars(job.memory())
        sent = total(seen["forward_and_backward"], kind="send")
        assert sent == job.wire().pipeline


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "8-bit"])
@pytest.mark.parametrize("expert_dtype", [torch.float32, torch.bfloat16])
def test_states_in_less_take_what_is_computed(dtype: str, expert_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = exf.wrap(Llama(32, 2), num_experts=N, fuse_on="step", bank_init="uniform", seed=0)
    stored: Any = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8-bit": "8bit"}[dtype]
    optimizer = exf.ExpertAdamW(
        model.parameters(), state_dtype=stored, expert_dtype=expert_dtype, fused=False
    )
    model(torch.randint(WORDS, (2, 4))).square().mean().backward()
    optimizer.step()
    method = footprint.Method(
        "step", N, scaling_tables.STATES[dtype], 4 if expert_dtype is torch.float32 else 2
    )
    layout = footprint.Layout(data=1, tokens=8)
    assert held(model, optimizer) == vars(footprint.Job(SHAPES, layout, method).memory())


def test_sizes_are_those_of_the_models() -> None:
    sizes = {name: model.size for name, (model, *_) in scaling_tables.JOBS.items()}
    # Those of meta-llama/Llama-2-7b, Llama-2-70b and Llama-3.1-405B.
    assert sizes == {"7B": 6738415616, "70B": 68976648192, "405B": 405853388800}
    model = SHAPES
    assert model.size == sum(p.numel() for p in Llama(32, 2).parameters())


def test_the_page_has_the_tables() -> None:
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    found = re.findall(r"^\|.*?(?=\n\n|\Z)", page.rstrip(), re.MULTILINE | re.DOTALL)
    assert found == list(scaling_tables.tables())
