from __future__ import annotations

from typing import Any

import pytest
import torch
from support.passes import refuse_other_levels
from support.quantize import DEQUANTIZE, QUANTIZE, calls, run, settle, settled, values
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Program, trace
from sqcompile.errors import FormatError, InputError, PassOptionError, SelectionError, VerifyError
from sqcompile.evaluate import constant_value
from sqcompile.layers import layers_of
from sqcompile.passes import ApplyMasks, MaskWeights, QuantizeWeights
from sqcompile.pipeline import PassRecord, parse_pass
from sqcompile.pipeline.manager import verify_program
from sqcompile.quantization import Format, affine
from sqcompile.sparsity import Pattern
from sqcompile.statistics import program_size
from sqcompile.testing import check_pass

TOKEN = Format.parse("uint8:affine:token:dynamic")


def quantize(model: nn.Module, *inputs: Tensor, **options: Any) -> tuple[Program, PassRecord]:
    program = trace(settle(model), inputs)
    (record,) = run([QuantizeWeights(**options)], program)
    return program, record


def weights(program: Program) -> dict[str, Tensor]:
    """The weights that the layers see."""
    found = {}
    for layer in layers_of(program):
        value = constant_value(program, layer.weight_value)
        assert value is not None
        found[layer.name] = value
    return found


def reasons(record: PassRecord) -> list[str]:
    return [remark.reason for remark in record.remarks]


def test_stores_the_codes_of_weights() -> None:
    model = settled(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    checked = check_pass(
        QuantizeWeights(),
        model,
        (values(2, 6),),
        expected="""
            program (level qdq)
              input  %input_1: f32[2, 6]
              tensor @2.weight_zero_point: i32[2]
              tensor @2.weight_scale: f32[2]
              tensor @2.weight_codes: i8[2, 4]
              tensor @0.weight_zero_point: i32[4]
              tensor @0.weight_scale: f32[4]
              tensor @0.weight_codes: i8[4, 6]
              tensor @0.bias: f32[4]
              tensor @2.bias: f32[2]
              %dequantize: f32[4, 6] = dequantize(@0.weight_codes, @0.weight_scale, @0.weight_zero_point, axis=0, qmin=-127, qmax=127)
              %linear: f32[2, 4] = linear(%input_1, %dequantize, @0.bias)
              %relu: f32[2, 4] = relu(%linear)
              %dequantize_1: f32[2, 4] = dequantize(@2.weight_codes, @2.weight_scale, @2.weight_zero_point, axis=0, qmin=-127, qmax=127)
              %linear_1: f32[2, 2] = linear(%relu, %dequantize_1, @2.bias)
              return output=%linear_1
        """,  # noqa: E501
    )
    weight = model[0].weight.detach()
    scale = weight.abs().amax(1) / 127
    assert torch.equal(checked.after.tensor("0.weight_scale"), scale)
    assert torch.equal(
        checked.after.tensor("0.weight_codes"), (weight / scale[:, None]).round().to(torch.int8)
    )
    assert not checked.after.has_tensor("0.weight")


def test_leaves_a_program_without_layers() -> None:
    check_pass(
        QuantizeWeights(),
        settled(nn.Tanh()),
        (values(2, 3),),
        unchanged=True,
        remarks=["has no layer to quantize"],
    )


def test_refuses_programs_past_its_level() -> None:
    refuse_other_levels(QuantizeWeights())


def test_quantizes_data_once_for_all_layers_that_take_it() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x) + x

    check_pass(
        QuantizeWeights(activation=Format.parse("uint8:affine:dynamic")),
        settle(Attention()),
        (values(2, 3, 4),),
        dynamic_shapes={"x": {1: Dim("tokens")}},
        expected="""
            program (level qdq)
              input  %x: f32[2, tokens, 4]
              tensor @k.weight_zero_point: i32[4]
              tensor @k.weight_scale: f32[4]
              tensor @k.weight_codes: i8[4, 4]
              tensor @q.weight_zero_point: i32[4]
              tensor @q.weight_scale: f32[4]
              tensor @q.weight_codes: i8[4, 4]
              tensor @q.bias: f32[4]
              tensor @k.bias: f32[4]
              %dequantize: f32[4, 4] = dequantize(@q.weight_codes, @q.weight_scale, @q.weight_zero_point, axis=0, qmin=-127, qmax=127)
              %dynamic_scale: (f32[], i32[]) = dynamic_scale(%x, qmin=0, qmax=255, symmetric=False)
              %getitem: f32[] = getitem(%dynamic_scale, 0)
              %getitem_1: i32[] = getitem(%dynamic_scale, 1)
              %quantize: u8[2, tokens, 4] = quantize(%x, %getitem, %getitem_1, qmin=0, qmax=255)
              %dequantize_1: f32[2, tokens, 4] = dequantize(%quantize, %getitem, %getitem_1, qmin=0, qmax=255)
              %linear: f32[2, tokens, 4] = linear(%dequantize_1, %dequantize, @q.bias)
              %dequantize_2: f32[4, 4] = dequantize(@k.weight_codes, @k.weight_scale, @k.weight_zero_point, axis=0, qmin=-127, qmax=127)
              %linear_1: f32[2, tokens, 4] = linear(%dequantize_1, %dequantize_2, @k.bias)
              %mul: f32[2, tokens, 4] = mul(%linear, %linear_1)
              %add: f32[2, tokens, 4] = add(%mul, %x)
              return output=%add
        """,  # noqa: E501
    )


def test_scales_a_token_do_not_depend_on_the_other_tokens() -> None:
    program = trace(settled(nn.Linear(4, 3)), (values(2, 4),), dynamic_shapes={"input": {0: Dim("batch")}})
    run([QuantizeWeights(activation=TOKEN)], program)
    x = torch.cat([values(2, 4), 1000 * values(1, 4, seed=2)])
    assert torch.equal(program(x)[:2], program(x[:2]))
    together = trace(settled(nn.Linear(4, 3)), (values(2, 4),), dynamic_shapes={"input": {0: Dim("batch")}})
    run([QuantizeWeights(activation=Format.parse("uint8:affine:dynamic"))], together)
    assert not torch.equal(together(x)[:2], together(x[:2]))  # one scale a tensor: the third token decides


def test_convolutions_and_embeddings_have_integer_weights_only() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv = nn.Embedding(7, 4), nn.Conv1d(4, 2, 1)

        def forward(self, ids: Tensor) -> Tensor:
            return self.conv(self.embed(ids).transpose(1, 2))

    program, record = quantize(Network(), torch.tensor([[1, 2]]), activation=TOKEN)
    assert not calls(program, QUANTIZE) and len(calls(program, DEQUANTIZE)) == 2
    assert reasons(record) == ["only its weight is quantized: dynamic data is for linear layers"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_a_tied_weight_is_stored_once() -> None:
    program, record = quantize(Tied(), torch.tensor([[1, 2]]))
    assert sum(name.endswith("_codes") for name, _ in program.tensors()) == 1
    assert {layer.name for layer in layers_of(program)} == {"embed", "head"}
    assert not record.remarks


def test_a_tied_weight_of_which_one_use_is_left_out_is_stored_twice_and_says_so() -> None:
    program, record = quantize(Tied(), torch.tensor([[1, 2]]), exclude=("embed",))
    assert reasons(record) == ["'embed' keeps a floating-point copy of a weight that others quantize"]
    assert sum(name.endswith("_codes") for name, _ in program.tensors()) == 1
    assert sum(tensor.is_floating_point() and tensor.dim() == 2 for _, tensor in program.tensors()) == 1


def test_an_incomplete_last_group_is_said() -> None:
    program, record = quantize(
        nn.Sequential(nn.Linear(10, 3)), values(1, 10), weight=Format.parse("int4:group=4")
    )
    assert program.tensor("0.weight_scale").shape == (3, 3)
    assert reasons(record) == ["its 10 input channels are no multiple of 4: the last group has 2"]


def test_groups_run_along_the_input_channels_wherever_they_are() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(8, 2, 1)
            self.matrix = nn.Parameter(torch.zeros(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x).transpose(1, 2) @ self.matrix

    program, _ = quantize(Products(), values(1, 8, 5), weight=Format.parse("int4:group=4"))
    assert program.tensor("up.weight_scale").shape == (2, 2, 1)  # weight [8, 2, 1]
    assert program.tensor("matrix_scale").shape == (1, 3)  # weight [2, 3]


def test_convolutions_with_few_inputs_get_a_scale_a_channel() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    program, record = quantize(model, values(1, 4, 5, 5), weight=Format.parse("int4:group=32"))
    assert program.tensor("0.weight_scale").shape == (4,)
    assert reasons(record) == ["its 1 input channels are less than a group of 32: one scale a channel"]


def test_masked_weights_stay_zero() -> None:
    for finish in ([], [ApplyMasks()]):
        program = trace(settled(nn.Linear(8, 4)), (values(1, 8),))
        passes = [MaskWeights(pattern=Pattern.parse("2:4")), *finish]
        run([*passes, QuantizeWeights(weight=Format.parse("uint4:group=4:affine"))], program)  # type: ignore[list-item]
        assert set(program.sparsity) == {"0.weight_codes"}
        assert str(program.sparsity["0.weight_codes"].pattern) == "2:4"
        assert int((weights(program)["0"] == 0).sum()) >= 16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_names_the_layer_whose_weight_is_not_finite(bad: float) -> None:
    model = settled(nn.Linear(3, 2), nn.Linear(2, 2))
    model[1].weight.data[0, 0] = bad
    program = trace(model, (values(2, 3),))
    with pytest.raises(InputError, match=r"(?s)not finite.*layer '1', tensor @1.weight.*1 of 4 weights"):
        run([QuantizeWeights()], program)


def test_a_channel_of_zeros_stays_zero() -> None:
    model = settled(nn.Linear(3, 2))
    model[0].weight.data[1] = 0
    program = trace(model, (values(2, 3),))
    run([QuantizeWeights(weight=Format.parse("uint8:channel=0:affine"))], program)
    assert not weights(program)["0"][1].any() and float(program.tensor("0.weight_scale")[1]) == 1.0


def test_other_types_than_float32_stay() -> None:
    check_pass(
        QuantizeWeights(),
        settled(nn.Linear(3, 2)).half(),
        (values(1, 3).half(),),
        unchanged=True,
        remarks=["its weight is torch.float16; convert the model with model.float()"],
    )


def test_the_search_option_reduces_the_error() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    errors = {}
    for search in ("minmax", "mse"):
        program, _ = quantize(model, values(1, 64), weight=Format.parse("int3:channel=0"), search=search)
        errors[search] = float((weights(program)["0"] - model[0].weight.detach()).square().sum())
    assert errors["mse"] < 0.9 * errors["minmax"]  # normal weights at 3 bits gain about a third


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_every_number_of_bits_is_as_exact_as_its_step(bits: int) -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    program, _ = quantize(model, values(1, 64), weight=Format.parse(f"int{bits}:group=32"))
    scale = program.tensor("0.weight_scale").repeat_interleave(32, 1)
    error = (weights(program)["0"] - model[0].weight.detach()).abs()
    assert bool((error <= scale * 0.5001).all())  # half a step, plus the rounding of the product
    dense, size = 4 * (64 * 8 + 8), program_size(program).size_bytes
    assert size == 64 * 8 * bits // 8 + 4 * 16 + 4 * 8 and size < dense


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(ids)).tanh())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"embed": 127, "hidden": 127, "head": 127}),
        ({"layers": ("hidden",)}, {"hidden": 127}),
        ({"exclude": ("hidden",)}, {"embed": 127, "head": 127}),
        ({"kinds": ("linear",)}, {"hidden": 127, "head": 127}),
        ({"formats": (("kind:embedding", "float"),)}, {"hidden": 127, "head": 127}),
        (
            {"formats": (("kind:linear", Format.parse("int4")), ("head", Format.parse("int2")))},
            {"embed": 127, "hidden": 7, "head": 1},
        ),
        (
            {"formats": (("kind:head", Format.parse("int4:group=4")),)},
            {"embed": 127, "hidden": 127, "head": 7},
        ),
    ],
)
def test_options_choose_layers_and_formats(options: dict[str, Any], expected: dict[str, int]) -> None:
    program, _ = quantize(Three(), torch.tensor([[1, 2]]), **options)
    seen = {
        layer.name: layer.weight_value.args[6]
        for layer in layers_of(program)
        if layer.weight_value.target is DEQUANTIZE
    }
    assert seen == expected


def test_options_choose_whose_data_is_quantized() -> None:
    options = {"activation": TOKEN, "activation_formats": (("head", "float"),)}
    program, _ = quantize(Three(), torch.tensor([[1, 2]]), **options)
    (data,) = calls(program, QUANTIZE)
    assert data.args[0].name == "embedding"  # type: ignore[union-attr]


def test_computes_what_integer_arithmetic_computes() -> None:
    """Against codes summed as integers: y = s_x · s_w · Σ (x - z) · w + bias."""
    model, x = nn.Sequential(nn.Linear(16, 4)), values(3, 16)
    program, _ = quantize(model, x, activation=TOKEN)
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale, zero = affine.scale_from_range(low, high, TOKEN)
    codes = ((x / scale).round() + zero).clamp(0, 255) - zero
    sums = codes.double() @ program.tensor("0.weight_codes").double().T
    expected = sums * scale.double() * program.tensor("0.weight_scale").double() + model[0].bias.detach()
    assert torch.allclose(program(x).double(), expected, rtol=0, atol=1e-6)  # float32 sums of 16 values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quantize-weights{weight=int8:dynamic}", "a static format"),
        ("quantize-weights{formats={fc:int8:dynamic}}", "a static format"),
        ("quantize-weights{activation=uint8:affine}", "a dynamic format"),
        ("quantize-weights{activation=int8:channel=0:dynamic}", "one scale a tensor, token or group"),
        ("quantize-weights{activation-formats={fc:int8}}", "a dynamic format"),
    ],
)
def test_refuses_formats_that_do_not_fit(text: str, expected: str) -> None:
    with pytest.raises(PassOptionError, match=expected):
        parse_pass(text)


def test_patterns_that_match_nothing_name_the_nearest() -> None:
    program = trace(settle(Three()), (torch.tensor([[1, 2]]),))
    with pytest.raises(
        SelectionError, match=r"(?s)The pattern 'hiden' matches no layer.*nearest layers: hidden"
    ):
        run([QuantizeWeights(layers=("hiden",))], program)
    with pytest.raises(SelectionError, match=r"(?s)The pattern 'hed' matches no layer.*head"):
        run([QuantizeWeights(formats=(("hed", "float"),))], program)


def test_stores_indices_into_a_table() -> None:
    model = settled(nn.Linear(8, 4))
    checked = check_pass(
        QuantizeWeights(weight=Format.parse("int3:group=4:mapping=nf")),
        model,
        (values(2, 8),),
        expected="""
            program (level qdq)
              input  %input_1: f32[2, 8]
              tensor @0.weight_zero_point: i32[4, 2]
              tensor @0.weight_scale: f32[4, 2]
              tensor @0.weight_table: i8[8]
              tensor @0.weight_codes: u8[4, 8]
              tensor @0.bias: f32[4]
              %lookup: i8[4, 8] = lookup(@0.weight_codes, @0.weight_table)
              %dequantize: f32[4, 8] = dequantize(%lookup, @0.weight_scale, @0.weight_zero_point, axis=-1, \
group_size=4, qmin=-127, qmax=127)
              %linear: f32[2, 4] = linear(%input_1, %dequantize, @0.bias)
              return output=%linear
        """,
        idempotent=False,
    )
    # 3 bits a code, a scale of 32 bits for 4 of them, a table of 8 bytes, a bias of 16
    assert program_size(checked.after).size_bytes == 12 + 32 + 8 + 16


@pytest.mark.parametrize("mapping", ["nf", "tanh", "sigmoid", "mu-law", "log2", "codebook"])
def test_tables_keep_the_zeros_of_masks(mapping: str) -> None:
    format = Format.parse(f"int4:group=8:mapping={mapping}")
    program = trace(settled(nn.Linear(16, 8)), (values(2, 16),))
    run([MaskWeights(sparsity=0.5), QuantizeWeights(weight=format)], program)
    (promise,) = program.sparsity.values()
    assert set(program.sparsity) == {"0.weight_codes"} and promise.sparsity == 0.5
    (weight,) = weights(program).values()
    assert not bool(weight[~promise.mask].any())


def test_finer_tables_where_weights_are_heavy_tailed() -> None:
    """What tables are for: most weights are small, and linear steps are as wide there as anywhere."""
    layer = nn.Linear(256, 64)
    with torch.no_grad():
        layer.weight.copy_(values(64, 256) * values(64, 256, seed=1).abs())
    dense = layer.weight.detach().clone()
    losses = {}
    for word in ("linear", "nf", "codebook"):
        format = Format.parse("int4:channel=0" + ("" if word == "linear" else f":mapping={word}"))
        program = trace(nn.Sequential(layer), (values(2, 256),))
        run([QuantizeWeights(weight=format, search="mse")], program)
        (weight,) = weights(program).values()
        losses[word] = float((weight - dense).square().sum())
    assert losses["codebook"] < losses["nf"] < 0.7 * losses["linear"]


def test_codes_outside_of_their_table_are_found() -> None:
    program, _ = quantize(
        nn.Sequential(nn.Linear(8, 4)), values(2, 8), weight=Format.parse("int3:mapping=nf")
    )
    verify_program(program)
    program.set_tensor("0.weight_codes", torch.full((4, 8), 8, dtype=torch.uint8))
    with pytest.raises(VerifyError, match="Stored codes are out of their table") as caught:
        verify_program(program)
    assert "0 to 7" in str(caught.value)


def test_data_with_a_table_is_looked_up() -> None:
    x = values(5, 16)
    program, _ = quantize(
        nn.Sequential(nn.Linear(16, 4)), x, activation=Format.parse("int4:token:dynamic:mapping=tanh@2")
    )
    entries = program.tensor("input_1_entries").float() - 128
    assert len(set(entries.tolist())) == 16
    scale = x.abs().amax(1, keepdim=True) / 127
    codes = (x / scale).round().clamp(-128, 127).long() + 128
    bias = program.tensor("0.bias")
    wanted = nn.functional.linear(entries[codes] * scale, weights(program)["0"], bias)
    torch.testing.assert_close(program(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mapping", ["tanh", "codebook", "mu-law"])
def test_tables_of_data_have_to_be_known(mapping: str) -> None:
    with pytest.raises(FormatError, match="known beforehand") as caught:
        Format.parse(f"int4:token:dynamic:mapping={mapping}")
    assert "tanh@2" in str(caught.value) and "insert-observers" in str(caught.value)
