"""Ranks that run different FFNs at the same time: all raise promptly, or pool at the step."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import exfusion_param as exf
from exfusion_param.fusion_weights.memory_bank import MemoryBank
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.ranks import on_ranks

SOON = 10.0
"""Seconds; starting a first process group takes most of them."""


class Dropping(FFNs):
    """Skips whole blocks, as stochastic depth does."""

    dropped: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            if index != self.dropped:
                x = x + block(x)
        return self.head(x)


def train(rank: int, fuse_on: Any, dropped: int, is_ddp: bool) -> tuple[str, float, list[Any]]:
    """What a rank raises if rank 1 drops a block at the second step, after how long; its banks."""
    torch.manual_seed(0)
    model: nn.Module = exf.wrap(Dropping(depth=3).double(), fuse_on=fuse_on, seed=0)
    inner = model
    if is_ddp:
        model = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    begin = time.monotonic()
    try:
        for step in range(3):
            inner.dropped = dropped if rank == 1 and step == 1 else None
            loss_of(model, inputs(seed=rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        return str(error), time.monotonic() - begin, []
    banks = [module.bank.tolist() for module in model.modules() if isinstance(module, MemoryBank)]
    return "", time.monotonic() - begin, banks


@pytest.mark.processes
@pytest.mark.parametrize(
    ("dropped", "where"),
    [
        (0, ("forward of 'blocks.0.fc1'", "forward of 'blocks.1.fc1'")),
        (1, ("forward of 'blocks.1.fc1'", "forward of 'blocks.2.fc1'")),
        (2, ("forward of 'blocks.2.fc1'", "backward of 'blocks.1.fc1'")),
    ],
)
@pytest.mark.parametrize("is_ddp", [True, False])
def test_all_ranks_raise_soon_where_one_drops_an_ffn(
    dropped: int, where: tuple[str, str], is_ddp: bool
) -> None:
    for message, seconds, _ in on_ranks(2, train, "forward", dropped, is_ddp):
        assert f": rank 0 the {where[0]}, rank 1 the {where[1]}." in message
        assert 'wrap with fuse_on="step"' in message
        assert seconds < SOON


@pytest.mark.processes
def test_under_step_ranks_may_drop_different_ffns() -> None:
    (first, _, banks), (second, _, others) = on_ranks(2, train, "step", 1, True)
    assert first == second == ""
    assert banks == others
    assert all(sum(bank) > 0.1 for bank in banks)
