"""A wrapped linear under `fuse_on="forward"` where other people's code writes to its weight."""

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import exfusion_param as exf
from exfusion_testing.models import FFNs, inputs, loss_of

VARIANTS = ["sw", "dw", "mb"]
LOST = r"An in-place write to the weight of shape \(6, 4\) in 'blocks.0' is lost"


def wrapped(variant: str = "mb", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return exf.wrap(FFNs(**kwargs), variant=variant, bank_init="uniform", seed=0)


def x() -> Tensor:
    return inputs().float()


def copy_into(linear: Any) -> None:
    with torch.no_grad():
        linear.weight.copy_(torch.ones(6, 4))


def replace_data(linear: Any) -> None:
    linear.weight.data = torch.ones(6, 4)


def multiply(linear: Any) -> None:
    with torch.no_grad():
        linear.weight.mul_(2)


def merge(linear: Any) -> None:
    linear.weight.data += torch.ones(6, 4)


WRITES: list[Callable[[Any], Any]] = [
    lambda linear: nn.init.normal_(linear.weight),
    lambda linear: linear.weight.data.normal_(),
    lambda linear: linear.weight.detach().neg_(),
    copy_into,
    replace_data,
    multiply,
    merge,
]
ACCESSES: list[Callable[[Any], Any]] = [
    lambda model: model.train()(x()),
    lambda model: model.eval()(x()),
    lambda model: model.blocks[0].fc1.weight,
    exf.fuse,
    exf.fused_state_dict,
]


@pytest.mark.parametrize("access", range(len(ACCESSES)))
@pytest.mark.parametrize("write", range(len(WRITES)))
def test_a_write_to_the_temporary_weight_raises_at_the_next_access(write: int, access: int) -> None:
    model = wrapped(VARIANTS[(write + access) % 3])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    WRITES[write](model.blocks[0].fc1)
    with pytest.raises(RuntimeError, match=LOST):
        ACCESSES[access](model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    ACCESSES[access](model)  # it is said once


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_ways_out_that_the_message_names_work(variant: str) -> None:
    weight = torch.randn(6, 4)
    for value in (weight, nn.Parameter(weight)):
        model = wrapped(variant)
        model.blocks[0].fc1.weight.data.normal_()
        model.blocks[0].fc1.weight = value  # nothing is lost now
        model(x())
        torch.testing.assert_close(model.blocks[0].fc1.weight, weight)
        assert (
            dict(model.named_parameters()).keys()
            == dict(wrapped(variant).named_parameters()).keys()
        )
    fused = exf.fuse(wrapped(variant))
    fused.blocks[0].fc1.weight.data += 1
    fused(x())


@pytest.mark.parametrize("wrong", [torch.ones(6), torch.ones(4, 6)])
def test_a_tensor_of_another_shape_cannot_be_assigned(wrong: Tensor) -> None:
    linear = wrapped().blocks[0].fc1
    before = linear.parametrizations.weight.original.clone()
    with pytest.raises(ValueError, match=r"can be assigned to the weight of shape \(6, 4\)"):
        linear.weight = wrong
    assert torch.equal(linear.parametrizations.weight.original, before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_a_penalty_on_the_weight_in_the_loss_is_no_write(variant: str, checkpointing: Any) -> None:
    def trained(read: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        model = wrapped(variant, checkpointing=checkpointing)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(3):
            for part in range(2):
                data = inputs(seed=2 * step + part).float()
                loss = loss_of(model, data.requires_grad_())
                (loss + read(model.blocks[1].fc1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    def by_hand(linear: Any) -> Tensor:
        weights = linear.parametrizations.weight[0].fusion_weights()
        stack = linear.parametrizations.weight.original
        return torch.tensordot(weights, stack, dims=1).square().sum()

    read = trained(lambda linear: linear.weight.square().sum())
    torch.testing.assert_close(read, trained(by_hand))


def test_a_weight_read_within_a_checkpoint_is_recomputed() -> None:
    model = wrapped("dw")
    linear = model.blocks[0].fc1
    y = checkpoint(lambda x: nn.functional.linear(x, linear.weight), x(), use_reentrant=False)
    y.sum().backward()
    assert linear.parametrizations.weight.original.grad.abs().sum() > 0


@pytest.mark.parametrize("write", [lambda p: p.data.mul_(0.5), lambda p: p.mul_(0.5)])
def test_experts_that_are_written_to_between_accesses_are_no_lost_write(write: Any) -> None:
    model = wrapped("dw")
    before = model.blocks[0].fc1.weight  # an EMA or an optimizer may write to `p.data`
    with torch.no_grad():
        write(model.blocks[0].fc1.parametrizations.weight.original)
    model(x())
    torch.testing.assert_close(model.blocks[0].fc1.weight, before / 2)


def test_nothing_is_kept_of_a_training_loop() -> None:
    from exfusion_param.fusion import handed_out

    handed_out._handed_out.clear()
    model = wrapped()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        loss_of(model, x()).backward()
        optimizer.step()
    exf.metrics(model)
    exf.fused_state_dict(model)
    assert not handed_out.is_any_handed_out()
    for _ in range(2):
        (loss_of(model, x()) + model.blocks[0].fc1.weight.square().sum()).backward()
        optimizer.step()
    assert not handed_out.is_any_handed_out()


def test_a_read_does_not_keep_the_graph_of_a_running_forward() -> None:
    read: list[Any] = []

    class Reading(FFNs):
        def forward(self, x: Tensor) -> Tensor:
            y = self.blocks[0].fc1(x)
            weight = self.blocks[0].fc1.weight
            assert weight.grad_fn is not None
            read.append(weakref.ref(weight))
            return y

    model = exf.wrap(Reading())
    model(x())
    assert read[0]() is None


def test_the_fast_path_of_torchs_transformer_layers_sees_a_lost_write() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    exf.wrap(layer, variant="dw").eval()
    with torch.no_grad():
        expected = layer(x())
        assert torch.equal(layer(x()), expected)
        layer.linear1.weight.mul_(2)
        with pytest.raises(RuntimeError, match="in-place write to the weight"):
            layer(x())
        assert torch.equal(layer(x()), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_threads_evaluate_one_model(variant: str) -> None:
    model = wrapped(variant).eval()
    data = [inputs(seed=seed).float() for seed in range(2)]
    with torch.no_grad():
        expected = [model(each) for each in data]
    wrong: list[int] = []

    def evaluate(index: int) -> None:
        with torch.no_grad():
            for _ in range(100):
                _ = model.blocks[0].fc1.weight.norm()
                if not torch.equal(model(data[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=evaluate, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Meeting(nn.GELU):
    """An activation in which two threads wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(2, timeout=5)

    def forward(self, x: Tensor) -> Tensor:
        self.barrier.wait()
        return super().forward(x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_threads_that_train_one_model_are_refused_or_right(variant: str) -> None:
    model = wrapped(variant, depth=1)
    data = [inputs(seed=seed).float() for seed in range(2)]
    expected = [copy.deepcopy(model)(each) for each in data]
    model.blocks[0].act = Meeting()
    errors: list[str] = []
    wrong: list[int] = []

    def forward(index: int) -> None:
        try:
            if not torch.equal(model(data[index]), expected[index]):
                wrong.append(index)
        except threading.BrokenBarrierError:  # the other one was refused before it came here
            pass
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=forward, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert bool(errors) == (variant == "mb")
    assert all("two threads" in error for error in errors)


def test_function_transforms_leave_nothing_behind() -> None:
    class Penalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = wrapped("dw")

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).mean() + self.model.blocks[0].fc1.weight.square().sum()

    module = Penalized()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    for _ in range(2):
        torch.func.grad(lambda p: torch.func.functional_call(module, p, (x(),)))(parameters)
    module(x())


@pytest.mark.compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_compiled_model_reads_weights_without_a_break(variant: str) -> None:
    model = wrapped(variant)

    def loss(x: Tensor) -> Tensor:
        return model(x).square().mean() + model.blocks[0].fc1.weight.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x()), loss(x()))
