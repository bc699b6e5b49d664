"""Inputs under the kernels of convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sqcompile.layers import Layer, layers_of
from sqcompile.second_order.patches import geometry, has_patches, patches_of
from sqcompile.sparsity import as_matrix
from sqcompile.tracing import trace

LAYERS = {
    "1d": (nn.Conv1d(3, 5, 3, 2, 1, dilation=2), (2, 3, 17)),
    "2d": (nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 0)), (2, 3, 9, 8)),
    "3d": (nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 2)), (2, 2, 4, 5, 6)),
    "one image": (nn.Conv2d(3, 5, 3, padding=1), (3, 9, 8)),
    "a point": (nn.Conv2d(3, 5, 1), (2, 3, 4, 4)),
}


def layer_of(module: nn.Module, x: torch.Tensor) -> Layer:
    return layers_of(trace(nn.Sequential(module).eval(), (x,)))[0]


@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_is_a_product_with_its_patches(name: str) -> None:
    module, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = patches_of(layer_of(module, x), x, module.weight.shape[2:])  # type: ignore[arg-type]
    wanted = module(x if x.dim() == module.weight.dim() else x[None]).movedim(1, -1)  # type: ignore[operator]
    made = rows @ as_matrix(module.weight).T + module.bias  # type: ignore[arg-type]
    # Sums of at most 27 products of numbers near 1, in another order.
    torch.testing.assert_close(made.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5)


def test_some_of_the_places_are_the_same_ones_each_time_and_all_different() -> None:
    module = nn.Conv2d(1, 1, 1)
    x = torch.arange(2 * 8 * 8.0).reshape(2, 1, 8, 8)
    layer = layer_of(module, x)
    rows = patches_of(layer, x, (1, 1), most=50)
    assert rows.shape == (50, 1)
    assert len(set(rows.flatten().tolist())) == 50
    torch.testing.assert_close(rows, patches_of(layer, x, (1, 1), most=50), rtol=0, atol=0)
    assert len({int(row) % 8 for row in rows.flatten()}) == 8  # every column of the images
    torch.testing.assert_close(patches_of(layer, x, (1, 1), most=128).flatten(), x.flatten(), rtol=0, atol=0)


def test_only_convolutions_whose_outputs_read_all_inputs_have_patches() -> None:
    x = torch.zeros(1, 4, 5, 5)
    assert has_patches(layer_of(nn.Conv2d(4, 4, 3), x))
    assert not has_patches(layer_of(nn.Conv2d(4, 4, 3, groups=2), x))
    assert not has_patches(layer_of(nn.ConvTranspose2d(4, 4, 3), x))
    assert not has_patches(layer_of(nn.Linear(5, 4), x))


def test_geometry_tells_kernels_apart_that_see_other_inputs() -> None:
    x = torch.zeros(1, 4, 9, 9)
    kinds = {
        geometry(layer_of(nn.Conv2d(4, 4, size, **options), x), (size, size))  # type: ignore[arg-type]
        for size, options in ((3, {}), (3, {"padding": 1}), (3, {"stride": 2}), (3, {"dilation": 2}), (1, {}))
    }
    assert len(kinds) == 5
    assert geometry(layer_of(nn.Conv2d(4, 2, 3), x), (3, 3)) in kinds
