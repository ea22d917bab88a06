"""The state of an optimizer, by the names of the parameters that it holds.

States of a parameter's shape, and stacks of them such as experts under `fuse_on="step"`, are
sharded as the parameter is and load on any number of ranks, as with torch's
`get_optimizer_state_dict`, but without first taking a step on zero gradients to create the states,
and with states that such a step would not create (lists, states of only some parameters).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ...finding.outer_modules import clean_name
from ...fusion.lookup import fused_parameter
from ...tensors.shards import as_stack, is_sharded, local, with_memory_of
from ..files.errors import CheckpointError
from ..files.plain_values import is_quantized
from .parts import Part


class OptimizerPart(Part):
    """An optimizer's states and settings.

    Args:
        name: of the part.
        optimizer: any `torch.optim.Optimizer`.
        names: of the parameters of all modules that are saved, by their ids.

    Raises:
        ValueError: the optimizer holds other parameters.
    """

    def __init__(self, name: str, optimizer: Optimizer, names: Mapping[int, str]) -> None:
        super().__init__(name)
        self._optimizer = optimizer
        self._names = names
        self._groups()

    def holds(self) -> list[str]:
        """The names of the parameters."""
        return list(self._parameters())

    def tensors(self) -> dict[str, Tensor]:
        """The states that have their parameter's shape, or that of a stack of such."""
        return {
            f"{name}/{key}": value
            for name, parameter, states in self._states()
            for key, value in states.items()
            if _is_spread(value, parameter)
        }

    def values(self) -> Any:
        """The settings of the groups, and all other states."""
        rest = {
            name: {k: _part(value) for k, value in states.items() if not _is_spread(value, of)}
            for name, of, states in self._states()
        }
        state_dict = self._optimizer.state_dict()
        more = {k: v for k, v in state_dict.items() if k not in ("state", "param_groups")}
        pairs = zip(state_dict["param_groups"], self._groups(), strict=True)
        groups = [{**settings, "params": list(group)} for settings, group in pairs]
        return {"rest": rest, "groups": groups, "more": more}

    def allocate(self, stored: Mapping[str, Tensor], values: Any) -> dict[str, Tensor]:
        """Tensors like the parameters that the states are of."""
        self._refuse_other_groups(values["groups"])
        parameters = self._parameters()
        room = {}
        for name, spec in stored.items():
            parameter = parameters.get(name.rpartition("/")[0])
            if parameter is None:
                raise CheckpointError(
                    f"{self.name}: {name} is not the state of any parameter here."
                )
            room[name] = self.room(name, target_of_state(parameter, spec), spec)
        self._state_dict(room, values)
        return room

    def load(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Load the state dict."""
        self._optimizer.load_state_dict(self._state_dict(tensors, values))

    def _state_dict(self, tensors: Mapping[str, Tensor], values: Any) -> dict[str, Any]:
        now, parameters = self._optimizer.state_dict(), self._parameters()
        state: dict[str, dict[str, Any]] = {
            name: {key: _whole(value, parameters[name]) for key, value in states.items()}
            for name, states in values["rest"].items()
        }
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition("/")
            state.setdefault(parameter, {})[key] = tensor
        groups = [
            {**group, "params": current["params"]}
            for group, current in zip(values["groups"], now["param_groups"], strict=True)
        ]
        by_key = {key: state[name] for name, key in self._keys(now).items() if name in state}
        return {**values["more"], "state": by_key, "param_groups": groups}

    def _states(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        """The name and the states of each parameter that has some."""
        state_dict = self._optimizer.state_dict()
        keys = self._keys(state_dict)
        for name, parameter in self._parameters().items():
            if keys[name] in state_dict["state"]:
                yield name, parameter, state_dict["state"][keys[name]]

    def _keys(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """By which a state dict of the optimizer knows each parameter, by the names."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        return dict(zip(self._parameters(), keys, strict=True))

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for group in self._groups() for name, parameter in group.items()}

    def _groups(self) -> list[dict[str, nn.Parameter]]:
        """The parameters of each group by their names."""
        groups = [group["params"] for group in self._optimizer.param_groups]
        return [{self._name_of(parameter): parameter for parameter in group} for group in groups]

    def _name_of(self, parameter: nn.Parameter) -> str:
        if id(parameter) not in self._names:
            raise ValueError(
                f"{self.name} has a parameter of shape {tuple(parameter.shape)} that is in none "
                "of the modules. Add its module to the parts."
            )
        return self._names[id(parameter)]

    def _refuse_other_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        saved, here = (
            [(i, name) for i, names in enumerate(every) for name in names]
            for every in ([group["params"] for group in groups], self._groups())
        )
        if differing := sorted(set(saved) ^ set(here)):
            i, name = differing[0]
            where = "as saved" if (i, name) in saved else "here"
            raise CheckpointError(
                f"{self.name}: {name} is in group {i} only {where}. Create the optimizer as "
                f"before, or resume without it: resume(leave_out=[{self.name!r}])."
            )
        if saved != here or len(groups) != len(self._groups()):
            raise CheckpointError(
                f"The order of parameters in {self.name} differs from the checkpoint. Create the "
                f"optimizer as before, or resume without it: resume(leave_out=[{self.name!r}])."
            )


def parameter_names(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """The names of all parameters of modules by their ids, with the modules' names before them."""
    return {
        id(parameter): f"{name}.{clean_name(fqn)}"
        for name, module in reversed(list(modules.items()))
        for fqn, parameter in module.named_parameters()
    }


def target_of_state(parameter: nn.Parameter, stored: Tensor) -> Tensor:
    """A tensor like a stored state: the parameter, or a stack of its experts, a dimension more."""
    fused = fused_parameter(parameter)
    if fused is None or stored.ndim != parameter.ndim + 1:
        return parameter
    part = local(parameter)
    shape = (fused.fusion_weights.config.num_experts, *part.shape)
    return as_stack(part.new_empty(shape), parameter)


def _is_spread(value: Any, parameter: nn.Parameter) -> bool:
    """Whether a state is spread over the ranks as its parameter is."""
    return (
        isinstance(value, Tensor)
        and value.ndim > 0
        and parameter.shape in (value.shape, value.shape[1:])
        and not is_quantized(local(value))
    )


def _part(value: Any) -> Any:
    """This rank's part of a state that each rank saves for itself."""
    return {"part": local(value)} if is_sharded(value) else {"whole": value}


def _whole(value: Mapping[str, Any], parameter: nn.Parameter) -> Any:
    if "part" in value:
        of_experts = value["part"].ndim > parameter.ndim
        return (as_stack if of_experts else with_memory_of)(value["part"], parameter)
    return value["whole"]
