"""transformers on several ranks: Trainer's `fsdp_config`, and models that it loads in parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import exfusion_param as exf
from exfusion_param.integrations.transformers import ExFusionCallback, ExFusionTrainerMixin
from exfusion_testing.accelerators import start_again, take_ranks_for_gpus
from exfusion_testing.ranks import on_ranks
from exfusion_testing.sharded import (
    VARIANTS,
    assert_same,
    set_environment,
    settings_of,
    whole_state,
)

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]
STEPS, SIZE, WORDS = 4, 8, 32
CONFIG = LlamaConfig(
    vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16, eos_token_id=1,
)  # fmt: skip


class InOrder(ExFusionTrainerMixin, Trainer):
    """Takes the samples in their order."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def dense_model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).double()


def samples() -> Tensor:
    return torch.randint(WORDS, (STEPS * SIZE, 6), generator=torch.Generator().manual_seed(0))


def by_trainer(out: Path, ranks: int, model: nn.Module, checkpoint: Path | None) -> Any:
    sharding = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
    }
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=SIZE // ranks,
        learning_rate=0.01, weight_decay=0.1, max_grad_norm=0.1, save_steps=2, logging_steps=2,
        use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        **(sharding if ranks > 1 else {}),
    )  # fmt: skip
    if ranks > 1:
        take_ranks_for_gpus()
    rows = [{"input_ids": words, "labels": words} for words in samples()]
    trainer = InOrder(model, arguments, train_dataset=rows, callbacks=[ExFusionCallback()])
    assert trainer.accelerator.is_fsdp2 == (ranks > 1)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return whole_state(trainer.model)


def sharded_by_trainer(rank: int, folder: Path) -> list[list[dict[str, Tensor]]]:
    set_environment(rank, 2)
    results = []
    for fuse_on, variant in CASES:
        out, states = folder / f"{fuse_on}-{variant}", []
        for checkpoint in (None, out / "checkpoint-2"):
            start_again()
            model = exf.wrap(dense_model(), settings_of(fuse_on, variant))
            states.append(by_trainer(out, 2, model, checkpoint))
        results.append(states)
    return results


CASES = [("forward", "mb"), ("step", "dw"), ("step", "mb")]


def test_trainer_shards_by_its_config_and_resumes(tmp_path: Path) -> None:
    results = on_ranks(2, sharded_by_trainer, tmp_path)
    for index, (fuse_on, variant) in enumerate(CASES):
        model = exf.wrap(dense_model(), settings_of(fuse_on, variant))
        expected = by_trainer(tmp_path / "alone" / str(index), 1, model, None)
        for of_rank in results:
            assert_same(of_rank[index], expected)


def train(model: Any) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for words in samples().split(SIZE):
        model(input_ids=words, labels=words).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole_state(model)


def loaded_in_parts(rank: int, folder: Path) -> str:
    set_environment(rank, 2)
    parts = DistributedConfig(tp_plan="auto", tp_size=2)
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=parts)
    with pytest.raises(ValueError, match="DTensor") as caught:
        exf.wrap(model, fuse_on="step")
    return str(caught.value)


def by_torch(model: Any, mesh: Any) -> Any:
    for layer in model.model.layers:
        plan: Any = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
        parallelize_module(layer.mlp, mesh, plan | {"down_proj": RowwiseParallel()})
    return model


def loaded_whole(rank: int, folder: Path) -> list[dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (2,))
    states = []
    for variant in VARIANTS:
        for split in (by_torch, apply_tensor_parallelism):
            model = LlamaForCausalLM.from_pretrained(folder)
            states.append(train(split(exf.wrap(model, settings_of("step", variant)), mesh)))
    return states


def test_a_model_that_is_loaded_in_parts_is_refused_and_the_way_out_is_right(
    tmp_path: Path,
) -> None:
    dense_model().save_pretrained(tmp_path)
    for message in on_ranks(2, loaded_in_parts, tmp_path):
        assert "Wrap first, shard after" in message
    expected = [
        train(exf.wrap(dense_model(), settings_of("step", variant)))
        for variant in VARIANTS
        for _ in range(2)
    ]
    for states in on_ranks(2, loaded_whole, tmp_path):
        for state, right in zip(states, expected, strict=True):
            assert_same([state], right)
