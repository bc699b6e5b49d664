"""Several operators that are one step of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from sqcompile.backends.native.lower.context import Lowering, is_float, tensor_of
from sqcompile.backends.native.plan import Value
from sqcompile.operators.table import argument
from sqcompile.program import Program

aten = torch.ops.aten

_CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
)


def find_patterns(
    program: Program, context: Lowering
) -> tuple[dict[fx.Node, Callable[[], Value]], set[fx.Node]]:
    """Return what makes each pattern's last node, and the nodes that are inside of one and need no step."""
    makers: dict[fx.Node, Callable[[], Value]] = {}
    inside: set[fx.Node] = set()
    for node in program.compute_nodes():
        norm = match_rms_norm(context, node)
        if norm is not None:
            makers[node] = norm.maker(context)
            inside |= norm.inner
    return makers, inside


@dataclass(frozen=True)
class RmsNorm:
    """x * rsqrt(mean(x²) + epsilon) * weight.

    Attributes:
        x: What is normalized, [.., K].
        weight: A constant [K].
        epsilon: What is added to the mean.
        inner: The nodes that compute it, but the last.
    """

    x: fx.Node
    weight: fx.Node
    epsilon: float
    inner: frozenset[fx.Node]

    def maker(self, context: Lowering) -> Callable[[], Value]:
        """Return what makes the step."""

        def make() -> Value:
            x = context.contiguous(context.value(self.x, "f32"))
            weight = context.contiguous(context.value(self.weight, "f32"))
            return context.step("rms_norm", [x, weight], "f32", x.shape, (), (self.epsilon,))

        return make


def match_rms_norm(context: Lowering, node: fx.Node) -> RmsNorm | None:
    """Return the norm whose last node this is, or None."""
    if node.target is not aten.mul.Tensor or not is_float(node):
        return None
    for weight, scaled in (node.args[:2], node.args[1::-1]):
        if (
            not isinstance(weight, fx.Node)
            or not isinstance(scaled, fx.Node)
            or not context.is_constant(weight)
        ):
            continue
        if tensor_of(weight).shape != tensor_of(node).shape[-1:]:
            continue
        found = _match_scaled(node, weight, scaled)
        if found is not None:
            return found
    return None


def _match_scaled(last: fx.Node, weight: fx.Node, scaled: fx.Node) -> RmsNorm | None:
    inner: list[fx.Node] = []

    def behind_casts(item: object) -> fx.Node | None:
        """Follow casts that change nothing; they are a part of the pattern."""
        while isinstance(item, fx.Node) and item.target in _CASTS:
            source = item.args[0]
            assert isinstance(source, fx.Node)
            if tensor_of(source).dtype != tensor_of(item).dtype and not (is_float(source) and is_float(item)):
                return item
            inner.append(item)
            item = source
        return item if isinstance(item, fx.Node) else None

    def operand(item: object, target: object) -> fx.Node | None:
        """Follow to a call of `target`, which is a part of the pattern."""
        found = behind_casts(item)
        if found is None or found.target is not target:
            return None
        inner.append(found)
        return found

    product = operand(scaled, aten.mul.Tensor)
    if product is None:
        return None
    x, factor = product.args[:2]
    root = operand(factor, aten.rsqrt.default)
    shifted = root and operand(root.args[0], aten.add.Tensor)
    mean = shifted and operand(shifted.args[0], aten.mean.dim)
    square = mean and operand(mean.args[0], aten.pow.Tensor_Scalar)
    if not shifted or not mean or not square or not isinstance(x, fx.Node) or square.args[0] is not x:
        return None
    epsilon = shifted.args[1]
    axes = argument(mean, 1)
    rank = tensor_of(x).dim()
    if not isinstance(epsilon, (int, float)) or argument(shifted, 2, 1) != 1 or square.args[1] != 2:
        return None
    if (
        axes not in ([-1], [rank - 1])
        or argument(mean, 2) is not True
        or tensor_of(x).shape != tensor_of(last).shape
    ):
        return None
    if not is_float(x):
        return None
    nodes = frozenset(inner)
    if any(user is not last and user not in nodes for item in nodes for user in item.users):
        return None
    return RmsNorm(x, weight, float(epsilon), nodes)
