"""wrap, step, save, load, fuse, wrap again, deepcopy, in any order."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

import exfusion_param as exf
from exfusion_param import ExFusionConfig
from exfusion_testing.models import FFNs, inputs, loss_of
from exfusion_testing.strategies import configs, seeds

DENSE_KEYS = list(FFNs().state_dict())
PROBE = inputs(seed=99).float()


@dataclasses.dataclass
class Subject:
    """A model in training, and what must hold of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: ExFusionConfig | None = None  # None while it is dense
    steps: int = 0  # of the optimizer since wrap

    @classmethod
    def of(cls, model: nn.Module, config: ExFusionConfig | None = None) -> "Subject":
        return cls(model, torch.optim.AdamW(exf.param_groups(model, 0.05), lr=0.01), config)


def output(model: nn.Module) -> Tensor:
    was_training = model.training
    with torch.no_grad():
        result = model.eval()(PROBE)
    model.train(was_training)
    return result


class Lifecycle(RuleBasedStateMachine):
    """Several models live side by side; none may notice the others."""

    subjects = Bundle("subjects")
    checkpoints = Bundle("checkpoints")

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Subject] = []

    @initialize(target=subjects)
    def start(self) -> Subject:
        return self._admit(Subject.of(FFNs()))

    def _admit(self, subject: Subject) -> Subject:
        self.alive.append(subject)
        return subject

    @rule(subject=subjects, config=configs(expert_init="upcycle", bank_init="uniform"))
    def wrap(self, subject: Subject, config: ExFusionConfig) -> None:
        if subject.config is not None:
            with pytest.raises(ValueError, match="already wrapped"):
                exf.wrap(subject.model, config)
            return
        before = output(subject.model)
        exf.wrap(subject.model, config)
        torch.testing.assert_close(output(subject.model), before, rtol=1e-4, atol=1e-5)
        self._renew(subject, config)

    @rule(subject=subjects, config=configs(bank_init="zeros"))
    def wrap_from_scratch(self, subject: Subject, config: ExFusionConfig) -> None:
        if subject.config is None:
            self._renew(subject, config, exf.wrap(subject.model, config))

    @rule(subject=subjects)
    def fuse(self, subject: Subject) -> None:
        if subject.config is None:
            with pytest.raises(ValueError, match="nothing to fuse"):
                exf.fuse(subject.model)
            return
        if subject.config.bank_init == "zeros" and subject.steps == 0:
            return  # it would warn, and leave zeros
        before = output(subject.model)
        exf.fuse(subject.model)
        assert torch.equal(output(subject.model), before)
        self._renew(subject, None)

    def _renew(
        self, subject: Subject, config: ExFusionConfig | None, model: nn.Module | None = None
    ) -> None:
        vars(subject).update(vars(Subject.of(model or subject.model, config)))

    @rule(subject=subjects, seed=seeds, micro_batches=st.integers(1, 3), in_eval=st.booleans())
    def step(self, subject: Subject, seed: int, micro_batches: int, in_eval: bool) -> None:
        others = [(other, output(other.model)) for other in self.alive if other is not subject]
        if in_eval:
            output(subject.model)
        for x in inputs(seed=seed % 1000).float().chunk(micro_batches):
            loss_of(subject.model, x).backward()
        subject.optimizer.step()
        subject.optimizer.zero_grad()
        subject.steps += 1
        for other, before in others:
            assert torch.equal(output(other.model), before)

    @rule(subject=subjects)
    def drop_gradients(self, subject: Subject) -> None:
        loss_of(subject.model, PROBE).backward()
        subject.optimizer.zero_grad()

    @rule(target=subjects, subject=subjects)
    def deepcopy(self, subject: Subject) -> Any:
        if len(self.alive) == 3:
            return multiple()
        model = copy.deepcopy(subject.model)
        assert torch.equal(output(model), output(subject.model))
        replica = Subject.of(model, subject.config)
        replica.steps = subject.steps
        return self._admit(replica)

    @rule(target=checkpoints, subject=subjects)
    def save(self, subject: Subject) -> Any:
        state = copy.deepcopy((subject.model.state_dict(), subject.optimizer.state_dict()))
        return subject.config, subject.steps, state, output(subject.model)

    @rule(subject=subjects, checkpoint=consumes(checkpoints))
    def load(self, subject: Subject, checkpoint: Any) -> None:
        config, steps, (model_state, optimizer_state), expected = checkpoint
        model = FFNs() if config is None else exf.wrap(FFNs(), config)
        self._renew(subject, config, model)
        subject.steps = steps
        subject.model.load_state_dict(model_state)
        subject.optimizer.load_state_dict(optimizer_state)
        assert torch.equal(output(subject.model), expected)

    @invariant()
    def the_dense_form_is_always_there(self) -> None:
        for subject in self.alive:
            state = exf.fused_state_dict(subject.model)
            assert list(state) == DENSE_KEYS
            assert all(torch.isfinite(value).all() for value in state.values())
            dense = FFNs().eval()
            dense.load_state_dict(state)
            assert torch.equal(output(subject.model), dense(PROBE).detach())

    @invariant()
    def what_is_wrapped_is_what_the_history_says(self) -> None:
        for subject in self.alive:
            wrapped = [m for m in subject.model.modules() if parametrize.is_parametrized(m)]
            assert len(wrapped) == (0 if subject.config is None else 4)

    @invariant()
    def a_bank_holds_the_mass_of_its_steps(self) -> None:
        for subject in self.alive:
            for name, value in subject.model.named_buffers():
                if name.endswith("bank"):
                    start = 1.0 if subject.config.bank_init == "uniform" else 0.0
                    left = subject.config.momentum**subject.steps
                    mass = start * left + 1 - left
                    assert value.sum().item() == pytest.approx(mass, abs=1e-5)


Lifecycle.TestCase.settings = settings(stateful_step_count=20)
TestLifecycle = pytest.mark.filterwarnings("ignore:The memory bank of")(Lifecycle.TestCase)
