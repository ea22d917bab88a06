"""Has accelerate, which shards on accelerators only, take ranks on a CPU for ranks on GPUs."""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def start_again() -> None:
    """Forget the accelerator before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)


def take_ranks_for_gpus() -> None:
    """What follows asks for the kind of the ranks, and does the rest on the CPU."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
