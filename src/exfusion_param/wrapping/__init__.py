"""How a dense model becomes a wrapped one, and back.

`wrap_linears` goes through it: find the groups, check them (`checks`), plan the draws of all
(`planning`, `drop_upcycling`), and only then change the model (`attach`, or step/attach.py). It
ends with what follows the model from then on: `load_guard` and `padding_masks`.
"""
