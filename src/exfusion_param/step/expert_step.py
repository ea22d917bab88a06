"""One step of an optimizer that holds wrapped parameters, see Note [A step]."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..expert_sums import fuse_into, products_with
from ..fusion_weights import FusionWeights, LearnedWeights, StaticWeights
from ..ranks import ALONE, Ranks, sum_together
from ..shards import is_sharded, like, local, padded, ranks_of, spread
from .expert_optimizers import ExpertOptimizer
from .fused_parameter import FusedParameter, Turn
from .torch_optimizers import StandIns, steps_one_by_one, update_one_by_one

_SEEN = "_exfusion_seen"
"""The attribute of a gradient that holds the version of it from which others were computed."""

_IS_VIEW = "_exfusion_is_view"
"""The attribute of an optimizer as its own `step` sees it."""


# Those of the step before.
_turns: weakref.WeakKeyDictionary[Optimizer, dict[FusedParameter, Turn]] = (
    weakref.WeakKeyDictionary()
)


def is_view(optimizer: Optimizer) -> bool:
    """Whether a step runs already, and this is a call of a base class's `step` within it."""
    return _IS_VIEW in vars(optimizer)


class ExpertStep:
    """A step of an optimizer, from its last pre-hook to its first post-hook.

    Args:
        optimizer: about to step.
        groups: the FFN groups of which it holds a parameter, all with `fuse_on="step"`.
    """

    def __init__(self, optimizer: Optimizer, groups: Sequence[FusionWeights]) -> None:
        self.optimizer = optimizer
        self.groups = groups
        self._lent: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        self._is_prepared = False
        if isinstance(optimizer, ExpertOptimizer):
            optimizer.refuse_unsupported()
        place = {
            id(parameter): index
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        self._settings = [dict(group) for group in optimizer.param_groups]
        with torch.no_grad():
            _gather_learned(groups)
            known = _turns.setdefault(optimizer, {})
            self._turns = {
                weights: [
                    fused.turn(optimizer, parameter, place.get(id(parameter)), known.get(fused))
                    for fused in weights.fused
                    for parameter in (fused.parameter,)
                ]
                for weights in groups
            }
        every = [turn for turns in self._turns.values() for turn in turns]
        known.update([(turn.fused, turn) for turn in every])
        self._held = [turn for turn in every if turn.group is not None]
        _refuse_tied(every)
        _warn_of_starts(groups)
        self._stand_ins = self._make_stand_ins()
        self.view = self._make_view()

    def _make_stand_ins(self) -> StandIns | None:
        if isinstance(self.optimizer, ExpertOptimizer) or steps_one_by_one(self.optimizer):
            return None
        return StandIns(self.optimizer, self._held)

    def _make_view(self) -> Optimizer:
        """The optimizer as its own `step` is to see it, without the wrapped parameters."""
        seen: dict[int, list[nn.Parameter]] = {id(turn.parameter): [] for turn in self._held}
        view: Optimizer = object.__new__(type(self.optimizer))
        view.__dict__.update(vars(self.optimizer), **{_IS_VIEW: True})
        if self._stand_ins is not None:
            seen, view.state = self._stand_ins.units, self._stand_ins.state
        view.param_groups = [
            group | {"params": [p for own in group["params"] for p in seen.get(id(own), (own,))]}
            for group in self.optimizer.param_groups
        ]
        return view

    def closure(self, evaluate: Callable[[], Any]) -> Callable[[], Any]:
        """The step's closure, after which the gradients are there."""

        def prepared() -> Any:
            if self._is_prepared or (self._stand_ins and self._stand_ins.have_moved()):
                raise RuntimeError(
                    f"{type(self.optimizer).__name__} moves the weights and evaluates its closure "
                    'again, which experts under fuse_on="step" cannot follow. Wrap with '
                    'fuse_on="forward".'
                )
            loss = evaluate()
            self.prepare()
            return loss

        return prepared

    @torch.no_grad()
    def prepare(self) -> None:
        """Take writes from outside, and give fusion weights and experts their gradients."""
        self._is_prepared = True
        for turn in self._held:
            gradient = turn.parameter.grad
            if gradient is not None and gradient.requires_grad:
                _refuse_graph(self.optimizer)
        for weights, turns in self._turns.items():
            weights.drop_unapplied()
            now = weights.current_weights()
            for turn in turns:
                turn.fused.take_writes(turn, now)
        self._lend_gradients()
        if self._stand_ins is not None:
            self._stand_ins.give_gradients()

    @torch.no_grad()
    def finish(self, skipped: Tensor | None) -> None:
        """Move the banks, update the experts, and fuse them.

        Args:
            skipped: as for `FusionWeights.optimizer_stepped`.
        """
        self.return_gradients()
        _copy_back(self.view, self.optimizer)
        for weights in self.groups:
            weights.optimizer_stepped(skipped)
        if not self._is_prepared:  # a closure that was never called
            return
        _gather_learned(self.groups)
        now = {weights: weights.current_weights().clone() for weights in self.groups}
        is_fused: set[Turn] = set()
        if isinstance(self.optimizer, ExpertOptimizer):
            is_fused = self.optimizer.update_experts(self._held, now)
        elif self._stand_ins is not None:
            self._stand_ins.take_states()
        else:
            update_one_by_one(self.optimizer, self._settings, self._held)
        for weights, turns in self._turns.items():
            for turn in turns:
                if turn.group is None and isinstance(weights, StaticWeights):
                    continue  # as it was, which an optimizer in backward relies on
                if turn not in is_fused:
                    fuse_into(turn.part, turn.experts, now[weights])
                turn.fused.is_fused(turn, now[weights])

    def _lend_gradients(self) -> None:
        """Add the step's gradients to what autograd gave routers and learned fusion weights."""
        for parameter, gradient in _fusion_gradients(self._turns).items():
            own = parameter.grad
            lent = gradient if own is None else own + gradient
            self._lent.append((parameter, lent, own))
            parameter.grad = lent

    def return_gradients(self) -> None:
        """Leave to routers and learned fusion weights what autograd gave them."""
        for parameter, lent, own in self._lent:
            if parameter.grad is lent:  # it may have been reset after a step that failed
                parameter.grad = own
        self._lent.clear()


def _fusion_gradients(
    turns: Mapping[FusionWeights, Sequence[Turn]],
) -> dict[nn.Parameter, Tensor]:
    """The gradients of routers and learned fusion weights, computed once for each backward.

    Another optimizer's step may come between; by then the experts are not those of the forward.
    """
    by_ranks: dict[Ranks, list[FusionWeights]] = defaultdict(list)
    for weights, own in turns.items():
        if _has_new_gradients(weights, own) and not isinstance(weights, StaticWeights):
            by_ranks[weights.ranks].append(weights)
    for ranks, alike in by_ranks.items():
        parts = [weights.statistics(_products(weights, turns[weights], ranks)) for weights in alike]
        for weights, sums in zip(alike, sum_together(ranks, parts), strict=True):
            weights.step_gradients = {
                parameter: _as_gradient(parameter, gradient)
                for parameter, gradient in weights.gradients(sums).items()
                if parameter.requires_grad
            }
    return {p: grad for weights in turns for p, grad in weights.step_gradients.items()}


def _has_new_gradients(weights: FusionWeights, turns: Sequence[Turn]) -> bool:
    """Whether a backward has written gradients since these were asked for last."""
    there: list[Any] = [grad for turn in turns if (grad := turn.parameter.grad) is not None]
    if not there:
        weights.step_gradients = {}
    is_new = any(getattr(grad, _SEEN, None) != local(grad)._version for grad in there)
    if is_new:
        for gradient in there:
            setattr(gradient, _SEEN, local(gradient)._version)
        for turn in turns:
            turn.fused.note_gradient()
    return is_new


def _products(weights: FusionWeights, turns: Sequence[Turn], ranks: Ranks) -> Tensor:
    """`<E_i, G>` of this rank's share of a group's experts, shape (N,)."""
    total = torch.zeros_like(weights.current_weights())
    for turn in turns:
        if (gradient := turn.parameter.grad) is not None:
            products = products_with(turn.experts, local(gradient)).to(total)
            if ranks is not ALONE:
                own = ranks_of(turn.parameter) or ranks
                products = products / own.replicas
            total += products
    return total


def _as_gradient(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    if is_sharded(parameter):
        return spread(gradient.to(parameter.dtype), parameter)
    return like(parameter, gradient)


def _gather_learned(groups: Iterable[FusionWeights]) -> None:
    """Gather the learned fusion weights that FSDP2 has sharded, all in one collective."""
    by_ranks: dict[Ranks, list[LearnedWeights]] = defaultdict(list)
    for weights in groups:
        if isinstance(weights, LearnedWeights):
            ranks = ranks_of(weights.weights)
            weights.gathered = None
            if ranks is not None:
                by_ranks[ranks].append(weights)
    for ranks, alike in by_ranks.items():
        parts = [padded(weights.weights) / ranks.replicas for weights in alike]
        for weights, whole in zip(alike, sum_together(ranks, parts), strict=True):
            weights.gathered = whole


def _refuse_tied(turns: Sequence[Turn]) -> None:
    names: dict[int, str] = {}
    for turn in turns:
        name = turn.fused.start.name
        if (other := names.setdefault(id(turn.parameter), name)) != name:
            raise RuntimeError(
                f"{other!r} and {name!r} were tied after wrap(), and one parameter cannot be fused "
                "from two stacks of experts. Tie them before wrap(), which takes one of them."
            )


def _warn_of_starts(groups: Sequence[FusionWeights]) -> None:
    """Warn if experts have just started around other weights than those that `wrap` made."""
    changed = [weights for weights in groups if weights.starts_around_changed]
    for weights in changed:
        weights.starts_around_changed = False
    if loaded := [weights for weights in changed if weights.was_loaded]:
        for weights in loaded:
            weights.was_loaded = False
        warnings.warn(
            f"The weights of {len(loaded)} FFN groups ({loaded[0].group!r} first) were loaded "
            "without their experts, which are optimizer state. New experts are drawn around the "
            "weights. To continue a run, load the optimizer's state, too.",
            stacklevel=2,
        )
    if empty := [weights for weights in changed if weights.is_empty()]:
        warnings.warn(
            f"The memory bank of {len(empty)} FFN groups ({empty[0].group!r} first) is zero, and "
            "their weights were written after wrap(): this step scales them down to the bank's "
            'mass. Wrap with bank_init="uniform" to start from the weights as they are.',
            stacklevel=2,
        )


def _refuse_graph(optimizer: Optimizer) -> None:
    raise RuntimeError(
        f"{type(optimizer).__name__} got gradients with a graph (create_graph=True), which "
        'those of experts under fuse_on="step" cannot have. Wrap with fuse_on="forward".'
    )


def _copy_back(view: Optimizer, optimizer: Optimizer) -> None:
    """Let the optimizer have what its step changed of itself and of its groups' settings."""
    for group, seen in zip(optimizer.param_groups, view.param_groups, strict=True):
        group.update({name: value for name, value in seen.items() if name != "params"})
    kept = ("param_groups", "state", _IS_VIEW)
    optimizer.__dict__.update({k: v for k, v in vars(view).items() if k not in kept})
