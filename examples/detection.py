r"""A fused backbone in detectors: Mask R-CNN and RetinaNet, on COCO or on scenes.

    torchrun --nproc-per-node 8 examples/detection.py --backbone runs/pvt --data /data/coco
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        examples/detection.py --backbone runs/pvt --data /data/coco --head retinanet
    python examples/detection.py --backbone runs/imagenet --size 128 --steps 1000 --batch-size 2 \
        --lr 2e-4 --evaluate-every 500 --workers 0

The backbone is the dense model that examples/imagenet.py ships; nothing here knows of experts.
The same command continues a run that was stopped or killed.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision

from support import labelled_images, ranks
from support.downstream import detector
from support.methods import Method
from support.pretraining import Batch, Pretraining, moved, start
from support.pyramid import Pyramid
from support.schedules import detection, warmed_up, with_defaults


@dataclasses.dataclass
class Settings:
    """Train a detector around a backbone. The defaults are PVT's, for 12 epochs of COCO.

    Args:
        backbone: what examples/imagenet.py left in its folder.
        head: mask-rcnn or retinanet.
        data: COCO's folder with train2017/, val2017/ and annotations/, or Fashion-MNIST's IDX
            files, whose garments are pasted into scenes; the default is the embedded subset.
        out: the folder for checkpoints, logs, results.json and the model.
        size: pixels of the images' shorter side.
        scenes: to train on.
        steps: by default 12 epochs; the learning rate falls to a tenth after 8 and 11 twelfths.
        batch_size: images of a step, on all ranks together; by default 16, for pvt_large 8.
        lr: highest learning rate of AdamW; by default the head's, for pvt_large divided by 1.4.
        warmup_steps: in which the learning rate grows.
        weight_decay: of AdamW.
        evaluate_every: steps between two measurements; by default an epoch.
        workers: processes that load on each rank.
        seed: of the head and the order of the images.
        smoke: a few small scenes, to see that everything works.
    """

    backbone: Path
    head: Literal["mask-rcnn", "retinanet"] = "mask-rcnn"
    data: Path | None = None
    out: Path = Path("runs/detection")
    size: int = 800
    scenes: int = 2000
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float = 1e-4
    warmup_steps: int = 500
    evaluate_every: int | None = None
    workers: int = 4
    seed: int = 0
    smoke: bool = False


SMOKE: dict[str, Any] = {"size": 64, "scenes": 10, "steps": 2, "batch_size": 2, "workers": 0}


def detection_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of a detector's losses."""
    images, targets = batch
    losses: dict[str, Tensor] = model(images, targets)
    return torch.stack(list(losses.values())).sum()


class AveragePrecision:
    """COCO's average precision of boxes, and of masks, in percent, over all ranks' images.

    Args:
        images: to test on, with their targets.
        with_masks: measure masks as well.
        workers: processes that load.
    """

    def __init__(self, images: Any, with_masks: bool, workers: int) -> None:
        self.loader = DataLoader(
            ranks.mine(images), 4, num_workers=workers, collate_fn=ranks.as_lists
        )
        kinds: Any = ("bbox", "segm") if with_masks else "bbox"
        self.measure = MeanAveragePrecision(iou_type=kinds)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`map`, or `bbox_map` and `segm_map`."""
        device = next(model.parameters()).device
        self.measure.reset()
        for batch in self.loader:
            images, targets = moved(batch, device)
            found = model(images)
            for one in found:
                if "masks" in one:
                    one["masks"] = one["masks"][:, 0] > 0.5
            self.measure.update(
                moved(found, torch.device("cpu")), moved(targets, torch.device("cpu"))
            )
        values = self.measure.compute()
        return {n: 100 * float(v) for n, v in values.items() if n.endswith("map")}


def main(given: Settings, device: torch.device) -> None:
    """Train and test."""
    if given.smoke:
        given = dataclasses.replace(given, **SMOKE)
    pyramid = Pyramid.load(given.backbone)
    settings = with_defaults(given, detection(given.head, pyramid.name))
    start(settings.out, settings, settings.seed)
    data = labelled_images.for_detection(settings.data, settings.size, settings.scenes)
    images, tests, classes = data
    model = detector(pyramid, settings.head, classes, settings.size).to(device)
    seed, workers, decay = settings.seed, settings.workers, settings.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=decay)
    drops = MultiStepLR(optimizer, [settings.steps * 8 // 12, settings.steps * 11 // 12])
    scheduler = warmed_up(optimizer, drops, settings.warmup_steps, settings.steps)
    run = Pretraining(
        out=settings.out,
        method=Method(model),
        optimizer=optimizer,
        loader=ranks.loader(images, settings.batch_size, workers, seed, collate_fn=ranks.as_lists),
        loss=detection_loss,
        schedule=lambda step: scheduler.step() if step else None,
        evaluate=AveragePrecision(tests, settings.head == "mask-rcnn", workers),
        steps=settings.steps,
        evaluate_every=settings.evaluate_every,
        save_every=settings.evaluate_every,
        more={"scheduler": scheduler},
    )
    if run.train():
        run.finish(settings)
        ranks.say(f"average precision {run.history.rows[-1]}")


if __name__ == "__main__":
    with ranks.job() as device:
        main(tyro.cli(Settings), device)
