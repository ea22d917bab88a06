"""Training loops like those of public repositories, with `wrap` as the only addition."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_testing.step_models import (
    EXACT,
    VARIANTS,
    Experts,
    Net,
    adamw,
    assert_equals_oracle,
    assert_same,
    batch,
    dense_state,
    dense_twin,
    fusion_weights,
    loss_of,
    train,
    wrap,
    wrapped,
)

Groups = Callable[[nn.Module], list[dict[str, Any]]]


def by_ndim(model: nn.Module) -> list[dict[str, Any]]:
    """As in nanoGPT."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]


def by_names(model: nn.Module) -> list[dict[str, Any]]:
    """As in DINO, with names that do not decay."""
    named = list(model.named_parameters())
    decays = [p for n, p in named if not (n.endswith(".bias") or len(p.shape) == 1)]
    others = [p for n, p in named if n.endswith(".bias") or len(p.shape) == 1]
    return [{"params": decays}, {"params": others, "weight_decay": 0.0}]


def by_modules(model: nn.Module) -> list[dict[str, Any]]:
    """As in minGPT: weights of linears in one group, the rest in another."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    ids = set(map(id, weights))
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def by_layers(model: nn.Module) -> list[dict[str, Any]]:
    """As in MAE and BEiT: a group for each layer, with keys of its own."""
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("blocks") else 2
        scale = 0.75 ** (2 - layer)
        key = f"{layer}_{parameter.ndim > 1}"
        group = groups.setdefault(
            key, {"params": [], "lr_scale": scale, "wd_multiplier": float(parameter.ndim > 1)}
        )
        group["params"].append(parameter)
    return list(groups.values())


GROUPS: dict[str, Groups] = {
    "by ndim": by_ndim,
    "by names": by_names,
    "by modules": by_modules,
    "by layers": by_layers,
}


def schedule(optimizer: torch.optim.Optimizer, step: int) -> None:
    lr = 0.02 * 0.5 * (1 + math.cos(math.pi * step / 8))
    for index, group in enumerate(optimizer.param_groups):
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if index == 0:  # only the first group decays
            group["weight_decay"] = 0.05 + 0.01 * step


class Grouped:
    """The oracle in the loop's groups: each expert is where its parameter is."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]]) -> None:
        self.oracle = Experts(model)
        names = {id(p): n for n, p in model.named_parameters()}
        learned = iter(self.oracle.learned())
        own = {n: next(learned) for n in names.values() if "fusion_weights" in n}
        plain = self.oracle.plain()
        self.groups = [
            group
            | {
                "params": [
                    leaf for p in group["params"] for leaf in self._leaves(names[id(p)], plain, own)
                ]
            }
            for group in groups
        ]

    def _leaves(self, name: str, plain: Any, own: Any) -> list[nn.Parameter]:
        return self.oracle.leaves.get(name) or [plain.get(name, own.get(name))]


@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("groups", GROUPS)
def test_groups_and_schedules_are_those_of_the_experts(variant: str, groups: str) -> None:
    model = wrapped(variant)
    parts = GROUPS[groups](model)
    grouped = Grouped(model, parts)
    ours, theirs = torch.optim.AdamW(parts), torch.optim.AdamW(grouped.groups)
    for step in range(8):
        for each, optimizer in ((model, ours), (grouped.oracle, theirs)):
            schedule(optimizer, step)
            each.zero_grad()
            loss_of(each, batch(step)).backward()
            torch.nn.utils.clip_grad_value_(model.parameters(), 1e9)
            optimizer.step()
    assert_equals_oracle(model, grouped.oracle)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("groups", GROUPS)
def test_groups_hold_what_they_hold_of_the_dense_model(variant: str, groups: str) -> None:
    model, dense = wrapped(variant), Net()
    for ours, theirs in zip(GROUPS[groups](model), GROUPS[groups](dense), strict=True):
        own = {id(p): n for n, p in model.named_parameters() if "fusion_weights" not in n}
        names = {id(p): n for n, p in dense.named_parameters()}
        held = [own[id(p)] for p in ours["params"] if id(p) in own]
        assert held == [names[id(p)] for p in theirs["params"]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_clipped_norms_are_those_of_the_dense_model(variant: str) -> None:
    model = wrapped(variant)
    train(model)
    dense = dense_twin(model)
    norms = []
    for each in (model, dense):
        loss_of(each, batch(9)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(each.parameters(), 0.01))
    assert_same(*norms, 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_average_over_parameters_only_is_a_dense_model(variant: str) -> None:
    """As in DiT and consistency models: no buffers."""
    model = wrapped(variant)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = adamw(model)
    expected = dense_state(model)
    for seed in range(6):
        train(model, optimizer, [seed])
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                average.mul_(0.5).add_(parameter.data, alpha=0.5)
        expected = {n: 0.5 * v + 0.5 * dense_state(model)[n] for n, v in expected.items()}
    assert_same(dense_state(ema), expected, 1e-14)
    dense = Net()
    dense.load_state_dict(expected)
    ema.eval()
    assert_same(ema(batch(9)), dense(batch(9)), 1e-13)
    assert_same(dict(exf.fuse(ema).state_dict()), expected, 1e-14)


def init_by_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def init_by_name(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if name.endswith("fc2.weight"):
            nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(4))


def init_by_data(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data.normal_(0, 0.02)
        module.bias.data.zero_()


def init_by_new_parameters(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight = nn.Parameter(torch.randn_like(module.weight) * 0.02)


def init_orthogonal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)


STARTS: dict[str, Callable[[nn.Module], Any]] = {
    "apply": lambda model: model.apply(init_by_module),
    "by name": init_by_name,
    "data": lambda model: model.apply(init_by_data),
    "new parameters": lambda model: model.apply(init_by_new_parameters),
    "orthogonal": lambda model: model.apply(init_orthogonal),
    "reset_parameters": lambda model: [
        m.reset_parameters() for m in model.modules() if isinstance(m, nn.Linear)
    ],
    "load_state_dict": lambda model: model.load_state_dict(Net().state_dict(), strict=False),
    "assign": lambda model: model.load_state_dict(Net().state_dict(), strict=False, assign=True),
}


@pytest.mark.filterwarnings("ignore:The weights of .* were loaded without their experts")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("start", STARTS)
def test_a_start_after_wrap_is_the_dense_models_and_experts_lie_around_it(
    variant: str, start: str
) -> None:
    model = wrapped(variant)
    dense = dense_twin(model)
    for each in (model, dense):
        torch.manual_seed(7)
        STARTS[start](each)
    assert_same(dense_state(model), dense.state_dict(), 0)
    spread = around(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, optimizer, [0])
    if variant != "mb":  # whose bank moves
        assert_same(dense_state(model), dense.state_dict(), 1e-14)
        assert_same(around(model), spread, 1e-14)
    assert all(each.abs().max() > 1e-3 for each in spread)


def around(model: Any) -> list[Tensor]:
    """How far experts are from one another."""
    every = (fused for weights in fusion_weights(model) for fused in weights.fused)
    return [f.experts() - f.experts().mean(0) for f in every]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_start_from_the_meta_device_is_the_models_own(variant: str) -> None:
    """As in nanochat and torchtitan: built on meta, emptied, and initialized."""
    with torch.device("meta"):
        model, dense = Net(), Net()
    wrap(model, variant)
    for each in (model, dense):
        each.to_empty(device="cpu")
        torch.manual_seed(7)
        for module in each.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
    for weights in fusion_weights(model):
        weights.reset_parameters()
    assert_same(dense_state(model), dense.state_dict(), 0)
    optimizer = train(model)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert len(optimizer.state[model.blocks[0].fc1.weight]["experts"]) == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_resumes_with_assign(variant: str) -> None:
    model = wrapped(variant)
    optimizer = train(model)
    state = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    resumed = wrapped(variant)
    resumed.load_state_dict(state[0], assign=True)
    again = adamw(resumed)
    again.load_state_dict(state[1])
    for each, stepper in ((model, optimizer), (resumed, again)):
        train(each, stepper, range(3, 6))
    assert_same(resumed.state_dict(), model.state_dict(), 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_of_parameters_are_the_dense_models_but_for_fusion_weights(variant: str) -> None:
    model = wrapped(variant)
    added = sum(p.numel() for weights in fusion_weights(model) for p in weights.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert total - added == sum(p.numel() for p in Net().parameters())
    assert added == {"sw": 0, "dw": 2 * 4, "mb": 2 * 4 * 8}[variant]


@pytest.mark.parametrize("variant", EXACT)
def test_accumulation_under_a_grad_scaler_and_clipping_is_one_batch(variant: str) -> None:
    models = [wrapped(variant), wrapped(variant)]
    x = batch(0, size=8)
    for model, parts in zip(models, (1, 4), strict=True):
        optimizer = adamw(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(4):
            for part in x.chunk(parts):
                scaler.scale(loss_of(model, part) / parts).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=False)
    assert_same(models[0].state_dict(), models[1].state_dict())


def test_runs_with_other_seeds_have_other_experts() -> None:
    spreads = []
    for seed in (1, 2):
        torch.manual_seed(0)
        spreads.append(around(wrap(Net(), "sw", seed=seed)))
    assert all(not torch.equal(a, b) for a, b in zip(*spreads, strict=True))


@pytest.mark.filterwarnings("ignore:The weights of .* changed since wrap")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loop_without_an_optimizer_trains_the_weights(variant: str) -> None:
    """As pytorch/examples' word model: SGD by hand."""
    model = wrapped(variant)
    dense = dense_twin(model)
    for seed in range(5):
        for each in (model, dense):
            each.zero_grad()
            loss_of(each, batch(seed)).backward()
            with torch.no_grad():
                for p in each.parameters():
                    p.add_(p.grad, alpha=-0.1)
    assert_same(dense_state(exf.fuse(model)), dense.state_dict(), 1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adafactor, exf.ExpertAdamW])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_that_is_converted_after_wrap_trains_on(
    variant: str, make: Any, steps: int
) -> None:
    model = wrapped(variant).float()
    optimizer = make(model.parameters(), lr=0.02)
    for seed in range(steps + 2):
        if seed == steps:
            model.bfloat16()
            optimizer.load_state_dict(optimizer.state_dict())  # casts Adam's moments
        loss_of(model, batch(seed).to(model.head.weight.dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {value.dtype for value in dense_state(model).values()} == {torch.bfloat16}
    assert all(value.isfinite().all() for value in model.state_dict().values())
