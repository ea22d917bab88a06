"""Memory banks that stay empty while their experts train: warnings, and averages of banks."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import exfusion_param as exf
from exfusion_param.fusion_weights.memory_bank import MemoryBank
from exfusion_param.routing import average_banks
from exfusion_testing.models import FFNs, inputs, loss_of

X = inputs(seed=0)


def make(**kwargs: Any) -> FFNs:
    return exf.wrap(FFNs().double(), seed=0, **kwargs)


def banks_of(model: nn.Module) -> list[Tensor]:
    return [module.bank for module in model.modules() if isinstance(module, MemoryBank)]


def train(model: nn.Module, steps: int = 3, after: Callable[[], None] = lambda: None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss_of(model, X).backward()
        optimizer.step()
        optimizer.zero_grad()
        after()


@torch.no_grad()
def average(target: nn.Module, source: nn.Module) -> None:
    for mean, new in zip(target.parameters(), source.parameters(), strict=True):
        mean.lerp_(new, 0.1)


def warned(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught]


def of_parameters(source: nn.Module) -> nn.Module:
    model = make()
    with pytest.warns(UserWarning, match=r"experts with the fusion weights \['router'\]"):
        model.load_state_dict(dict(source.named_parameters()), strict=False)
    return model


@pytest.mark.parametrize("make_teacher", [copy.deepcopy, of_parameters])
def test_an_eval_forward_with_an_empty_bank_warns_once_per_model(make_teacher: Any) -> None:
    model = make()
    teacher = make_teacher(model).eval()
    train(model, after=lambda: average(teacher, model))
    for each in (teacher, copy.deepcopy(teacher)):
        messages = warned(lambda each=each: [each(X) for _ in range(3)])
        assert len(messages) == 1
        assert "'blocks.0' is still zero" in messages[0]
        assert "average_banks(target, source)" in messages[0]
    average_banks(teacher, model)  # the way out that it names
    assert not warned(lambda: copy.deepcopy(teacher)(X))


@pytest.mark.parametrize("fuse_on", ["forward", "step"])
def test_banks_that_are_filled_and_dense_weights_do_not_warn(fuse_on: Any) -> None:
    model = make(fuse_on=fuse_on)
    if fuse_on == "forward":
        train(model)
    assert not warned(lambda: model.eval()(X))


def test_an_eval_before_training_warns_once_and_fuse_does_not_repeat_it() -> None:
    model = make().eval()
    assert len(warned(lambda: model(X))) == 1  # as Lightning's sanity check
    train(model.train())
    assert not warned(lambda: model.eval()(X))
    untrained = make().eval()
    assert len(warned(lambda: exf.fused_state_dict(untrained))) == 1
    assert not warned(lambda: untrained(X))


def test_a_full_bank_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(bank_init="uniform").eval()
    reads: list[MemoryBank] = []
    is_empty = MemoryBank.is_empty
    monkeypatch.setattr(
        MemoryBank, "is_empty", lambda bank: (reads.append(bank), is_empty(bank))[1]
    )
    for _ in range(3):
        model(X)
    assert len(reads) == len(set(reads)) == 2


def test_an_empty_bank_does_not_disturb_vmap_and_export() -> None:
    model = make().eval()
    states, buffers = torch.func.stack_module_state([model, copy.deepcopy(model)])
    torch.vmap(lambda *state: torch.func.functional_call(model, state, (X,)))(states, buffers)
    torch.export.export(model, (X,))
    assert len(warned(lambda: model(X))) == 1


@pytest.mark.compiled
def test_an_empty_bank_breaks_no_compiled_graph() -> None:
    model = make().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(X)
    with pytest.warns(UserWarning, match="is still zero"):
        torch.testing.assert_close(compiled, model(X))


@pytest.mark.parametrize("fuse_on", ["forward", "step"])
@pytest.mark.parametrize("around", [copy.deepcopy, AveragedModel])
def test_average_banks_copies_or_averages(fuse_on: Any, around: Any) -> None:
    source = make(fuse_on=fuse_on, bank_init="uniform")
    target = around(source)
    train(source)
    starts = [bank.clone() for bank in banks_of(target)]
    average_banks(target, source, decay=0.25)
    for bank, start, new in zip(banks_of(target), starts, banks_of(source), strict=True):
        torch.testing.assert_close(bank, 0.25 * start + 0.75 * new)
    average_banks(target, source)
    for bank, new in zip(banks_of(target), banks_of(source), strict=True):
        assert torch.equal(bank, new)


def test_average_banks_refuses_other_models_and_changes_nothing() -> None:
    target = make()
    train(other := make(bank_init="uniform"))
    fewer = exf.wrap(FFNs(depth=1).double(), bank_init="uniform")
    sixteen = exf.wrap(FFNs().double(), num_experts=16)
    for source in (fewer, sixteen):
        with pytest.raises(ValueError, match=r"'blocks\.\d' has shape \(4,\) in the target"):
            average_banks(target, source)
    with pytest.raises(ValueError, match="has no memory bank"):
        average_banks(target, make(variant="sw"))
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        average_banks(target, other, decay=1.5)
    assert not any(bank.any() for bank in banks_of(target))


@pytest.mark.parametrize("fuse_on", ["forward", "step"])
@pytest.mark.parametrize("variant", ["mb", "dw"])
def test_a_state_dict_in_bfloat16_that_is_assigned_leaves_fusion_weights_in_float32(
    fuse_on: Any, variant: Any
) -> None:
    model = exf.wrap(FFNs(), variant=variant, fuse_on=fuse_on, seed=0)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    dtypes = {
        name.rsplit(".")[-1]: tensor.dtype
        for name, tensor in model.state_dict().items()
        if "fusion_weights" in name
    }
    assert set(dtypes.values()) == {torch.float32}
    assert model.stem.weight.dtype == torch.bfloat16
    if variant == "mb":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(200):
            loss_of(model, X.bfloat16()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(bank.sum() > 0.999 for bank in banks_of(model))


def key_encoder(model: nn.Module, forwards: int, *, follows: Any = average) -> nn.Module:
    """A copy that averages the model's parameters, and is in training mode as that of MoCo."""
    target = copy.deepcopy(model).requires_grad_(False)

    def encode() -> None:
        with torch.no_grad():
            target(X)
        follows(target, model)

    train(model, forwards, after=encode)
    return target


def test_a_key_encoder_whose_bank_never_moves_warns_once() -> None:
    model = make()
    messages = warned(lambda: key_encoder(model, 25))
    assert len(messages) == 1
    assert "sums to 0.00 and has not moved in 10 forwards without gradients" in messages[0]
    assert "while its experts changed" in messages[0]
    early = make()
    train(early, 3)
    (message,) = warned(lambda: key_encoder(early, 25))
    assert "sums to 0.14 and has not moved" in message


def copies_each_15th(target: nn.Module, model: nn.Module) -> None:
    """The hard updates of deep Q-learning, which no version counter sees."""
    model.updates = getattr(model, "updates", 0) + 1  # type: ignore[assignment, operator]
    if model.updates % 15 == 0:
        for mean, new in zip(target.parameters(), model.parameters(), strict=True):
            mean.data.copy_(new.data)


@pytest.mark.parametrize(("follows", "forwards"), [(average, 10), (copies_each_15th, 100)])
@pytest.mark.parametrize("training", [False, True])
def test_a_full_bank_that_stays_while_its_experts_follow_another_model_warns_once(
    training: bool, follows: Any, forwards: int
) -> None:
    model = make(bank_init="uniform").train()
    target = copy.deepcopy(model).requires_grad_(False).train(training)

    @torch.no_grad()
    def encode() -> None:
        target(X)
        follows(target, model)

    (message,) = warned(lambda: train(model, 110, after=encode))
    assert f"sums to 1.00 and has not moved in {forwards} forwards" in message
    assert "are not those it averages" in message


def test_key_encoders_whose_bank_moves_or_whose_weights_are_dense_do_not_warn() -> None:
    def both(target: nn.Module, model: nn.Module) -> None:
        average(target, model)
        average_banks(target, model, decay=0.9)

    assert not warned(lambda: key_encoder(make(), 25, follows=both))
    assert not warned(lambda: key_encoder(make(momentum=0.2), 1))
    assert not warned(lambda: key_encoder(make(bank_init="uniform"), 25, follows=both))
    assert not warned(lambda: key_encoder(make(fuse_on="step"), 25))


@torch.no_grad()
def test_evaluating_a_model_that_trains_or_has_trained_does_not_warn() -> None:
    model = make()
    with torch.enable_grad():
        train(model, 3, after=lambda: model(X))
    assert not warned(lambda: [model(X) for _ in range(25)])
    assert not warned(lambda: [copy.deepcopy(model)(X) for _ in range(25)])
    kept = copy.deepcopy(model).eval()
    assert not warned(lambda: [kept(X) for _ in range(25)])


def test_an_average_of_dense_weights_ships_without_a_warning() -> None:
    model = make(fuse_on="step")
    target = copy.deepcopy(model)
    train(model, after=lambda: average(target, model))
    weight = target.blocks[0].fc1.weight.detach().clone()
    assert weight.any()
    assert not warned(lambda: exf.fused_state_dict(target))
    assert not warned(lambda: exf.fuse(target))
    assert torch.equal(target.blocks[0].fc1.weight, weight)


@pytest.mark.parametrize("bias", [True, False])
def test_a_loop_without_an_optimizer_whose_weights_stay_zero_is_told(bias: bool) -> None:
    model = exf.wrap(FFNs(bias=bias).double(), seed=0, fuse_on="step")

    def loop() -> None:
        for _ in range(20):
            loss_of(model, X).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        model.eval()(X)

    messages = warned(loop)
    assert messages
    assert any("torch.optim.Optimizer" in each or "optimizer steps" in each for each in messages)
