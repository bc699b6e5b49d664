"""Second-order compression: what a weight costs by the loss it causes in its layer's outputs.

A layer's output error is quadratic in its weights, with the Hessian H = mean of x xᵀ over the layer's
inputs. `Hessian` collects it, `sweep` prunes and rounds column after column and lets the columns that
are still free make up for the error, `refit` solves for the surviving weights exactly, `elimination_costs`
says what it costs to take whole inputs away.
"""

from sqcompile.second_order.elimination import Reader, elimination_costs
from sqcompile.second_order.hessian import Hessian, inverse_factor
from sqcompile.second_order.least_squares import refit, target
from sqcompile.second_order.sweep import Grid, Swept, sweep

__all__ = [
    "Grid",
    "Hessian",
    "Reader",
    "Swept",
    "elimination_costs",
    "inverse_factor",
    "refit",
    "sweep",
    "target",
]
