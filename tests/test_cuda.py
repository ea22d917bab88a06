"""On a GPU: compiled modes, CUDA graphs and low precision equal eager float32."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

VARIANTS = ["sw", "dw", "mb"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this GPU only, with NCCL."""
    store = distributed.HashStore()
    distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield init_device_mesh("cuda", (1,))
    distributed.destroy_process_group()


def train(
    variant: str, mode: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    """Six losses with float16's gradients scaled, and the state after them."""
    torch.manual_seed(0)
    model = exf.wrap(FFNs(dim=64, hidden=128).cuda(), variant=variant, seed=0)
    run = model if mode is None else torch.compile(model, mode=mode)
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.05), lr=0.01, eps=1e-4)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**7, enabled=dtype == torch.float16)
    losses = []
    for step in range(6):
        x = inputs(64, batch=32, seed=step).float().cuda()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_of(run, x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return torch.stack(losses), model.state_dict()


@pytest.mark.compiled
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_equals_eager(variant: str, mode: str) -> None:
    (losses, state), (expected, expected_state) = train(variant, mode), train(variant)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    for name in (name for name in state if name.endswith("bank")):
        torch.testing.assert_close(state[name], expected_state[name], rtol=0, atol=1e-4)
        assert state[name].sum().item() == pytest.approx(1 - 0.95**6, abs=1e-5)


@pytest.mark.compiled
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_follows_float32(variant: str, mode: str | None, dtype: torch.dtype) -> None:
    losses, _ = train(variant, mode, dtype)
    torch.testing.assert_close(
        losses, train(variant)[0], rtol=4 * torch.finfo(dtype).eps, atol=1e-2
    )


def losses_of(model: nn.Module, device: str = "cuda") -> Tensor:
    """Six losses of training in float32, or in FSDP2's precision."""
    optimizer = torch.optim.AdamW(exf.param_groups(model, 0.05), lr=0.01, eps=1e-4)
    losses = []
    for step in range(6):
        loss = loss_of(model, inputs(64, batch=32, seed=step).float().to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return torch.stack(losses)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {},
    "offloaded": {"offload_policy": CPUOffloadPolicy()},
    "bfloat16": {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    },
}


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fuse_on", ["step", "forward"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by Dynamo
@pytest.mark.parametrize("form", FORMS)
def test_fsdp2_equals_one_process(variant: Any, fuse_on: Any, form: str, mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    plain = exf.wrap(FFNs(64, 128), variant=variant, fuse_on=fuse_on, seed=0)
    sharded: Any = exf.fully_shard(copy.deepcopy(plain), mesh=mesh, **FORMS[form])
    for block in sharded.blocks if form == "compiled" else []:
        block.compile(fullgraph=True)
    tolerance = 1e-2 if form == "bfloat16" else 1e-4
    torch.testing.assert_close(
        losses_of(sharded), losses_of(plain.cuda()), rtol=tolerance, atol=tolerance
    )


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*view tensor:UserWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_tensor_parallelism_under_fsdp2_equals_one_process(variant: Any, mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    plain = exf.wrap(FFNs(64, 128), variant=variant, fuse_on="step", seed=0).cuda()
    split: Any = copy.deepcopy(plain)
    two = init_device_mesh("cuda", (1, 1), mesh_dim_names=("data", "tensor"))
    for block in split.blocks:
        plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
        parallelize_module(block, two["tensor"], plan)
    sharded = exf.fully_shard(split, mesh=two["data"])
    torch.testing.assert_close(losses_of(sharded), losses_of(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, "8bit"])
def test_expert_adamw_is_adamw(variant: Any, state_dtype: Any) -> None:
    torch.manual_seed(0)
    model = exf.wrap(FFNs(64, 128), variant=variant, fuse_on="step", seed=0).cuda()
    twin = copy.deepcopy(model)
    settings = {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.05}
    train_with(model, exf.ExpertAdamW(model.parameters(), **settings, state_dtype=state_dtype))
    train_with(twin, torch.optim.AdamW(twin.parameters(), **settings))
    tolerance = 1e-5 if state_dtype is None else 1e-2
    ours, theirs = exf.fused_state_dict(model), exf.fused_state_dict(twin)
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=tolerance, atol=tolerance)


def train_with(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(6):
        loss_of(model, inputs(64, batch=32, seed=step).float().cuda()).backward()
        optimizer.step()
        optimizer.zero_grad()
