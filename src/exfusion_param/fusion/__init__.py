"""`fuse_on="forward"`: the weight of a linear is a weighted sum of experts at each use.

Formula: `W = sum_i w_i E_i` and `b = sum_i w_i b_i` (Eq. 7), so that `W x + b` is the weighted sum
of the experts' outputs. Only the weight changes: the linear stays in its place, is called as
before, and sees a weight of its usual shape.

Storage: `linear.parametrizations.weight.original` is the stack `E`, shape (N, out, in), and
`linear.parametrizations.bias.original` is (N, out). The group's fusion weights belong to its first
linear, as `parametrizations.weight[0].fusion_weights`; the other parametrizations refer to them.

Cost: one pass over the stack at each use of the weight, another in backward. The forward and
backward of the linear are those of the dense one.

`expert_fusion` is the parametrization, and `linear_class` makes the class that the linear gets.
`outside_access` raises for writes to the fused weight that would be lost, which `handed_out` finds,
and for experts that were never filled; `refused_edits` for edits of the linear itself. `lookup`
finds what is wrapped in a model, under both settings of `fuse_on`.
"""
