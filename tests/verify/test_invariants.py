"""The invariants of quantization and sparsity, and that their shortcuts cannot be fooled."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from support.programs import conv_net, data, mlp, seeded
from torch import fx, nn

from sqcompile.errors import VerifyError
from sqcompile.layers import layers_of
from sqcompile.levels import Level
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import Pattern, Sparsity, as_matrix, from_matrix
from sqcompile.tracing import trace
from sqcompile.verify import check_masks_kept, check_quantization, check_sparsity, invariants

ours = torch.ops.sqcompile
INT32_MAX = 2**31 - 1


def quantize_layer(
    program: Program,
    index: int,
    codes: torch.Tensor,
    *,
    data_range: tuple[int, int] = (0, 255),
    data_zero: int = 0,
    weight_range: tuple[int, int] = (-128, 127),
    weight_zero: int = 0,
    bias: int | None = None,
) -> None:
    """Quantize data and weight of one layer, with the given codes."""
    edit = Rewriter(program)
    layer = layers_of(program)[index]
    source = layer.data
    assert source is not None

    def scalars(name: str, zero: int) -> tuple[fx.Node, fx.Node]:
        zero_point = torch.tensor(zero, dtype=torch.int32)
        return edit.constant(f"{name}_scale", torch.tensor(0.5)), edit.constant(f"{name}_zero", zero_point)

    tail = (None, None, *data_range)
    with edit.before(layer.node):
        quantized = edit.call(ours.quantize.default, source, *scalars("x", data_zero), *tail)
        value = edit.call(ours.dequantize.default, quantized, *scalars("x2", data_zero), *tail)
        weight = edit.call(
            ours.dequantize.default,
            edit.constant("w_codes", codes),
            *scalars("w", weight_zero),
            None,
            None,
            *weight_range,
        )
        if bias is not None:
            assert layer.bias is not None
            shape = program.tensor(layer.bias).shape
            stored = edit.constant("b_codes", torch.full(shape, bias, dtype=torch.int32))
            ends = (None, None, -(2**31), 2**31 - 1)
            edit.set_argument(
                layer.node, 2, edit.call(ours.dequantize.default, stored, *scalars("b", 0), *ends)
            )
    edit.set_argument(layer.node, layer.operator.data[0], value)
    assert layer.operator.weight is not None
    edit.set_argument(layer.node, layer.operator.weight, weight)
    edit.finish()
    program.level = Level.QDQ


class TestAccumulators:
    """Σ |a| · |w| + |bias| < 2³¹, to the last unit."""

    @pytest.mark.parametrize(
        ("data_range", "data_zero", "widest"),
        [((0, 255), 0, 255), ((0, 255), 128, 128), ((-128, 127), 0, 128), ((-128, 127), -128, 255)],
    )
    def test_the_bound_is_exact(self, data_range: tuple[int, int], data_zero: int, widest: int) -> None:
        """One weight a row differs from zero; the bias takes what is left, or one more."""
        codes = torch.zeros(16, 8, dtype=torch.int8)
        codes[5, 3] = -100
        room = INT32_MAX - 100 * widest
        for bias, fits in ((room, True), (-room, True), (room + 1, False), (-room - 1, False)):
            program = mlp()
            quantize_layer(program, 0, codes, data_range=data_range, data_zero=data_zero, bias=bias)
            if fits:
                check_quantization(program)
                continue
            with pytest.raises(VerifyError, match="int32 accumulator") as caught:
                check_quantization(program)
            error = caught.value
            assert f"up to {INT32_MAX + 1}" in str(error.seen) and str(INT32_MAX) in str(error.expected)
            assert "%linear (first, programs.py" in str(error.where) and error.next_step

    @pytest.mark.parametrize(("depth", "fits"), [(65793, True), (66312, False)])
    def test_long_sums(self, depth: int, fits: bool) -> None:
        """255 · 127 · 66312 is just above 2³¹."""
        program = trace(seeded(lambda: nn.Linear(depth, 1)), (torch.zeros(1, depth),))
        quantize_layer(program, 0, torch.full((1, depth), 127, dtype=torch.int8))
        assert (255 * 127 * depth <= INT32_MAX) == fits
        if fits:
            check_quantization(program)
        else:
            with pytest.raises(VerifyError, match="int32 accumulator"):
                check_quantization(program)

    def test_weights_count_and_not_their_format(self) -> None:
        """As many products as could overflow with the largest codes; these codes are small."""
        program = trace(seeded(lambda: nn.Linear(70000, 1)), (torch.zeros(1, 70000),))
        quantize_layer(program, 0, torch.full((1, 70000), 10, dtype=torch.int8))
        check_quantization(program)

    def test_the_zero_point_of_weights_counts(self) -> None:
        program = trace(seeded(lambda: nn.Linear(70000, 1)), (torch.zeros(1, 70000),))
        quantize_layer(program, 0, torch.full((1, 70000), 10, dtype=torch.int8), weight_zero=-120)
        with pytest.raises(VerifyError, match="int32 accumulator"):
            check_quantization(program)

    def test_wide_data_is_computed_otherwise(self) -> None:
        program = trace(seeded(lambda: nn.Linear(70000, 1)), (torch.zeros(1, 70000),))
        codes = torch.full((1, 70000), 127, dtype=torch.int8)
        quantize_layer(program, 0, codes, data_range=(-32768, 32767))
        check_quantization(program)

    @pytest.mark.parametrize("index", [0, 1, 2], ids=["convolution", "depthwise", "transposed"])
    def test_convolutions_sum_over_their_kernel(self, index: int) -> None:
        layer = layers_of(conv_net())[index]
        shape = conv_net().tensor(layer.weight).shape
        codes = torch.full(shape, 127, dtype=torch.int8)
        depth = {0: 3 * 9, 1: 9, 2: 8 * 4}[index]  # a transposed convolution's sum is at most this
        room = INT32_MAX - 255 * 127 * depth
        for bias, fits in ((room, True), (room + 1, False)):
            program = conv_net()
            quantize_layer(program, index, codes, bias=bias)
            if fits:
                check_quantization(program)
            else:
                with pytest.raises(VerifyError, match="int32 accumulator"):
                    check_quantization(program)

    def test_groups_of_a_transposed_convolution_have_sums_of_their_own(self) -> None:
        model = seeded(lambda: nn.ConvTranspose2d(4, 4, 1, groups=2))
        codes = torch.zeros(4, 2, 1, 1, dtype=torch.int8)
        codes[:2, 0] = 100
        codes[2:, 0] = 50
        room = INT32_MAX - 255 * 200
        for bias, fits in ((room, True), (room + 1, False)):
            program = trace(model, (data(1, 4, 3, 3),))
            quantize_layer(program, 0, codes, bias=bias)
            if fits:
                check_quantization(program)
            else:
                with pytest.raises(VerifyError, match="int32 accumulator"):
                    check_quantization(program)


class TestParameters:
    def test_scales_that_are_computed_from_constants(self) -> None:
        """A scale need not be stored: it may be a product of two that are."""
        program = mlp()
        quantize_layer(program, 0, torch.zeros(16, 8, dtype=torch.int8))
        edit = Rewriter(program)
        node = layers_of(program)[0].weight_value
        with edit.before(node):
            product = edit.call(torch.ops.aten.mul.Tensor, node.args[1], 2.0)
        edit.set_argument(node, 1, product)
        check_quantization(program)
        edit.set_argument(product, 1, -2.0)
        with pytest.raises(VerifyError, match="scale is not a positive"):
            check_quantization(program)

    def test_dynamic_scales(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        layer = layers_of(program)[0]
        x = layer.data
        with edit.before(layer.node):
            made = edit.call(ours.dynamic_scale.default, x, -1, -1, 0, 255, False)
            scale, zero = (edit.call(operator.getitem, made, i) for i in (0, 1))
            codes = edit.call(ours.quantize.default, x, scale, zero, -1, -1, 0, 255)
            value = edit.call(ours.dequantize.default, codes, scale, zero, -1, -1, 0, 255)
        edit.set_argument(layer.node, 0, value)
        edit.finish()
        program.level = Level.QDQ
        check_quantization(program)
        assert torch.isfinite(program(data(2, 8))).all()

    def test_codes_are_read_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        program = mlp()
        quantize_layer(program, 0, torch.ones(16, 8, dtype=torch.int8))
        check_quantization(program)
        seen: list[Any] = []
        monkeypatch.setattr(invariants, "_check_range", lambda node, what, *_: seen.append(what))
        check_quantization(program)
        check_quantization(program.snapshot())
        assert seen and not any(what.startswith("Stored") for what in seen)

    def test_new_codes_are_read_even_at_the_old_address(self) -> None:
        """A tensor that is freed leaves its address to the next of its size."""
        for _ in range(20):
            program = mlp()
            quantize_layer(program, 0, torch.ones(16, 8, dtype=torch.int8), weight_range=(-8, 7))
            check_quantization(program)
            name = layers_of(program)[0].weight_name
            address = program.tensor(name).data_ptr()
            program.delete_tensor(name)
            program.set_tensor(name, torch.full((16, 8), 9, dtype=torch.int8))
            with pytest.raises(VerifyError, match="Stored codes"):
                check_quantization(program)
            if program.tensor(name).data_ptr() == address:
                return
        pytest.skip("the allocator never gave the address again")

    def test_codes_that_are_written_to(self) -> None:
        program = mlp()
        quantize_layer(program, 0, torch.ones(16, 8, dtype=torch.int8), weight_range=(-8, 7))
        check_quantization(program)
        program.tensor(layers_of(program)[0].weight_name)[0, 0] = 8
        with pytest.raises(VerifyError, match="Stored codes"):
            check_quantization(program)

    def test_a_narrower_range(self) -> None:
        program = mlp()
        quantize_layer(program, 0, torch.full((16, 8), 9, dtype=torch.int8))
        check_quantization(program)
        node = layers_of(program)[0].weight_value
        node.args = (*node.args[:5], -8, 7)
        with pytest.raises(VerifyError, match="Stored codes"):
            check_quantization(program)


def promised(pattern: str, mask: torch.Tensor) -> Program:
    """A program whose first weight is zero where the mask is, with a promise about it."""
    program = mlp()
    edit = Rewriter(program)
    layer = layers_of(program)[0]
    edit.replace_tensor(layer.weight, program.tensor(layer.weight).detach() * mask)
    program.sparsity[layer.weight_name] = Sparsity(mask, Pattern.parse(pattern))
    return program


TWO_OF_FOUR = torch.tensor([True, False, False, True] * 2).expand(16, 8).contiguous()


class TestPromises:
    @pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3:4"])
    def test_that_hold(self, pattern: str) -> None:
        check_sparsity(promised(pattern, TWO_OF_FOUR))

    @pytest.mark.parametrize("pattern", ["1:4", "1x4", "2x1", "3:5", "1x3"])
    def test_of_a_pattern_that_the_mask_has_not(self, pattern: str) -> None:
        mask = TWO_OF_FOUR.clone()
        mask[0] = True
        if ":" not in pattern:
            mask[1, 0] = False
        with pytest.raises(VerifyError, match="no longer has the sparsity") as caught:
            check_sparsity(promised(pattern, mask))
        assert pattern in str(caught.value.seen) and "tensor @first.weight" in str(caught.value.where)

    def test_one_weight_too_many(self) -> None:
        program = promised("2:4", TWO_OF_FOUR)
        check_sparsity(program)
        weight = program.tensor("first.weight").detach().clone()
        weight[3, 1] = 1e-30
        Rewriter(program).replace_tensor(layers_of(program)[0].weight, weight)
        with pytest.raises(VerifyError) as caught:
            check_sparsity(program)
        assert caught.value.seen == "1 weights are nonzero where the mask is 0"
        assert caught.value.expected == "2:4, 50.0 % zeros"

    def test_of_another_shape(self) -> None:
        program = promised("unstructured", TWO_OF_FOUR)
        program.sparsity["first.weight"] = Sparsity(TWO_OF_FOUR[:8])
        with pytest.raises(VerifyError) as caught:
            check_sparsity(program)
        assert "shape (16, 8) instead of (8, 8)" in str(caught.value.seen)

    def test_not_a_number_is_no_zero(self) -> None:
        program = promised("unstructured", TWO_OF_FOUR)
        weight = program.tensor("first.weight").detach().clone()
        weight[0, 1] = torch.nan
        Rewriter(program).replace_tensor(layers_of(program)[0].weight, weight)
        with pytest.raises(VerifyError):
            check_sparsity(program)

    def test_of_quantized_weights_count_after_decoding(self) -> None:
        """The codes stay; a new zero point turns each zero into something else."""
        program = mlp()
        quantize_layer(program, 0, TWO_OF_FOUR.to(torch.int8))
        layer = layers_of(program)[0]
        program.sparsity[layer.weight_name] = Sparsity(TWO_OF_FOUR, Pattern.parse("2:4"))
        check_sparsity(program)
        zero = layer.weight_value.args[2]
        assert isinstance(zero, fx.Node)
        Rewriter(program).replace_tensor(zero, torch.tensor(1, dtype=torch.int32))
        with pytest.raises(VerifyError, match="no longer has the sparsity"):
            check_sparsity(program)

    def test_are_checked_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        program = promised("2:4", TWO_OF_FOUR)
        check_sparsity(program)
        monkeypatch.setattr(
            Sparsity, "violations", lambda self, weight: pytest.fail("it read the weight again")
        )
        check_sparsity(program)
        check_sparsity(program.snapshot())

    @pytest.mark.parametrize("index", [0, 2], ids=["convolution", "transposed"])
    def test_of_convolutions_run_along_input_channels(self, index: int) -> None:
        """Two of eight columns of the matrix view are gone; in the weight's own layout they are elsewhere."""
        program = conv_net()
        layer = layers_of(program)[index]
        entry, shape = layer.operator, tuple(program.tensor(layer.weight).shape)
        matrix = as_matrix(torch.ones(shape, dtype=torch.bool), entry.out_axis, entry.in_axis).clone()
        channels = shape[entry.in_axis]
        matrix[:, ::channels] = False
        mask = from_matrix(matrix, shape, entry.out_axis, entry.in_axis)
        edit = Rewriter(program)
        edit.replace_tensor(layer.weight, program.tensor(layer.weight).detach() * mask)
        pattern = Pattern(n=channels - 1, m=channels)
        program.sparsity[layer.weight_name] = Sparsity(mask, pattern)
        check_sparsity(program)
        program.sparsity[layer.weight_name] = Sparsity(mask, Pattern(n=1, m=channels))
        with pytest.raises(VerifyError):
            check_sparsity(program)


class TestMasks:
    def masked(self) -> Program:
        program = mlp()
        edit = Rewriter(program)
        layer = layers_of(program)[0]
        with edit.before(layer.node):
            value = edit.call(
                ours.mask.default, layer.weight, edit.constant("first.weight_mask", TWO_OF_FOUR)
            )
        edit.set_argument(layer.node, 1, value)
        edit.finish()
        return program

    @pytest.mark.parametrize("mask", [torch.ones(8, 16, dtype=torch.bool), torch.ones(16, 8)])
    def test_that_fit_no_weight(self, mask: torch.Tensor) -> None:
        program = self.masked()
        program.set_tensor("first.weight_mask", mask)
        with pytest.raises(VerifyError, match="mask does not fit") as caught:
            check_sparsity(program)
        assert caught.value.expected == "bool (16, 8)"

    def test_stay_with_their_layer(self) -> None:
        before = self.masked()
        after = before.snapshot()
        check_masks_kept(before, after)
        layer = layers_of(after)[0]
        Rewriter(after).set_argument(layer.node, 1, layer.weight)
        with pytest.raises(VerifyError, match="'first' has lost its mask") as caught:
            check_masks_kept(before, after)
        assert caught.value.seen and caught.value.expected and caught.value.next_step
        after.sparsity["first.weight"] = Sparsity(TWO_OF_FOUR)  # that they hold is for `check_sparsity`
        check_masks_kept(before, after)

    def test_stay_with_the_node_in_their_layers_place(self) -> None:
        before = self.masked()
        after = before.snapshot()
        edit = Rewriter(after, "replace")
        layer = layers_of(after)[0]
        with edit.before(layer.node):
            copy = edit.call(
                torch.ops.aten.linear.default, layer.data, layer.weight, layer.bias, like=layer.node
            )
        edit.replace(layer.node, copy)
        edit.finish()
        with pytest.raises(VerifyError, match="lost its mask"):
            check_masks_kept(before, after)

    def test_layers_may_go(self) -> None:
        before = self.masked()
        after = before.snapshot()
        edit = Rewriter(after)
        layer = layers_of(after)[0]
        edit.replace(layer.node, layer.node, only=lambda user: False)
        zeros = edit.constant("zeros", torch.zeros(2, 16))
        edit.replace(layer.node, zeros)
        edit.finish()
        check_masks_kept(before, after)
