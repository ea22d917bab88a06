"""Plots of a run's history; needs matplotlib.

A history maps the name of a column to its values over the run, as `read_history` returns it:
`{"step": [...], "fusion_weights/blocks.0.mlp/0": [...], ...}`. Every function draws on the given
axes, or creates new ones, and returns them.

`axes` draws the figures, `columns` looks up a history's columns, `run` writes all plots of a run.
"""

from .axes import OVER_GROUPS, curves, fusion_weights, over_groups, router_load
from .columns import group_names
from .run import write_plots

__all__ = [
    "OVER_GROUPS",
    "curves",
    "fusion_weights",
    "group_names",
    "over_groups",
    "router_load",
    "write_plots",
]
