"""Images as the engine's convolutions take them: [N, H, W, C], the channels of a pixel together.

PyTorch's [N, C, H, W] remains the shape that everybody else sees: a view of the same memory, so that only an
operator that wants rows of pixels ever copies. Images of 8-bit codes have their channels filled up to a multiple
of 16 (4 where there are at most 4 in what a model is given), so that kernels never meet half a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sqcompile.backends.native.lower.context import Lowering, dtype_of, tensor_of
from sqcompile.backends.native.plan import Shape, Value

CHANNEL_UNIT = 16
_TO_PIXELS, _TO_PLANES = (0, 2, 3, 1), (0, 3, 1, 2)


@dataclass(frozen=True)
class CodesImage:
    """An image of codes.

    Attributes:
        value: u8 [N, H, W, P].
        channels: Those that hold data.
        shift: What was added to the program's codes: 128 where those are signed.
    """

    value: Value
    channels: int
    shift: int


def padded_channels(channels: int) -> int:
    """Return how many channels an image of codes has room for."""
    return -(-channels // CHANNEL_UNIT) * CHANNEL_UNIT


def is_image(node: fx.Node) -> bool:
    """Whether a node is an image, or a row of pixels, with a fixed number of channels."""
    shape = tensor_of(node).shape
    return len(shape) in (3, 4) and isinstance(shape[1], int)


def pixels_of(context: Lowering, value: Value) -> Value:
    """Return [N, C, H, W] or [N, C, L] as [N, H, W, C]; a row of pixels has height 1."""
    if value.rank == 3:
        value = context.reshape(value, [*value.shape[:2], 1, value.shape[2]])
    return context.contiguous(context.permute(value, _TO_PIXELS))


def planes_of(context: Lowering, value: Value, shape: Shape) -> Value:
    """Return [N, H, W, C] as the image of that shape which PyTorch knows."""
    return context.reshape(context.permute(value, _TO_PLANES), shape)


def image_shape(context: Lowering, node: fx.Node) -> Shape:
    """Return (N, H, W) of an image."""
    shape = context.shape(node)
    return (shape[0], 1, shape[2]) if len(shape) == 3 else (shape[0], *shape[2:])


def define_codes(context: Lowering, node: fx.Node, image: CodesImage) -> Value:
    """Remember an image of codes for its users, and return what others see of it."""
    context.shared["codes", node] = image
    view = context.slice(image.value, 3, 0, image.channels)
    if image.shift:
        shifted = context.binary("sub", context.cast(view, "i32"), context.number(image.shift, "i32"))
        view = context.cast(shifted, dtype_of(node))
    return planes_of(context, view, context.shape(node))


def codes_of(context: Lowering, node: fx.Node) -> CodesImage:
    """Return a node's codes as an image; they are rearranged where they do not lie so already."""
    key = ("codes", node)
    if key not in context.shared:
        value = pixels_of(context, context.value(node))
        shift = 0
        if value.dtype == "i8":
            shift = 128
            moved = context.binary("add", context.cast(value, "i32"), context.number(shift, "i32"))
            value = context.cast(moved, "u8")
        channels = value.shape[3]
        assert isinstance(channels, int)
        context.shared[key] = CodesImage(fill_channels(context, value, channels), channels, shift)
    image: CodesImage = context.shared[key]
    return image


def fill_channels(context: Lowering, value: Value, channels: int) -> Value:
    """Return an image whose first channels are those of `value`, with as many as kernels want."""
    value = context.slice(value, 3, 0, channels)
    room = padded_channels(channels)
    if room == channels:
        return context.contiguous(value)
    filler = context.number(0, value.dtype)
    return context.step("pad", [value, filler], value.dtype, (*value.shape[:3], room), (0, 0, 0, 0))
