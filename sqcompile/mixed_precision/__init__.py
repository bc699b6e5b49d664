"""Mixed precision: which layer gets which format and density, under a budget.

`measure_sensitivity` says what each candidate does to each layer, and what that does to the outputs;
`allocate` chooses one for each layer, exactly; `frontier` chooses for many budgets.
"""

from sqcompile.mixed_precision.budget import Point, allocate, allocate_within, frontier
from sqcompile.mixed_precision.candidate import Candidate
from sqcompile.mixed_precision.sensitivity import Measure, Sensitivity, measure_sensitivity

__all__ = [
    "Candidate",
    "Measure",
    "Point",
    "Sensitivity",
    "allocate",
    "allocate_within",
    "frontier",
    "measure_sensitivity",
]
