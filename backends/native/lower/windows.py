"""The geometry of convolutions and pools, read from a program's operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from sqcompile.backends.native.lower.context import int_argument, node_argument, tensor_of
from sqcompile.operators.table import argument

aten = torch.ops.aten

CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input)

Pair = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """Where each output pixel looks, vertically and horizontally; see `kernels/window.h`.

    Attributes:
        kernel: Its size.
        stride: Input pixels from one output pixel to the next.
        before: Padding above and to the left.
        behind: Padding below and to the right.
        dilation: Input pixels from one place of the kernel to the next.
        spread: How far apart the input's pixels lie: the stride of a transposed convolution.
        groups: Groups of channels.
        transposed: Whether the kernel is applied backwards.
    """

    kernel: Pair
    stride: Pair
    before: Pair
    behind: Pair
    dilation: Pair
    spread: Pair = (1, 1)
    groups: int = 1
    transposed: bool = False

    @property
    def ints(self) -> tuple[int, ...]:
        """The operands that every convolution begins with."""
        return (*self.kernel, *self.stride, *self.before, *self.behind, *self.dilation, *self.spread)

    @property
    def taps(self) -> int:
        """Places of the kernel."""
        return self.kernel[0] * self.kernel[1]

    def without_padding(self) -> Windows:
        """Return the same on an image that has its padding already."""
        return replace(self, before=(0, 0), behind=(0, 0))

    def of_columns(self) -> Windows:
        """Return the same on an image whose pixels have all columns that a row of the kernel sees."""
        return replace(
            self, kernel=(self.kernel[0], 1), stride=(self.stride[0], 1), dilation=(self.dilation[0], 1)
        )


def convolution_windows(node: fx.Node) -> Windows:
    """Return the geometry of a convolution."""
    spatial = tensor_of(node_argument(node, 1)).dim() - 2
    kernel = pair(list(tensor_of(node_argument(node, 1)).shape[2:]), spatial, 1)
    stride = pair(argument(node, 3), spatial, 1)
    if node.target in _TRANSPOSED:
        padding = pair(argument(node, 4), spatial, 0)
        added = pair(argument(node, 5), spatial, 0)
        dilation = pair(argument(node, 7), spatial, 1)
        # Pixels lie a stride apart, and the kernel's reach is around them, less what padding takes away.
        before = _each(lambda k, d, p: d * (k - 1) - p, kernel, dilation, padding)
        behind = _each(lambda b, a: b + a, before, added)
        return Windows(
            kernel, (1, 1), before, behind, dilation, stride, int_argument(node, 6, 1), transposed=True
        )
    dilation = pair(argument(node, 5), spatial, 1)
    before, behind = _padding(argument(node, 4), spatial, kernel, dilation)
    return Windows(kernel, stride, before, behind, dilation, groups=int_argument(node, 6, 1))


def _padding(option: object, spatial: int, kernel: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    if option == "valid":
        return (0, 0), (0, 0)
    if option == "same":
        # As PyTorch does it: the odd pixel is added behind.
        total = _each(lambda k, d: d * (k - 1), kernel, dilation)
        before = _each(lambda t: t // 2, total)
        return before, _each(lambda t, b: t - b, total, before)
    both = pair(option, spatial, 0)
    return both, both


def pair(option: object, spatial: int, neutral: int) -> Pair:
    """Return an option for both directions; what has one direction gets the neutral value for the other."""
    items: Sequence[int] = (
        [int(item) for item in option] if isinstance(option, (list, tuple)) else [int(option)]  # type: ignore[call-overload]
    )
    return (neutral, items[0]) if spatial == 1 else (items[0], items[-1])


def _each(function: object, *pairs: Pair) -> Pair:
    first, second = (function(*items) for items in zip(*pairs, strict=True))  # type: ignore[operator]
    return first, second
