"""Optimizers that hold copies of the weights, as those of DeepSpeed's ZeRO and of Megatron."""

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.sharded import assert_same

LR = 0.02
VARIANTS = ["sw", "dw", "mb"]


class Copies:
    """Trains copies of parameters in float32, and copies them into the parameters.

    Args:
        parameters: the model's.
        flat: whether the copy is one flat tensor.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], flat: bool) -> None:
        self.parameters = list(parameters)
        self.flat = flat
        self.copies = [nn.Parameter(tensor.clone()) for tensor in self._copied(lambda p: p)]
        self.optimizer = torch.optim.AdamW(self.copies, LR)

    @torch.no_grad()
    def _copied(self, of: Callable[[nn.Parameter], Any]) -> list[Tensor]:
        tensors = [of(p) if of(p) is not None else torch.zeros_like(p) for p in self.parameters]
        return [torch.cat([t.flatten() for t in tensors])] if self.flat else tensors

    def step(self) -> None:
        """Step, and forget the gradients."""
        for master, gradient in zip(self.copies, self._copied(lambda p: p.grad), strict=True):
            master.grad = gradient.clone()
        self.optimizer.step()
        sizes = [parameter.numel() for parameter in self.parameters]
        values = self.copies[0].split(sizes) if self.flat else self.copies
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data.copy_(value.data.view_as(parameter))
            parameter.grad = None


class Views:
    """Trains a part of one buffer, which the parameters and their gradients are views of.

    As Megatron's distributed optimizer: a hook adds each gradient to a buffer and drops it, the
    optimizer of a rank holds a copy of a part of the buffer, and what it steps to is copied back.

    Args:
        parameters: the model's.
        flat: whether the part is all of the buffer, or each of two optimizers has a half.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], flat: bool) -> None:
        self.parameters = list(parameters)
        sizes = [parameter.numel() for parameter in self.parameters]
        self.buffer = torch.cat([p.detach().flatten() for p in self.parameters])
        self.gradients = torch.zeros_like(self.buffer)
        views = zip(
            self.parameters, self.buffer.split(sizes), self.gradients.split(sizes), strict=True
        )
        for parameter, value, gradient in views:
            parameter.data = value.view_as(parameter)
            main: Any = parameter
            main.main_grad = gradient.view_as(parameter)
            parameter.register_post_accumulate_grad_hook(self._add)
        self.masters = [nn.Parameter(p.clone()) for p in self.buffer.chunk(1 if flat else 2)]
        self.optimizers = [torch.optim.AdamW([master], LR) for master in self.masters]

    def _add(self, parameter: Any) -> None:
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    def step(self) -> None:
        """Step, and forget the gradients."""
        parts = len(self.masters)
        for master, gradient in zip(self.masters, self.gradients.chunk(parts), strict=True):
            master.grad = gradient.clone()
        for optimizer in self.optimizers:
            optimizer.step()
        self.buffer.copy_(torch.cat([master.detach() for master in self.masters]))
        self.gradients.zero_()


def wrapped(variant: Any = "mb", fuse_on: Any = "step", **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"num_experts": 3, "bank_init": "uniform", "seed": 1} | settings
    return exf.wrap(FFNs().double(), variant=variant, fuse_on=fuse_on, **settings)


def train(
    model: nn.Module, step: Callable[[], Any], steps: int = 3, micro_batches: int = 1
) -> None:
    for index in range(steps):
        for part in inputs(batch=8, seed=index).chunk(micro_batches):
            (loss_of(model, part) / micro_batches).backward()
        step()


REFUSED = [("step", "sw"), ("step", "dw"), ("step", "mb"), ("forward", "mb")]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("kind", [Copies, Views])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(("fuse_on", "variant"), REFUSED)
def test_experts_and_banks_that_would_stand_still_are_refused(
    fuse_on: str, variant: str, flat: bool, micro_batches: int, kind: Any
) -> None:
    model = wrapped(variant, fuse_on)
    copies = kind(model.parameters(), flat)
    train(model, copies.step, steps=1, micro_batches=micro_batches)
    what = "experts" if fuse_on == "step" else "memory bank"
    rule = f"with a step of AdamW, which holds other tensors.* The {what} of 'blocks.0' stood still"
    way_out = 'Use FSDP2 .* wrap with fuse_on="forward" and variant="sw" or "dw"'
    with pytest.raises(RuntimeError, match=f"{rule}.*{way_out}"):
        train(model, copies.step, micro_batches=micro_batches)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("kind", [Copies, Views])
@pytest.mark.parametrize("variant", ["sw", "dw"])
def test_the_way_out_is_right(variant: str, flat: bool, kind: Any) -> None:
    model, expected = wrapped(variant, "forward"), wrapped(variant, "forward")
    train(model, kind(model.parameters(), flat).step)
    optimizer = torch.optim.AdamW(expected.parameters(), LR)
    train(expected, lambda: (optimizer.step(), optimizer.zero_grad()))
    assert_same([model.state_dict()], expected.state_dict(), atol=1e-12)


def test_weights_that_are_loaded_first_are_no_excuse() -> None:
    model = wrapped()
    model.load_state_dict(wrapped(seed=2).state_dict())
    with pytest.raises(RuntimeError, match="stood still"):
        train(model, Copies(model.parameters(), flat=True).step)


def test_a_first_step_of_rate_zero_only_delays_it() -> None:
    model = wrapped()
    copies = Copies(model.parameters(), flat=True)
    copies.optimizer.param_groups[0]["lr"] = 0.0
    train(model, copies.step)
    copies.optimizer.param_groups[0]["lr"] = LR
    with pytest.raises(RuntimeError, match="stood still"):
        train(model, copies.step, steps=6)


@pytest.mark.parametrize("fuse_on", ["step", "forward"])
def test_another_optimizer_of_other_weights_is_fine(fuse_on: str) -> None:
    """As of a head that is trained first, or of a discriminator."""
    model = wrapped(fuse_on=fuse_on)
    head = torch.optim.AdamW(model.head.parameters(), LR)
    train(model, head.step, steps=9)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    train(model, lambda: (head.step(), optimizer.step()), steps=5)
    experts = torch.optim.AdamW(model.blocks.parameters(), LR)
    train(model, lambda: (head.step(), experts.step()), steps=5)


@pytest.mark.parametrize("fuse_on", ["step", "forward"])
def test_averages_of_a_model_that_trains_are_fine(fuse_on: str) -> None:
    """Their outputs are differentiated, and another optimizer trains a part of the loss."""
    model = wrapped(fuse_on=fuse_on)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    of_loss = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    for index in range(9):
        train(model, optimizer.step, steps=1)
        of_loss.step()
        with torch.no_grad():
            for target, source in zip(average.parameters(), model.parameters(), strict=True):
                target.lerp_(source, 0.1)
        loss_of(average, inputs(seed=index)).backward()
        loss_of(copy.deepcopy(model), inputs()).backward()


@pytest.mark.parametrize("fuse_on", ["step", "forward"])
def test_loads_between_two_steps_are_fine(fuse_on: str) -> None:
    model = wrapped(fuse_on=fuse_on)
    head = torch.optim.AdamW(model.head.parameters(), LR)
    train(model, head.step, steps=1)
    model.load_state_dict(wrapped(fuse_on=fuse_on, seed=2).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their experts are not loaded
        train(model, head.step)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loop_by_hand_under_forward_is_warned_of_where_a_bank_stays(variant: str) -> None:
    model = wrapped(variant, "forward")

    @torch.no_grad()
    def step() -> None:
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=LR)
            parameter.grad = None

    if variant == "mb":
        with pytest.warns(UserWarning, match='Its memory bank needs one .* variant="sw" or "dw"'):
            train(model, step, steps=14)
    train(model, step, steps=14)
