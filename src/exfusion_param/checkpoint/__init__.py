"""Checkpoints on disk: those of a run, which it continues from, and wrapped ones made dense.

`Checkpoints` saves and resumes a run, on one process or many (`run`). `fuse_checkpoint` makes a
dense model of a wrapped checkpoint without its code; `save_config` writes beside a checkpoint of
any trainer what that needs to know (`dense`). How both lie on disk is in `files`.

`files` imports neither of the others; `run` imports `dense` to describe the models it saves.
"""

from .dense.description import describe, save_config
from .dense.fusing import fuse_checkpoint
from .files.errors import CheckpointError
from .run.checkpoints import Checkpoints
from .run.stop_request import StopRequest

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "StopRequest",
    "describe",
    "fuse_checkpoint",
    "save_config",
]
