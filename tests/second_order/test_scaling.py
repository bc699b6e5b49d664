"""Scales of layers' inputs, against their papers' equations written plainly in NumPy.

Tolerances are those of float32 sums against float64 ones.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sqcompile.quantization import affine
from sqcompile.quantization.format import Format
from sqcompile.second_order import Hessian
from sqcompile.second_order.scaling import activation_scale, smoothing_scale

FORMAT = Format.parse("int3:group=8")


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(count: int, depth: int) -> Tensor:
    """Inputs of which one channel in eight is large, as language models have them; the last is always zero."""
    x = values(count, depth, seed=1) * torch.where(torch.arange(depth) % 8 == 3, 12.0, 1.0)
    x[:, -1] = 0
    return x


def hessian_of(x: Tensor) -> Hessian:
    hessian = Hessian(x.shape[-1])
    for part in x.split(50):
        hessian.add(part)
    return hessian


def rounded(weight: Tensor) -> Tensor:
    scale, zero_point = affine.scale_for_tensor(weight, FORMAT)
    axis, group_size = FORMAT.granularity.pair
    return affine.fake_quantize(weight, scale, zero_point, axis, group_size, FORMAT.qmin, FORMAT.qmax)


def test_magnitude_and_peak_are_those_of_all_batches() -> None:
    x = uneven(130, 16)
    hessian = hessian_of(x)
    torch.testing.assert_close(hessian.magnitude, x.abs().mean(0))
    assert torch.equal(hessian.peak, x.abs().amax(0))


def test_the_scale_of_awq_is_the_power_of_magnitudes_with_the_least_output_error() -> None:
    x, weights = uneven(200, 32), [values(12, 32, seed=2), values(6, 32, seed=3)]
    scale, error, plain = activation_scale(
        weights, hessian_of(x), lambda index, weight: rounded(weight), steps=10
    )
    data = x.double().numpy()
    magnitude = np.abs(data).mean(0)
    counts = magnitude > 0
    errors, scales = [], []
    for step in range(11):
        s = np.ones(32)
        s[counts] = magnitude[counts] ** (step / 10)
        s[counts] /= np.sqrt(s[counts].max() * s[counts].min())
        outputs = [
            (rounded(torch.from_numpy(w.double().numpy() * s).float()).double().numpy() @ (data / s).T, w)
            for w in weights
        ]
        errors.append(sum(np.square(y - w.double().numpy() @ data.T).sum(0).mean() for y, w in outputs))
        scales.append(s)
    best = int(np.argmin(errors))
    assert best not in (0, 10)  # neither end: something was to be found
    np.testing.assert_allclose(scale.double().numpy(), scales[best], rtol=1e-5)
    assert error == pytest.approx(errors[best], rel=1e-4) and plain == pytest.approx(errors[0], rel=1e-4)
    assert error < 0.5 * plain


def test_the_scale_of_smoothquant_is_the_papers_equation_4() -> None:
    x, weights = uneven(100, 16), [values(5, 16, seed=2), values(7, 16, seed=3)]
    weights[0][:, 4] = weights[1][:, 4] = 0
    scale = smoothing_scale(weights, hessian_of(x).peak, 0.7).double().numpy()
    largest = np.abs(torch.cat(weights).double().numpy()).max(0)
    peak = np.abs(x.double().numpy()).max(0)
    usable = (largest > 0) & (peak > 0)
    np.testing.assert_allclose(
        scale[usable], (peak**0.7 / np.where(largest > 0, largest, 1) ** 0.3)[usable], rtol=1e-5
    )
    assert list(scale[~usable]) == [1.0, 1.0]  # no weight there, or no input: nothing to move


def test_inputs_that_are_always_zero_scale_nothing() -> None:
    scale, error, plain = activation_scale(
        [values(4, 8)], hessian_of(torch.zeros(10, 8)), lambda index, weight: rounded(weight)
    )
    assert torch.equal(scale, torch.ones(8)) and error == plain == 0
