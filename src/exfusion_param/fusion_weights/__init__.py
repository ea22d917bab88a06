"""The fusion weights of an FFN group: the factor of each expert in the sum.

All variants share `base`: the weights of one group, a module that must exist only once
(`single_instance`), and the protocol `fused` for the tensors that are fused from them under
`fuse_on="step"`. `variants` has the static and the learned weights, and picks the variant;
`split_backwards` refuses pipelines that learned weights cannot follow.

The third variant is the memory bank, which follows a router: `memory_bank` under "forward",
`bank_on_step` under "step".

- Its input, from which `token_pool` excludes padding.
- Its votes, the micro-batches that count: the folder `votes`.
- Its problems: `bank_problems` raises for forwards that it cannot follow, and warns of collapsed
  routers and dead experts; `empty_banks` warns of banks that are still zero or do not move.

Under "step" autograd does not compute the gradients of routers and learned weights.
`zero_gradients` gives them zeros instead, which DDP and FSDP2 wait for.

Several ranks: `rank_agreement` compares how they wrapped the model, once; `votes/ordered_sums` sums
over them in each forward and backward, and raises where they run different FFNs.
"""
