"""Sizes: parameters, zeros and bytes at the declared bits."""

from __future__ import annotations

import pytest
import torch
from support.programs import conv_net, data, mlp, seeded
from torch import nn

from sqcompile.layers import layers_of
from sqcompile.program import Program
from sqcompile.quantization.format import middle_code
from sqcompile.rewrite import Rewriter
from sqcompile.statistics import Size, multiply_adds, program_size, stored_bits, weight_zeros
from sqcompile.tracing import trace

ours = torch.ops.sqcompile


def mask_first(program: Program, mask: torch.Tensor) -> None:
    edit = Rewriter(program)
    layer = layers_of(program)[0]
    with edit.before(layer.node):
        value = edit.call(ours.mask.default, layer.weight, edit.constant("mask", mask))
    edit.set_argument(layer.node, 1, value)
    edit.finish()


def quantize_first(
    program: Program, codes: torch.Tensor, zero: torch.Tensor, low: int, high: int, group: int | None = None
) -> None:
    edit = Rewriter(program)
    layer = layers_of(program)[0]
    shape = zero.shape
    arguments = [
        edit.constant("codes", codes),
        edit.constant("scale", torch.full(shape, 0.5)),
        edit.constant("zero", zero),
    ]
    axis = None if not shape else 0 if group is None else 1
    with edit.before(layer.node):
        value = edit.call(ours.dequantize.default, *arguments, axis, group, low, high)
    edit.set_argument(layer.node, 1, value)
    edit.finish()


class TestProgramSize:
    def test_of_floats(self) -> None:
        program = mlp()
        count = 16 * 8 + 16 + 4 * 16 + 4
        size = program_size(program)
        assert size == Size(parameters=count, zeros=0, weights=16 * 8 + 4 * 16, size_bytes=4 * count)
        assert size.bits_per_parameter == 32 and size.sparsity == 0

    def test_zeros_are_counted_in_weights_only(self) -> None:
        program = mlp()
        program.set_tensor("first.bias", torch.zeros(16))
        weight = program.tensor("first.weight").detach().clone()
        weight[:4] = 0
        program.set_tensor("first.weight", weight)
        assert program_size(program).zeros == 32
        assert program_size(program).sparsity == 32 / 192

    def test_masks_weigh_a_bit_and_are_no_parameters(self) -> None:
        program = mlp()
        before = program_size(program)
        mask_first(program, torch.arange(128).reshape(16, 8) % 4 == 0)
        size = program_size(program)
        assert size.parameters == before.parameters and size.size_bytes == before.size_bytes + 128 // 8
        assert size.zeros == 96

    @pytest.mark.parametrize(
        ("low", "high", "bits"), [(-8, 7, 4), (-7, 7, 4), (0, 3, 2), (-128, 127, 8), (0, 255, 8)]
    )
    def test_codes_weigh_their_declared_bits(self, low: int, high: int, bits: int) -> None:
        program = mlp()
        before = program_size(program)
        symmetric = torch.tensor(middle_code(low, high), dtype=torch.int32)
        quantize_first(program, torch.full((16, 8), 1, dtype=torch.int8), symmetric, low, high)
        size = program_size(program)
        assert stored_bits(program)["codes"] == bits
        assert size.parameters == before.parameters and size.weights == before.weights
        # A scale is left of the 32 bits that each weight had; a symmetric zero point takes nothing.
        assert size.size_bytes == before.size_bytes - 128 * 4 + 128 * bits // 8 + 4

    def test_zero_points_weigh_as_much_as_a_code(self) -> None:
        symmetric, affine = mlp(), mlp()
        quantize_first(
            symmetric, torch.ones(16, 8, dtype=torch.int8), torch.zeros(16, 2, dtype=torch.int32), -8, 7, 4
        )
        varied = torch.arange(32, dtype=torch.int32).reshape(16, 2) % 8
        quantize_first(affine, torch.ones(16, 8, dtype=torch.int8), varied, -8, 7, 4)
        assert program_size(affine).size_bytes == program_size(symmetric).size_bytes + 32 * 4 // 8

    def test_tables_of_integers_are_no_parameters(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 4)
                self.register_buffer("positions", torch.arange(100))
                self.register_buffer("running", torch.ones(7))
                self.register_buffer("flags", torch.ones(4, dtype=torch.bool))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.linear(x) + self.positions[:4] + self.running[:4]
                return torch.where(self.flags, x, 0.0)

        size = program_size(trace(seeded(Model), (data(2, 4),)))
        assert size.parameters == 16 + 4 + 7 and size.size_bytes == 4 * 27 + 8 * 100 + 4

    def test_shared_weights_count_once(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 4, bias=False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.linear(self.linear(x))

        size = program_size(trace(seeded(Model), (data(2, 4),)))
        assert (size.parameters, size.weights) == (16, 16)

    def test_of_a_program_without_tensors(self) -> None:
        size = program_size(trace(nn.ReLU(), (data(2),)))
        assert size == Size(0, 0, 0, 0) and size.sparsity == 0.0 and size.bits_per_parameter == 0.0


class TestZeros:
    def test_of_codes_are_those_at_the_zero_point(self) -> None:
        codes = torch.zeros(16, 8, dtype=torch.int8)
        codes[0] = 3
        for zero, expected in ((0, 120), (3, 8), (1, 0)):
            program = mlp()
            quantize_first(program, codes, torch.tensor(zero, dtype=torch.int32), -8, 7)
            assert weight_zeros(program, layers_of(program)[0]) == expected

    def test_of_codes_with_a_zero_point_a_channel(self) -> None:
        codes = torch.arange(16, dtype=torch.int8).reshape(16, 1).expand(16, 8).contiguous()
        program = mlp()
        quantize_first(program, codes, torch.full((16,), 5, dtype=torch.int32), -128, 127)
        assert weight_zeros(program, layers_of(program)[0]) == 8

    def test_of_masked_weights(self) -> None:
        program = mlp()
        mask_first(program, torch.zeros(16, 8, dtype=torch.bool))
        assert weight_zeros(program, layers_of(program)[0]) == 128

    def test_minus_zero_is_zero_and_nan_is_not(self) -> None:
        program = mlp()
        weight = torch.ones(16, 8)
        weight[0, :3] = torch.tensor([0.0, -0.0, torch.nan])
        program.set_tensor("first.weight", weight)
        assert weight_zeros(program, layers_of(program)[0]) == 2


class TestMultiplyAdds:
    def test_of_convolutions(self) -> None:
        """By hand: output places times weights of an output; inputs times weights of an input where transposed."""
        assert multiply_adds(conv_net(), [data(2, 3, 6, 6)]) == {
            "stem": 2 * 8 * 36 * 27,
            "depthwise": 2 * 8 * 36 * 9,
            "up": 2 * 8 * 36 * 6 * 4,
            "head": 2 * 5 * 6,
        }

    def test_follow_the_sizes_of_a_call(self) -> None:
        program = mlp(dynamic=True)
        for batch in (1, 5):
            assert multiply_adds(program, [data(batch, 8)]) == {
                "first": batch * 16 * 8,
                "second": batch * 16 * 4,
            }

    def test_a_table_that_is_read_multiplies_nothing_and_a_layer_used_twice_counts_twice(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(5, 8)
                self.layer = nn.Linear(8, 8)

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                return self.layer(self.layer(self.table(ids)))

        ids = torch.zeros(3, 2, dtype=torch.int64)
        assert multiply_adds(trace(seeded(Twice), (ids,)), [ids]) == {"layer": 2 * 6 * 64}
