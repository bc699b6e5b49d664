"""Comparisons: which layer made the error, not only which shows it."""

from __future__ import annotations

import math

import pytest
import torch
from support.programs import conv_net, data, mlp, seeded
from torch import nn

from sqcompile.compare import LayerDistance, compare_layers, first_jump
from sqcompile.errors import InputError
from sqcompile.evaluate import constant_sources, constant_value, explain_failure, run_watched
from sqcompile.layers import layers_of
from sqcompile.metrics import EQUAL, Distance
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.tracing import trace

aten = torch.ops.aten


class Deep(nn.Module):
    """Layers in a row, with a branch: errors of one pile up in all behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.side = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x + self.side(start)


@pytest.fixture(scope="module")
def deep() -> Program:
    return trace(seeded(Deep), (data(32, 16),))


def spoil(program: Program, name: str, amount: float) -> Program:
    """Return the program with noise added to the weight of one layer."""
    twin = program.snapshot()
    layer = next(layer for layer in layers_of(twin) if layer.name == name)
    weight = twin.tensor(layer.weight).detach()
    Rewriter(twin).replace_tensor(layer.weight, weight + amount * data(*weight.shape, seed=9))
    twin.recompile()
    return twin


class TestLayers:
    def test_equal_programs(self, deep: Program) -> None:
        rows = compare_layers(deep, deep.snapshot(), [[data(32, 16)]])
        assert [row.name for row in rows] == [*(f"layers.{i}" for i in range(6)), "side"]
        assert all(row.distance == EQUAL and row.loss == 0.0 for row in rows)
        assert rows[0].place.startswith("node %linear (layers.0, test_compare.py:")

    @pytest.mark.parametrize("name", ["layers.0", "layers.2", "layers.5", "side"])
    def test_the_loss_is_where_the_error_is_made(self, deep: Program, name: str) -> None:
        rows = compare_layers(deep, spoil(deep, name, 0.05), [[data(32, 16)]])
        assert max(rows, key=lambda row: row.loss).name == name
        names = [row.name for row in rows]
        for row in rows:
            if name != "side" and row.name != "side" and names.index(row.name) < names.index(name):
                assert row.distance == EQUAL

    def test_the_largest_of_several(self, deep: Program) -> None:
        spoiled = spoil(spoil(spoil(deep, "layers.1", 0.01), "layers.3", 0.1), "layers.4", 0.01)
        rows = {row.name: row for row in compare_layers(deep, spoiled, [[data(32, 16)]])}
        assert max(rows.values(), key=lambda row: row.loss).name == "layers.3"
        assert rows["layers.0"].loss == 0 < rows["layers.1"].loss < rows["layers.3"].loss

    def test_quantizing_the_data_is_the_layers_own_loss(self, deep: Program) -> None:
        twin = deep.snapshot()
        edit = Rewriter(twin)
        layer = layers_of(twin)[2]
        arguments = (
            edit.constant("s", torch.tensor(0.1)),
            edit.constant("z", torch.tensor(0, dtype=torch.int32)),
        )
        tail = (None, None, -8, 7)
        with edit.before(layer.node):
            codes = edit.call(torch.ops.sqcompile.quantize.default, layer.data, *arguments, *tail)
            value = edit.call(torch.ops.sqcompile.dequantize.default, codes, *arguments, *tail)
        edit.set_argument(layer.node, 0, value)
        edit.finish()
        rows = compare_layers(deep, twin, [[data(32, 16)]])
        assert max(rows, key=lambda row: row.loss).name == "layers.2"
        # With much noise on the way in, little of what the layer shows is its own.
        rows = {row.name: row for row in compare_layers(deep, spoil(twin, "layers.1", 0.3), [[data(32, 16)]])}
        assert (
            rows["layers.2"].before is not None
            and rows["layers.2"].loss < rows["layers.2"].distance.noise / 2
        )

    def test_what_reached_a_layer_is_no_loss_of_its_own(self) -> None:
        def at(sqnr_db: float, before: float | None) -> LayerDistance:
            reached = None if before is None else Distance(before, 1.0, 0.0)
            return LayerDistance("layer", "node", "place", Distance(sqnr_db, 1.0, 0.0), reached)

        assert at(20, None).loss == pytest.approx(0.01)
        assert at(10, 20).loss == pytest.approx(0.1 - 0.01)
        assert at(20, 10).loss == 0.0 == at(20, 20).loss  # a layer may also lose noise
        assert at(9, 10).loss < at(20, math.inf).loss * 3 < at(10, 20).loss

    def test_over_several_batches(self, deep: Program) -> None:
        spoiled = spoil(deep, "layers.2", 0.05)
        one, two = data(32, 16), data(32, 16, seed=3)
        apart = [compare_layers(deep, spoiled, [[x]])[-2].distance.max_error for x in (one, two)]
        both = compare_layers(deep, spoiled, [[one], [two]])[-2].distance.max_error
        assert both == max(apart)

    def test_layers_in_place_of_others(self, deep: Program) -> None:
        """A node that stands for another is compared with what the other gave."""
        twin = deep.snapshot()
        edit = Rewriter(twin, "fuse")
        layer = layers_of(twin)[1]
        with edit.before(layer.node):
            new = edit.call(aten.linear.default, layer.data, layer.weight, layer.bias, like=layer.node)
        edit.replace(layer.node, new)
        edit.finish()
        rows = compare_layers(deep, twin, [[data(32, 16)]])
        assert len(rows) == 7 and all(row.distance == EQUAL for row in rows)

    def test_channels_that_were_rescaled(self, deep: Program) -> None:
        twin = deep.snapshot()
        edit = Rewriter(twin)
        factor = torch.linspace(0.5, 4, 16)
        layer = layers_of(twin)[0]
        edit.replace_tensor(layer.weight, twin.tensor(layer.weight).detach() * factor[:, None])
        edit.replace_tensor(layer.bias, twin.tensor(layer.bias).detach() * factor)
        edit.rescale(layer.node, factor)
        twin.recompile()
        row = compare_layers(deep, twin, [[data(32, 16)]])[0]
        assert row.distance.sqnr_db > 120  # rounding of float32

    @pytest.mark.parametrize("channel", range(8))
    def test_no_channel_escapes_the_sample(self, channel: int) -> None:
        """Of a large value every so-many-th element is compared; each channel must be among them."""
        model = seeded(lambda: nn.Linear(4, 8))
        x = data(1 << 16, 4)  # a value of 2¹⁹ elements, of which at most 2¹⁸ are looked at
        program = trace(model, (x,))
        twin = program.snapshot()
        bias = twin.tensor("bias").detach().clone()
        bias[channel] += 1.0
        Rewriter(twin).replace_tensor(layers_of(twin)[0].bias, bias)
        twin.recompile()
        (row,) = compare_layers(program, twin, [[x]])
        assert row.distance.max_error == pytest.approx(1.0, abs=1e-5)

    def test_programs_without_common_layers(self, deep: Program) -> None:
        other = trace(nn.Sequential(nn.ReLU()).eval(), (data(32, 16),))
        assert compare_layers(deep, other, [[data(32, 16)]]) == []

    def test_not_finite(self, deep: Program) -> None:
        rows = compare_layers(deep, spoil(deep, "layers.2", math.nan), [[data(32, 16)]])
        assert max(rows, key=lambda row: row.loss).name == "layers.2"
        assert [row.loss for row in rows[3:6]] == [0.0] * 3  # what reached them was NaN already


class TestFirstJump:
    def test_finds_the_first_that_parts(self, deep: Program) -> None:
        place = first_jump(deep, spoil(deep, "layers.3", 1.0), [data(32, 16)])
        assert str(place).startswith("node %linear_3 (layers.3, test_compare.py:")

    def test_nothing_parts(self, deep: Program) -> None:
        assert first_jump(deep, deep.snapshot(), [data(32, 16)]) is None
        assert first_jump(deep, spoil(deep, "layers.3", 1e-4), [data(32, 16)]) is None  # far above 20 dB

    def test_with_a_judge_of_ones_own(self, deep: Program) -> None:
        spoiled = spoil(deep, "layers.3", 1e-4)
        assert "layers.3" in str(
            first_jump(deep, spoiled, [data(32, 16)], lambda a, b: not torch.equal(a, b))
        )

    def test_not_finite_parts_whatever_the_judge_says(self, deep: Program) -> None:
        place = first_jump(deep, spoil(deep, "layers.3", math.nan), [data(32, 16)], lambda a, b: False)
        assert "layers.3" in str(place)

    def test_a_program_that_cannot_run(self, deep: Program) -> None:
        broken = deep.snapshot()
        broken.set_tensor("layers.0.weight", torch.zeros(3, 3))
        assert first_jump(deep, broken, [data(32, 16)]) is None


class TestEvaluation:
    def test_constants(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        layer = layers_of(program)[0]
        with edit.before(layer.node):
            doubled = edit.call(aten.mul.Tensor, layer.weight, 2.0)
            total = edit.call(aten.add.Tensor, doubled, doubled)
            mixed = edit.call(aten.mul.Tensor, layer.data, 2.0)
            random = edit.call(aten.rand.default, [3])
            written = edit.call(aten.add_.Tensor, layer.weight, 1.0)
        weight = program.tensor(layer.weight).detach()
        before = weight.clone()
        assert torch.equal(constant_value(program, total), before * 4)
        assert torch.equal(constant_value(program, layer.weight), before)
        assert constant_value(program, mixed) is None and constant_value(program, layer.node) is None
        assert constant_value(program, random) is None  # another one at each run
        assert constant_value(program, written) is None and torch.equal(weight, before)
        assert constant_sources(total) == [layer.weight] and constant_sources(mixed) is None

    def test_constants_at_the_end_of_long_chains(self) -> None:
        """Deeper than Python's stack."""
        program = mlp()
        edit = Rewriter(program)
        layer = layers_of(program)[0]
        fixed, moving = layer.weight, layer.data
        with edit.before(layer.node):
            for _ in range(1500):
                fixed = program.graph.call_function(aten.add.Tensor, (fixed, 1.0))
                moving = program.graph.call_function(aten.add.Tensor, (moving, 1.0))
        value = constant_value(program, fixed)
        assert value is not None and value.mean() == pytest.approx(1500, abs=1)
        assert constant_value(program, moving) is None

    def test_watching_values(self) -> None:
        program = conv_net()
        x = data(2, 3, 6, 6)
        seen: dict[str, torch.Tensor] = {}
        nodes = [node for node in program.compute_nodes() if node.name in ("relu", "mean")]
        outputs = run_watched(
            program, [x], nodes, lambda node, value: seen.update({node.name: value.clone()})
        )
        assert torch.equal(outputs[0], program(x)) and not outputs[0].requires_grad
        assert list(seen) == ["relu", "mean"] and (seen["relu"] >= 0).all()

    def test_a_run_that_fails_names_the_operator(self) -> None:
        program = mlp()
        with pytest.raises(InputError, match="cannot run") as caught:
            run_watched(program, [data(2, 9)], (), lambda node, value: None)
        assert "%linear (first, programs.py:" in str(caught.value.where)
        error = explain_failure(program, [], RuntimeError("first line\nsecond"))
        assert isinstance(error, InputError)
