"""Which linears of a model make up an FFN, and what each of them is in it.

`selection` chooses among them. `discovery` finds them, by the names in `ffn_shapes` or by
`structure`, outside of `attention`. `mixtures` refuses models that hold experts already; `left_out`
reports what looks like an FFN and is not wrapped. `projections` describes the kinds of linears
(nn.Linear, Conv1D, 1x1 convolutions); `place` describes a linear's place in its FFN.
`outer_modules` takes what DDP and torch.compile add to modules and names off again.
"""
