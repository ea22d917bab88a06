r"""The paper's ImageNet recipe: ViT, DeiT, Swin and PVT, with ExFusion and its controls.

    torchrun --nproc-per-node 8 examples/imagenet.py --data /data/imagenet
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        --max-restarts 3 examples/imagenet.py --data /data/imagenet --model pvt_small --amp
    python examples/imagenet.py --image-size 28 --no-augment --drop-path 0 --epochs 4 \
        --warmup-epochs 1 --batch-size 128 --lr 8e-3 \
        --model-kwargs patch_size 7 embed_dim 96 depth 6 num_heads 3

The same command continues a run that was stopped or killed.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, random_seed

import exfusion_param as exf
from support import methods, ranks, timm_images
from support.classification import OTHERS, SOURCES, Accuracy, Mixing, build, check_dense
from support.experts_apart import displacement_spread
from support.pretraining import Pretraining, start
from support.schedules import with_defaults

DEFAULTS = exf.ExFusionConfig(seed=0)
AUGMENTATION = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}


@dataclasses.dataclass
class Settings:
    """Train a vision Transformer from scratch. The defaults are the paper's, then the model's own.

    Args:
        exfusion: the settings of ExFusion; their seed is that of the whole run.
        method: exfusion, or what it is compared with (support/methods.py).
        model: a model of timm, or pvt_tiny, pvt_small, pvt_medium, pvt_large.
        model_kwargs: whole numbers that the model is made with, such as `depth 6 embed_dim 96`.
        data: an ImageFolder with train/ and val/, or Fashion-MNIST's IDX files; else a subset.
        out: the folder for checkpoints, logs, results.json and the dense model.
        image_size: pixels.
        epochs: passes over the training images; parts of one count.
        batch_size: images of a step, on all ranks together.
        micro_batch: images that a rank's GPU takes at once; by default its share of the step's.
        lr: highest learning rate, for a batch of 1024; it is scaled with the batch.
        weight_decay: of AdamW.
        warmup_epochs: in which the learning rate grows.
        drop_path: rate of stochastic depth; by default that of the model's own recipe.
        clip: largest norm of the gradients; by default likewise, where that clips.
        min_lr: to which the learning rate falls.
        augment: RandAugment, Mixup, CutMix, random erasing and label smoothing.
        fusion_lr: learning rate of routers and learned fusion weights; by default the others'.
        held_out: test on a tenth of the training images instead, to choose settings.
        limit: train on no more than this many images.
        evaluate_every: epochs between two tests, and between two checkpoints.
        ema: decay of an average of the weights, which is then tested and shipped.
        amp: forward in bfloat16.
        workers: processes that load images on each rank.
        smoke: a tiny model and a few steps, to see that everything works.
    """

    exfusion: Annotated[exf.ExFusionConfig, tyro.conf.OmitArgPrefixes] = DEFAULTS
    method: methods.Name = "exfusion"
    model: str = "deit_tiny_patch16_224"
    model_kwargs: dict[str, int] = dataclasses.field(default_factory=dict)
    data: Path | None = None
    out: Path = Path("runs/imagenet")
    image_size: int = 224
    epochs: float = 300
    batch_size: int = 1024
    micro_batch: int | None = None
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 20
    drop_path: float | None = None
    clip: float | None = None
    min_lr: float = 1e-5
    augment: bool = True
    fusion_lr: float | None = None
    held_out: bool = False
    limit: int | None = None
    evaluate_every: float = 1
    ema: float | None = None
    amp: bool = False
    workers: int = 8
    smoke: bool = False


SMOKE: dict[str, Any] = {"image_size": 32, "epochs": 0.02, "batch_size": 64, "workers": 0}
TINY = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def main(given: Settings, device: torch.device) -> None:
    """Train, test, and ship the dense model."""
    if given.smoke:
        kwargs = TINY if given.model == Settings.model else {}
        given = dataclasses.replace(given, **SMOKE, model_kwargs=kwargs)
    settings = with_defaults(given, OTHERS | SOURCES.get(given.model, {}))
    seed = start(settings.out, settings, settings.exfusion.seed)
    options = AUGMENTATION if settings.augment else None, settings.held_out, settings.limit
    images, tests, classes = timm_images.load(settings.data, settings.image_size, *options)
    training = ranks.loader(images, settings.batch_size, settings.workers, seed)
    make = partial(build, settings.model, settings.image_size, classes, settings.model_kwargs)

    def prepare() -> methods.Method:
        torch.manual_seed(seed)  # the same weights for every method
        dense, config = make(drop_path_rate=settings.drop_path), settings.exfusion
        return methods.prepare(settings.method, dense, config.replace(seed=seed))

    method = prepare()
    model = method.model.to(device)
    random_seed(seed, ranks.place()[0])  # what each rank draws for itself
    scale = settings.batch_size / 1024
    fusion_lr = None if settings.fusion_lr is None else settings.fusion_lr * scale
    groups = exf.param_groups(model, settings.weight_decay, fusion_lr=fusion_lr)
    optimizer = exf.ExpertAdamW(groups, settings.lr * scale)
    steps = max(1, round(settings.epochs * len(training)))
    every = max(1, round(settings.evaluate_every * len(training)))
    warmup = {"warmup_t": round(settings.warmup_epochs * len(training)), "warmup_lr_init": 1e-6}
    cosine = {"t_initial": steps, "lr_min": settings.min_lr, "t_in_epochs": False}
    scheduler = CosineLRScheduler(optimizer, **cosine, **warmup)
    run = Pretraining(
        out=settings.out,
        method=method,
        optimizer=optimizer,
        loader=training,
        loss=Mixing(classes, settings.augment),
        schedule=scheduler.step_update,
        evaluate=Accuracy(tests, 250, settings.workers),
        steps=steps,
        evaluate_every=every,
        save_every=every,
        micro_batch=settings.micro_batch,
        average=None if settings.ema is None else ModelEmaV3(model, decay=settings.ema),
        clip=settings.clip,
        amp=settings.amp,
    )
    if run.train():
        shipped = run.finish(settings, spread=displacement_spread(model, prepare().model))
        ranks.say(check_dense(settings.out, shipped, make, run.evaluate))


if __name__ == "__main__":
    with ranks.job() as device:
        main(tyro.cli(Settings), device)
