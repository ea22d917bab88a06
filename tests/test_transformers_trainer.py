"""transformers' Trainer trains as a plain loop does, and resumes as if it had not stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import exfusion_param as exf
from exfusion_param.checkpoint import fuse_checkpoint, save_config
from exfusion_param.history import read_history
from exfusion_param.integrations.transformers import ExFusionCallback, ExFusionTrainerMixin

VARIANTS = ["sw", "dw", "mb"]
STEPS, MICRO_BATCHES, SIZE = 6, 2, 4


class InOrder(ExFusionTrainerMixin, Trainer):
    """Takes the samples in their order, for the plain loop to do the same."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def build(variant: str) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return exf.wrap(BertForSequenceClassification(config).double(), variant=variant, seed=0)


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(STEPS * MICRO_BATCHES * SIZE):
        tokens = torch.randint(20, (6,), generator=generator)
        mask = (torch.arange(6) < torch.randint(2, 7, (), generator=generator)).long()
        rows.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens[0] % 2})
    return rows


def trainer_for(
    model: nn.Module, out: Path, kind: type[Trainer] = InOrder, **settings: Any
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=MICRO_BATCHES, learning_rate=0.01, weight_decay=0.1,
        warmup_steps=2, max_grad_norm=0.5, save_steps=3, logging_steps=2, use_cpu=True,
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    return kind(
        model,
        arguments,
        train_dataset=samples(),
        eval_dataset=samples()[:8],
        callbacks=[ExFusionCallback()],
    )


def train_by_hand(model: nn.Module) -> None:
    decays, rest = [], []
    for name, parameter in model.named_parameters():
        is_exempt = "bias" in name or "LayerNorm" in name or "fusion_weights.weights" in name
        (rest if is_exempt else decays).append(parameter)
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    rows = iter(samples())
    for _ in range(STEPS):
        for _ in range(MICRO_BATCHES):
            batch = [next(rows) for _ in range(SIZE)]
            columns = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
            model(**columns).loss.backward()  # summed, as Trainer does where forward takes **kwargs
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def assert_same_state(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_as_a_plain_loop_does(variant: str, tmp_path: Path) -> None:
    model, by_hand = build(variant), build(variant)
    trainer_for(model, tmp_path).train()
    train_by_hand(by_hand)
    assert_same_state(model, by_hand, 1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one(variant: str, tmp_path: Path) -> None:
    whole, resumed = build(variant), build(variant)
    trainer_for(whole, tmp_path).train()
    trainer_for(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_state(resumed, whole, 0)


def test_a_checkpoint_fuses_on_the_command_line_and_loads_with_transformers(
    tmp_path: Path,
) -> None:
    model = build("mb")
    trainer_for(model, tmp_path).train()
    fuse_checkpoint(tmp_path / "checkpoint-6", tmp_path / "dense")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert_same_state(loaded, exf.fuse(model), 0)


def test_save_model_says_how_to_fuse_and_a_users_own_save_pretrained_stays(tmp_path: Path) -> None:
    trainer = trainer_for(build("dw"), tmp_path)
    calls, inherited = [], trainer.model.save_pretrained
    trainer.model.save_pretrained = lambda *a, **k: (calls.append(k), inherited(*a, **k))
    for name in ("first", "second"):
        trainer.save_model(str(tmp_path / name))
        fuse_checkpoint(tmp_path / name, tmp_path / f"{name}-dense")
    assert [call["save_original_format"] for call in calls] == [False, False]


def test_a_second_run_in_the_same_folder_leaves_the_first_ones_metrics(tmp_path: Path) -> None:
    for _ in range(2):
        trainer_for(build("mb"), tmp_path).train()
    for name in ("metrics.csv", "metrics.1.csv"):
        assert read_history(tmp_path / name)["step"] == [2, 4, 6]


def test_a_fused_model_drops_the_entry_about_experts_in_its_config(tmp_path: Path) -> None:
    build("sw").save_pretrained(tmp_path / "wrapped")
    save_config(build("sw"), tmp_path / "wrapped")
    config = BertConfig.from_pretrained(tmp_path / "wrapped")
    model = exf.fuse(exf.wrap(BertForSequenceClassification(config), variant="sw"))
    model.save_pretrained(tmp_path / "dense")
    assert "exfusion" not in (tmp_path / "dense" / "config.json").read_text()


def test_metrics_reach_every_log_and_a_resumed_run_writes_its_rows_again(tmp_path: Path) -> None:
    trainer = trainer_for(build("mb"), tmp_path)
    trainer.train()
    key = "bank_mass/bert.encoder.layer.0"
    masses = [log[key] for log in trainer.state.log_history if key in log]
    assert masses == pytest.approx([1 - 0.95**step for step in (2, 4, 6)])
    history = read_history(tmp_path / "metrics.csv")
    assert history["step"] == [2, 4, 6]
    assert history[key] == pytest.approx(masses)
    assert all(loss > 0 for loss in history["loss"])
    checkpoint = str(tmp_path / "checkpoint-3")
    trainer_for(build("mb"), tmp_path).train(resume_from_checkpoint=checkpoint)
    assert read_history(tmp_path / "metrics.csv")["step"] == [2, 4, 6]


@pytest.mark.parametrize("kind", [Trainer, InOrder])
def test_a_plain_trainer_decays_learned_fusion_weights_and_the_mixin_does_not(
    kind: type[Trainer], tmp_path: Path
) -> None:
    trainer = trainer_for(build("dw"), tmp_path, kind)
    names = trainer.get_decay_parameter_names(trainer.model)
    assert any("weight.original" in name for name in names)
    assert not any("bias" in name for name in names)
    assert any("fusion_weights.weights" in name for name in names) == (kind is Trainer)


def vit(variant: str) -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=4, patch_size=2, num_channels=1, hidden_size=8, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    return exf.wrap(ViTForImageClassification(config).double(), variant=variant, seed=0)


def test_a_model_that_transformers_renames_resumes_and_fuses_under_its_own_names(
    tmp_path: Path,
) -> None:
    def run(resume: str | None = None, kind: type[Trainer] = InOrder) -> nn.Module:
        trainer = trainer_for(vit("mb"), tmp_path / kind.__name__, kind)
        generator = torch.Generator().manual_seed(0)
        count = STEPS * MICRO_BATCHES * SIZE
        images = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
        trainer.train_dataset = [
            {"pixel_values": image, "labels": torch.tensor(i % 2)} for i, image in enumerate(images)
        ]
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = run()
    assert_same_state(run(str(tmp_path / "InOrder" / "checkpoint-3")), whole, 0)
    fuse_checkpoint(tmp_path / "InOrder" / "checkpoint-6", tmp_path / "dense")
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "dense")
    assert_same_state(loaded, exf.fuse(whole), 0)
    run(kind=Trainer)
    with pytest.raises(ValueError, match=r"was saved under other names.*save_original_format=Fal"):
        run(str(tmp_path / "Trainer" / "checkpoint-3"), Trainer)


def test_the_best_model_is_loaded_at_the_end_and_a_fused_model_still_logs(tmp_path: Path) -> None:
    trainer = trainer_for(
        build("mb"), tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True
    )
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    saved = load_file(best / "model.safetensors")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, saved[name])
    exf.fuse(trainer.model)
    trainer.log({"loss": 1.0})
    assert "eval_loss" in trainer.evaluate()
