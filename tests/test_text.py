"""The text of a program: exact, stable, in the words of the model."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.programs import ConvNet, Mlp, TwoInputs, conv_net, data, mlp, seeded
from torch import nn
from torch.export import Dim

from sqcompile.rewrite import Rewriter
from sqcompile.text import (
    locate,
    module_path,
    node_text,
    operator_name,
    program_diff,
    program_text,
    source_frame,
    source_line,
    symbol_names,
    text_diff,
)
from sqcompile.tracing import trace

aten = torch.ops.aten


def lines(text: str) -> str:
    return textwrap.dedent(text).strip()


def test_whole_program() -> None:
    assert str(conv_net()) == lines("""
        program (level aten)
          input  %x: f32[2, 3, 6, 6]
          tensor @stem.weight: f32[8, 3, 3, 3]
          tensor @stem.bias: f32[8]
          tensor @depthwise.weight: f32[8, 1, 3, 3]
          tensor @depthwise.bias: f32[8]
          tensor @up.weight: f32[8, 6, 2, 2]
          tensor @up.bias: f32[6]
          tensor @head.weight: f32[5, 6]
          tensor @head.bias: f32[5]
          %conv2d: f32[2, 8, 6, 6] = conv2d(%x, @stem.weight, @stem.bias, padding=[1, 1])
          %relu: f32[2, 8, 6, 6] = relu(%conv2d)
          %conv2d_1: f32[2, 8, 6, 6] = conv2d(%relu, @depthwise.weight, @depthwise.bias, padding=[1, 1], groups=8)
          %add: f32[2, 8, 6, 6] = add(%relu, %conv2d_1)
          %conv_transpose2d: f32[2, 6, 12, 12] = conv_transpose2d.input(%add, @up.weight, @up.bias, stride=[2, 2])
          %mean: f32[2, 6] = mean.dim(%conv_transpose2d, dim=[2, 3])
          %linear: f32[2, 5] = linear(%mean, @head.weight, @head.bias)
          return output=%linear
    """)


def test_dimensions_have_the_users_names() -> None:
    batch, length = Dim("batch"), Dim("length", min=3, max=99)

    class Model(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, y[:, 1:]], 1).flatten()

    program = trace(
        Model(),
        (data(2, 3), data(2, 5)),
        dynamic_shapes={"x": {0: batch}, "y": {0: batch, 1: length}},
    )
    text = str(program)
    assert "input  %x: f32[batch, 3]" in text and "input  %y: f32[batch, length]" in text
    assert "f32[batch, length + 2] = cat(" in text
    assert set(symbol_names(program).values()) == {"batch", "length"}
    assert not any(symbol in text for symbol in symbol_names(program))


def test_nested_outputs_and_constants() -> None:
    program = trace(TwoInputs(), (data(3, 4), {"left": data(3, 4), "right": data(3, 4)}))
    text = str(program)
    assert "input  %pair_left: f32[3, 4]" in text
    assert text.splitlines()[-1] == "  return total=%add, parts.0=%pair_right, parts.1=%sum_1"


@pytest.mark.parametrize("model", [Mlp, ConvNet])
def test_two_traces_of_a_model_read_alike(model: Callable[[], nn.Module]) -> None:
    shape = (2, 8) if model is Mlp else (2, 3, 6, 6)
    first, second = (trace(seeded(model), (data(*shape),)) for _ in range(2))
    assert program_text(first) == program_text(second)
    assert program_text(first, source=True) == program_text(second, source=True)
    assert program_diff(first, second) == ""


def test_sources() -> None:
    text = program_text(mlp(), source=True)
    line = next(line for line in text.splitlines() if "%linear_1:" in line)
    assert line.endswith(
        "linear(%relu, @second.weight, @second.bias)  # node %linear_1 (second, programs.py:27)"
    )
    assert "#" not in program_text(mlp())


class TestArguments:
    """One line a case: what a node's arguments look like."""

    @pytest.mark.parametrize(
        ("target", "arguments", "keywords", "expected"),
        [
            (aten.relu.default, (), {}, "relu(%x)"),
            (aten.add.Tensor, (2,), {}, "add(%x, other=2)"),
            (aten.add.Tensor, ("x",), {"alpha": 1}, "add(%x, %x)"),
            (aten.add.Tensor, ("x",), {"alpha": 2}, "add(%x, %x, alpha=2)"),
            (aten.add.Scalar, (0.1,), {}, "add.Scalar(%x, other=0.1)"),
            (aten.mul.Scalar, (1 / 3,), {}, "mul.Scalar(%x, other=0.333333)"),
            (aten.mul.Scalar, (-math.inf,), {}, "mul.Scalar(%x, other=-inf)"),
            (aten.clamp.default, (None, 6.0), {}, "clamp(%x, max=6)"),
            (aten.clamp.default, (0.0, 6.0), {}, "clamp(%x, min=0, max=6)"),
            (aten.slice.Tensor, (1, 0, 2**63 - 1), {}, "slice(%x, dim=1, start=0, end=end)"),
            (aten.slice.Tensor, (1, 2, 3), {}, "slice(%x, dim=1, start=2, end=3)"),
            (aten.slice.Tensor, (0, 2, 2**63 - 1), {}, "slice(%x, start=2, end=end)"),
            (aten.to.dtype, (torch.float16,), {}, "to.dtype(%x, dtype=f16)"),
            (aten.mean.dim, ([1],), {}, "mean.dim(%x, dim=[1])"),
            (aten.mean.dim, ([1], True), {}, "mean.dim(%x, dim=[1], keepdim=True)"),
            (aten.mean.dim, ([1],), {"dtype": torch.float64}, "mean.dim(%x, dim=[1], dtype=f64)"),
            (aten.sum.dim_IntList, (None,), {}, "sum.dim_IntList(%x, dim=None)"),
            (aten.squeeze.dims, ([],), {}, "squeeze.dims(%x, dim=[])"),
            (aten.avg_pool2d.default, ([2, 2], []), {}, "avg_pool2d(%x, kernel_size=[2, 2])"),
            (aten.flip.default, ([0, 1],), {}, "flip(%x, dims=[0, 1])"),
            (aten.flatten.using_ints, (0, -1), {}, "flatten.using_ints(%x)"),
            (aten.flatten.using_ints, (1,), {}, "flatten.using_ints(%x, start_dim=1)"),
            (aten.gelu.default, (), {"approximate": "tanh"}, "gelu(%x, approximate='tanh')"),
            (aten.gelu.default, (), {"approximate": "none"}, "gelu(%x)"),
            (torch.ops.sqcompile.observe.default, ("name",), {}, "observe(%x, observer='name')"),
        ],
    )
    def test_defaults_are_left_out(
        self, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], expected: str
    ) -> None:
        program = mlp()
        (x,) = program.placeholders
        given = tuple(x if item == "x" else item for item in arguments)
        with program.graph.inserting_before(program.output):
            node = program.graph.call_function(target, (x, *given), keywords)
        node.name = "n"
        assert node_text(node) == f"%n: none = {expected}"

    @pytest.mark.parametrize(
        ("stride", "padding", "shown"),
        [
            ([1, 1], [0, 0], ""),
            ([2, 2], [0, 0], ", stride=[2, 2]"),
            ([1, 1], [0, 1], ", padding=[0, 1]"),
            ([1], [0], ""),
        ],
    )
    def test_lists_whose_default_is_one_number(
        self, stride: list[int], padding: list[int], shown: str
    ) -> None:
        program = conv_net()
        node = next(program.compute_nodes())
        node.args = (*node.args[:3], stride, padding)
        assert node_text(node).endswith(f"conv2d(%x, @stem.weight, @stem.bias{shown})")

    def test_an_argument_in_the_middle_that_is_left_out(self) -> None:
        """What follows it is named, so that no value is read as another argument's."""
        program = conv_net()
        node = next(program.compute_nodes())
        node.args = (*node.args[:2], None, [2, 2])
        assert node_text(node).endswith("conv2d(%x, @stem.weight, stride=[2, 2])")

    def test_lists_of_values(self) -> None:
        program = mlp()
        (x,) = program.placeholders
        with program.graph.inserting_before(program.output):
            node = program.graph.call_function(aten.cat.default, ([x, x], 1))
        assert node_text(node).endswith("cat([%x, %x], dim=1)")

    def test_several_results(self) -> None:
        class Model(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.chunk(2, dim=1)[1] * x.shape[0]

        text = str(trace(Model(), (data(4, 6),), dynamic_shapes=({0: Dim("n")},)))
        assert "%chunk: (f32[n, 3], f32[n, 3]) = chunk(%x, chunks=2, dim=1)" in text
        assert "getitem" in text and ": int = sym_size.int(%x" in text


class TestDiff:
    def test_shows_what_changed(self) -> None:
        before, after = mlp(), mlp()
        edit = Rewriter(after)
        relu = next(node for node in after.compute_nodes() if node.name == "relu")
        with edit.before(relu):
            edit.replace(relu, edit.call(aten.gelu.default, relu.args[0], like=relu))
        edit.finish()
        assert program_diff(before, after, context=1) == lines("""
            --- before
            +++ after
            @@ -7,4 +7,4 @@
               %linear: f32[2, 16] = linear(%x, @first.weight, @first.bias)
            -  %relu: f32[2, 16] = relu(%linear)
            -  %linear_1: f32[2, 4] = linear(%relu, @second.weight, @second.bias)
            +  %gelu: f32[2, 16] = gelu(%linear)
            +  %linear_1: f32[2, 4] = linear(%gelu, @second.weight, @second.bias)
               return output=%linear_1
        """)

    def test_equal_programs(self) -> None:
        assert program_diff(mlp(), mlp()) == ""

    def test_texts(self) -> None:
        assert text_diff("a\nb", "a\nc", names=("old", "new")).splitlines()[:2] == ["--- old", "+++ new"]


class TestPlaces:
    def test_of_a_node(self) -> None:
        node = next(conv_net().compute_nodes())
        assert module_path(node) == "stem" and source_line(node).startswith("programs.py:")
        assert locate(node) == f"node %conv2d (stem, {source_line(node)})"

    def test_of_a_node_without_origin(self) -> None:
        node = next(mlp().compute_nodes())
        node.meta = {}
        assert (module_path(node), source_line(node), locate(node)) == ("", "", "node %linear")

    def test_frames_of_torch_are_left_out(self) -> None:
        stack = (
            '  File "/home/model.py", line 7, in forward\n    return self.fc(x)\n'
            '  File "/lib/torch/nn/modules/linear.py", line 134, in forward\n    return F.linear(x)\n'
        )
        assert source_frame(stack) == ("/home/model.py", 7, "return self.fc(x)")
        assert source_frame(stack.splitlines(True)[2]) == ("/lib/torch/nn/modules/linear.py", 134, "")
        assert source_frame("") is None

    def test_a_users_folder_called_torch_something(self) -> None:
        stack = '  File "/home/torch_models/net.py", line 3, in forward\n    x = 1\n'
        assert source_frame(stack) == ("/home/torch_models/net.py", 3, "x = 1")

    def test_names_of_operators(self) -> None:
        program = conv_net()
        names = [operator_name(node) for node in program.graph.nodes if node.op != "get_attr"]
        expected = "input conv2d relu conv2d add conv_transpose2d.input mean.dim linear return"
        assert names == expected.split()
