"""Machines that are made up: kernels that take what a test says."""

from __future__ import annotations

import dataclasses

from sqcompile.backends.native.kernel_times import SHIPPED, FormTimes, KernelTimes


def machine(**million_ns: float) -> KernelTimes:
    """Return a machine without overhead, on which a million weights take so many ns a row, whatever their zeros.

    Args:
        **million_ns: By form, with `_` for a space and `__` for a comma and a space; all others take 100 ns.
    """
    shipped = KernelTimes.load(SHIPPED)
    named = {name.replace("__", ", ").replace("_", " "): value for name, value in million_ns.items()}
    assert set(named) <= set(shipped.forms), named
    forms = {
        name: FormTimes((1, 128), (1.0,), *[((named.get(name, 100.0),), (128 * named.get(name, 100.0),))] * 2)
        for name in shipped.forms
    }
    return dataclasses.replace(shipped, overhead_ns=0.0, forms=forms)
