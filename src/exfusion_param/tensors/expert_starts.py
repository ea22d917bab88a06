"""How an expert stack starts from a dense tensor, and what seeds its draws.

Every start works on any tensor of a linear, weight (out, in) or bias (out,), and returns the stack
(N, out, in) or (N, out). A tensor on the meta device yields a stack on the meta device.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..expert_config import ExpertConfig
from .precision import accumulation_dtype


class Dropped(NamedTuple):
    """Entries of one tensor: a dimension, and for each of N experts K indices along it, (N, K)."""

    dim: int
    units: Tensor


@dataclasses.dataclass(frozen=True)
class ExpertStart:
    """Draws the expert stack of one tensor of a linear.

    Args:
        config: the settings.
        seed: of all draws of one `wrap`.
        name: of the tensor in the model, such as "blocks.0.mlp.fc1.weight".
        dropped: the entries that drop-upcycling draws again, if it does.
    """

    config: ExpertConfig
    seed: int
    name: str
    dropped: Dropped | None = None

    def draw(self, tensor: Tensor) -> Tensor:
        """The stack, shape (N, *S), around the dense tensor, shape (*S).

        Draws depend on the seed, the name and the kind of device only, so that linears get the same
        experts whichever others are wrapped, at any time and on any number of ranks.
        """
        generator = named_generator(self.seed, self.name, tensor.device)
        if self.config.expert_init == "independent":
            return independent_experts(tensor, self.config.num_experts, generator)
        if self.dropped is not None:
            return drop_upcycled_experts(tensor, *self.dropped, generator)
        # Drop-upcycling leaves exact copies of what belongs to no hidden unit.
        noise = self.config.upcycle_noise if self.config.expert_init == "upcycle" else 0.0
        dtype = accumulation_dtype(tensor.dtype)
        weights = uniform_weights(self.config.num_experts, tensor.device, dtype)
        return upcycled_experts(tensor, weights, noise, generator)


def independent_experts(
    tensor: Tensor, num_experts: int, generator: torch.Generator | None = None
) -> Tensor:
    """Expert 0 is `tensor` itself; the others are its rows and columns in random order.

    The model's own initialization is known only by its result, be it normal, truncated, orthogonal
    or constant. A random order keeps what that result has: its entries, and so their mean, standard
    deviation and bounds, and its singular values. Experts are uncorrelated on average over the
    orders, so that the mean of N of them has 1/N of the variance of one.

    Args:
        tensor: shape (*S). The first two dimensions are permuted, of a bias its only one.
        num_experts: N.
        generator: on the device of `tensor`; None takes torch's global one.

    Returns:
        The stack, shape (N, *S).
    """
    experts = tensor.new_empty(num_experts, *tensor.shape)
    if tensor.is_meta:
        return experts
    experts[0] = tensor.detach()
    for expert in experts[1:]:
        expert.copy_(_permuted(tensor.detach(), generator))
    return experts


def _permuted(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    for dim, size in enumerate(tensor.shape[:2]):
        order = torch.randperm(size, generator=generator, device=tensor.device)
        tensor = tensor.index_select(dim, order)
    return tensor


def upcycled_experts(
    tensor: Tensor, weights: Tensor, noise: float, generator: torch.Generator | None = None
) -> Tensor:
    """Every expert is `tensor` plus noise, and their fused tensor is `tensor`.

    `E_i = W / sum(w) + n_i` with `sum_i w_i n_i = 0`. Without noise the experts would be exact
    copies, which never separate while their fusion weights are equal.

    Args:
        tensor: `W`, shape (*S).
        weights: the fusion weights `w` that the experts start with, shape (N,), of non-zero sum.
        noise: standard deviation of the `n_i`, over all experts, as a share of that of `tensor`.
        generator: on the device of `tensor`; None takes torch's global one.

    Returns:
        The stack, shape (N, *S).

    Raises:
        ValueError: the weights sum to zero, so that no experts fuse to the tensor.
    """
    shape = (len(weights), *tensor.shape)
    if tensor.is_meta:
        return tensor.new_empty(shape)
    dtype = accumulation_dtype(tensor.dtype)
    weights = weights.detach().to(tensor.device, dtype)
    if weights.sum() == 0:
        raise ValueError("The fusion weights sum to zero. Set them before the dense weight.")
    dense = tensor.detach().to(dtype)
    # The constraint on the noise takes a part of its variance, 1/N for equal weights.
    left = 1 - 2 / len(weights) + (weights / weights.sum()).square().sum()
    scale = noise * dense.std(correction=0) / left.sqrt()
    experts = torch.randn(shape, generator=generator, device=tensor.device, dtype=dtype)
    experts.mul_(scale)  # in place: new memory costs more than the numbers in it
    experts.add_((dense - torch.tensordot(weights, experts, dims=1)) / weights.sum())
    return experts.to(tensor.dtype)


def drop_upcycled_experts(
    tensor: Tensor, dim: int, units: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Every expert is `tensor`, but for some hidden units redrawn (arXiv 2502.19261).

    New entries are normal with the mean and standard deviation of `tensor`. The fused tensor is
    another one, so that the function changes; the experts differ from the start.

    Args:
        tensor: shape (*S).
        dim: dimension of `tensor` that runs over the hidden units.
        units: for each of N experts the units to redraw, shape (N, K).
        generator: on the device of `tensor`; None takes torch's global one.

    Returns:
        The stack, shape (N, *S).
    """
    experts = tensor.detach().repeat(len(units), *[1] * tensor.ndim)
    if tensor.is_meta:
        return experts
    deviation, mean = torch.std_mean(tensor.detach(), correction=0)
    for expert, drawn in zip(experts, units.to(tensor.device), strict=True):
        shape = [*expert.shape]
        shape[dim] = len(drawn)
        noise = torch.randn(shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
        expert.index_copy_(dim, drawn, mean + deviation * noise)
    return experts


def named_generator(seed: int, name: str, device: torch.device) -> torch.Generator | None:
    """The generator for one tensor: its draws depend only on the seed and the name.

    So the experts of a linear are the same whichever other linears are wrapped, and in any order.
    Draws on different kinds of device differ. The meta device needs, and gets, none.
    """
    if device.type == "meta":
        return None
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # 32 bits: torch's generator on the CPU ignores the others
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4]))


def uniform_weights(num_experts: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1/N for each of N experts, shape (N,)."""
    return torch.full((num_experts,), 1 / num_experts, device=device, dtype=dtype)
