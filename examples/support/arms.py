"""What the evidence compares, as arguments of a recipe."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Self

from support import corpus
from support.paper import TABLES

ARMS = {
    "dense": "--method dense",
    "control": "--method control",
    "small init": "--method small-init",
    "sw": "--variant sw",
    "dw": "--variant dw",
    "mb": "",
    "mb, uniform bank": "--bank-init uniform",
    "mb, uniform bank, fixed router": "--bank-init uniform --fusion-lr 0",
    'mb, "step"': "--fuse-on step",
    "MoE-4-1": "--method moe",
}
"""The paper's variants, the ways this package holds experts, and what they are compared with."""

CANDIDATES = {
    "weights drawn for each FFN": "--method subspace",
    "weights drawn for the network": "--method subspace-network",
    "drawn for each FFN, cosine term": "--method subspace-cosine",
    "drawn near the mid-point": "--method subspace-near",
    "mb, drawn around the bank": "--method around-bank --bank-init uniform",
    "samples parted, experts averaged": "--method partitioned",
    "mb, learning rate for each expert": "--method expert-lr --bank-init uniform",
    "mb, noise that differs": "--method noise --bank-init uniform",
}
"""What could make the experts differ (diversity.py)."""

CONTROL = "control"


class Measure(NamedTuple):
    """What is compared.

    Args:
        name: a column of the results.
        sign: 1 if more is better, -1 if less is.
        title: with its unit.
        paper: what the paper gives for an arm.
    """

    name: str
    sign: int
    title: str
    paper: Mapping[str, str] = MappingProxyType({})


ACCURACY = Measure("accuracy", 1, "test accuracy, %", TABLES["VI"].column("top-1"))
LOSS = Measure("test_loss", -1, "test loss, nats for each token")


class Task(NamedTuple):
    """A recipe at a scale.

    Args:
        recipe: a script in examples/.
        measure: what is compared.
        common: arguments of every run.
        tuning: more of those that choose a learning rate.
        rates: learning rates to choose from.
        length: the argument that says how long a run is, and its value.
    """

    recipe: str
    measure: Measure
    common: str
    tuning: str
    rates: tuple[float, ...]
    length: tuple[str, float]

    def lasting(self, length: float) -> Self:
        """The same for another length, whole where this one's is."""
        name, usual = self.length
        return self._replace(length=(name, type(usual)(round(length, 3))))


TASKS = {
    ("images", "small"): Task(
        "imagenet.py",
        ACCURACY,
        "--image-size 28 --no-augment --drop-path 0 --min-lr 0 --workers 0 --batch-size 128 "
        "--warmup-epochs 0.1 --model-kwargs patch_size 7 embed_dim 64 depth 4 num_heads 4",
        "--held-out --epochs 0.5",
        (16e-3, 32e-3, 64e-3),
        ("--epochs", 1.0),
    ),
    ("images", "few"): Task(
        "imagenet.py",
        ACCURACY,
        "--limit 4000 --image-size 28 --no-augment --drop-path 0 --min-lr 0 --workers 0 "
        "--batch-size 128 --warmup-epochs 1 --evaluate-every 5 "
        "--model-kwargs patch_size 14 embed_dim 96 depth 2 num_heads 4",
        "--held-out --epochs 10",
        (16e-3, 32e-3),
        ("--epochs", 20.0),
    ),
    ("images", "gpu"): Task(
        "imagenet.py",
        ACCURACY,
        "--image-size 28 --workers 4 --batch-size 512 --warmup-epochs 2 --amp "
        "--model-kwargs patch_size 4",
        "--held-out --epochs 10",
        (1e-3, 2e-3, 4e-3),
        ("--epochs", 60.0),
    ),
    ("text", "small"): Task(
        "t5_pretrain.py",
        LOSS,
        "--inputs 64 --batch-size 32 --optimizer adamw --workers 0 "
        "--evaluate-every 100 --save-every 400 --model-kwargs d_model 64 d_ff 128 num_layers 2 "
        "num_heads 4 d_kv 16",
        "--fold 1 --steps 150",
        (8e-3, 16e-3, 32e-3),
        ("--steps", 400),
    ),
    ("text", "few"): Task(
        "t5_pretrain.py",
        LOSS,
        f"--held-out {corpus.EMBEDDED} --inputs 64 --batch-size 32 --optimizer adamw --workers 0 "
        "--evaluate-every 100 --save-every 600 --model-kwargs d_model 96 d_ff 192 num_layers 2 "
        "num_heads 4 d_kv 24",
        "--fold 1 --steps 300",
        (4e-3, 8e-3),
        ("--steps", 600),
    ),
    ("text", "gpu"): Task(
        "t5_pretrain.py",
        LOSS,
        "--model small --inputs 128 --batch-size 128 --optimizer adamw --dropout 0.1 --amp "
        "--evaluate-every 200",
        "--fold 1 --steps 1000",
        (5e-4, 1e-3, 2e-3),
        ("--steps", 4000),
    ),
}
"""By what is learned and at which scale.

Few images are learned by heart within 20 epochs. Few texts are one play, read some 30 times, and
tested on held-out passages of it and of others. On a GPU a DeiT-T and T5-small learn until they
have learned.
"""
