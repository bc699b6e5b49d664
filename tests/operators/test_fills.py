"""Operators that make a tensor of one number, and which number that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from sqcompile.operators.fills import FILLS, fill_value

aten = torch.ops.aten
X = torch.arange(3.0)

CALLS: dict[Any, tuple[tuple[Any, ...], float]] = {
    aten.zeros.default: (([3],), 0),
    aten.ones.default: (([3],), 1),
    aten.zeros_like.default: ((X,), 0),
    aten.ones_like.default: ((X,), 1),
    aten.new_zeros.default: ((X, [3]), 0),
    aten.new_ones.default: ((X, [3]), 1),
    aten.full.default: (([3], 5), 5),
    aten.full_like.default: ((X, 6.5), 6.5),
    aten.new_full.default: ((X, [3], 7), 7),
    aten.scalar_tensor.default: ((8,), 8),
}


def test_every_fill_has_a_call_here() -> None:
    assert set(FILLS) == set(CALLS)


@pytest.mark.parametrize("target", FILLS, ids=str)
def test_is_the_number_that_pytorch_shows(target: Any) -> None:
    arguments, number = CALLS[target]
    result = target(*arguments)
    node = fx.Graph().call_function(target, arguments)
    assert fill_value(node) == number and torch.equal(result, torch.full_like(result, number))


def test_a_number_given_by_name_is_found() -> None:
    node = fx.Graph().call_function(aten.full.default, ([3],), {"fill_value": 4})
    assert fill_value(node) == 4
