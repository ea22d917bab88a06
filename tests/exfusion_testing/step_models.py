"""A wrapped model that fuses at each step, and the dense one with the same weights."""

import copy
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import exfusion_param as exf
from exfusion_param.fusion_weights.base import FusionWeights

VARIANTS = ["sw", "dw", "mb"]
EXACT = ["sw", "dw"]
Make = Callable[[Iterable[Any]], torch.optim.Optimizer]


class Block(nn.Module):
    """`x + fc2(gelu(fc1(norm(x))))`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Net(nn.Module):
    """An embedding, two residual FFNs and a head, in float64."""

    def __init__(self, dim: int = 8, hidden: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(6, dim)
        self.blocks = nn.ModuleList(Block(dim, hidden) for _ in range(depth))
        self.head = nn.Linear(dim, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) to (batch, 3)."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Pixels(nn.Module):
    """An FFN of 1x1 convolutions, as in MobileNet or PVT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mlp = ConvMlp(8, 16)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, height, width) to (batch, 8)."""
        x = self.stem(x)
        return (x + self.mlp(x)).mean((2, 3))


class ConvMlp(nn.Module):
    """fc2(gelu(fc1(x))) on images."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim, height, width), in and out."""
        return self.fc2(self.act(self.fc1(x)))


def batch(seed: int = 0, size: int = 5) -> Tensor:
    """Inputs of `Net`, shape (size, 6)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A loss with a gradient everywhere."""
    y = model(x)
    return (y.square() + y.sin()).mean()


def wrap(model: Any, variant: str, **fields: Any) -> Any:
    """Wrapped to fuse at each step."""
    return exf.wrap(
        model,
        **({"variant": variant, "fuse_on": "step", "seed": 1, "bank_init": "uniform"} | fields),
    )


def wrapped(variant: str, **fields: Any) -> Any:
    """A wrapped `Net`."""
    torch.manual_seed(0)
    return wrap(Net(), variant, **fields)


def adamw(model: nn.Module, **settings: Any) -> torch.optim.AdamW:
    """AdamW on all parameters."""
    return torch.optim.AdamW(model.parameters(), **({"lr": 0.02} | settings))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    seeds: Iterable[int] = range(3),
) -> torch.optim.Optimizer:
    """A few plain steps."""
    optimizer = optimizer or adamw(model)
    for seed in seeds:
        loss_of(model, batch(seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def trained(variant: str, **fields: Any) -> Any:
    """A wrapped `Net` after a few steps."""
    model = wrapped(variant, **fields)
    train(model)
    return model


def dense_twin(model: Any, dense: Any = None) -> Any:
    """The dense model with the weights that a wrapped one has."""
    dense = Net() if dense is None else dense
    own = dense.state_dict()
    dense.load_state_dict({k: v.clone() for k, v in model.state_dict().items() if k in own})
    return dense.train(model.training)


def fusion_weights(model: nn.Module) -> list[Any]:
    """The modules that `wrap` has attached."""
    return [module for module in model.modules() if isinstance(module, FusionWeights)]


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """What a model has of the dense one's tensors, as they are now."""
    own = Net().state_dict()
    return {name: value.clone() for name, value in model.state_dict().items() if name in own}


def assert_same(ours: Any, theirs: Any, atol: float = 1e-10) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


class Experts:
    """The oracle: `sw` or `dw` with each expert a leaf of its own, fused at each forward.

    Args:
        model: a wrapped model that has not been trained.
        dense: of its class, if that is not `Net`.
    """

    def __init__(self, model: Any, dense: Any = None) -> None:
        self.dense = dense_twin(model, dense)
        self.leaves: dict[str, list[nn.Parameter]] = {}
        self.vectors: dict[str, nn.Parameter] = {}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for weights in fusion_weights(model):
            own = [*weights.parameters()]
            vector = nn.Parameter(
                copy.deepcopy(own[0].detach()) if own else weights.current_weights().clone(),
                requires_grad=bool(own),
            )
            for fused in weights.fused:
                name = names[id(fused.parameter)]
                self.leaves[name] = [nn.Parameter(e.clone()) for e in fused.experts()]
                self.vectors[name] = vector

    def plain(self) -> dict[str, nn.Parameter]:
        """The parameters that are not fused, by name."""
        named = self.dense.named_parameters()
        return {name: parameter for name, parameter in named if name not in self.leaves}

    def learned(self) -> list[nn.Parameter]:
        """The learned vectors, one for each FFN."""
        unique = {id(vector): vector for vector in self.vectors.values() if vector.requires_grad}
        return list(unique.values())

    def parameters(self) -> list[nn.Parameter]:
        """All leaves."""
        return [*self.plain().values(), *chain(*self.leaves.values()), *self.learned()]

    def fused(self) -> dict[str, Tensor]:
        """The dense model's tensors."""
        fused = {
            name: sum(w * e for w, e in zip(self.vectors[name], experts, strict=True))
            for name, experts in self.leaves.items()
        }
        return self.plain() | fused

    def __call__(self, x: Tensor) -> Tensor:
        """The model's output."""
        return torch.func.functional_call(self.dense, self.fused(), (x,))

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None


def assert_equals_oracle(model: nn.Module, oracle: Experts, atol: float = 1e-10) -> None:
    """The dense tensors, and the learned vectors, are those of the oracle."""
    with torch.no_grad():
        expected = {name: value.detach().clone() for name, value in oracle.fused().items()}
    assert_same(dense_state(model), {name: expected[name] for name in dense_state(model)}, atol)
    learned = [weights.weights for weights in fusion_weights(model) if hasattr(weights, "weights")]
    assert_same([w.detach() for w in learned], [w.detach() for w in oracle.learned()], atol)
