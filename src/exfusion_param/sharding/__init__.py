"""What `fuse_on="forward"` needs of FSDP2: parts of every expert on each rank.

`fsdp` shards a model block by block; `checks` refuses what cannot be sharded before anything has
changed; `transformer_blocks` finds the blocks.
"""
