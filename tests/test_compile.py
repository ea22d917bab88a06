"""torch.compile: one graph without a break, compiled once, equal to eager."""

import copy
import warnings
from collections.abc import Iterator
from typing import Literal

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import exfusion_param as exf
from exfusion_testing.compilers import COMPILER
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_ranks

VARIANTS = ["sw", "dw", "mb"]
Loop = Literal["plain", "accumulation", "checkpointing"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def labels_of(x: Tensor) -> Tensor:
    """One of three classes for each token, shape (batch * tokens,)."""
    return x[..., :3].argmax(-1).flatten()


def losses(
    variant: str,
    loop: Loop = "plain",
    dtype: torch.dtype = torch.float32,
    compiler: str | None = None,
) -> Tensor:
    """Five losses; each batch holds its samples twice, so that its halves are equal."""
    torch.manual_seed(0)
    checkpointing = "non-reentrant" if loop == "checkpointing" else None
    model = exf.wrap(FFNs(dim=8, hidden=16, checkpointing=checkpointing), variant=variant, seed=0)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.05), lr=0.03)
    run = torch.compile(model, fullgraph=True, backend=compiler) if compiler else model
    history = []
    for _ in range(5):
        half = inputs(8).float()
        micro_batches = [half, half] if loop == "accumulation" else [torch.cat([half, half])]
        step_loss = torch.zeros(())
        for x in micro_batches:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = run(x).flatten(0, 1)
                loss = F.cross_entropy(logits, labels_of(x)) / len(micro_batches)
            loss.backward()
            step_loss += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        history.append(step_loss)
    return torch.stack(history)


def assert_trains_as_the_plain_one(
    variant: str, loop: Loop, dtype: torch.dtype, compiler: str | None
) -> None:
    expected = losses(variant)
    assert expected[0] - expected[-1] > 0.05  # it trains
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(
        losses(variant, loop, dtype, compiler), expected, rtol=tolerance, atol=0
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loop", ["plain", "accumulation", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiler", [None, pytest.param(COMPILER, marks=pytest.mark.compiled)])
def test_every_loop_has_the_losses_of_the_plain_one(
    variant: str, loop: Loop, dtype: torch.dtype, compiler: str | None
) -> None:
    assert_trains_as_the_plain_one(variant, loop, dtype, compiler)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("variant", "loop", "dtype"),
    [("dw", "plain", torch.float32), ("mb", "checkpointing", torch.bfloat16)],
)
def test_inductor_has_them_too(variant: str, loop: Loop, dtype: torch.dtype) -> None:
    assert_trains_as_the_plain_one(variant, loop, dtype, "inductor")


def vit(variant: str, depth: int) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, num_heads=2, num_classes=3,
        depth=depth,
    )  # fmt: skip
    return exf.wrap(model.double(), variant=variant, seed=0, bank_init="uniform")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 16, 16, generator=generator, dtype=torch.float64)
    model.train()
    model(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        model(images)


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("per_block", [True, False])
def test_training_and_eval_with_any_batch_size_compile_twice_each_and_equal_eager(
    variant: str, per_block: bool
) -> None:
    """Once for the first batch size, once for any other."""
    eager = vit(variant, depth=10 if per_block else 2)  # more than torch.compile recompiles
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend(COMPILER)
    for module in compiled.blocks if per_block else [compiled]:
        module.compile(backend=counter, fullgraph=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (eager, compiled)]
    for seed, batch in enumerate([4, 4, 6, 3, 7, 4]):
        for model, optimizer in zip((eager, compiled), optimizers, strict=True):
            step(model, optimizer, batch, seed)
        assert_same_state(compiled, eager)
        assert counter.frame_count == (2 if seed < 2 else 4)


@pytest.mark.compiled
@pytest.mark.parametrize("variant", ["dw", "mb"])
def test_parameters_frozen_replaced_and_thawed_in_training_equal_eager(variant: str) -> None:
    eager = exf.wrap(FFNs().double(), variant=variant, seed=0, bank_init="uniform")
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend=COMPILER)
    for model in (eager, compiled):
        learned = [p for name, p in model.named_parameters() if "fusion_weights" in name]
        for trains in (True, False, True):
            for parameter in learned:
                parameter.requires_grad_(trains)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=0.1)
            for seed in range(2):
                loss_of(model, inputs(seed=seed)).backward()
                optimizer.step()
                optimizer.zero_grad()
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        loss_of(model, inputs()).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert_same_state(compiled, eager)


@pytest.mark.compiled
def test_compiled_autograd_takes_two_forwards_before_one_backward() -> None:
    model = exf.wrap(FFNs(), seed=0, bank_init="uniform")
    x = inputs().float()
    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled = torch.compile(lambda: loss_of(model, x) + loss_of(model, 2 * x), backend="eager")
        compiled().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.compiled
def test_a_fused_model_compiles_again() -> None:
    model = exf.wrap(FFNs(), seed=0, bank_init="uniform").eval()
    compiled = torch.compile(model, fullgraph=True)
    x = inputs().float()
    with torch.no_grad():
        before = compiled(x)
        exf.fuse(model)
        torch.testing.assert_close(compiled(x), before)


def test_cuda_graphs_leave_the_banks_operators_out() -> None:
    exf.wrap(FFNs())
    for operator in (torch.ops.exfusion_param.mark, torch.ops.exfusion_param.note):
        assert torch.Tag.cudagraph_unsafe in operator.default.tags


def ddp_losses(rank: int, ranks: int, variant: str, compiled: bool) -> Tensor:
    """Losses of a model whose batch is split among the ranks; the halves are equal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Memory banks are not averaged")
        model = exf.wrap(FFNs(dim=8, hidden=16).double(), variant=variant, seed=0)
    run: nn.Module = DistributedDataParallel(model) if ranks > 1 else model
    run = torch.compile(run, backend=COMPILER) if compiled else run
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    history = []
    for seed in range(4):
        half = inputs(8, seed=seed)
        loss = loss_of(run, half if ranks > 1 else torch.cat([half, half]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.detach())
    return torch.stack(history)


def seeded_ddp_losses(rank: int, ranks: int, compiled: bool) -> Tensor:
    """Of all variants."""
    found = []
    for variant in VARIANTS:
        torch.manual_seed(0)
        found.append(ddp_losses(rank, ranks, variant, compiled))
    return torch.stack(found)


@pytest.mark.compiled
@pytest.mark.processes
def test_two_compiled_ranks_under_ddp_are_one_eager_rank() -> None:
    expected = seeded_ddp_losses(0, 1, False)
    for found in on_ranks(2, seeded_ddp_losses, 2, True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.compiled
def test_attention_masks_of_transformers_compile_once_and_equal_eager() -> None:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    eager = exf.wrap(transformers.BertModel(config).double(), seed=0, bank_init="uniform")
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend(COMPILER)
    compiled.compile(backend=counter, fullgraph=True)
    for seed in range(3):
        torch.manual_seed(seed)
        tokens, lengths = torch.randint(20, (4, 6)), torch.randint(1, 7, (4, 1))
        mask = (torch.arange(6) < lengths).long()
        for model in (eager, compiled):
            model(tokens, attention_mask=mask).pooler_output.square().sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            model.zero_grad()
        assert_same_state(compiled, eager)
    assert counter.frame_count == 1
