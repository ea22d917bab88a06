"""transformers' Trainer: a ViT trained from scratch, logged, resumed, and shipped dense.

    python hf_trainer.py --out runs/trainer
    exfusion plot runs/trainer
    exfusion fuse runs/trainer/checkpoint-128 runs/trainer-dense

Stop it and run the same command: it continues from its last checkpoint. Needs exfusion_param,
accelerate, tensorboard, transformers and tyro. Copy this file and replace `make_images` with your
data and `build` with your model. A dense script lacks only the lines marked "ExFusion".
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

import exfusion_param as exf
from exfusion_param.integrations.transformers import ExFusionCallback, ExFusionTrainerMixin


@dataclasses.dataclass
class Settings:
    """Train a ViT of transformers with its Trainer."""

    out: Path = Path("runs/trainer")  # the folder for checkpoints, logs and the dense model
    variant: str = "mb"  # of ExFusion: sw, dw or mb
    num_experts: int = 4  # of each linear
    epochs: int = 4  # passes over the training images
    lr: float = 1e-3  # the highest learning rate
    report_to: tuple[str, ...] = ("tensorboard",)  # trackers of Trainer: wandb, trackio, ...
    smoke: bool = False  # a few images, to see that everything works


class ExFusionTrainer(ExFusionTrainerMixin, Trainer):  # ExFusion
    """Trainer that leaves learned fusion weights without decay and logs what the experts do."""


def make_images(count: int, seed: int) -> list[dict[str, Any]]:
    """Stand-in for your data: one of ten patterns under noise, (1, 28, 28), and its number."""
    patterns = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=draw)
    noise = torch.randn(count, 1, 28, 28, generator=draw)
    images = patterns[labels] + 3 * noise
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]


def build() -> ViTForImageClassification:
    """A small ViT with random weights."""
    config = ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        id2label={number: str(number) for number in range(10)},
    )
    return ViTForImageClassification(config)


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """Share of the images that are classified rightly."""
    logits = predicted.predictions
    assert not isinstance(logits, tuple)
    return {"accuracy": float((logits.argmax(-1) == predicted.label_ids).mean())}


def main(settings: Settings) -> None:
    """Train, from the last checkpoint on if there is one; fuse; load the dense model."""
    torch.manual_seed(0)
    train = make_images(256 if settings.smoke else 4096, seed=1)
    test = make_images(256 if settings.smoke else 1024, seed=2)
    model = build()
    exf.wrap(model, variant=settings.variant, num_experts=settings.num_experts, seed=0)  # ExFusion
    arguments = TrainingArguments(
        output_dir=str(settings.out),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=2,
        learning_rate=settings.lr,
        weight_decay=0.05,
        warmup_steps=10,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=2 if settings.smoke else 10,
        report_to=list(settings.report_to),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = ExFusionTrainer(  # ExFusion, for Trainer
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
        callbacks=[ExFusionCallback()],  # ExFusion: metrics.csv, checkpoints that can be fused
    )
    last = get_last_checkpoint(str(settings.out)) if settings.out.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trained = trainer.evaluate()["eval_accuracy"]

    exf.fuse(model)  # ExFusion: the dense model again
    model.save_pretrained(settings.out / "dense")
    loaded = ViTForImageClassification.from_pretrained(settings.out / "dense")
    plain = Trainer(loaded, arguments, eval_dataset=test, compute_metrics=accuracy)
    shipped = plain.evaluate()["eval_accuracy"]
    print(f"test accuracy: trained {100 * trained:.1f} %, fused and loaded {100 * shipped:.1f} %")


if __name__ == "__main__":
    main(tyro.cli(Settings))
