"""accelerate shards a wrapped model, takes one that was sharded before, and resumes both."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.integrations import tensor_parallel

import exfusion_param as exf
from exfusion_testing.accelerators import start_again, take_ranks_for_gpus
from exfusion_testing.models import loss_of
from exfusion_testing.ranks import on_ranks
from exfusion_testing.sharded import (
    BATCHES,
    assert_same,
    dense_model,
    mesh_of,
    my_part,
    set_environment,
    settings_of,
    whole_state,
)

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]
CLASSES = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["Mlp"]}


def accelerator_of(plugin: Any, **settings: Any) -> Any:
    start_again()
    take_ranks_for_gpus()
    return Accelerator(cpu=True, fsdp_plugin=plugin, **settings)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(exf.param_groups(model, 0.1), lr=0.02)


def train(accelerator: Any, model: Any, batches: list[Tensor], stop: Path, resume: bool) -> Any:
    """Clipped steps, with a checkpoint in the middle that another run resumes from."""
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    middle = len(batches) // 2
    if resume:
        accelerator.load_state(stop)
    for index, batch in list(enumerate(batches))[middle if resume else 0 :]:
        if index == middle and not resume:
            accelerator.save_state(stop)
        accelerator.backward(loss_of(model, batch))
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return whole_state(model)


def on_one_rank(fuse_on: str, variant: str) -> dict[str, Tensor]:
    model = exf.wrap(dense_model(), settings_of(fuse_on, variant))
    optimizer = optimizer_of(model)
    for batch in BATCHES:
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def by_plugin(rank: int, kind: str) -> tuple[Any, dict[str, Any]]:
    """The model, and what the plugin is told."""
    model = dense_model()
    if kind == "loaded by rank 0" and rank > 0:  # the others have empty memory until it is sharded
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    is_efficient = kind == "loaded by rank 0"
    settings = CLASSES if kind != "sharded before" else {"auto_wrap_policy": "NO_WRAP"}
    return model, settings | {"cpu_ram_efficient_loading": is_efficient}


CASES = [
    ("by accelerate", "forward", "mb"),
    ("by accelerate", "step", "sw"),
    ("by accelerate", "step", "mb"),
    ("sharded before", "forward", "mb"),
    ("sharded before", "step", "mb"),
    ("loaded by rank 0", "forward", "dw"),  # accelerate loads no buffers so, such as banks
    ("loaded by rank 0", "step", "dw"),
]


def on_each_kind(rank: int, folder: Path) -> list[list[dict[str, Tensor]]]:
    set_environment(rank, 2)
    results = []
    for index, (kind, fuse_on, variant) in enumerate(CASES):
        states = []
        for resume in (False, True):
            model, told = by_plugin(rank, kind)
            exf.wrap(model, settings_of(fuse_on, variant))
            if kind == "sharded before":
                exf.fully_shard(model, mesh=mesh_of(2))
            form = "FULL_STATE_DICT" if variant == "sw" else "SHARDED_STATE_DICT"
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=form, **told)
            part = my_part(rank, BATCHES)
            states.append(train(accelerator_of(plugin), model, part, folder / str(index), resume))
        results.append(states)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(2, on_each_kind, tmp_path_factory.mktemp("states"))


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_its_plugin_equals_one_rank_and_resumes(index: int, results: list[Any]) -> None:
    _, fuse_on, variant = CASES[index]
    for of_rank in results:
        assert_same(of_rank[index], on_one_rank(fuse_on, variant))


SPLIT = ["dw", "mb"]


class ReplicateParallel:
    """As in transformers 4, which accelerate looks for in 5 as well."""

    def prepare_module_tp(self, module: nn.Module, mesh: Any) -> None:
        """Spread its parameters and buffers, and take plain tensors."""
        distribute_module(module, mesh, None, self._into, self._out_of)

    def _into(self, module: nn.Module, inputs: Any, mesh: Any) -> Any:
        return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

    def _out_of(self, module: nn.Module, output: Any, mesh: Any) -> Any:
        return output.to_local()


def by_parallelism_config(rank: int, folder: Path) -> list[list[dict[str, Tensor]]]:
    set_environment(rank, 4)
    tensor_parallel.ReplicateParallel = ReplicateParallel  # type: ignore[attr-defined]
    results = []
    for variant in SPLIT:
        states = []
        for resume in (False, True):
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **CLASSES)
            config = ParallelismConfig(tp_size=2, dp_shard_size=2)
            accelerator = accelerator_of(plugin, parallelism_config=config)
            model: Any = exf.wrap(dense_model(), settings_of("step", variant))
            for block in model.blocks:
                plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
                parallelize_module(block, accelerator.torch_device_mesh["tp"], plan)
            part = [batch.chunk(2)[rank // 2] for batch in BATCHES]
            states.append(train(accelerator, model, part, folder / variant, resume))
        results.append(states)
    return results


def test_its_parallelism_config_equals_one_rank_and_resumes(tmp_path: Path) -> None:
    for of_rank in on_ranks(4, by_parallelism_config, tmp_path):
        for variant, states in zip(SPLIT, of_rank, strict=True):
            assert_same(states, on_one_rank("step", variant))


def without_plugin(rank: int) -> dict[str, Tensor]:
    set_environment(rank, 2)
    accelerator = Accelerator(cpu=True)
    model = exf.fully_shard(exf.wrap(dense_model(), settings_of("step")), mesh=mesh_of(2))
    optimizer = accelerator.prepare(optimizer_of(model))
    for batch in my_part(rank, BATCHES):
        accelerator.backward(loss_of(model, batch))
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return whole_state(model)


def test_a_model_that_the_user_shards_needs_no_plugin() -> None:
    assert_same(on_ranks(2, without_plugin), on_one_rank("step", "mb"))
