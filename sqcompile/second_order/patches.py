"""What a convolution multiplies its weight with at each place: its inputs under the kernel."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from sqcompile.layers import Layer
from sqcompile.operators.table import argument

_DIMENSIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_ROWS_PER_INPUT = 64  # places to look at for each input under a kernel; more of the same images say little
_STRIDE, _PADDING, _DILATION = 3, 4, 5  # positions of the arguments
# A prime, so that its multiples meet every row; near the golden ratio of 2³², so that they spread.
_SCATTER = 2654435761


def has_patches(layer: Layer) -> bool:
    """Whether a layer is a convolution whose every output reads all input channels under its kernel."""
    return layer.kind in _DIMENSIONS and layer.groups == 1


def enough_rows(inputs: int, kernel: Sequence[int], batches: int) -> int:
    """Return how many rows of a batch tell enough about the inputs under a kernel, given so many batches."""
    return -(-_ROWS_PER_INPUT * inputs * math.prod(kernel) // max(batches, 1))


def geometry(layer: Layer, kernel: Sequence[int]) -> Hashable:
    """Return what decides which inputs lie under a kernel: layers alike in it that read one value have the same."""
    return tuple(kernel), *(tuple(_sizes(layer, place)) for place in (_STRIDE, _PADDING, _DILATION))


def patches_of(layer: Layer, value: Tensor, kernel: Sequence[int], most: int | None = None) -> Tensor:
    """Return the inputs under the kernel of a convolution, a row for each place of the output.

    The convolution is the product of these rows with its weight as a matrix (`sparsity.as_matrix`).

    Shapes: value [N, I, …] or [I, …]; result [rows, Kh · Kw · I], input channels fastest.
    Source: Chellapilla et al. 2006, section 3.1, with the channels last.

    Args:
        layer: A layer that `has_patches`.
        value: What it reads.
        kernel: The sizes of its kernel.
        most: Rows to return where there are more: always the same places, spread evenly over all.
    """
    count = _DIMENSIONS[layer.kind]
    value = value if value.dim() == count + 2 else value[None]
    padding = _sizes(layer, _PADDING)
    value = torch.nn.functional.pad(value, [size for size in reversed(padding) for _ in range(2)])
    steps, gaps = _sizes(layer, _STRIDE), _sizes(layer, _DILATION)
    for axis, (size, step, gap) in enumerate(zip(kernel, steps, gaps, strict=True), start=2):
        value = value.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    places = value.movedim(1, -1)  # [N, places …, kernel …, I], which repeats nothing in memory yet
    sizes = places.shape[: count + 1]
    rows = sizes.numel()
    if most is None or rows <= most:
        return places.reshape(rows, -1)
    chosen = (torch.arange(most, device=value.device) * _SCATTER) % rows
    return places[torch.unravel_index(chosen, sizes)].reshape(most, -1)


def _sizes(layer: Layer, position: int) -> list[int]:
    given = argument(layer.node, position)
    values = [given] if isinstance(given, int) else list(cast(Iterable[int], given))
    return values * _DIMENSIONS[layer.kind] if len(values) == 1 else values
