"""Refuses what would copy or compile away a module whose state has to exist only once."""

from __future__ import annotations

from typing import NoReturn

from torch import nn


class SingleInstance(nn.Module):
    """A module that refuses DataParallel's replicas and TorchScript."""

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "nn.DataParallel copies the model for each forward, and fusion weights would be lost "
            "with the copies. Use torch.nn.parallel.DistributedDataParallel."
        )

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "TorchScript cannot compile a wrapped model. Call fuse(model) first, or fuse "
            "a copy.deepcopy(model) to continue training."
        )
