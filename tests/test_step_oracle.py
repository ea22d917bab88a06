"""`fuse_on="step"` against experts as N separate tensors, under many optimizers."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import schedulefree
import timm.optim
import torch
from torch import Tensor, nn
from torchao.optim import AdamW8bit
from transformers.optimization import Adafactor as TransformersAdafactor

import exfusion_param as exf
from exfusion_testing.step_models import (
    EXACT,
    Experts,
    Net,
    assert_equals_oracle,
    assert_same,
    batch,
    fusion_weights,
    loss_of,
    train,
    wrap,
    wrapped,
)

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]
optim = torch.optim

ELEMENTWISE: dict[str, Make] = {
    "adam": lambda p: optim.Adam(p, lr=0.02),
    "adam with decay": lambda p: optim.Adam(p, lr=0.02, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "adamw foreach": lambda p: optim.AdamW(p, lr=0.02, foreach=True),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.02, fused=True),
    "expert adamw": lambda p: exf.ExpertAdamW(p, lr=0.02),
    "expert sgd": lambda p: exf.ExpertSGD(p, lr=0.1, momentum=0.9),
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.005, momentum=0.5, centered=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.02),
    "radam": lambda p: optim.RAdam(p, lr=0.02),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.02),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "adamax": lambda p: optim.Adamax(p, lr=0.02),
    "asgd": lambda p: optim.ASGD(p, lr=0.1),
    "rprop": lambda p: optim.Rprop(p, lr=0.002),
    "timm adopt": lambda p: timm.optim.create_optimizer_v2(p, "adopt", lr=0.02),
    "timm lion": lambda p: timm.optim.create_optimizer_v2(p, "lion", lr=0.002),
    "timm nadamw": lambda p: timm.optim.create_optimizer_v2(p, "nadamw", lr=0.02),
    "schedule-free": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.02, warmup_steps=3),
    "schedule-free sgd": lambda p: schedulefree.SGDScheduleFree(p, lr=0.1),
    "schedule-free radam": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.02),
}
TIMMS = [
    "lamb",
    "lambc",
    "lars",
    "larc",
    "novograd",
    "sgdp",
    "adamp",
    "madgrad",
    "adafactorbv",
    "adabelief",
    "mars",
    "rmsproptf",
    "laprop",
    "cadamw",
]
BY_TENSOR: dict[str, Make] = {
    "adafactor": lambda p: optim.Adafactor(p, lr=0.02),
    "transformers adafactor": lambda p: TransformersAdafactor(p, lr=0.02, relative_step=False),
    "transformers adafactor with relative steps": lambda p: TransformersAdafactor(
        p, scale_parameter=True, relative_step=True, warmup_init=True
    ),
    **{
        f"timm {name}": lambda p, name=name: timm.optim.create_optimizer_v2(p, name, lr=0.02)
        for name in TIMMS
    },
}
OPTIMIZERS = ELEMENTWISE | BY_TENSOR


def set_mode(optimizer: Any, mode: str) -> None:
    if callable(getattr(optimizer, mode, None)):
        getattr(optimizer, mode)()


def run(model: Any, optimizer: torch.optim.Optimizer, steps: int = 10) -> None:
    set_mode(optimizer, "train")
    for seed in range(steps):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        loss_of(model, batch(seed)).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_steps_each_expert_as_a_tensor_of_its_own(variant: str, name: str) -> None:
    model = wrapped(variant)
    oracle = Experts(model)
    run(model, OPTIMIZERS[name](model.parameters()))
    run(oracle, OPTIMIZERS[name](oracle.parameters()))
    assert_equals_oracle(model, oracle)


def forward_twin(model: Any, variant: str) -> Any:
    """Wrapped under "forward", with the experts of a model wrapped under "step"."""
    torch.manual_seed(0)
    twin = exf.wrap(Net(), variant=variant, seed=1, fuse_on="forward")
    with torch.no_grad():
        for mine, its in zip(fusion_weights(model), fusion_weights(twin), strict=True):
            for fused, stack in zip(mine.fused, its.expert_stacks(), strict=True):
                stack.copy_(fused.experts())
    return twin


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_elementwise_optimizer_trains_as_under_forward(variant: str, name: str) -> None:
    model = wrapped(variant)
    twin = forward_twin(model, variant)
    for each in (model, twin):
        run(each, ELEMENTWISE[name](each.parameters()))
    theirs = exf.fused_state_dict(twin)
    assert_same(dict(exf.fused_state_dict(model)), dict(theirs))


def muon_and_adamw(model: Any) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim == 2 and min(p.shape) > 3]
    others = [p for p in parameters if not (p.ndim == 2 and min(p.shape) > 3)]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.02)]


@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("order", [1, -1])
def test_muon_on_matrices_and_adamw_on_the_rest_are_the_oracles(variant: str, order: int) -> None:
    model = wrapped(variant)
    oracle = Experts(model)
    for each in (model, oracle):
        optimizers = muon_and_adamw(each)
        for seed in range(6):
            each.zero_grad()
            loss_of(each, batch(seed)).backward()
            for optimizer in optimizers[::order]:
                optimizer.step()
    assert_equals_oracle(model, oracle, 1e-9)


@pytest.mark.parametrize("variant", EXACT)
def test_timms_muon_is_the_oracles(variant: str) -> None:
    model = wrapped(variant)
    oracle = Experts(model)
    for each in (model, oracle):
        run(each, timm.optim.Muon(each.parameters(), lr=0.02), 6)
    assert_equals_oracle(model, oracle, 1e-9)


@pytest.mark.parametrize("variant", EXACT)
def test_eight_bit_adamw_of_torchao_is_the_oracles(variant: str) -> None:
    torch.manual_seed(0)
    model = wrap(Net(64, 128, depth=1).float(), variant)
    oracle = Experts(model, Net(64, 128, depth=1).float())
    for each in (model, oracle):
        optimizer = AdamW8bit(each.parameters(), lr=0.001)
        for seed in range(3):
            each.zero_grad()
            loss_of(each, batch(seed).float()).backward()
            optimizer.step()
    names = [name for name in model.state_dict() if "fc" in name]
    fused = oracle.fused()
    for name in names:
        assert_same(model.state_dict()[name], fused[name].detach(), 1e-5)


@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("name", ["adamw", "expert adamw", "sgd", "timm lamb"])
@pytest.mark.parametrize("order", [1, -1])
def test_fusion_weights_with_an_optimizer_of_their_own_are_the_oracles(
    variant: str, name: str, order: int
) -> None:
    model = wrapped(variant)
    oracle = Experts(model)
    for each, learned in (
        (model, [p for weights in fusion_weights(model) for p in weights.parameters()]),
        (oracle, oracle.learned()),
    ):
        own = {id(p) for p in learned}
        optimizers = [OPTIMIZERS[name](p for p in each.parameters() if id(p) not in own)]
        if learned:
            optimizers.append(torch.optim.SGD(learned, lr=0.1))
        for seed in range(6):
            each.zero_grad()
            loss_of(each, batch(seed)).backward()
            for optimizer in optimizers[::order]:
                optimizer.step()
    assert_equals_oracle(model, oracle)


@pytest.mark.parametrize("variant", EXACT)
def test_schedule_free_evaluates_the_average_and_trains_on(variant: str) -> None:
    model = wrapped(variant)
    oracle = Experts(model)
    pairs = [
        (each, schedulefree.AdamWScheduleFree(each.parameters(), lr=0.02))
        for each in (model, oracle)
    ]
    for start in (0, 3, 6):
        for each, optimizer in pairs:
            optimizer.train()
            for seed in range(start, start + 3):
                optimizer.zero_grad()
                loss_of(each, batch(seed)).backward()
                optimizer.step()
            optimizer.eval()
        if variant == "sw":
            assert_equals_oracle(model, oracle)


class Bank:
    """`mb` with SGD, by its equations: a router, a bank, and experts one by one."""

    def __init__(self, model: Any, momentum: float) -> None:
        self.oracle = Experts(model)
        self.momentum = momentum
        self.routers = [w.router.detach().clone() for w in fusion_weights(model)]
        self.banks = [w.bank.clone() for w in fusion_weights(model)]

    def step(self, x: Tensor, lr: float) -> None:
        oracle = self.oracle
        for name in oracle.vectors:
            oracle.vectors[name] = nn.Parameter(self.banks[int(name.split(".")[1])].clone())
        seen: list[Tensor] = []
        hooks = [
            block.fc1.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
            for block in oracle.dense.blocks
        ]
        loss_of(oracle, x).backward()
        for hook in hooks:
            hook.remove()
        for index, tokens in enumerate(seen):
            names = [n for n in oracle.leaves if n.startswith(f"blocks.{index}.")]
            gradient = sum(oracle.vectors[n].grad for n in names)
            router = self.routers[index].clone().requires_grad_()
            current = torch.softmax(tokens @ router.T, -1).mean(0)
            moved = self.momentum * self.banks[index] + (1 - self.momentum) * current
            (moved @ gradient).backward()
            self.routers[index] = self.routers[index] - lr * router.grad
            self.banks[index] = moved.detach()
        with torch.no_grad():
            for leaf in [*oracle.plain().values(), *itertools.chain(*oracle.leaves.values())]:
                leaf -= lr * leaf.grad
                leaf.grad = None
        for name in oracle.vectors:
            oracle.vectors[name] = nn.Parameter(self.banks[int(name.split(".")[1])].clone())


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("bank_init", ["uniform", "zeros"])
def test_a_memory_bank_follows_its_equations(momentum: float, bank_init: str) -> None:
    model = wrapped("mb", momentum=momentum, bank_init=bank_init)
    by_hand = Bank(model, momentum)
    if bank_init == "zeros":
        draws_around_nothing(model, by_hand)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(10):
        train(model, optimizer, [seed])
        by_hand.step(batch(seed), 0.1)
        assert_same([w.bank for w in fusion_weights(model)], by_hand.banks)
        assert_same([w.router.detach() for w in fusion_weights(model)], by_hand.routers)
    fused = {name: value.detach() for name, value in by_hand.oracle.fused().items()}
    ours = model.state_dict()
    assert_same({name: ours[name] for name in fused}, fused)


def draws_around_nothing(model: Any, by_hand: Bank) -> None:
    """With an empty bank a model starts from zeros, as in the paper."""
    assert not model.blocks[0].fc1.weight.any()
    assert all(any(leaf.any() for leaf in leaves) for leaves in by_hand.oracle.leaves.values())
