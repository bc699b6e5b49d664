"""Machines that are made up: kernels that take what a test says."""

from __future__ import annotations

import dataclasses

from sqcompile.backends.native.kernel_times import SHIPPED, FormTimes, KernelTimes


def machine(*, skips: bool = False, **million_ns: float) -> KernelTimes:
    """Return a machine without overhead, on which a million weights take so many ns a row, whatever their zeros.

    Args:
        skips: Whether zeros take no time, nearly.
        **million_ns: Without zeros, by form, with `_` for a space and `__` for a comma and a space; all others
            take 100 ns.
    """
    shipped = KernelTimes.load(SHIPPED)
    named = {name.replace("__", ", ").replace("_", " "): value for name, value in million_ns.items()}
    assert set(named) <= set(shipped.forms), named
    density = (0.01, 1.0) if skips else (1.0,)

    def times(row_ns: float) -> FormTimes:
        table = tuple(tuple(rows * part * row_ns for part in density) for rows in (1, 128))
        return FormTimes((1, 128), density, table, table)

    forms = {name: times(named.get(name, 100.0)) for name in shipped.forms}
    return dataclasses.replace(shipped, overhead_ns=0.0, forms=forms)
