"""Which linears of a model make up an FFN, and what each of them is in it.

`discovery` finds them, by the names in `ffn_shapes` or by structure. `projections` describes the
kinds of linears (nn.Linear, Conv1D, 1x1 convolutions); `place` describes a linear's place in its
FFN. `outer_modules` takes what DDP and torch.compile add to modules and names off again.
"""
