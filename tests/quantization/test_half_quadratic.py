"""Scales by half-quadratic splitting, against the equations written plainly in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sqcompile.quantization import affine
from sqcompile.quantization.format import Format
from sqcompile.quantization.half_quadratic import half_quadratic

POWER = 0.7


def weights(*shape: int, seed: int = 0) -> Tensor:
    """Weights with outliers: one in fifty is eight times as large."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values * torch.where(torch.rand(*shape, generator=generator) < 0.02, 8.0, 1.0)


def error(x: NDArray[np.float64], scale: float, zero: float, qmin: int, qmax: int) -> float:
    steps = np.clip(np.rint(x / scale) + zero, qmin, qmax) - zero
    return float((np.abs(x - steps * scale) ** POWER).sum())


def plain(
    x: NDArray[np.float64], scale: float, zero: float, qmin: int, qmax: int, symmetric: bool
) -> tuple[float, float]:
    """One group at a time, in the units of the weights."""
    best, least, beta = (scale, zero), error(x, scale, zero, qmin, qmax), 10.0
    for _ in range(20):
        steps = np.clip(np.rint(x / scale) + zero, qmin, qmax) - zero
        rest = x / scale - steps
        large = np.maximum(np.abs(rest), 1e-300)
        errors = np.sign(rest) * np.maximum(large - large ** (POWER - 1) / beta, 0) * scale
        wanted = x - errors
        if (steps**2).sum() > 0 and (wanted * steps).sum() > 0:
            scale = (wanted * steps).sum() / (steps**2).sum()
        if not symmetric:
            zero = float(np.clip(np.rint((steps + zero - wanted / scale).mean()), qmin, qmax))
        found = error(x, scale, zero, qmin, qmax)
        if found < least:
            best, least = (scale, zero), found
        beta *= 1.01
    return best


@pytest.mark.parametrize(
    "text", ["uint4:group=32:affine", "uint3:group=32:affine", "int4:group=32", "int8:channel=0"]
)
def test_is_the_papers_splitting_group_by_group(text: str) -> None:
    format = Format.parse(text)
    x = weights(6, 64)
    scale, zero_point = half_quadratic(x, *affine.scale_for_tensor(x, format), format)
    start, first = affine.scale_for_tensor(x, format)
    rows = x.double().numpy().reshape(scale.numel(), -1)
    errors, wanted = [], []
    for index, row in enumerate(rows):
        options = format.qmin, format.qmax
        found = float(scale.flatten()[index]), float(zero_point.flatten()[index])
        best = plain(
            row, float(start.flatten()[index]), float(first.flatten()[index]), *options, format.symmetric
        )
        errors.append(error(row, *found, *options))
        wanted.append(error(row, *best, *options))
    # A weight halfway between two codes may go either way in float32, and the ways part from there.
    np.testing.assert_allclose(errors, wanted, rtol=0.02)
    assert np.isclose(errors, wanted, rtol=1e-4).mean() > 0.8


@pytest.mark.parametrize(
    "text", ["uint4:group=32:affine", "int3:group=32", "uint4:group=24:affine", "int4:channel=0"]
)
def test_is_never_worse_than_what_it_started_from(text: str) -> None:
    format = Format.parse(text)
    x = weights(8, 64)
    axis, group_size = format.granularity.pair

    def errors(scale: Tensor, zero_point: Tensor) -> Tensor:
        value = affine.fake_quantize(x, scale, zero_point, axis, group_size, format.qmin, format.qmax)
        return affine.reduce_blocks((x - value).abs().pow(POWER), axis, group_size, torch.sum)

    before = errors(*affine.scale_for_tensor(x, format, "mse"))
    after = errors(*affine.scale_for_tensor(x, format, "half-quadratic"))
    assert bool((after <= before * (1 + 1e-5)).all())  # the order of sums
    assert float(after.sum()) < float(before.sum())


def test_groups_of_zeros_and_of_one_value_stay_finite() -> None:
    x = torch.zeros(3, 32)
    x[1] = 0.25
    for text in ("uint4:group=32:affine", "int4:group=32"):
        format = Format.parse(text)
        scale, zero_point = affine.scale_for_tensor(x, format, "half-quadratic")
        assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
        value = affine.fake_quantize(x, scale, zero_point, -1, 32, format.qmin, format.qmax)
        torch.testing.assert_close(value, x)
