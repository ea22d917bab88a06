"""Checkpoints on disk: those of a run, which it continues from, and wrapped ones made dense.

`Checkpoints` saves and resumes a run, on one process or many. `fuse_checkpoint` makes a dense model
of a wrapped checkpoint without its code; `save_config` says beside a checkpoint of any trainer what
that needs to know. Nothing here is ever unpickled but tensors in torch's own files.
"""

from .checkpoints import Checkpoints
from .description import describe, save_config
from .fusing import fuse_checkpoint
from .reader import CheckpointError
from .stop_request import StopRequest

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "StopRequest",
    "describe",
    "fuse_checkpoint",
    "save_config",
]
