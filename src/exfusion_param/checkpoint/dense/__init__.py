"""A wrapped checkpoint made dense, without its model or its code.

`description` writes into config.json what the names of tensors do not say: which linears are fused
with which weights. `wrapped_layout` checks a checkpoint against that before it reads any tensor,
and `fusing` writes the dense model.
"""
