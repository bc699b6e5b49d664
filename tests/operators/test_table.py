"""The operator table says the truth: every claim in it is tried on the operator itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.programs import conv_net, data, mlp
from torch import fx

from sqcompile.operators.table import (
    TABLE,
    Operator,
    Scales,
    argument,
    data_arguments,
    operator_of,
    pad_value,
    preserves_scale,
)

aten = torch.ops.aten


def name_of(operator: torch._ops.OpOverload) -> str:
    return str(operator)


def schema(operator: torch._ops.OpOverload) -> list[str]:
    return [parameter.name for parameter in operator._schema.arguments]


LAYERS = {operator: entry for operator, entry in TABLE.items() if entry.weight is not None}

# One call of each layer: data [2, 4, …], weight, further arguments.
WEIGHTS: dict[torch._ops.OpOverload, tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = {
    aten.conv1d.default: ((2, 4, 5), (6, 4, 3), ()),
    aten.conv2d.default: ((2, 4, 5, 5), (6, 4, 3, 3), ()),
    aten.conv3d.default: ((2, 4, 5, 5, 5), (6, 4, 3, 3, 3), ()),
    aten.conv_transpose1d.default: ((2, 4, 5), (4, 6, 3), ()),
    aten.conv_transpose2d.input: ((2, 4, 5, 5), (4, 6, 3, 3), ()),
    aten.conv_transpose3d.input: ((2, 4, 5, 5, 5), (4, 6, 3, 3, 3), ()),
    aten.linear.default: ((2, 4), (6, 4), ()),
    aten.addmm.default: ((2, 4), (4, 6), ()),
    aten.matmul.default: ((2, 4), (4, 6), ()),
    aten.mm.default: ((2, 4), (4, 6), ()),
    aten.bmm.default: ((2, 3, 4), (2, 4, 6), ()),
    aten.embedding.default: ((), (6, 4), ()),
}


def call(
    operator: torch._ops.OpOverload, entry: Operator, x: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Call a layer with its data and weight where the table says that they are."""
    assert entry.weight is not None
    arguments: dict[int, Any] = {entry.weight: weight}
    if entry.data:
        arguments[next(position for position in entry.data if position != entry.weight)] = x
    else:
        arguments[1] = torch.arange(weight.shape[entry.out_axis])
    if entry.bias is not None:
        arguments[entry.bias] = torch.zeros(6)
    result: torch.Tensor = operator(*(arguments.get(index) for index in range(max(arguments) + 1)))
    return result


@pytest.mark.parametrize("operator", LAYERS, ids=name_of)
class TestLayers:
    def test_arguments_are_where_the_table_says(self, operator: torch._ops.OpOverload) -> None:
        entry, names = LAYERS[operator], schema(operator)
        assert entry.weight is not None
        assert names[entry.weight] in ("weight", "mat2", "other")
        if entry.bias is not None:
            assert names[entry.bias] == ("self" if operator is aten.addmm.default else "bias")
        if entry.groups is not None:
            assert names[entry.groups] == "groups"
        assert ("groups" in names) == (entry.groups is not None) and ("bias" in names) <= (
            entry.bias is not None
        )

    def test_axes_of_the_weight(self, operator: torch._ops.OpOverload) -> None:
        """A slice along the output axis moves that output alone; along the input axis, that input's part."""
        entry = LAYERS[operator]
        shape, weight_shape, _ = WEIGHTS[operator]
        x, weight = data(*shape), data(*weight_shape)
        before = call(operator, entry, x, weight)
        channel = 0 if operator is aten.embedding.default else (before.dim() - 1 if before.dim() <= 2 else 1)
        if operator is aten.bmm.default:
            channel = 2
        moved = weight.clone()
        moved.select(entry.out_axis, 3).add_(1.0)
        changed = (call(operator, entry, x, moved) != before).transpose(0, channel).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == [3]
        if operator is aten.embedding.default:
            return
        silent = x.clone()
        silent.select(channel if operator is aten.bmm.default else 1, 2).zero_()
        moved = weight.clone()
        moved.select(entry.in_axis, 2).add_(1.0)
        assert torch.equal(call(operator, entry, silent, moved), call(operator, entry, silent, weight))
        assert not torch.equal(call(operator, entry, x, moved), before)


# One call of each operator that only moves values.
MOVES: dict[torch._ops.OpOverload, tuple[Any, ...]] = {
    aten.view.default: ([4, 6],),
    aten.reshape.default: ([4, 6],),
    aten._unsafe_view.default: ([4, 6],),
    aten.flatten.using_ints: (1,),
    aten.unflatten.int: (1, [2, 2]),
    aten.permute.default: ([2, 0, 1],),
    aten.transpose.int: (0, 1),
    aten.t.default: (),
    aten.squeeze.default: (),
    aten.squeeze.dim: (0,),
    aten.squeeze.dims: ([0],),
    aten.unsqueeze.default: (1,),
    aten.expand.default: ([5, 2, 4, 3],),
    aten.slice.Tensor: (1, 1, 3),
    aten.select.int: (1, 2),
    aten.contiguous.default: (),
    aten.clone.default: (),
    aten.alias.default: (),
    aten.detach.default: (),
    aten.pixel_shuffle.default: (2,),
    aten.channel_shuffle.default: (2,),
    aten.dropout.default: (0.5, False),
    aten.feature_dropout.default: (0.5, False),
    aten.max_pool1d.default: ([2],),
    aten.max_pool2d.default: ([2, 2], [1, 1], [1, 1]),
    aten.adaptive_max_pool2d.default: ([1, 1],),
    aten.pad.default: ([1, 1],),
    aten.constant_pad_nd.default: ([1, 1],),
    aten.upsample_nearest2d.vec: (None, [2.0, 2.0]),
    aten.upsample_nearest2d.default: ([4, 6],),
    aten.chunk.default: (2,),
    aten.split.Tensor: (1,),
    aten.split_with_sizes.default: ([1, 1],),
}
SHAPES = {
    aten.t.default: (4, 3),
    aten.pixel_shuffle.default: (1, 4, 3, 2),
    aten.channel_shuffle.default: (1, 4, 3, 2),
    aten.upsample_nearest2d.vec: (1, 2, 4, 3),
    aten.upsample_nearest2d.default: (1, 2, 4, 3),
}


@pytest.mark.parametrize(
    "operator", [op for op, entry in TABLE.items() if entry.scales is Scales.PRESERVES], ids=name_of
)
def test_operators_that_preserve_scales_only_move_values(operator: torch._ops.OpOverload) -> None:
    """Then quantizing before or after is the same. An operator that is new here needs a call above."""
    shape = SHAPES.get(operator, (2, 4, 3))
    # Values on a grid, as dequantized codes are; all negative, so that a zero is seen.
    x = -torch.randint(1, 100, shape, generator=torch.Generator().manual_seed(0)).float()
    for result in torch.utils._pytree.tree_leaves(operator(x, *MOVES[operator])):
        if result.is_floating_point():
            allowed = (
                {*x.flatten().tolist(), 0.0} if TABLE[operator].kind == "pad" else set(x.flatten().tolist())
            )
            assert set(result.flatten().tolist()) <= allowed


@pytest.mark.parametrize(
    "operator", [op for op, entry in TABLE.items() if entry.scales is Scales.FIXED], ids=name_of
)
def test_operators_of_a_fixed_range_stay_in_it(operator: torch._ops.OpOverload) -> None:
    bounds = TABLE[operator].output_range
    assert bounds is not None
    x = torch.cat([data(100) * 10, torch.tensor([-1e30, 1e30, 0.0])])
    result = operator(x, 0) if operator is aten.softmax.int else operator(x)
    assert bounds[0] <= float(result.min()) and float(result.max()) <= bounds[1]
    # And the range is no wider than it must be: softmax alone never reaches its ends together.
    assert float(result.max()) > bounds[0] + 0.99 * (bounds[1] - bounds[0])


def test_ranges_and_scales_belong_together() -> None:
    for operator, entry in TABLE.items():
        assert (entry.output_range is not None) == (entry.scales is Scales.FIXED), operator
        assert not entry.activation or entry.integer, operator


def test_every_position_exists() -> None:
    for operator, entry in TABLE.items():
        for position in (*entry.data, entry.weight, entry.bias, entry.groups):
            assert position is None or position < len(schema(operator)), operator


class TestLooking:
    def node(self, target: Any, *arguments: Any, **keywords: Any) -> fx.Node:
        program = mlp()
        (x,) = program.placeholders
        given = tuple(x if item == "x" else item for item in arguments)
        with program.graph.inserting_before(program.output):
            made: fx.Node = program.graph.call_function(target, given, keywords)
        return made

    def test_arguments_by_position_name_and_default(self) -> None:
        conv = next(conv_net().compute_nodes())
        assert argument(conv, 6) == 1 and argument(conv, 4) == [1, 1] and argument(conv, 99) is None
        named = self.node(aten.conv2d.default, "x", "x", groups=8, bias="b")
        assert argument(named, 6) == 8 and argument(named, 2) == "b" and argument(named, 3) == [1, 1]
        assert argument(self.node(len, "x"), 3, "else") == "else"

    def test_data_in_lists(self) -> None:
        node = self.node(aten.cat.default, ["x"], 1)
        (x,) = node.graph.find_nodes(op="placeholder")
        node.args = ([x, x], 1)
        assert data_arguments(node) == [x, x]
        half = self.node(aten.add.Tensor, "x", 2.0)
        assert data_arguments(half) == [half.args[0]]
        assert data_arguments(self.node(aten.sin.default, "x")) == []

    def test_what_is_no_operator(self) -> None:
        program = mlp()
        assert operator_of(program.placeholders[0]) is None and operator_of(program.output) is None
        assert operator_of(self.node(len, "x")) is None

    @pytest.mark.parametrize(
        ("factors", "known"), [({}, True), ({"beta": 1}, True), ({"alpha": 2}, False), ({"beta": 0}, False)]
    )
    def test_sums_with_factors_are_no_layers(self, factors: dict[str, int], known: bool) -> None:
        node = self.node(aten.addmm.default, "x", "x", "x", **factors)
        assert (operator_of(node) is not None) == known

    @pytest.mark.parametrize(
        ("target", "arguments", "value", "preserves"),
        [
            (aten.constant_pad_nd.default, ([1, 1],), 0, True),
            (aten.constant_pad_nd.default, ([1, 1], 0.0), 0, True),
            (aten.constant_pad_nd.default, ([1, 1], 1.0), 1.0, False),
            (aten.pad.default, ([1, 1],), 0, True),
            (aten.pad.default, ([1, 1], "constant", 2.0), 2.0, False),
            (aten.pad.default, ([1, 1], "reflect"), 0, True),
        ],
    )
    def test_padding(self, target: Any, arguments: tuple[Any, ...], value: float, preserves: bool) -> None:
        node = self.node(target, "x", *arguments)
        assert pad_value(node) == value and preserves_scale(node) == preserves

    def test_preserving(self) -> None:
        assert preserves_scale(self.node(aten.view.default, "x", [16]))
        assert not preserves_scale(self.node(aten.add.Tensor, "x", "x"))
        assert not preserves_scale(self.node(aten.sin.default, "x"))
