"""Arithmetic on expert stacks, whole or sharded, and how the stacks start.

`functional` has the paper's equations. `sliced_sums` sums over experts without a second copy of a
stack. `shards` and `ranks` give tensors of which each rank holds a part the same functions as plain
ones. `expert_starts` draws the experts from a seed and a name.
"""
