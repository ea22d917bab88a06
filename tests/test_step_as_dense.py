"""Under `fuse_on="step"` a wrapped model behaves as the dense one, whatever is done to it."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import exfusion_param as exf
from exfusion_testing.step_models import (
    VARIANTS,
    Net,
    Pixels,
    assert_same,
    batch,
    dense_twin,
    fusion_weights,
    train,
    trained,
    wrap,
    wrapped,
)

Operation = Callable[[Any], Any]
X = batch(9)


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """All parameters but those of fusion weights, which have no part in a forward."""
    return {n: p.detach() for n, p in model.named_parameters() if "fusion_weights" not in n}


def keys(model: Any) -> Any:
    added = {name for name in model.state_dict() if "fusion_weights" in name}
    return [name for name in model.state_dict() if name not in added]


def classes(model: Any) -> Any:
    return [
        (name, type(module))
        for name, module in model.named_modules()
        if "fusion_weights" not in name
    ]


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))(X)


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(X)


def copied(model: Any) -> Any:
    return copy.deepcopy(model)(X)


def exported(model: Any) -> Any:
    program = torch.export.export(model, (X,), strict=False)
    return program.module()(X)


def exported_strictly(model: Any) -> Any:
    return torch.export.export(model, (X,), strict=True).module()(X)


def graph_of_exported(model: Any) -> Any:
    program = torch.export.export(model.train(), (X,), strict=False)
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def called_functionally(model: Any) -> Any:
    doubled = {name: 2 * value for name, value in own_parameters(model).items()}
    return functional_call(model, doubled, (X,))


def stacked_and_mapped(model: Any) -> Any:
    models = [copy.deepcopy(model) for _ in range(3)]
    with torch.no_grad():
        for factor, each in enumerate(models):
            each.blocks[0].fc1.weight.mul_(1 + factor)
    params, buffers = stack_module_state(models)
    base = copy.deepcopy(model).to("meta")

    def call(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return functional_call(base, (params, buffers), (x,))

    return vmap(call, (0, 0, None))(params, buffers, X)


def gradients_by_sample(model: Any) -> Any:
    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x[None],)).square().sum()

    return vmap(grad(loss), (None, 0))(own_parameters(model), X)


def along_a_tangent(model: Any) -> Any:
    params = own_parameters(model)
    tangents = {name: torch.ones_like(value) for name, value in params.items()}
    return jvp(lambda p: functional_call(model, p, (X,)), (params,), (tangents,))


def second_derivatives(model: Any) -> Any:
    params = own_parameters(model)

    def loss(weight: Tensor) -> Tensor:
        changed = params | {"blocks.0.fc1.weight": weight}
        return functional_call(model, changed, (X,)).square().sum()

    return torch.func.hessian(loss)(params["blocks.0.fc1.weight"])


def gradient_of_the_input(model: Any) -> Any:
    x = X.clone().requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), x)


def quantized(model: Any) -> Any:
    model = copy.deepcopy(model).float()
    quantize_(model, Int8WeightOnlyConfig())
    with torch.no_grad():
        return model(X.float())


def pruned(model: Any) -> Any:
    prune.l1_unstructured(model.blocks[0].fc1, "weight", 0.5)
    first = model(X)
    prune.remove(model.blocks[0].fc1, "weight")
    return first, model(X)


def offloaded(model: Any) -> Any:
    offloaded = accelerate.cpu_offload(copy.deepcopy(model).eval(), torch.device("cpu"))
    with torch.no_grad():
        return offloaded(X), offloaded(X)


def swapped(model: Any) -> Any:
    weight = nn.Parameter(torch.ones_like(model.blocks[0].fc1.weight))
    torch.utils.swap_tensors(model.blocks[0].fc1.weight, weight)
    return model(X)


def converted_by_swaps(model: Any) -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.to(torch.float32)(X.float())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def converted_and_back(model: Any) -> Any:
    return model.bfloat16().double()(X)


def from_a_vector(model: Any) -> Any:
    parameters = [p for n, p in model.named_parameters() if "fusion_weights" not in n]
    vector_to_parameters(2 * parameters_to_vector(parameters), parameters)
    return model(X)


def spectrally_normed(model: Any) -> Any:
    torch.manual_seed(3)
    nn.utils.parametrizations.spectral_norm(model.blocks[0].fc1)
    return model.eval()(X)


def weight_normed(model: Any) -> Any:
    nn.utils.parametrizations.weight_norm(model.blocks[0].fc2)
    return model(X)


def emptied_and_initialized(model: Any) -> Any:
    model = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()
    return model(X)


def hooked(model: Any) -> Any:
    seen: list[Any] = []
    linear = model.blocks[1].fc1
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    linear.register_full_backward_hook(lambda module, inner, outer: seen.append(outer[0].detach()))
    model(X).sum().backward()
    return seen


def loaded_with_assign(model: Any) -> Any:
    state = {name: 2 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model(X)


def with_another_linear(model: Any) -> Any:
    torch.manual_seed(3)
    model.blocks[0].fc1 = nn.Linear(8, 16).double()
    return model(X)


def with_another_parameter(model: Any) -> Any:
    model.blocks[0].fc2.weight = nn.Parameter(torch.ones(8, 16).double())
    return model(X)


def in_shared_memory(model: Any) -> Any:
    model = model.share_memory()
    return model(X), [p.is_shared() for p in model.parameters()][:3]


def traced(model: Any) -> Any:
    return torch.fx.symbolic_trace(model)(X)


def ran_by_data_parallel_replicas(model: Any) -> Any:
    return nn.DataParallel(model)(X)


OPERATIONS: dict[str, Operation] = {
    "keys": keys,
    "classes": classes,
    "pickle": pickled,
    "torch.save": saved,
    "deepcopy": copied,
    "export": exported,
    "strict export": exported_strictly,
    "exported graph": graph_of_exported,
    "functional_call": called_functionally,
    "vmap over models": stacked_and_mapped,
    "gradients by sample": gradients_by_sample,
    "jvp": along_a_tangent,
    "hessian": second_derivatives,
    "gradient of the input": gradient_of_the_input,
    "quantize_": quantized,
    "prune": pruned,
    "cpu_offload": offloaded,
    "swap_tensors": swapped,
    "conversion by swaps": converted_by_swaps,
    "another dtype and back": converted_and_back,
    "vector_to_parameters": from_a_vector,
    "spectral_norm": spectrally_normed,
    "weight_norm": weight_normed,
    "meta, to_empty, reset_parameters": emptied_and_initialized,
    "hooks": hooked,
    "load_state_dict with assign": loaded_with_assign,
    "another linear": with_another_linear,
    "another parameter": with_another_parameter,
    "share_memory": in_shared_memory,
    "fx": traced,
    "DataParallel on a CPU": ran_by_data_parallel_replicas,
}


CASES = [
    (operation, variant, is_trained)
    for operation in OPERATIONS
    for variant in VARIANTS
    for is_trained in (True, False)
]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize(("operation", "variant", "is_trained"), CASES)
def test_an_operation_gives_what_it_gives_on_the_dense_model(
    operation: str, variant: str, is_trained: bool
) -> None:
    model = trained(variant) if is_trained else wrapped(variant)
    dense = dense_twin(model)
    operate = OPERATIONS[operation]
    ours, theirs = operate(model), operate(dense)
    if isinstance(theirs, list) and not isinstance(theirs[0], Tensor):
        assert ours == theirs
    else:
        assert_same(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_wrapping_leaves_classes_parameters_and_their_names(variant: str) -> None:
    torch.manual_seed(0)
    dense = Net()
    parameters, modules = dict(dense.named_parameters()), dict(dense.named_modules())
    model = wrap(dense, variant)
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert all(dict(model.named_modules())[name] is module for name, module in modules.items())
    assert type(model.blocks[0].fc1) is type(model.blocks[1].fc2) is nn.Linear
    added = {"sw": [], "dw": ["weights"], "mb": ["router", "bank"]}[variant]
    assert [n for n in model.state_dict() if n not in Net().state_dict()] == [
        f"blocks.{i}.fusion_weights.{name}" for i in range(2) for name in added
    ]
    train(model)
    exf.fuse(model)
    assert list(model.state_dict()) == list(Net().state_dict())
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert not fusion_weights(model)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("variant", VARIANTS)
def test_channels_last_is_as_on_the_dense_model(variant: str) -> None:
    torch.manual_seed(0)
    model = wrap(Pixels(), variant)
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(3):
        model = model.to(memory_format=torch.channels_last)
        dense = dense_twin(model, Pixels()).to(memory_format=torch.channels_last)
        x = images.to(memory_format=torch.channels_last)
        assert_same(model(x), dense(x), atol=1e-12)
        assert model.mlp.fc1.weight.stride() == dense.mlp.fc1.weight.stride()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert model.mlp.fc1.weight.stride() == dense.mlp.fc1.weight.stride()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*")
def test_onnx_has_the_dense_models_graph(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    import onnx

    graphs = []
    model = trained(variant)
    for index, each in enumerate((model, dense_twin(model))):
        path = tmp_path / f"{index}.onnx"
        torch.onnx.export(each.eval(), (X,), path, dynamo=True)
        graph = onnx.load(path).graph
        graphs.append([(node.op_type, len(node.input)) for node in graph.node])
    assert graphs[0] == graphs[1]
