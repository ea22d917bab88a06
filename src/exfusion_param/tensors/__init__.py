"""Arithmetic on expert stacks, whole or sharded, and how the stacks start.

`functional` has the paper's equations. `sliced_sums` sums over experts without a second copy of a
stack. `shards` lets tensors that are split over ranks be handled like plain ones, and `ranks` has
the sums over ranks, which `arrival` waits for; `fsdp_groups` asks FSDP2 for what has no public
name. `expert_starts` draws the experts from a seed and a name. `precision` names the dtype that
sums over experts are taken in, whatever autocast computes in; `readable` tells whether the numbers
of a tensor can be looked at.
"""
