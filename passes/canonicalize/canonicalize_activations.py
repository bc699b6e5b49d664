"""Recognizing activation functions in the ways that models write them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import fx

from sqcompile.infer import same_type
from sqcompile.levels import Level
from sqcompile.matching import is_call, scalar_value, sole_user, users_text
from sqcompile.operators.table import argument
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program, value_of
from sqcompile.rewrite import Rewriter
from sqcompile.text import operator_name

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_QUOTIENTS = frozenset({aten.div.Tensor, aten.div.Scalar})
_SUMS = frozenset({aten.add.Tensor, aten.add.Scalar})
_POWERS = frozenset({aten.pow.Tensor_Scalar, aten.square.default})

_GELU_CUBIC = 0.044715
_GELU_SCALE = math.sqrt(2 / math.pi)

_Bounds = tuple[float, float]
_Call = tuple[torch._ops.OpOverload, fx.Node, dict[str, object]]


class CanonicalizeActivations(Pass):
    """Write activation functions in one form each: relu, clamp, silu, hardswish, hardsigmoid, gelu.

    One operator instead of up to eight, which backends fuse into the layer before it, and whose output
    is the only one that quantization has to observe.

    Rewrites: hardtanh, relu6, clamp_min, clamp_max  ==>  clamp, and clamp from 0 up  ==>  relu;
        a clamp of a clamp  ==>  one clamp;
        x · sigmoid(x)  ==>  silu(x);
        clamp(x + 3, 0, 6) / 6  ==>  hardsigmoid(x), and x times that  ==>  hardswish(x);
        x / 2 · (1 + erf(x / √2))  ==>  gelu(x);
        x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))  ==>  gelu(x, approximate="tanh").
        Products may be in any order and grouping.
    Keeps: close(rtol=1e-4): one operator rounds once where several rounded each time.
    Rejects: a part that something else uses too, since it would be computed twice.
    Source: Hendrycks and Gimpel 2016 (gelu); Howard et al. 2019 (hardswish).
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.close(rtol=1e-4, atol=1e-6)
    local: ClassVar[bool] = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rewrite in graph order: what a product is made of has its canonical form already."""
        edit = Rewriter(program, self.name)
        for node in list(program.graph.nodes):
            found = _clamp(program, node) or _gate(program, node)
            if isinstance(found, str):
                context.remark(node, found)
            elif found is not None:
                _replace(edit, node, *found)
        return PassResult(changes=edit.finish())


def _replace(
    edit: Rewriter, node: fx.Node, target: torch._ops.OpOverload, x: fx.Node, options: dict[str, object]
) -> None:
    with edit.before(node):
        activation = edit.call(target, x, like=node, **options)
    if not same_type(value_of(activation), value_of(node)):
        edit.discard(activation)  # a product that broadcasts, or promotes its type
        return
    edit.replace(node, activation)
    edit.erase(node)


# --- clamps ---------------------------------------------------------------------------------------------


def _clamp(program: Program, node: fx.Node) -> _Call | None:
    """Return the canonical call of a clamp, or None if the node is none or has the form already."""
    bounds = _bounds(node)
    if bounds is None:
        return None
    x = node.args[0]
    assert isinstance(x, fx.Node)
    inner = _bounds(x)
    while inner is not None and sole_user(x) is not None:
        # Monotone functions: what the outer one makes of the inner one's bounds are the bounds of both.
        low, high = bounds
        bounds = min(max(inner[0], low), high), min(max(inner[1], low), high)
        assert isinstance(x.args[0], fx.Node)
        x = x.args[0]
        inner = _bounds(x)
    call = _clamp_call(x, bounds)
    return None if call[0] is node.target and x is node.args[0] else call


def _bounds(node: fx.Node) -> _Bounds | None:
    """Return the bounds of a clamp in any of its forms."""
    low: object = None
    high: object = None
    if is_call(node, aten.relu.default):
        low = 0
    elif is_call(node, aten.relu6.default):
        low, high = 0, 6
    elif is_call(node, aten.hardtanh.default, aten.clamp.default):
        low, high = argument(node, 1), argument(node, 2)
    elif is_call(node, aten.clamp_min.default):
        low = argument(node, 1)
    elif is_call(node, aten.clamp_max.default):
        high = argument(node, 1)
    elif is_call(node, aten.threshold.default) and argument(node, 1) == argument(node, 2) == 0:
        low = 0
    else:
        return None
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    bounds = -math.inf if low is None else low, math.inf if high is None else high
    if bounds[0] > bounds[1] or bounds == (-math.inf, math.inf):  # type: ignore[operator]
        return None
    return bounds  # type: ignore[return-value]


def _clamp_call(x: fx.Node, bounds: _Bounds) -> _Call:
    low, high = bounds
    if low == 0 and high == math.inf:
        return aten.relu.default, x, {}
    options: dict[str, object] = {}
    if low > -math.inf:
        options["min"] = low
    if high < math.inf:
        options["max"] = high
    return aten.clamp.default, x, options


# --- products -------------------------------------------------------------------------------------------


def _gate(program: Program, node: fx.Node) -> _Call | str | None:
    """Return the activation that a product is, or why it stays a product; None if it is none."""
    if node.target not in _PRODUCTS | _QUOTIENTS:
        return None
    coefficient, factors = _product(program, node)
    if len(factors) == 1 and _close(coefficient, 1 / 6):
        x = _shifted_clamp(program, factors[0])
        return None if x is None else _unless_shared(factors[0], (aten.hardsigmoid.default, x, {}))
    if len(factors) != 2:
        return None
    for x, gate in (factors, factors[::-1]):
        found = _gated(program, coefficient, x, gate)
        if found is not None:
            return _unless_shared(gate, found)
    return None


def _gated(program: Program, coefficient: float, x: fx.Node, gate: fx.Node) -> _Call | None:
    """Return the activation coefficient · x · gate, or None."""
    if _close(coefficient, 1):
        if is_call(gate, aten.sigmoid.default) and gate.args[0] is x:
            return aten.silu.default, x, {}
        if is_call(gate, aten.hardsigmoid.default) and gate.args[0] is x:
            return aten.hardswish.default, x, {}
    if _close(coefficient, 1 / 6) and _shifted_clamp(program, gate) is x:
        return aten.hardswish.default, x, {}
    if _close(coefficient, 1 / 2):
        for inner in _plus(program, gate, 1):
            if is_call(inner, aten.erf.default) and _is_power(program, inner.args[0], x, 1, math.sqrt(0.5)):
                return aten.gelu.default, x, {}
            if is_call(inner, aten.tanh.default) and _is_gelu_polynomial(program, inner.args[0], x):
                return aten.gelu.default, x, {"approximate": "tanh"}
    return None


def _unless_shared(part: fx.Node, found: _Call) -> _Call | str:
    if sole_user(part) is not None:
        return found
    name = found[0]._schema.name.removeprefix("aten::")
    return f"it is {name}, but its part {operator_name(part)} %{part.name} {users_text(part)}"


def _shifted_clamp(program: Program, node: fx.Node) -> fx.Node | None:
    """Return x if a node is clamp(x + 3, 0, 6)."""
    if not is_call(node, aten.clamp.default) or _bounds(node) != (0, 6):
        return None
    return next(_plus(program, node.args[0], 3), None)


def _is_gelu_polynomial(program: Program, node: object, x: fx.Node) -> bool:
    """Whether a node is √(2/π) · (x + 0.044715 · x³), also as √(2/π) · x · (1 + 0.044715 · x²)."""
    if not isinstance(node, fx.Node):
        return False
    coefficient, factors = _product(program, node)
    if not _close(coefficient, _GELU_SCALE):
        return False
    if len(factors) == 1:
        cubes = _plus(program, factors[0], x)
        return any(_is_power(program, cube, x, 3, _GELU_CUBIC) for cube in cubes)
    if len(factors) == 2 and x in factors:
        rest = factors[1] if factors[0] is x else factors[0]
        return any(_is_power(program, square, x, 2, _GELU_CUBIC) for square in _plus(program, rest, 1))
    return False


def _is_power(program: Program, node: object, x: fx.Node, degree: int, coefficient: float) -> bool:
    """Whether a node is coefficient · x ** degree."""
    if not isinstance(node, fx.Node):
        return False
    found, factors = _product(program, node)
    return _close(found, coefficient) and factors == [x] * degree


def _product(program: Program, node: fx.Node) -> tuple[float, list[fx.Node]]:
    """Return a node as coefficient · factor · factor …, through products that nothing else uses."""
    coefficient, factors = 1.0, []
    pending: list[tuple[fx.Node, bool]] = [(node, True)]
    while pending:
        item, may_open = pending.pop(0)
        left = item.args[0] if item.args else None
        if not may_open or not isinstance(left, fx.Node):
            factors.append(item)
        elif item.target in _PRODUCTS | _QUOTIENTS:
            parts, number = _split(program, item)
            coefficient *= number
            pending = [(part, sole_user(part) is item) for part in parts] + pending
        elif item.target in _POWERS and (degree := argument(item, 1, 2)) in (2, 3):
            factors += [left] * int(degree)
        else:
            factors.append(item)
    return coefficient, factors


def _split(program: Program, node: fx.Node) -> tuple[list[fx.Node], float]:
    """Return the factors of one product or quotient, and its known coefficient."""
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    number = scalar_value(program, right)
    if node.target in _QUOTIENTS:
        return ([node], 1.0) if not number else ([left], 1 / number)
    if number is not None:
        return [left], number
    number = scalar_value(program, left)
    assert isinstance(right, fx.Node)
    return ([right], number) if number is not None else ([left, right], 1.0)


def _plus(program: Program, node: object, summand: fx.Node | float) -> Iterator[fx.Node]:
    """Yield what a node adds to a summand: a node, or a known number."""
    if not isinstance(node, fx.Node) or node.target not in _SUMS or argument(node, 2) != 1:
        return
    for value, other in (node.args[:2], node.args[1::-1]):
        if not isinstance(value, fx.Node):
            continue
        if other is summand if isinstance(summand, fx.Node) else scalar_value(program, other) == summand:
            yield value


def _close(value: float, wanted: float) -> bool:
    return math.isclose(value, wanted, rel_tol=1e-5)  # models write constants with six digits or more
