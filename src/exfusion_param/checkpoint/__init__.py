"""Checkpoints on disk: runs that resume, and wrapped checkpoints turned into dense ones.

`Checkpoints` saves and resumes a run, on one process or many (`run`). `fuse_checkpoint` turns a
wrapped checkpoint into a dense one without the model's code; `save_config` records what it needs
to know beside a checkpoint of any trainer (`dense`). `files` defines the format on disk.

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
