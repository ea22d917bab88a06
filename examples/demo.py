"""Train a small ViT on real images three ways, side by side, and ship the fused one.

- dense: the model as it is.
- control: dense as well, started from the mean of the experts that ExFusion starts from.
- exfusion: the model wrapped.

    python examples/demo.py --variant mb --num-experts 4 --out runs/demo

Stop it with Ctrl-C, or kill it: the same command continues, and ends as if it had not been stopped.
"""

import copy
import dataclasses
import json
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import timm
import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import nn

import exfusion_param as exf
from exfusion_param.history import write_history
from support import report
from support.data import load
from support.training import DEVICE, Comparison

DEFAULTS = exf.ExFusionConfig(seed=0)


@dataclasses.dataclass
class Settings:
    """Train a small ViT dense, dense from the mean of the experts, and with ExFusion.

    Args:
        exfusion: the settings of ExFusion; their seed is that of the whole run.
        data: a folder of Fashion-MNIST's IDX files, or an ImageFolder with train/ and test/. The
            default is a subset of Fashion-MNIST that comes with the repository.
        out: the folder for the model, the metrics and the report.
        image_size: pixels that the images of an ImageFolder are resized to.
        patch_size: pixels of a patch, a divisor of the image size.
        epochs: passes over the training images.
        batch_size: images in a batch.
        lr: highest learning rate of AdamW.
        weight_decay: of AdamW.
        save_every: steps between two checkpoints.
        smoke: train for a moment on a few images, to see that everything works.
    """

    exfusion: Annotated[exf.ExFusionConfig, tyro.conf.OmitArgPrefixes] = DEFAULTS
    data: Path | None = None
    out: Path = Path("runs/demo")
    image_size: int = 28
    patch_size: int = 7
    epochs: int = 8
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    save_every: int = 25
    smoke: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which a checkpoint remembers."""
        paths = {"data": self.data and str(self.data.resolve()), "out": str(self.out)}
        exfusion = self.exfusion.to_dict()
        return vars(self) | paths | {"exfusion": exfusion, "seed": exfusion["seed"] or 0}


def build_models(arguments: dict[str, Any], config: exf.ExFusionConfig) -> dict[str, nn.Module]:
    """The three models, from the same initial weights and the same draws of the experts."""
    torch.manual_seed(config.seed or 0)
    dense = timm.create_model(**arguments)
    exfusion = exf.wrap(copy.deepcopy(dense), config)
    control = exf.fuse(exf.wrap(copy.deepcopy(dense), config, variant="sw"))
    return {"dense": dense, "control": control, "exfusion": exfusion}


def ship(comparison: Comparison, arguments: dict[str, Any], settings: Settings) -> str:
    """Fuse the trained model, save it, check it in a fresh dense model; what the check found."""
    run, images = comparison.runs["exfusion"], comparison.data.test
    trained, _ = run.logits(images)
    exf.fuse(run.model)
    save_file(run.model.state_dict(), settings.out / "model.safetensors")
    config = {"model": arguments, "exfusion": settings.exfusion.to_dict()}
    (settings.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    run.model = timm.create_model(**arguments).to(DEVICE)
    run.model.load_state_dict(load_file(settings.out / "model.safetensors"), strict=True)
    fused, _ = run.logits(images)
    difference = (fused - trained).abs().max().item()
    if difference > 1e-4:
        sys.exit(f"The fused model is another one: its logits differ by {difference:.2g}.")
    agree = f"fused and trained logits agree on {len(images)} images"
    return f"{agree}, max difference {difference:.2g}"


def main(settings: Settings) -> None:
    """Train, ship and report."""
    seed = settings.exfusion.seed or 0  # the control needs the same draws
    settings = dataclasses.replace(settings, exfusion=settings.exfusion.replace(seed=seed))
    data = load(settings.data, settings.image_size, limit=200 if settings.smoke else None)
    if settings.smoke:
        settings = dataclasses.replace(settings, epochs=2, batch_size=20, save_every=4)
    arguments = {
        "model_name": "vit_tiny_patch16_224",
        "img_size": data.size,
        "patch_size": settings.patch_size,
        "in_chans": data.channels,
        "num_classes": len(data.classes),
        "embed_dim": 96,
        "depth": 6,
        "num_heads": 3,
    }
    models = build_models(arguments, settings.exfusion)
    summary = exf.summarize(models["exfusion"])
    print(summary)
    training = {"exfusion": summary.training_parameters}
    comparison = Comparison(models, data, settings.out, settings.to_dict())
    comparison.train()
    write_history(settings.out / "metrics.csv", comparison.rows)
    results = [
        report.Result(
            run=name,
            is_right=run.is_right(data.test),
            step_ms=median(row[f"step_ms/{name}"] for row in comparison.rows),
            training_parameters=training.get(name, summary.shipped_parameters),
            shipped_parameters=summary.shipped_parameters,
        )
        for name, run in comparison.runs.items()
    ]
    check = ship(comparison, arguments, settings)
    path = report.write_report(settings.out, results, check, settings.to_dict())
    print(report.table(results), f"Check: {check}", f"Report: {path}", sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
