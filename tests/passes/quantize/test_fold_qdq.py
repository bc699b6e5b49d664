from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.quantize import (
    DEQUANTIZE,
    QUANTIZE,
    Written,
    calls,
    frozen,
    refuse_level,
    run,
    settle,
    settled,
    values,
    written,
)
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Level, Program, trace
from sqcompile.layers import layers_of
from sqcompile.passes import FoldQDQ, MaskWeights, QuantizeWeights
from sqcompile.quantization import Format
from sqcompile.sparsity import Sparsity
from sqcompile.testing import CheckedPass, check_pass

F = torch.nn.functional


def fold(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> CheckedPass:
    """Fold a program written with Q and DQ, and check that not a bit of its results changes."""
    program = written(Written(function), inputs)
    checked = check_pass(FoldQDQ(), program, inputs, **options)
    for before, after in zip(checked.before.run(inputs), checked.after.run(inputs), strict=True):
        assert torch.equal(before, after)
    return checked


def operators(program: Program) -> list[str]:
    return [
        str(node.target).split(".")[1] if "." in str(node.target) else "getitem"
        for node in program.compute_nodes()
    ]


def test_cancels_dequantize_and_quantize_with_the_same_parameters() -> None:
    fold(
        lambda self, x: self.dq(self.q(self.dq(self.q(x)))),
        values(2, 3),
        expected="""
            program (level qdq)
              input  %inputs_0: f32[2, 3]
              tensor @scale: f32[]
              tensor @zero_point: i32[]
              %quantize: u8[2, 3] = quantize(%inputs_0, @scale, @zero_point, qmin=0, qmax=255)
              %dequantize: f32[2, 3] = dequantize(%quantize, @scale, @zero_point, qmin=0, qmax=255)
              return output=%dequantize
        """,
    )


def test_keeps_them_where_parameters_differ() -> None:
    """A requantization is an operation of its own."""
    checked = fold(
        lambda self, x: self.dq(self.q(self.dq(self.q(x)), self.other_scale), self.other_scale),
        values(2, 3),
        unchanged=True,
    )
    assert operators(checked.after) == ["quantize", "dequantize", "quantize", "dequantize"]


def test_cancels_equal_parameters_under_two_names() -> None:
    model = Written(lambda self, x: self.dq(self.q(self.dq(self.q(x)), self.other_scale), self.other_scale))
    model.other_scale = model.scale.clone()
    checked = check_pass(FoldQDQ(), written(model, (values(2, 3),)), (values(2, 3),))
    assert operators(checked.after) == ["quantize", "dequantize"]


def test_merges_equal_quantizations_of_one_value() -> None:
    checked = fold(
        lambda self, x: (self.dq(self.q(x)).exp(), self.dq(self.q(x)).tanh()),
        values(2, 3),
        expected="""
            program (level qdq)
              input  %inputs_0: f32[2, 3]
              tensor @scale: f32[]
              tensor @zero_point: i32[]
              %quantize: u8[2, 3] = quantize(%inputs_0, @scale, @zero_point, qmin=0, qmax=255)
              %dequantize: f32[2, 3] = dequantize(%quantize, @scale, @zero_point, qmin=0, qmax=255)
              %exp: f32[2, 3] = exp(%dequantize)
              %tanh: f32[2, 3] = tanh(%dequantize)
              return output_0=%exp, output_1=%tanh
        """,
    )
    assert operators(checked.after).count("quantize") == 1


def test_codes_that_are_returned_stay_returned() -> None:
    checked = fold(lambda self, x: (self.q(x), self.dq(self.q(x)).flatten()), values(2, 3))
    assert checked.after(values(2, 3))[0].dtype == torch.uint8
    assert operators(checked.after) == ["quantize", "flatten", "dequantize"]


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(2, 64),
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "slice": lambda x: x[:, :, 1:3],
    "select": lambda x: x[:, 0],
    "expand": lambda x: x[:, :1].expand(2, 4, 4, 4),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, padding=1),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
}


@pytest.mark.parametrize("zero_point", [0, 128, 255])
@pytest.mark.parametrize("move", MOVES)
def test_codes_flow_through_what_moves_them(move: str, zero_point: int) -> None:
    x = values(2, 4, 4, 4)
    model = Written(lambda self, x: MOVES[move](self.dq(self.q(x))).exp(), zero_point=zero_point)
    checked = check_pass(FoldQDQ(), written(model, (x,)), (x,))
    assert torch.equal(checked.before(x), checked.after(x))
    names = operators(checked.after)
    assert names[0] == "quantize" and names[-2:] == ["dequantize", "exp"] and names.count("dequantize") == 1


def test_padding_writes_the_code_of_zero() -> None:
    fold(
        lambda self, x: F.pad(self.dq(self.q(x)), (1, 1)),
        values(1, 3),
        expected="""
            program (level qdq)
              input  %inputs_0: f32[1, 3]
              tensor @scale: f32[]
              tensor @zero_point: i32[]
              %quantize: u8[1, 3] = quantize(%inputs_0, @scale, @zero_point, qmin=0, qmax=255)
              %pad: u8[1, 5] = pad(%quantize, pad=[1, 1], value=128)
              %dequantize_1: f32[1, 5] = dequantize(%pad, @scale, @zero_point, qmin=0, qmax=255)
              return output=%dequantize_1
        """,
    )


def test_padding_with_another_number_is_no_move() -> None:
    fold(lambda self, x: F.pad(self.dq(self.q(x)), (1, 1), value=0.1), values(1, 3), unchanged=True)


@pytest.mark.parametrize(
    "move",
    [lambda x: F.adaptive_max_pool2d(x, 2), lambda x: F.interpolate(x, scale_factor=2.0)],
    ids=["adaptive_max_pool2d", "upsample"],
)
def test_operators_without_integer_kernels_stand_between_equal_quantizations(
    move: Callable[[Tensor], Tensor],
) -> None:
    """PyTorch cannot run them on codes; backends see that the codes go on to an integer operator."""
    x = values(1, 2, 4, 4)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(move(self.first(x)))

    checked = check_pass(FoldQDQ(), frozen(settle(Network()), x), (x,))
    assert torch.equal(checked.before(x), checked.after(x))
    last = calls(checked.after, torch.ops.aten.conv2d.default)[1]
    codes = last.args[0].args[0]  # type: ignore[union-attr]
    assert codes.target is QUANTIZE and codes.args[1].target == "conv2d_scale"  # type: ignore[union-attr]


def test_operators_without_integer_kernels_before_floating_point_stay() -> None:
    fold(
        lambda self, x: F.adaptive_max_pool2d(self.dq(self.q(x)), 2).exp(), values(1, 2, 4, 4), unchanged=True
    )


def test_sixteen_bits_move_where_kernels_take_them() -> None:
    x = values(1, 2, 4, 4)
    wide = Format.parse("uint16:affine")
    model = settled(nn.Conv2d(2, 2, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2))
    checked = check_pass(FoldQDQ(), frozen(model, x, activation=wide), (x,))
    assert torch.equal(checked.before(x), checked.after(x))
    # Codes of 16 bits cannot be pooled in PyTorch, but they can be flattened.
    names = [name for name in operators(checked.after) if name != "dequantize"]
    assert names == ["quantize", "conv2d", "quantize", "max_pool2d", "quantize", "flatten", "linear"]


def test_parts_of_a_chunk_are_codes() -> None:
    checked = fold(
        lambda self, x: [part.exp() for part in self.dq(self.q(x)).chunk(2, 1)],
        values(2, 4),
        expected="""
            program (level qdq)
              input  %inputs_0: f32[2, 4]
              tensor @scale: f32[]
              tensor @zero_point: i32[]
              %quantize: u8[2, 4] = quantize(%inputs_0, @scale, @zero_point, qmin=0, qmax=255)
              %chunk: (u8[2, 2], u8[2, 2]) = chunk(%quantize, chunks=2, dim=1)
              %getitem: u8[2, 2] = getitem(%chunk, 0)
              %dequantize_1: f32[2, 2] = dequantize(%getitem, @scale, @zero_point, qmin=0, qmax=255)
              %getitem_1: u8[2, 2] = getitem(%chunk, 1)
              %dequantize_2: f32[2, 2] = dequantize(%getitem_1, @scale, @zero_point, qmin=0, qmax=255)
              %exp: f32[2, 2] = exp(%dequantize_1)
              %exp_1: f32[2, 2] = exp(%dequantize_2)
              return output_0=%exp, output_1=%exp_1
        """,
    )
    assert operators(checked.after).count("dequantize") == 2


def test_concatenates_codes_of_one_scale() -> None:
    fold(
        lambda self, x, y: torch.cat([self.dq(self.q(x)), self.dq(self.q(y))], 1),
        values(2, 3),
        values(2, 3, seed=2),
        expected="""
            program (level qdq)
              input  %inputs_0: f32[2, 3]
              input  %inputs_1: f32[2, 3]
              tensor @scale: f32[]
              tensor @zero_point: i32[]
              %quantize: u8[2, 3] = quantize(%inputs_0, @scale, @zero_point, qmin=0, qmax=255)
              %quantize_1: u8[2, 3] = quantize(%inputs_1, @scale, @zero_point, qmin=0, qmax=255)
              %cat: u8[2, 6] = cat([%quantize, %quantize_1], dim=1)
              %dequantize_2: f32[2, 6] = dequantize(%cat, @scale, @zero_point, qmin=0, qmax=255)
              return output=%dequantize_2
        """,
    )


def test_does_not_concatenate_codes_of_different_scales() -> None:
    fold(
        lambda self, x: torch.cat(
            [self.dq(self.q(x)), self.dq(self.q(x, self.other_scale), self.other_scale)], 1
        ),
        values(2, 3),
        unchanged=True,
        remarks=["its inputs have different scales: it stays in floating point"],
    )


def test_quantizes_right_behind_an_integer_operator() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.grid = Written(lambda self, x: x)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(self.grid.dq(self.grid.q(x)))
            return self.grid.dq(self.grid.q(F.pad(F.max_pool2d(x, 2), (1, 1)).flatten(1)))

    x = values(1, 2, 4, 4)
    checked = check_pass(FoldQDQ(), written(settle(Network()), (x,)), (x,))
    assert torch.equal(checked.before(x), checked.after(x))
    expected = ["quantize", "dequantize", "conv2d", "quantize", "max_pool2d", "pad", "flatten", "dequantize"]
    assert operators(checked.after) == expected


def test_does_not_quantize_early_what_floating_point_also_takes() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.grid = Written(lambda self, x: x)

        def forward(self, x: Tensor) -> Any:
            x = self.conv(x).flatten(1)
            return self.grid.dq(self.grid.q(x)), x.exp()

    x = values(1, 2, 4, 4)
    check_pass(FoldQDQ(), written(settle(Network()), (x,)), (x,), unchanged=True)


def test_stored_tensors_become_stored_codes() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.grid = Written(lambda self, x: x)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.grid.dq(self.grid.q(self.fc.weight))
            return F.linear(x, weight, self.fc.bias)

    x = values(1, 3)
    check_pass(
        FoldQDQ(),
        written(settle(Network()), (x,)),
        (x,),
        expected="""
            program (level qdq)
              input  %x: f32[1, 3]
              tensor @fc.weight_codes: u8[2, 3]
              tensor @fc.bias: f32[2]
              tensor @grid.scale: f32[]
              tensor @grid.zero_point: i32[]
              %dequantize: f32[2, 3] = dequantize(@fc.weight_codes, @grid.scale, @grid.zero_point, qmin=0, qmax=255)
              %linear: f32[1, 2] = linear(%x, %dequantize, @fc.bias)
              return output=%linear
        """,
    )


def test_promises_about_zeros_move_to_stored_codes() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.grid = Written(lambda self, x: x)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.grid.dq(self.grid.q(self.fc.weight)), self.fc.bias)

    x, model = values(1, 4), settle(Network())
    model.fc.weight.data[:, 1] = 0
    program = written(model, (x,))
    program.sparsity["fc.weight"] = Sparsity(model.fc.weight.detach() != 0)
    checked = check_pass(FoldQDQ(), program, (x,))
    assert set(checked.after.sparsity) == {"fc.weight_codes"}
    (layer,) = layers_of(checked.after)
    assert layer.name == "fc" and layer.weight_name == "fc.weight_codes"


def test_scales_a_channel_are_not_moved() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor([0.1, 0.2, 0.3]))
            self.register_buffer("zero", torch.zeros(3, dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            codes = QUANTIZE(x, self.scale, self.zero, 1, None, -128, 127)
            return DEQUANTIZE(codes, self.scale, self.zero, 1, None, -128, 127).flatten(1)

    check_pass(FoldQDQ(), written(Network(), (values(2, 3, 2),)), (values(2, 3, 2),), unchanged=True)


def test_dynamic_scales_move_but_not_through_padding() -> None:
    """The code of zero is known only at run time."""

    class Network(nn.Module):
        def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.move = move

        def forward(self, x: Tensor) -> Tensor:
            scale, zero = torch.ops.sqcompile.dynamic_scale(x, None, None, 0, 255, False)
            codes = QUANTIZE(x, scale, zero, None, None, 0, 255)
            return self.move(DEQUANTIZE(codes, scale, zero, None, None, 0, 255))

    x = values(2, 3)
    moved = check_pass(FoldQDQ(), written(Network(lambda x: x.flatten()), (x,)), (x,))
    assert operators(moved.after)[-2:] == ["flatten", "dequantize"]
    check_pass(FoldQDQ(), written(Network(lambda x: F.pad(x, (1, 1))), (x,)), (x,), unchanged=True)


def test_dynamic_batches_stay_dynamic() -> None:
    program = written(
        Written(lambda self, x: self.dq(self.q(x)).flatten(1)),
        (values(2, 3, 4),),
        dynamic_shapes={"inputs": ({0: Dim("batch")},)},
    )
    checked = check_pass(FoldQDQ(), program, (values(2, 3, 4),))
    assert operators(checked.after) == ["quantize", "flatten", "dequantize"]
    assert checked.after(values(5, 3, 4)).shape == (5, 12)


def test_refuses_programs_of_another_level() -> None:
    refuse_level(FoldQDQ(), Level.ATEN)
    refuse_level(FoldQDQ(), Level.OBSERVED)


def test_leaves_weights_that_are_codes_already() -> None:
    program = trace(settled(nn.Linear(4, 4)), (values(1, 4),))
    run([MaskWeights(sparsity=0.5), QuantizeWeights()], program)
    checked = check_pass(FoldQDQ(), program, (values(1, 4),), unchanged=True)
    assert set(checked.after.sparsity) == {"0.weight_codes"}
