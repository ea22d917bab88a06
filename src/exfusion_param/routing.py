"""Router outputs for single tokens, for plots over classes or positions; averages of banks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .finding.outer_modules import unwrapped
from .finding.place import input_of
from .finding.projections import projections_of
from .fusion.lookup import groups_of, labels_of
from .fusion_weights.memory_bank import MemoryBank
from .tensors.functional import token_shares
from .tensors.precision import without_autocast


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the output of every router for every token, inside a `with` block.

        with record_routing(model) as shares, torch.no_grad():
            model(images)
        shares["blocks.0.mlp"]  # softmax(G(x)), shape (batch, tokens, N), of the last forward

    Args:
        model: a wrapped model, in training or eval.

    Raises:
        ValueError: the model has no memory bank.

    Examples:
        >>> model = exf.wrap(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)))
        >>> with record_routing(model) as shares, torch.no_grad():
        ...     output = model(torch.randn(2, 3, 8))
        >>> {group: tuple(share.shape) for group, share in shares.items()}
        {'0': (2, 3, 4)}
    """
    banks = {bank: name for bank, name in labels_of(model).items() if isinstance(bank, MemoryBank)}
    if not banks:
        raise ValueError(f"{type(model).__name__} has no memory bank, so no router to record.")
    shares: dict[str, Tensor] = {}
    hooks = [
        bank.linears[0].register_forward_pre_hook(
            partial(_record, shares, name, bank), with_kwargs=True
        )
        for bank, name in banks.items()
    ]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would pass the hooks by
            yield shares
    finally:
        for hook in hooks:
            hook.remove()


def router_load(
    shares: Mapping[str, Tensor], labels: Tensor, names: Sequence[str] | None = None
) -> dict[str, float]:
    """Average the recorded router outputs per label, as a flat dict for any tracker.

    Args:
        shares: from `record_routing`, of shape (*S, N) for each group.
        labels: integers >= 0 whose shape matches the leading dimensions of S: (batch,) for the
            classes of samples, (batch, tokens) for the positions of tokens.
        names: the names of the labels; None uses their numbers.

    Returns:
        `router_load/{group}/{label}/{i}` for expert i; labels that do not occur are left out.

    Raises:
        ValueError: the labels do not match the shares or the names; or a name contains a slash,
            which separates the parts of a column's name.

    Examples:
        >>> shares = {"0": torch.tensor([[[0.25, 0.75]], [[0.5, 0.5]]])}  # 2 samples of 1 token
        >>> router_load(shares, torch.tensor([0, 1]), names=["cat", "dog"])
        {'router_load/0/cat/0': 0.25, 'router_load/0/cat/1': 0.75,
         'router_load/0/dog/0': 0.5, 'router_load/0/dog/1': 0.5}
    """
    _check_labels(shares, labels, names)
    if slashed := [name for name in names or () if "/" in name]:
        raise ValueError(f"A label must not hold a slash, got {slashed[0]!r}.")
    flat = labels.flatten()
    kinds, rows = flat.unique(return_inverse=True)
    load: dict[str, float] = {}
    for group, share in shares.items():
        tokens = share.detach().float().reshape(len(flat), -1, share.shape[-1]).mean(1)
        means = tokens.new_zeros(len(kinds), share.shape[-1]).index_add_(0, rows, tokens)
        means /= rows.bincount().unsqueeze(1)
        for kind, mean in zip(kinds.tolist(), means.tolist(), strict=True):
            label = names[kind] if names else kind
            load |= {f"router_load/{group}/{label}/{i}": value for i, value in enumerate(mean)}
    return load


@torch.no_grad()
def average_banks(target: nn.Module, source: nn.Module, *, decay: float = 0.0) -> None:
    """Update the memory banks of an averaged model from those of the model that is trained.

    EMA models, key encoders, teachers and target networks that average only `parameters()` need
    this: a memory bank is a buffer, and moves only if an optimizer steps on its own model.

        teacher = copy.deepcopy(model).eval()
        for x in batches:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for average, new in zip(teacher.parameters(), model.parameters()):
                    average.lerp_(new, 0.01)
            average_banks(teacher, model)

    Args:
        target: a wrapped model, such as a copy of `source`; its banks are changed in place.
        source: a wrapped model with the same FFN groups.
        decay: the new banks are `decay * target + (1 - decay) * source`. The default copies them,
            which also fills an empty bank at once.

    Raises:
        ValueError: `decay` is not between 0 and 1, or the names or shapes of the memory banks in
            the two models differ. The target is then unchanged.

    Examples:
        >>> model = exf.wrap(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), seed=0)
        >>> teacher = copy.deepcopy(model).eval()
        >>> model(torch.ones(2, 3, 8)).sum().backward()
        >>> torch.optim.SGD(model.parameters()).step()
        >>> average_banks(teacher, model)
        >>> round(exf.metrics(teacher)["bank_mass/TransformerEncoderLayer"], 2)
        0.05
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be between 0 and 1, got {decay}.")
    averages, new = _banks_by_name(target), _banks_by_name(source)
    if not new:
        raise ValueError(f"{type(source).__name__} has no memory bank, so nothing to average.")
    for name in [*new, *averages]:
        shapes = [tuple(banks[name].shape) if name in banks else None for banks in (averages, new)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The memory bank of {name!r} has shape {shapes[0]} in the target and {shapes[1]} "
                "in the source. Both models must be wrapped alike; copy.deepcopy(source) is."
            )
    for name, bank in averages.items():
        bank.copy_(decay * bank + (1 - decay) * new[name].to(bank))


def _banks_by_name(model: nn.Module) -> dict[str, Tensor]:
    """The memory banks of a model, by the names of their FFN groups in it."""
    inner = unwrapped(model.module if isinstance(model, AveragedModel) else model)
    return {
        name: bank.numbers
        for bank, name in groups_of(inner).items()
        if isinstance(bank, MemoryBank)
    }


def _check_labels(
    shares: Mapping[str, Tensor], labels: Tensor, names: Sequence[str] | None
) -> None:
    for group, share in shares.items():
        if share.shape[: labels.ndim] != labels.shape or share.ndim == labels.ndim:
            raise ValueError(
                f"The labels have shape {tuple(labels.shape)}, which does not match the leading "
                f"dimensions of the router outputs of {group!r}, {tuple(share.shape)}."
            )
    highest = len(names) - 1 if names is not None else None
    if labels.numel() and (labels.min() < 0 or (highest is not None and labels.max() > highest)):
        raise ValueError(
            f"Labels must be at least 0{f' and at most {highest}' if names else ''}, got "
            f"{labels.min().item()} to {labels.max().item()}."
        )


def _record(
    shares: dict[str, Tensor],
    name: str,
    bank: MemoryBank,
    linear: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
) -> None:
    (projection,) = projections_of([linear])
    x = input_of(args, kwargs).detach().movedim(projection.feature_dim, -1)
    with torch.no_grad(), without_autocast(x.device):
        of_tokens = token_shares(x, bank.router)
    shares[name] = of_tokens.reshape(*x.shape[:-1], len(bank.router))
