"""What ends in 8-bit codes of one fixed scale, as integer steps on images.

    quantize(relu(conv(dequantize(x), …)))            -> conv_q8
    quantize(relu(dequantize(x) + dequantize(y)))     -> add_codes, or at the end of the convolution that makes x
    quantize(dequantize(x) * dequantize(y))           -> mul_codes
    quantize(hardswish(dequantize(x)))                -> look_up_codes, or at the end of the convolution
    quantize(mean(dequantize(x), (2, 3)))             -> average_codes
    quantize(x)                                       -> quantize_image

A function of one code is a table of 256 codes, which PyTorch computes when the program is lowered: whatever the
activation, codes are the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from sqcompile.backends.native.lower.context import Lowering, node_argument, tensor_of
from sqcompile.backends.native.lower.convolutions import (
    IntegerLayer,
    Scale,
    Target,
    code_bounds,
    integer_layer,
    quantized_image,
    tensor_scale,
)
from sqcompile.backends.native.lower.images import (
    CodesImage,
    codes_of,
    define_codes,
    is_image,
    padded_channels,
)
from sqcompile.backends.native.lower.windows import CONVOLUTIONS
from sqcompile.backends.native.plan import Value
from sqcompile.operators.table import argument
from sqcompile.program import Program

aten = torch.ops.aten
sq = torch.ops.sqcompile

_BOUNDS: dict[object, Callable[[fx.Node], tuple[object, object]]] = {
    aten.relu.default: lambda node: (0.0, None),
    aten.relu6.default: lambda node: (0.0, 6.0),
    aten.hardtanh.default: lambda node: (argument(node, 1, -1.0), argument(node, 2, 1.0)),
    aten.clamp.default: lambda node: (argument(node, 1), argument(node, 2)),
    aten.clamp_min.default: lambda node: (argument(node, 1), None),
    aten.clamp_max.default: lambda node: (None, argument(node, 1)),
}

# Operators of one value, each element by itself, whose other arguments are numbers.
_UNARY = frozenset(
    (
        *_BOUNDS,
        *(
            aten.sigmoid.default,
            aten.tanh.default,
            aten.silu.default,
            aten.gelu.default,
            aten.hardswish.default,
        ),
        *(aten.hardsigmoid.default, aten.leaky_relu.default, aten.elu.default, aten.abs.default),
        *(aten.neg.default, aten.exp.default, aten.sqrt.default, aten.square.default, aten.erf.default),
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar),
    )
)

_LARGEST_AVERAGE = 1 << 23  # pixels of an image whose sum of codes is an int32


# Operators whose results are images, and those that leave an image one.
_MAKE_IMAGES = frozenset(
    (
        *CONVOLUTIONS,
        *(aten.max_pool1d.default, aten.max_pool2d.default, aten.avg_pool1d.default, aten.avg_pool2d.default),
        *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.batch_norm.default),
    )
)
_KEEP_IMAGES = _UNARY | {sq.quantize.default, sq.dequantize.default, aten.cat.default}


@dataclass(frozen=True)
class Chain:
    """What ends in a quantize: a node that makes values, and bounds that are put on them."""

    source: fx.Node
    low: float
    high: float
    between: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Fused:
    """A convolution with everything that follows it up to `quantize`."""

    quantize: fx.Node
    layer: IntegerLayer
    target: Target
    inner: frozenset[fx.Node]
    other: tuple[fx.Node, Scale] | None = None  # the codes that `target.other` will be


def find_codes(
    program: Program, context: Lowering
) -> tuple[dict[fx.Node, Callable[[], Value]], set[fx.Node]]:
    """Return what makes each quantize that ends a pattern, and the nodes inside of patterns."""
    makers: dict[fx.Node, Callable[[], Value]] = {}
    fused: dict[fx.Node, Fused] = {}
    images = _images(program)
    for node in program.compute_nodes():
        if node.target is not sq.quantize.default or not is_image_of_codes(node) or context.is_constant(node):
            continue
        scale = tensor_scale(context, node)
        if scale is None:
            continue
        found = _convolution(context, node, scale) or _after_convolution(context, node, scale, fused)
        if found is not None:
            for inner in found.inner & fused.keys():
                del fused[inner]
            fused[node] = found
            continue
        maker = _image(context, node, scale)
        if node_argument(node, 0) in images:
            maker = (
                _sum_or_product(context, node, scale)
                or _table(context, node, scale)
                or _average(context, node, scale)
                or maker
            )
        if maker is not None:
            makers[node] = maker
    inside: set[fx.Node] = set()
    for node, found in fused.items():
        inside |= found.inner
        makers[node] = _fused_maker(context, found)
    return makers, inside


def _images(program: Program) -> set[fx.Node]:
    """Return the values that are images: sequences of tokens may have as many dimensions."""
    found: set[fx.Node] = set()
    for node in program.compute_nodes():
        if node.target in _MAKE_IMAGES or _is_whole_mean(node):
            found.add(node)
        elif node.target in _KEEP_IMAGES and any(item in found for item in node.all_input_nodes):
            found.add(node)
    return found


def is_image_of_codes(node: fx.Node) -> bool:
    """Whether a node is an image, or what became of one by taking its mean."""
    shape = tensor_of(node).shape
    return len(shape) in (2, 3, 4) and isinstance(shape[1], int)


def _chain(node: fx.Node) -> Chain:
    """Follow a quantize back over bounds that nobody else sees."""
    low, high = -math.inf, math.inf
    source, between = node_argument(node, 0), []
    while source.target in _BOUNDS and len(source.users) == 1:
        bounds = _BOUNDS[source.target](source)
        if not all(bound is None or isinstance(bound, (int, float)) for bound in bounds):
            break
        first, last = (
            default if bound is None else float(bound)  # type: ignore[arg-type]
            for bound, default in zip(bounds, (-math.inf, math.inf), strict=True)
        )
        # What comes later has the last word.
        low, high = min(max(first, low), high), min(max(last, low), high)
        between.append(source)
        source = node_argument(source, 0)
    return Chain(source, low, high, tuple(between))


def _convolution(context: Lowering, node: fx.Node, scale: Scale) -> Fused | None:
    chain = _chain(node)
    if chain.source.target not in CONVOLUTIONS or len(chain.source.users) != 1:
        return None
    layer = integer_layer(context, chain.source)
    if layer is None:
        return None
    target = Target(scale, chain.low, chain.high)
    return Fused(node, layer, target, frozenset((chain.source, *chain.between)))


def _after_convolution(
    context: Lowering, node: fx.Node, scale: Scale, fused: dict[fx.Node, Fused]
) -> Fused | None:
    """Return a convolution that can do this too: its codes are used for nothing else."""
    chain = _chain(node)
    parts = _summands(context, chain)
    for own, other in (parts, parts[::-1]) if parts is not None else ():
        found = _only_for(own, fused)
        if found is None or found.target.table is not None or found.other is not None or own is other:
            continue
        other_scale = tensor_scale(context, other)
        assert other_scale is not None
        total = Target(scale, chain.low, chain.high)
        target = replace(found.target, total=total)
        inner = {*found.inner, found.quantize, own, chain.source, *chain.between}
        return Fused(node, found.layer, target, frozenset(inner), (node_argument(other, 0), other_scale))
    path = _unary_path(context, node)
    found = _only_for(path[0], fused) if path is not None else None
    if path is None or found is None or found.target.table is not None:
        return None
    last = found.target.total or found.target
    assert last.scale is not None
    target = replace(found.target, table=_codes_table(context, path, last.scale, scale))
    return replace(
        found,
        quantize=node,
        target=target,
        inner=frozenset({*found.inner, found.quantize, *path[:-1]}),
    )


def _only_for(dequantize: fx.Node, fused: dict[fx.Node, Fused]) -> Fused | None:
    """Return the convolution whose codes this dequantizes, if nobody else uses them."""
    codes = node_argument(dequantize, 0)
    if codes not in fused or len(codes.users) != 1 or len(dequantize.users) != 1:
        return None
    return fused[codes]


def _summands(context: Lowering, chain: Chain) -> tuple[fx.Node, fx.Node] | None:
    """Return the two dequantized images that are added, of one shape."""
    node = chain.source
    if node.target is not aten.add.Tensor or len(node.users) != 1 or argument(node, 2, 1) != 1:
        return None
    return _operands(context, node, lambda a, b: a == b)


def _operands(
    context: Lowering, node: fx.Node, fits: Callable[[list[str], list[str]], bool]
) -> tuple[fx.Node, fx.Node] | None:
    a, b = node.args[0], argument(node, 1)
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    for item in (a, b):
        if item.target is not sq.dequantize.default or not is_image(item) or context.is_constant(item):
            return None
        if tensor_scale(context, item) is None:
            return None
    shapes = [[str(size) for size in tensor_of(item).shape] for item in (a, b)]
    return (a, b) if fits(*shapes) else None


def _fused_maker(context: Lowering, found: Fused) -> Callable[[], Value]:
    def make() -> Value:
        context.begin(found.layer.node)  # whose time it is in a profile
        target = found.target
        if found.other is not None:
            codes, scale = found.other
            target = replace(target, other=(codes_of(context, codes), scale))
        value = found.layer.add(context, target)
        return _defined(context, found.quantize, value)

    return make


def _defined(context: Lowering, node: fx.Node, value: Value) -> Value:
    channels = tensor_of(node).shape[1]
    assert isinstance(channels, int)
    scale = tensor_scale(context, node)
    assert scale is not None
    return define_codes(context, node, CodesImage(value, channels, scale.shift))


# --- sums and products of two images -------------------------------------------------------------------


def _sum_or_product(context: Lowering, node: fx.Node, scale: Scale) -> Callable[[], Value] | None:
    chain = _chain(node)
    source = chain.source
    if len(source.users) != 1:
        return None
    if source.target is aten.add.Tensor:
        parts = _summands(context, chain)
    elif source.target is aten.mul.Tensor:
        parts = _operands(context, source, _can_be_factor)
        if parts is None:
            swapped = _operands(context, source, lambda a, b: _can_be_factor(b, a))
            parts = None if swapped is None else swapped[::-1]
    else:
        return None
    if parts is None:
        return None
    a, b = parts

    def make() -> Value:
        images = [codes_of(context, node_argument(item, 0)) for item in (a, b)]
        scales = [tensor_scale(context, item) for item in (a, b)]
        assert scales[0] is not None and scales[1] is not None
        low, high = code_bounds(scale, chain.low, chain.high)
        is_sum = source.target is aten.add.Tensor
        factors = (
            (scales[0].scale / scale.scale, scales[1].scale / scale.scale)
            if is_sum
            else (scales[0].scale * scales[1].scale / scale.scale, 0.0)
        )
        value = context.step(
            "add_codes" if is_sum else "mul_codes",
            [image.value for image in images],
            "u8",
            images[0].value.shape,
            (scales[0].zero, scales[1].zero, scale.zero),
            (*factors, low, high),
        )
        return _defined(context, node, value)

    return make


def _can_be_factor(a: list[str], b: list[str]) -> bool:
    """Whether b is a factor for each element of a, or for each channel."""
    return a == b or (len(a) == len(b) == 4 and a[:2] == b[:2] and b[2:] == ["1", "1"])


# --- functions of one code -----------------------------------------------------------------------------


def _unary_path(context: Lowering, node: fx.Node) -> list[fx.Node] | None:
    """Return the nodes from a dequantize to a quantize, if only functions of one value are between."""
    path = [node]
    item = node_argument(node, 0)
    while item.target in _UNARY and len(item.users) == 1:
        operands = [part for part in (*item.args, *item.kwargs.values()) if isinstance(part, fx.Node)]
        if len(operands) != 1 or item.args[0] is not operands[0]:
            return None
        path.insert(0, item)
        item = operands[0]
    if item.target is not sq.dequantize.default or context.is_constant(item) or len(item.users) != 1:
        return None
    return [item, *path] if tensor_scale(context, item) is not None and is_image(item) else None


def _codes_table(context: Lowering, path: list[fx.Node], source: Scale, scale: Scale) -> NDArray[np.uint8]:
    """Return the code that becomes of each code, both shifted."""
    dtype = tensor_of(node_argument(path[0], 0)).dtype
    value = (torch.arange(256) - source.shift).to(dtype)
    with torch.no_grad():
        for node in path:
            args = [
                value,
                *(context.constant(item) if isinstance(item, fx.Node) else item for item in node.args[1:]),
            ]
            value = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return (value.to(torch.int16) + scale.shift).to(torch.uint8).numpy()


def _table(context: Lowering, node: fx.Node, scale: Scale) -> Callable[[], Value] | None:
    path = _unary_path(context, node)
    if path is None:
        return None
    source = tensor_scale(context, path[0])
    assert source is not None

    def make() -> Value:
        image = codes_of(context, node_argument(path[0], 0))
        table = context.plan.add_constant(_codes_table(context, path, source, scale))
        value = context.step("look_up_codes", [image.value, table], "u8", image.value.shape)
        return _defined(context, node, value)

    return make


# --- means and what comes in ---------------------------------------------------------------------------


def _average(context: Lowering, node: fx.Node, scale: Scale) -> Callable[[], Value] | None:
    chain = _chain(node)
    mean = chain.source
    if len(mean.users) != 1 or not _is_whole_mean(mean):
        return None
    data = node_argument(mean, 0)
    source = tensor_scale(context, data) if data.target is sq.dequantize.default else None
    pixels = math.prod(
        size if isinstance(size, int) else _LARGEST_AVERAGE + 1 for size in tensor_of(data).shape[2:]
    )
    if source is None or not is_image(data) or not 0 < pixels <= _LARGEST_AVERAGE:
        return None

    def make() -> Value:
        image = codes_of(context, node_argument(data, 0))
        shape = (image.value.shape[0], 1, 1, image.value.shape[3])
        bounds = code_bounds(scale, chain.low, chain.high)
        floats = (source.scale / scale.scale, *bounds)
        value = context.step("average_codes", [image.value], "u8", shape, (source.zero, scale.zero), floats)
        return _defined(context, node, value)

    return make


def _is_whole_mean(node: fx.Node) -> bool:
    """Whether a node is the mean over all places of an image."""
    if node.target in (aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default):
        return all(size == 1 for size in tensor_of(node).shape[2:]) and is_image(node)
    if node.target is not aten.mean.dim or not is_image(node_argument(node, 0)):
        return False
    rank = tensor_of(node_argument(node, 0)).dim()
    axes = argument(node, 1)
    if not isinstance(axes, (list, tuple)) or argument(node, 3) not in (None, torch.float32):
        return False
    return sorted(axis % rank for axis in axes if isinstance(axis, int)) == list(range(2, rank))


def _image(context: Lowering, node: fx.Node, scale: Scale) -> Callable[[], Value] | None:
    """Quantize what is no image of codes yet, if an image is what its users want."""
    x = node_argument(node, 0)
    if not is_image(node) or tensor_of(x).dtype is not torch.float32 or not any(_image_users(node)):
        return None

    def make() -> Value:
        channels = tensor_of(node).shape[1]
        assert isinstance(channels, int)
        return _defined(context, node, quantized_image(context, x, scale, padded_channels(channels)))

    return make


def _image_users(node: fx.Node) -> Iterator[bool]:
    """Yield of each user of codes whether it works on images."""
    for user in node.users:
        if user.target is sq.dequantize.default:
            yield from (_wants_image(final) for final in user.users)
        else:
            yield _wants_image(user)


def _wants_image(node: fx.Node) -> bool:
    return node.target in _MAKE_IMAGES
