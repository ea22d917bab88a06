"""What the evidence compares, as arguments of a recipe."""

from typing import NamedTuple

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
    "mb, shared displacement": "--fuse-on step --displacement shared",
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


class Task(NamedTuple):
    """A recipe at a scale.

    Args:
        recipe: a script in examples/.
        common: arguments of every run.
        tuning: more of those that choose a learning rate.
        rates: learning rates to choose from.
        measure: a column of the results.
        sign: 1 if more is better, -1 if less is.
        title: of the measure.
        length: the argument that says how long a run is, and its value.
    """

    recipe: str
    common: str
    tuning: str
    rates: tuple[str, ...]
    measure: str
    sign: int
    title: str
    length: tuple[str, float]


TASKS = {
    "images": Task(
        "imagenet.py",
        "--image-size 28 --no-augment --drop-path 0 --workers 0 --batch-size 128 "
        "--warmup-epochs 0.25 --model-kwargs patch_size 7 embed_dim 64 depth 4 num_heads 4",
        "--held-out --epochs 1",
        ("16e-3", "32e-3", "64e-3"),
        "accuracy",
        1,
        "test accuracy, %",
        ("--epochs", 2.0),
    ),
    "text": Task(
        "t5_pretrain.py",
        "--inputs 64 --batch-size 32 --optimizer adamw --workers 0 "
        "--evaluate-every 200 --save-every 600 --model-kwargs d_model 64 d_ff 128 num_layers 2 "
        "num_heads 4 d_kv 16",
        "--steps 200",
        ("2e-3", "4e-3"),
        "test_loss",
        -1,
        "test loss, nats for each token",
        ("--steps", 600),
    ),
}
