"""Layers: names that users know, and selections that say when they match nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.programs import conv_net, data, mlp, seeded
from torch import nn

from sqcompile.errors import SelectionError
from sqcompile.layers import layer_of, layers_of, matches, select_layers, stored_weight
from sqcompile.rewrite import Rewriter
from sqcompile.tracing import trace

ours = torch.ops.sqcompile


class Blocks(nn.Module):
    """Layers with the names that real models have: nested, numbered, tied, shared, and without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(8, 8), "mlp": nn.Linear(8, 8)}) for _ in range(11)
        )
        self.shared = nn.Linear(8, 8)
        self.free = nn.Parameter(torch.zeros(8, 8))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = block["mlp"](block["attn"](x))
        x = self.shared(torch.relu(self.shared(x)))
        return self.head(nn.functional.linear(x, self.free))


@pytest.fixture(scope="module")
def blocks() -> Any:
    return layers_of(trace(seeded(Blocks), (torch.tensor([[1, 2, 3]]),)))


class TestLayers:
    def test_names_kinds_and_parts(self) -> None:
        program = conv_net()
        layers = layers_of(program)
        assert [(layer.name, layer.kind, layer.groups) for layer in layers] == [
            ("stem", "conv2d", 1),
            ("depthwise", "conv2d", 8),
            ("up", "conv_transpose2d", 1),
            ("head", "linear", 1),
        ]
        for layer in layers:
            assert layer.weight_name == f"{layer.name}.weight" and layer.weight_value is layer.weight
            assert layer.bias is not None and str(layer.bias.target) == f"{layer.name}.bias"
            assert layer.data is not None and layer.data is layer.node.args[0]

    def test_tied_and_shared_weights(self, blocks: Any) -> None:
        found = {layer.name: layer.weight_name for layer in blocks if "layers" not in layer.name}
        assert list(found) == ["embed", "shared", "free", "head"]
        assert found["embed"] == found["head"]  # one tensor, under one of its two names
        assert (found["shared"], found["free"]) == ("shared.weight", "free")
        assert [layer.name for layer in blocks].count("shared") == 2
        assert blocks[0].data is None and blocks[0].bias is None and blocks[-1].bias is None

    def test_of_gpt2s_kind(self) -> None:
        """x @ weight + bias, with the weight [in, out]."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight, self.bias = nn.Parameter(data(4, 6)), nn.Parameter(data(6))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.addmm(self.bias, x, self.weight)

        (layer,) = layers_of(trace(Model(), (data(2, 4),)))
        assert layer.data is layer.node.args[1] and layer.bias is layer.node.args[0]
        assert (layer.operator.out_axis, layer.operator.in_axis) == (1, 0)

    def test_through_masks_and_quantization(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        layer = layers_of(program)[0]
        scale, zero = (
            edit.constant("s", torch.tensor(0.1)),
            edit.constant("z", torch.tensor(0, dtype=torch.int32)),
        )
        tail = (None, None, -128, 127)
        with edit.before(layer.node):
            value = edit.call(
                ours.mask.default, layer.weight, edit.constant("m", torch.ones(16, 8, dtype=torch.bool))
            )
            value = edit.call(ours.observe.default, value, "name")
            value = edit.call(ours.fake_quantize.default, value, scale, zero, *tail)
            value = edit.call(ours.quantize.default, value, scale, zero, *tail)
            value = edit.call(ours.dequantize.default, value, scale, zero, *tail)
        edit.set_argument(layer.node, 1, value)
        found = layers_of(program)[0]
        assert found.weight is layer.weight and found.weight_value is value and found.name == "first"
        assert stored_weight(value) is layer.weight

    def test_weights_that_are_computed_are_none(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        layer = layers_of(program)[0]
        with edit.before(layer.node):
            value = edit.call(torch.ops.aten.neg.default, layer.weight)
        edit.set_argument(layer.node, 1, value)
        assert layer_of(program, layer.node) is None and stored_weight(value) is None
        assert [item.name for item in layers_of(program)] == ["second"]

    def test_products_of_two_values_are_none(self) -> None:
        class Model(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x @ x.t()

        assert layers_of(trace(Model(), (data(2, 4),))) == []

    def test_stored_under_another_name(self) -> None:
        """Passes store `weight` as `weight_codes`, …: the layer keeps its name."""
        for suffix in ("_codes", "_transposed"):
            program = mlp()
            edit = Rewriter(program)
            layer = layers_of(program)[0]
            stored = program.tensor(layer.weight).detach().clone()
            edit.replace(layer.weight, edit.constant(f"first.weight{suffix}", stored))
            edit.finish()
            assert [item.name for item in layers_of(program)] == ["first", "second"]


class TestSelection:
    def names(self, layers: Any, *include: str, **options: Any) -> list[str]:
        return [layer.name for layer in select_layers(layers, include or ("*",), **options)]

    @pytest.mark.parametrize(
        ("pattern", "count"),
        [
            ("*", 27),
            ("embed", 1),
            ("layers", 22),
            ("layers.1", 2),  # not layers.10
            ("layers.1.attn", 1),
            ("layers.*.attn", 11),
            ("layers.1*", 4),  # layers.1 and layers.10
            ("layers.[23].mlp", 2),
            ("re:attn$", 11),
            (r"re:^layers\.(3|10)\.", 4),
            ("shared", 2),
        ],
    )
    def test_patterns(self, blocks: Any, pattern: str, count: int) -> None:
        assert len(self.names(blocks, pattern)) == count

    def test_come_in_graph_order(self, blocks: Any) -> None:
        assert self.names(blocks, "head", "embed") == ["embed", "head"]

    def test_exclusion_and_kinds(self, blocks: Any) -> None:
        assert self.names(blocks, exclude=("layers", "re:^sh")) == ["embed", "free", "head"]
        assert self.names(blocks, kinds=("embedding",)) == ["embed"]
        assert self.names(blocks, "layers.0", exclude=("layers.0.mlp",), kinds=("linear",)) == [
            "layers.0.attn"
        ]
        assert self.names(blocks, "head", kinds=("embedding",)) == []

    @pytest.mark.parametrize("option", ["include", "exclude"])
    def test_a_pattern_that_matches_nothing(self, blocks: Any, option: str) -> None:
        with pytest.raises(SelectionError) as caught:
            select_layers(blocks, **{option: ("layers.1.atn",)}, where="pass mask-weights")
        error = caught.value
        assert error.what == "The pattern 'layers.1.atn' matches no layer."
        assert "layers.1.attn" in str(error.next_step) and error.where == "pass mask-weights"
        assert error.seen and error.expected

    def test_a_kind_that_the_model_has_not(self, blocks: Any) -> None:
        with pytest.raises(SelectionError) as caught:
            select_layers(blocks, kinds=("linaer",))
        error = caught.value
        assert error.what == "The model has no layer of kind 'linaer'." and "'linear'" in str(error.next_step)
        assert error.expected == "embedding, linear"

    def test_a_wrong_expression(self, blocks: Any) -> None:
        with pytest.raises(SelectionError, match="not a regular expression") as caught:
            select_layers(blocks, ("re:layers.(",))
        assert caught.value.seen and caught.value.expected and caught.value.next_step

    def test_of_a_model_without_layers(self) -> None:
        assert select_layers([]) == []
        with pytest.raises(SelectionError) as caught:
            select_layers([], ("fc",))
        assert "sqcompile inspect" in str(caught.value.next_step)

    def test_names_are_matched_whole(self) -> None:
        assert (
            matches("fc", "fc")
            and matches("fc", "fc.1")
            and not matches("fc", "fc1")
            and not matches("fc", "a.fc")
        )
