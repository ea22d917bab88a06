"""transformers' Trainer: a ViT trained from scratch, logged, resumed, and shipped dense.

    python examples/hf_trainer.py --out runs/trainer
    exfusion fuse runs/trainer/checkpoint-376 runs/trainer-dense

Stop it and run the same command: it continues from its last checkpoint.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

import exfusion_param as exf
from exfusion_param.integrations.transformers import ExFusionCallback, ExFusionTrainerMixin
from support import fashion


@dataclasses.dataclass
class Settings:
    """Train a ViT of transformers with its Trainer on a subset of Fashion-MNIST.

    Args:
        out: the folder for checkpoints, logs and the dense model.
        variant: of ExFusion: sw, dw or mb.
        num_experts: experts of each linear.
        epochs: passes over the training images.
        lr: highest learning rate.
        report_to: trackers of Trainer, such as tensorboard, wandb or trackio.
        smoke: a few images, to see that everything works.
    """

    out: Path = Path("runs/trainer")
    variant: str = "mb"
    num_experts: int = 4
    epochs: int = 4
    lr: float = 1e-3
    report_to: tuple[str, ...] = ("tensorboard",)
    smoke: bool = False


class ExFusionTrainer(ExFusionTrainerMixin, Trainer):
    """Trainer that leaves learned fusion weights without decay and logs what the experts do."""


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
        id2label=dict(enumerate(fashion.CLASSES)),
    )
    return ViTForImageClassification(config)


def rows(data: TensorDataset) -> list[dict[str, Any]]:
    """The images as Trainer takes them."""
    images, labels = data.tensors
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """Share of the images that are classified rightly."""
    logits = predicted.predictions
    assert not isinstance(logits, tuple)
    return {"accuracy": float((logits.argmax(-1) == predicted.label_ids).mean())}


def main(settings: Settings) -> None:
    """Train, from the last checkpoint on if there is one; fuse; load the dense model."""
    torch.manual_seed(0)
    train, test = fashion.load(limit=256 if settings.smoke else None)
    model = build()
    exf.wrap(model, variant=settings.variant, num_experts=settings.num_experts, seed=0)
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
        logging_steps=10 if not settings.smoke else 2,
        report_to=list(settings.report_to),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = ExFusionTrainer(
        model,
        arguments,
        train_dataset=rows(train),
        eval_dataset=rows(test),
        compute_metrics=accuracy,
        callbacks=[ExFusionCallback()],
    )
    last = get_last_checkpoint(str(settings.out)) if settings.out.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trained = trainer.evaluate()["eval_accuracy"]

    dense = settings.out / "dense"
    exf.fuse(model).save_pretrained(dense)
    loaded = ViTForImageClassification.from_pretrained(dense)
    plain = Trainer(loaded, arguments, eval_dataset=rows(test), compute_metrics=accuracy)
    shipped = plain.evaluate()["eval_accuracy"]
    print(f"test accuracy: trained {100 * trained:.1f} %, fused and loaded {100 * shipped:.1f} %")


if __name__ == "__main__":
    main(tyro.cli(Settings))
