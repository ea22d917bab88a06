r"""A fused backbone in models for segmentation: Semantic FPN and UperNet, on ADE20K or on scenes.

    torchrun --nproc-per-node 8 examples/segmentation.py --backbone runs/pvt --data /data/ADE20K
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        examples/segmentation.py --backbone runs/deit --data /data/ADE20K --head upernet --amp
    python examples/segmentation.py --backbone runs/imagenet --size 96 --steps 1000 --lr 2e-4 \
        --evaluate-every 500 --workers 0

The backbone is the dense model that examples/imagenet.py ships; nothing here knows of experts.
The same command continues a run that was stopped or killed.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from support import labelled_images, ranks
from support.downstream import Segmenter, pixel_loss
from support.methods import Method
from support.pretraining import Pretraining, moved, start
from support.pyramid import Pyramid
from support.scenes import IGNORED
from support.schedules import (
    POWERS,
    SEGMENTATION,
    UPERNET_WARMUP_START,
    decayed,
    warmed_up,
    with_defaults,
)


@dataclasses.dataclass
class Settings:
    """Train a model for segmentation around a backbone, on ADE20K or scenes.

    The defaults are those of PVT's Semantic FPN, and of mmsegmentation's DeiT in UperNet.

    Args:
        backbone: what examples/imagenet.py left in its folder.
        head: fpn is Semantic FPN.
        data: ADE20K's folder with images/ and annotations/, or Fashion-MNIST's IDX files, whose
            garments are pasted into scenes; the default is the embedded subset.
        out: the folder for checkpoints, logs, results.json and the model.
        size: pixels of the images to train on.
        scenes: to train on.
        steps: of the optimizer; by default the head's. The paper's second row of each DeiT in
            UperNet has 160,000.
        batch_size: images of a step, on all ranks together; by default the head's.
        lr: highest learning rate of AdamW, which falls to zero; by default the head's.
        weight_decay: of AdamW; by default the head's.
        warmup_steps: in which the learning rate grows; by default the head's.
        evaluate_every: steps between two measurements.
        amp: forward in bfloat16.
        workers: processes that load on each rank.
        seed: of the head and the order of the images.
        smoke: a few small scenes, to see that everything works.
    """

    backbone: Path
    head: Literal["fpn", "upernet"] = "fpn"
    data: Path | None = None
    out: Path = Path("runs/segmentation")
    size: int = 512
    scenes: int = 2000
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    warmup_steps: int | None = None
    evaluate_every: int = 4000
    amp: bool = False
    workers: int = 4
    seed: int = 0
    smoke: bool = False


SMOKE: dict[str, Any] = {"size": 64, "scenes": 10, "steps": 2, "batch_size": 2, "workers": 0}


class MeanIoU:
    """Mean intersection over union of the classes, in percent, over all ranks' images.

    Args:
        images: to test on, with the classes of their pixels.
        classes: how many.
        workers: processes that load.
    """

    def __init__(self, images: Any, classes: int, workers: int) -> None:
        self.loader = DataLoader(ranks.mine(images), 4, num_workers=workers)
        self.measure = MulticlassJaccardIndex(classes, ignore_index=IGNORED)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`miou`."""
        device = next(model.parameters()).device
        measure = self.measure.to(device)
        measure.reset()
        for batch in self.loader:
            images, classes = moved(batch, device)
            measure.update(model(images)[0].argmax(dim=1), classes)
        return {"miou": 100 * measure.compute().item()}


def main(given: Settings, device: torch.device) -> None:
    """Train and test."""
    if given.smoke:
        given = dataclasses.replace(given, **SMOKE)
    settings = with_defaults(given, SEGMENTATION[given.head])
    start(settings.out, settings, settings.seed)
    images, tests, classes = labelled_images.for_segmentation(
        settings.data, settings.size, settings.scenes
    )
    model = Segmenter(Pyramid.load(settings.backbone), settings.head, classes).to(device)
    groups = decayed(model, settings.head, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, settings.lr)
    fall = PolynomialLR(optimizer, settings.steps, POWERS[settings.head])
    scheduler = warmed_up(
        optimizer, fall, settings.warmup_steps, settings.steps, UPERNET_WARMUP_START
    )
    run = Pretraining(
        out=settings.out,
        method=Method(model),
        optimizer=optimizer,
        loader=ranks.loader(images, settings.batch_size, settings.workers, settings.seed),
        loss=pixel_loss,
        schedule=lambda step: scheduler.step() if step else None,
        evaluate=MeanIoU(tests, classes, settings.workers),
        steps=settings.steps,
        evaluate_every=settings.evaluate_every,
        save_every=settings.evaluate_every,
        amp=settings.amp,
        more={"scheduler": scheduler},
    )
    if run.train():
        run.finish(settings)
        ranks.say(f"mean IoU {run.history.rows[-1]['miou']:.2f} %")


if __name__ == "__main__":
    with ranks.job() as device:
        main(tyro.cli(Settings), device)
