"""Which micro-batches count when a memory bank moves, see Note [Votes follow the gradient].

`votes` counts those whose gradient a step applies, with the gradient of one parameter, the
`anchor`; `custom_ops` has the operators that note them in a backward, `refusals` the errors where
they cannot follow. `ordered_sums` sums over the ranks in each forward and backward, and raises
where they run different FFNs.
"""
