from __future__ import annotations

import pytest
import torch
from support.quantize import DEQUANTIZE, QUANTIZE, calls, frozen, refuse_level, run, settle, settled, values
from torch import Tensor, nn

from sqcompile import Level, Program, trace
from sqcompile.errors import CalibrationError, InputError
from sqcompile.evaluate import constant_value
from sqcompile.layers import layers_of
from sqcompile.passes import ApplyMasks, Calibrate, FreezeObservers, InsertObservers, MaskWeights
from sqcompile.quantization import Format, MinMax, affine
from sqcompile.quantization.observed import value_observers
from sqcompile.sparsity import Pattern
from sqcompile.testing import check_pass


def test_writes_quantize_and_dequantize_for_observers() -> None:
    x = values(2, 3, 5, 5)
    checked = check_pass(
        FreezeObservers(),
        settled(nn.Conv2d(3, 4, 3), nn.ReLU()),
        (x,),
        prepare=[InsertObservers(), Calibrate()],
        calibration=[x],
        expected="""
            program (level qdq)
              input  %input_1: f32[2, 3, 5, 5]
              tensor @0.bias_zero_point: i32[4]
              tensor @0.bias_scale: f32[4]
              tensor @0.bias_codes: i32[4]
              tensor @0.weight_zero_point: i32[4]
              tensor @0.weight_scale: f32[4]
              tensor @0.weight_codes: i8[4, 3, 3, 3]
              tensor @relu_zero_point: i32[]
              tensor @relu_scale: f32[]
              tensor @input_1_zero_point: i32[]
              tensor @input_1_scale: f32[]
              %quantize: u8[2, 3, 5, 5] = quantize(%input_1, @input_1_scale, @input_1_zero_point, qmin=0, qmax=255)
              %dequantize: f32[2, 3, 5, 5] = dequantize(%quantize, @input_1_scale, @input_1_zero_point, qmin=0, qmax=255)
              %dequantize_2: f32[4, 3, 3, 3] = dequantize(@0.weight_codes, @0.weight_scale, @0.weight_zero_point, axis=0, qmin=-127, qmax=127)
              %dequantize_3: f32[4] = dequantize(@0.bias_codes, @0.bias_scale, @0.bias_zero_point, axis=0, qmin=-2147483648, qmax=2147483647)
              %conv2d: f32[2, 4, 3, 3] = conv2d(%dequantize, %dequantize_2, %dequantize_3)
              %relu: f32[2, 4, 3, 3] = relu(%conv2d)
              %quantize_1: u8[2, 4, 3, 3] = quantize(%relu, @relu_scale, @relu_zero_point, qmin=0, qmax=255)
              %dequantize_1: f32[2, 4, 3, 3] = dequantize(%quantize_1, @relu_scale, @relu_zero_point, qmin=0, qmax=255)
              return output=%dequantize_1
        """,  # noqa: E501
    )
    assert checked.after.observers == {}
    assert not checked.after.has_tensor("0.weight") and not checked.after.has_tensor("0.bias")


def test_computes_what_integer_arithmetic_computes() -> None:
    """Against (codes - zero point) summed in int32, plus the bias codes, times s_x · s_w."""
    x = values(2, 3, 5, 5)
    model = settled(nn.Conv2d(3, 4, 3), nn.ReLU())
    program = frozen(model, x, observer=MinMax())
    scale = (x.max() - x.min()) / 255
    zero = int((-x.min() / scale).round())
    codes = torch.clamp((x / scale).round() + zero, 0, 255)
    weight = model[0].weight.detach()
    weight_scale = weight.abs().amax((1, 2, 3)) / 127
    weight_codes = (weight / weight_scale[:, None, None, None]).round()
    bias_scale = scale * weight_scale
    bias_codes = (model[0].bias.detach() / bias_scale).round()
    assert torch.equal(program.tensor("0.weight_codes"), weight_codes.to(torch.int8))
    assert torch.equal(program.tensor("0.bias_codes"), bias_codes.to(torch.int32))
    assert torch.equal(program.tensor("0.bias_scale"), bias_scale)
    sums = torch.nn.functional.conv2d((codes - zero).double(), weight_codes.double(), bias_codes.double())
    real = torch.relu(sums * bias_scale.double()[:, None, None])
    out_scale = program.tensor("relu_scale")
    # One code: the reference sums in float32, so a value on the edge between two codes may fall either way.
    assert float((program(x) - real).abs().max()) <= float(out_scale) * 1.001


def test_freezes_a_program_without_observers() -> None:
    check_pass(
        FreezeObservers(), settled(nn.Tanh()), (values(2, 3),), prepare=[InsertObservers()], unchanged=True
    )


def test_refuses_programs_of_another_level() -> None:
    refuse_level(FreezeObservers(), Level.ATEN)
    refuse_level(FreezeObservers(), Level.QDQ)


def test_names_an_observer_that_never_saw_data() -> None:
    program = trace(settled(nn.Linear(3, 2)), (values(2, 3),))
    run([InsertObservers()], program)
    with pytest.raises(CalibrationError, match=r"(?s)never saw data.*node %input_1.*0 batches"):
        run([FreezeObservers()], program)
    assert program.level is Level.OBSERVED and len(value_observers(program)) == 1  # as before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_names_the_layer_whose_weight_is_not_finite(bad: float) -> None:
    program = trace(settled(nn.Linear(3, 2), nn.Linear(2, 2)), (values(2, 3),))
    run([InsertObservers(activation_formats=(("*", "float"),))], program)
    broken = program.tensor("1.weight").detach().clone()
    broken[0, 0] = bad
    program.set_tensor("1.weight", broken)
    with pytest.raises(InputError, match=r"(?s)not finite.*layer '1', tensor @1.weight.*1 of 4 weights"):
        run([FreezeObservers()], program)


def test_a_channel_of_zeros_has_the_scale_one() -> None:
    model = settled(nn.Linear(3, 2))
    model[0].weight.data[1] = 0
    program = frozen(model, values(2, 3))
    assert float(program.tensor("0.weight_scale")[1]) == 1.0
    assert not program.tensor("0.weight_codes")[1].any()
    assert torch.allclose(program(values(2, 3))[:, 1], model[0].bias[1], atol=1e-2)  # half a step of s_x


def test_a_value_that_is_always_zero_has_the_scale_one() -> None:
    program = trace(settled(nn.Linear(3, 2)), (values(2, 3),))
    records = run([InsertObservers(), Calibrate(), FreezeObservers()], program, [torch.zeros(2, 3)])
    assert [remark.reason for remark in records[-1].remarks] == [
        "was zero for all calibration data: its scale is 1"
    ]
    assert float(program.tensor("input_1_scale")) == 1.0


def test_raises_the_scale_of_weights_too_small_for_their_bias() -> None:
    """Channel 1 has weights of 1e-12 and a bias of 1: at its own scale the bias would not fit int32."""
    model = settled(nn.Linear(3, 2))
    model[0].weight.data[1] = 1e-12
    model[0].bias.data[:] = 1.0
    x = values(2, 3)
    program = trace(model, (x,))
    *_, record = run([InsertObservers(), Calibrate(), FreezeObservers()], program, [x])
    assert [remark.reason for remark in record.remarks] == [
        "1 weight scales were raised so that the bias fits int32"
    ]
    assert int(program.tensor("0.bias_codes").abs().max()) <= affine.BIAS_LIMIT
    assert torch.allclose(program(x)[:, 1], torch.ones(2), rtol=1e-6)


def test_a_bias_stays_in_floating_point_beside_scales_a_group() -> None:
    x = values(2, 8)
    program = trace(settled(nn.Linear(8, 2)), (x,))
    passes = [InsertObservers(weight=Format.parse("int4:group=4")), Calibrate(), FreezeObservers()]
    *_, record = run(passes, program, [x])
    assert [remark.reason for remark in record.remarks] == [
        "its bias stays in floating point: its weight has scales a group"
    ]
    assert program.has_tensor("0.bias") and program.tensor("0.weight_scale").shape == (2, 2)


def test_a_bias_stays_in_floating_point_where_the_data_is() -> None:
    x = values(2, 8)
    program = frozen(settled(nn.Linear(8, 2)), x, activation_formats=(("0", "float"),))
    assert program.has_tensor("0.bias") and not calls(program, QUANTIZE)


def test_the_bias_behind_moved_and_concatenated_codes_has_their_scale() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.a(x), self.b(x)], 1)
            return self.fc(torch.nn.functional.max_pool1d(x, 2).flatten(1))

    program = frozen(settle(Network()), values(2, 2, 4))
    expected = program.tensor("cat_scale") * program.tensor("fc.weight_scale")
    assert torch.equal(program.tensor("fc.bias_scale"), expected)


@pytest.mark.parametrize("prune", [[], [ApplyMasks()]], ids=["masked", "applied"])
def test_codes_of_masked_weights_are_the_zero_point(prune: list[ApplyMasks]) -> None:
    x = values(2, 8)
    program = trace(settled(nn.Linear(8, 4)), (x,))
    pattern = Pattern.parse("2:4")
    passes = [
        MaskWeights(pattern=pattern),
        *prune,
        InsertObservers(weight=Format.parse("uint8:channel=0:affine")),
        Calibrate(),
        FreezeObservers(),
    ]
    run(passes, program, [x])
    promise = program.sparsity["0.weight_codes"]
    assert promise.pattern == pattern and promise.sparsity == 0.5
    zero = program.tensor("0.weight_zero_point").unsqueeze(1).expand(4, 8)
    codes = program.tensor("0.weight_codes").int()
    assert torch.equal(codes[~promise.mask], zero[~promise.mask]) and zero.any()
    assert set(program.sparsity) == {"0.weight_codes"}
    assert not calls(program, torch.ops.sqcompile.mask.default)


def test_a_tied_weight_is_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 3)
            self.head = nn.Linear(3, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).tanh())

    ids = torch.tensor([[1, 2], [3, 4]])
    program = trace(settle(Tied()), (ids,))
    run([InsertObservers(), Calibrate(), FreezeObservers()], program, [ids])
    codes = [name for name, _ in program.tensors() if name.endswith("_codes")]
    assert len(codes) == 1
    assert {layer.name for layer in layers_of(program)} == {"embed", "head"}


def test_biases_of_grouped_transposed_convolutions() -> None:
    """Scales [out / groups] serve a channel of every group; the bias has one a channel."""
    x = values(2, 4, 3, 3)
    program = frozen(settled(nn.ConvTranspose2d(4, 6, 2, groups=2)), x)
    scale = program.tensor("0.weight_scale")
    assert scale.shape == (3,)
    assert torch.equal(program.tensor("0.bias_scale"), (program.tensor("input_1_scale") * scale).repeat(2))


def error(program: Program, model: nn.Sequential) -> float:
    (layer,) = layers_of(program)
    value = constant_value(program, layer.weight_value)
    assert value is not None
    return float((value - model[0].weight.detach()).square().sum())


def test_the_search_option_reduces_the_error_of_the_weights() -> None:
    model, x = settled(nn.Linear(64, 8)), values(2, 64)
    errors = {}
    for search in ("minmax", "mse"):
        program = trace(model, (x,))
        passes = [
            InsertObservers(weight=Format.parse("int3:channel=0")),
            Calibrate(),
            FreezeObservers(search=search),  # type: ignore[arg-type]
        ]
        run(passes, program, [x])
        errors[search] = error(program, model)
    assert errors["mse"] < 0.9 * errors["minmax"]  # normal weights at 3 bits gain about a third


def test_scales_are_those_of_the_observed_range() -> None:
    x = values(4, 3)
    program = frozen(settled(nn.Linear(3, 2)), x, observer=MinMax(), activation=Format.parse("int8"))
    (quantize,) = calls(program, QUANTIZE)
    assert quantize.args[5:] == (-128, 127)
    assert torch.equal(program.tensor("input_1_scale"), x.abs().max() / 127)
    assert len(calls(program, DEQUANTIZE)) == 3  # the value, the weight, the bias


@pytest.mark.parametrize("mapping", ["tanh", "codebook", "nf", "log2"])
def test_values_with_a_table_are_looked_up(mapping: str) -> None:
    """What was left open is fitted to the histogram: nearer than even steps, for values with long tails."""
    x = values(64, 16) * values(64, 16, seed=2).exp()
    model = settled(nn.Linear(16, 4))
    program, linear = (
        frozen(model, x, activation=Format.parse(text)) for text in (f"int4:mapping={mapping}", "int4")
    )
    entries = program.tensor("input_1_entries")
    assert entries.shape == (256,) and 8 <= len(set(entries.tolist())) <= 16 and int(entries[128]) == 128
    (lookup,) = calls(program, torch.ops.sqcompile.lookup.default)
    (quantize, *_), (dequantize, *_) = calls(program, QUANTIZE), lookup.users
    assert lookup.args[0] is quantize and dequantize.args[1] is quantize.args[1]
    scale = program.tensor("input_1_scale")
    codes = (x / scale).round().clamp(-128, 127).long() + 128
    restored = (entries[codes].float() - 128) * scale
    weight = constant_value(program, layers_of(program)[0].weight_value)
    bias = constant_value(program, layers_of(program)[0].bias)  # type: ignore[arg-type]
    assert weight is not None and bias is not None
    torch.testing.assert_close(program(x), nn.functional.linear(restored, weight, bias), rtol=1e-5, atol=1e-5)
    even = calls(linear, QUANTIZE)[0]
    step = linear.tensor(str(even.args[1].target))  # type: ignore[union-attr]
    plain = (x / step).round().clamp(-8, 7) * step
    if mapping in ("tanh", "codebook"):
        assert (restored - x).square().mean() < 0.8 * (plain - x).square().mean()


def test_a_range_alone_is_covered_by_a_table_that_is_known() -> None:
    x = values(32, 16)
    model = settled(nn.Linear(16, 4))
    program = frozen(model, x, activation=Format.parse("int4:mapping=nf"), observer=MinMax())
    assert float(program.tensor("input_1_scale")) == pytest.approx(float(x.abs().max()) / 127)
    with pytest.raises(CalibrationError, match="range alone") as caught:
        frozen(model, x, activation=Format.parse("int4:mapping=tanh"), observer=MinMax())
    assert "histogram-mse" in str(caught.value) and "mapping=tanh" in str(caught.value)
