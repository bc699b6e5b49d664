"""What a program costs: multiply-accumulate operations, as it is and with a part of it removed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sqcompile.channels.flow import Dim, Flow, Value, size_of
from sqcompile.infer import fake_mode_of
from sqcompile.operators.table import argument
from sqcompile.text import operator_name

SizeOf = Callable[[Dim], int]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


class Costs:
    """Costs of a program whose dimensions may shrink; symbolic ones count as they were when it was traced.

    Args:
        flow: The labels of the program.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        environment = fake_mode_of(flow.program).shape_env
        known = () if environment is None else environment.backed_var_to_val
        self._values = dict(known)
        self._layers = [
            (node, count)
            for node in flow.program.compute_nodes()
            if (count := _COUNTS.get(operator_name(node).partition(".")[0])) is not None
        ]

    def macs(self, factors: Callable[[Dim], tuple[int, int]] | None = None) -> int:
        """Count multiply-accumulates of convolutions, linear and recurrent layers, products and attention.

        Args:
            factors: Says the numbers in a dimension before and after a removal; none: as it is.
        """

        def size(dim: Dim) -> int:
            whole = self._number(size_of(dim))
            if factors is None:
                return whole
            old, new = factors(dim)
            return whole // old * new

        return sum(count(self.flow, node, size) for node, count in self._layers)

    def parameters(self, factors: Callable[[Dim], tuple[int, int]] | None = None) -> int:
        """Count the elements of all parameters; of what is stored for other use, none."""
        total = 0
        for name, value in self.flow.tensors.items():
            if not isinstance(self.flow.program.tensor(name), torch.nn.Parameter):
                continue
            total += math.prod(size_of(dim) if factors is None else factors(dim)[1] for dim in value)
        return total

    def _number(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        known = size.xreplace(self._values)
        return int(known) if known.is_number else 1


def count_macs(flow: Flow) -> int:
    """Count a program's multiply-accumulate operations; see `Costs.macs`."""
    return Costs(flow).macs()


def _value(flow: Flow, node: fx.Node, position: int) -> Value:
    return flow.value(argument(node, position))


def _linear(flow: Flow, node: fx.Node, size: SizeOf) -> int:
    made = math.prod(map(size, flow.value(node)))
    return made * size(_value(flow, node, 0)[-1])


def _addmm(flow: Flow, node: fx.Node, size: SizeOf) -> int:
    return math.prod(map(size, flow.value(node))) * size(_value(flow, node, 1)[-1])


def _convolution(flow: Flow, node: fx.Node, size: SizeOf) -> int:
    weight = _value(flow, node, 1)
    return math.prod(map(size, flow.value(node))) * math.prod(map(size, weight[1:]))


def _transposed(flow: Flow, node: fx.Node, size: SizeOf) -> int:
    weight = _value(flow, node, 1)
    return math.prod(map(size, _value(flow, node, 0))) * math.prod(map(size, weight[1:]))


def _attention(flow: Flow, node: fx.Node, size: SizeOf) -> int:
    query, key = _value(flow, node, 0), _value(flow, node, 1)
    steps = size(key[-2])
    return steps * (math.prod(map(size, query)) + math.prod(map(size, flow.value(node))))


def _recurrent(flow: Flow, node: fx.Node, size: SizeOf) -> int:
    steps = math.prod(map(size, _value(flow, node, 0)[:2]))
    stored = argument(node, 2)
    assert isinstance(stored, (list, tuple))
    weights = [value for item in stored if len(value := flow.value(item)) == 2]
    return steps * sum(math.prod(map(size, value)) for value in weights)


_COUNTS: dict[str, Callable[[Flow, fx.Node, SizeOf], int]] = {
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _linear,
    "mm": _linear,
    "bmm": _linear,
    "baddbmm": _addmm,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **{f"conv_transpose{n}d": _transposed for n in (1, 2, 3)},
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru"), _recurrent),
}
