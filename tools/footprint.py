"""What training a Llama with experts takes of each rank: memory, bytes on the wire, time to update.

Computed, not measured: tests/test_parallel_traffic.py holds it against bytes that are counted on
ranks with gloo at small sizes. The variant is `mb`, the optimizer AdamW or `ExpertAdamW`. Blocks
are checkpointed and gathered one by one, as in examples/torchtitan_llama.py. Activations are the
dense model's, and are not counted.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from exfusion_param.tensors.functional import rows_of_statistics

Mode = Literal["dense", "step", "forward"]


@dataclasses.dataclass(frozen=True)
class Llama:
    """The shapes of a dense model, by default those of Llama 2 7B."""

    dim: int = 4096
    hidden: int = 11008  # of an FFN, which has three linears
    layers: int = 32
    keys: int = 4096  # features of keys, and of values
    words: int = 32000

    @property
    def size(self) -> int:
        """Numbers in the model."""
        block = 3 * self.dim * self.hidden + 2 * self.dim * (self.dim + self.keys + 1)
        return self.layers * block + self.dim + 2 * self.words * self.dim


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks, and the tokens of a step.

    Args:
        data: ranks of FSDP2, among which each rank's part of the model is sharded.
        tensor: ranks of tensor parallelism, with sequences split between the linears.
        stages: of a pipeline, under 1F1B.
        micro_batches: of a pipeline's step.
        tokens: of a step, on all ranks together.
        bytes_computed: of a number that is gathered, and of a feature.
        bytes_reduced: of a gradient that is scattered.
    """

    data: int = 64
    tensor: int = 1
    stages: int = 1
    micro_batches: int = 1
    tokens: int = 2**22
    bytes_computed: int = 2
    bytes_reduced: int = 4


@dataclasses.dataclass(frozen=True)
class Method:
    """How the FFNs are trained.

    Args:
        mode: the dense model, or `fuse_on`.
        num_experts: N.
        bytes_per_state: of each of AdamW's two states of an expert: 4, 2, or 1 for 8 bits with a
            scale in float32 for each 256 numbers.
        bytes_per_expert: of the experts themselves: 4 or 2.
    """

    mode: Mode = "step"
    num_experts: int = 4
    bytes_per_state: float = 4
    bytes_per_expert: int = 4


@dataclasses.dataclass(frozen=True)
class Memory:
    """The bytes that a rank keeps, in float32 but for the experts and their states.

    Args:
        weights: parameters, or expert stacks under "forward".
        gradients: theirs.
        copies: of fused weights, by which writes from outside are found.
        experts: stacks under "step".
        expert_states: of the optimizer, of the stacks or of the dense FFNs.
        other_states: of the optimizer.
        banks: memory banks.
    """

    weights: int
    gradients: int
    copies: int
    experts: int
    expert_states: int
    other_states: int
    banks: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


@dataclasses.dataclass(frozen=True)
class Wire:
    """The bytes that a rank sends in a step, counted as benchmarks/collectives.py does.

    Args:
        data: FSDP2's gathers and scatters.
        tensor: features, their gradients and the norms' gradients under tensor parallelism.
        pipeline: features and their gradients, to the stages before and behind.
        votes: what memory banks and routers need beyond their parameters.
    """

    data: int
    tensor: int
    pipeline: int
    votes: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


@dataclasses.dataclass(frozen=True)
class Job:
    """A model with its layout and its method, as a rank of one pipeline stage sees them."""

    model: Llama = Llama()
    layout: Layout = Layout()
    method: Method = Method()
    stage: int = 0

    @property
    def _layers(self) -> int:
        """Of the stage; where they do not divide, of the stage that has most."""
        return -(-self.model.layers // self.layout.stages)

    @property
    def _is_last(self) -> bool:
        return self.stage == self.layout.stages - 1

    def _held(self, *shapes: tuple[int, int]) -> int:
        """Numbers of some weights on a rank; FSDP2 shards rows, and pads them to divide."""
        return sum(-(-rows // self.layout.data) * columns for rows, columns in shapes)

    @property
    def _ffn(self) -> int:
        """Numbers of a block's FFN on a rank."""
        dim, part = self.model.dim, self.model.hidden // self.layout.tensor
        return self._held((part, dim), (part, dim), (dim, part))

    @property
    def _others(self) -> int:
        """Numbers of what else a block has on a rank: attention, norms and router."""
        model, ranks = self.model, self.layout.tensor
        inputs = [(rows // ranks, model.dim) for rows in (model.dim, model.keys, model.keys)]
        router = (self._experts if self.method.mode != "dense" else 0, model.dim)
        output = (model.dim, model.dim // ranks)
        return self._held(*inputs, output, (model.dim, 1), (model.dim, 1), router)

    @property
    def _ends(self) -> int:
        """Numbers of the stage's embedding, or head and last norm, on a rank."""
        matrix = (self.model.words // self.layout.tensor, self.model.dim)
        first = [matrix] if self.stage == 0 else []
        return self._held(*first, *([matrix, (self.model.dim, 1)] if self._is_last else []))

    @property
    def _experts(self) -> int:
        return 1 if self.method.mode == "dense" else self.method.num_experts

    def memory(self) -> Memory:
        """What the rank keeps."""
        method, is_step = self.method, self.method.mode == "step"
        ffn = self._layers * self._ffn
        others = self._layers * self._others + self._ends
        stacks = self._experts * ffn
        trained = others + (ffn if is_step else stacks)
        return Memory(
            weights=4 * trained,
            gradients=4 * trained,
            copies=4 * ffn * is_step,
            experts=method.bytes_per_expert * stacks * is_step,
            expert_states=round(2 * stacks * (method.bytes_per_state if is_step else 4)),
            other_states=8 * others,
            banks=4 * self._layers * self._experts * (method.mode != "dense"),
        )

    def wire(self) -> Wire:
        """What the rank sends and receives; a pipeline gathers a block for each micro-batch."""
        layout, width = self.layout, self.layout.bytes_computed
        block = self._others + self._ffn * (self._experts if self.method.mode == "forward" else 1)
        gathers = 1 + layout.micro_batches
        data = self._layers * block * (gathers * width + layout.bytes_reduced)
        data += self._ends * (width + layout.bytes_reduced)
        features = layout.tokens // layout.data * self.model.dim * width
        neighbours = (self.stage > 0) + (not self._is_last)
        return Wire(
            data=data * (layout.data - 1),
            tensor=self._of_tensors(features),
            pipeline=neighbours * features // layout.tensor,
            votes=self._votes(),
        )

    def _of_tensors(self, features: int) -> int:
        """Eleven collectives of each block: four each way, and three as it is computed again."""
        ranks, model = self.layout.tensor, self.model
        scores = self.layout.tokens // self.layout.data * model.words * self.layout.bytes_computed
        times = 11 * self._layers + 2 * (self.stage == 0) + 2 * self._is_last
        sent = (times * features + self._is_last * scores) * (ranks - 1) // ranks
        norms = self.layout.micro_batches * (2 * self._layers + self._is_last)
        return sent + norms * ring(ranks, model.dim * self.layout.bytes_computed)

    def _votes(self) -> int:
        """All-reduces, over each dimension of the weights' mesh in turn."""
        count, layout = self.method.num_experts, self.layout
        if self.method.mode == "dense":
            return 0
        if self.method.mode == "forward":  # w and three more, as computed, again and differentiated
            return 3 * layout.micro_batches * self._layers * ring(layout.data, 8 * (count + 3))
        inputs = rows_of_statistics(count, self.model.dim)
        floats = 2 * count + inputs * self.model.dim + 1
        return sum(ring(k, 4 * floats * self._layers) for k in (layout.data, layout.tensor))

    def bytes_updated(self) -> int:
        """The bytes that the update of a rank's experts moves through its memory, in float32.

        For each number of an expert: itself and its states read and written, `w_i G` written and
        read, itself read for the inner product and again for the fused weight.
        """
        return 40 * self.method.num_experts * self._layers * self._ffn


def ring(ranks: int, size: int) -> int:
    """The bytes that each rank sends to all-reduce so many bytes."""
    return 2 * (ranks - 1) * size // ranks
