"""Learned rounding, against the paper's objective written plainly in NumPy and against all roundings there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from sqcompile.quantization import affine
from sqcompile.quantization.format import Format
from sqcompile.second_order import Hessian
from sqcompile.second_order.learned_rounding import learn_rounding, objective, soft


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(count: int, depth: int) -> Tensor:
    """Correlated inputs: independent ones leave nothing to cancel."""
    return values(count, depth, seed=1) @ (torch.eye(depth) + 0.6 * values(depth, depth, seed=2))


def hessian_of(x: Tensor) -> Hessian:
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return hessian


def errors(weight: Tensor, rounded: Tensor, x: Tensor) -> Tensor:
    """Mean squared output error of each row."""
    return ((rounded - weight).double() @ x.double().T).square().mean(1)


def nearest(weight: Tensor, text: str) -> Tensor:
    format = Format.parse(text)
    scale, zero_point = affine.scale_for_tensor(weight, format, "mse")
    axis, group_size = format.granularity.pair
    return affine.fake_quantize(weight, scale, zero_point, axis, group_size, format.qmin, format.qmax)


def test_objective_is_the_papers() -> None:
    x, change, variable = inputs(50, 12), 0.1 * values(3, 12, seed=4), values(3, 12, seed=5)
    up = soft(variable)
    found = float(objective(change, hessian_of(x).matrix, up, 3.0))
    v = variable.double().numpy()
    h = np.clip(1 / (1 + np.exp(-v)) * (1.1 - (-0.1)) + (-0.1), 0, 1)
    error = np.square(x.double().numpy() @ change.double().numpy().T).mean(0).sum()
    assert found == pytest.approx(error + 1.0 * (1 - np.abs(2 * h - 1) ** 3).sum(), rel=1e-5)
    np.testing.assert_allclose(up.numpy(), h, atol=1e-6)  # float32 against float64


def test_is_near_the_best_of_all_roundings() -> None:
    x, weight, text = inputs(60, 10), values(4, 10, seed=3), "int3:channel=0"
    format = Format.parse(text)
    result = learn_rounding(weight, hessian_of(x), format)
    scale = result.decoding.scale[:, None]
    floor = (weight / scale).floor()
    best = torch.full((4,), torch.inf, dtype=torch.float64)
    for bits in itertools.product((0.0, 1.0), repeat=10):
        candidate = (floor + torch.tensor(bits)).clamp(format.qmin, format.qmax) * scale
        best = torch.minimum(best, errors(weight, candidate, x))
    found, plain = errors(weight, result.weight, x), errors(weight, nearest(weight, text), x)
    assert bool((found >= best * (1 - 1e-5)).all())  # of 1024 roundings of a row, none is better
    assert float(found.sum()) < 1.5 * float(
        best.sum()
    )  # measured: 1.43, where gradients end in a local minimum
    assert float(found.sum()) < 0.8 * float(plain.sum())


@pytest.mark.parametrize(
    "text", ["uint3:group=8:affine", "int4:group=16", "int2:channel=0", "uint4:tensor:affine"]
)
def test_is_on_the_grid_and_no_row_is_worse_than_nearest(text: str) -> None:
    x, weight = inputs(80, 32), values(6, 32, seed=3)
    format = Format.parse(text)
    result = learn_rounding(weight, hessian_of(x), format, steps=150)
    axis, group_size = format.granularity.pair
    decoding = result.decoding
    again = affine.fake_quantize(
        result.weight, decoding.scale, decoding.zero_point, axis, group_size, format.qmin, format.qmax
    )
    torch.testing.assert_close(again, result.weight)
    found, plain = errors(weight, result.weight, x), errors(weight, nearest(weight, text), x)
    assert bool((found <= plain * (1 + 1e-4)).all())  # compared in float32 there
    assert float(found.sum()) < 0.95 * float(plain.sum())


def test_zeros_stay_zeros() -> None:
    x, weight = inputs(80, 16), values(4, 16, seed=3)
    kept = values(4, 16, seed=6) > 0
    result = learn_rounding(
        weight * kept, hessian_of(x), Format.parse("uint4:group=8:affine"), steps=30, kept=kept
    )
    assert not result.weight[~kept].any() and bool(result.weight[kept].any())


def test_inputs_that_are_always_zero_leave_rounding_to_nearest() -> None:
    weight = values(4, 16)
    result = learn_rounding(weight, hessian_of(torch.zeros(5, 16)), Format.parse("int4:group=8"))
    torch.testing.assert_close(result.weight, nearest(weight, "int4:group=8"))
