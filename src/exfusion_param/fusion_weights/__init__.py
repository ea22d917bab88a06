"""What each expert counts for now: the fusion weights of an FFN group.

`base` has what the variants share, `variants` the static and the learned ones, `memory_bank` the
third, which follows a router: `routed_forward` and `token_pool` give it the FFN's input, `votes`
decides which micro-batches count (with `anchor` and `vote_ops`), and `bank_health` warns of a bank
that is of no use. `rank_agreement` compares the groups of all ranks.
"""
