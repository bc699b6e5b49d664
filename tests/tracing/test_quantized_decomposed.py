"""Programs that PyTorch's own quantization has made."""

import importlib

import pytest
import torch
from torch import Tensor, nn

import sqcompile
from sqcompile import Level, Program
from sqcompile.errors import TraceError
from sqcompile.verify import check_level, check_quantization, check_structure


@pytest.fixture(scope="module", autouse=True)
def quantized_decomposed() -> None:
    # By name: only who hands in such a program has these operators, sqcompile itself never imports them.
    pytest.importorskip("torch.ao.quantization.fx._decomposed")
    importlib.import_module("torch.ao.quantization.fx._decomposed")


class Uses(nn.Module):
    """Runs a function of the input and a stored tensor."""

    def __init__(self, function, weight: Tensor) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def op(name: str, overload: str = "default"):  # type: ignore[no-untyped-def]
    return getattr(getattr(torch.ops.quantized_decomposed, name), overload)


def per_tensor(x: Tensor, weight: Tensor) -> Tensor:
    codes = op("quantize_per_tensor")(x, 0.03, 12, 0, 255, torch.uint8)
    x = op("dequantize_per_tensor")(codes, 0.03, 12, 0, 255, torch.uint8)
    codes = op("quantize_per_tensor")(weight, 0.02, 0, -127, 127, torch.int8)
    return x @ op("dequantize_per_tensor")(codes, 0.02, 0, -127, 127, torch.int8).T


def per_tensor_stored_scales(x: Tensor, weight: Tensor) -> Tensor:
    scale, zero = torch.tensor([0.05], dtype=torch.float64), torch.tensor([3])
    codes = op("quantize_per_tensor", "tensor")(x, scale, zero, -128, 127, torch.int8)
    return op("dequantize_per_tensor", "tensor")(codes, scale, zero, -128, 127, torch.int8)


def per_channel(x: Tensor, weight: Tensor) -> Tensor:
    scales, zeros = torch.tensor([0.01, 0.02, 0.03]), torch.tensor([0, 1, 2])
    codes = op("quantize_per_channel")(weight, scales, zeros, 0, -128, 127, torch.int8)
    return x @ op("dequantize_per_channel")(codes, scales, zeros, 0, -128, 127, torch.int8).T


def per_channel_without_zero_points(x: Tensor, weight: Tensor) -> Tensor:
    scales = torch.tensor([0.01, 0.02, 0.03])
    codes = op("quantize_per_channel")(weight, scales, torch.zeros(3).long(), 0, -128, 127, torch.int8)
    return x @ op("dequantize_per_channel")(codes, scales, None, 0, -128, 127, torch.int8).T


def per_group(x: Tensor, weight: Tensor) -> Tensor:
    scales, zeros = torch.full((3, 2), 0.1), torch.zeros(3, 2)
    codes = op("quantize_per_channel_group")(weight, scales, zeros, -8, 7, torch.int8, 4)
    return x @ op("dequantize_per_channel_group")(codes, scales, zeros, -8, 7, torch.int8, 4, torch.float32).T


def per_token(x: Tensor, weight: Tensor) -> Tensor:
    scales, zeros = x.abs().amax(-1, keepdim=True).double() / 127, torch.zeros(2, 1).long()
    codes = op("quantize_per_token")(x, scales, zeros, -128, 127, torch.int8)
    return op("dequantize_per_token")(codes, scales, zeros, -128, 127, torch.int8, torch.float32)


def dynamic(x: Tensor, weight: Tensor) -> Tensor:
    scale, zero = op("choose_qparams", "tensor")(x, 0, 255, 1e-6, torch.uint8)
    codes = op("quantize_per_tensor", "tensor")(x, scale, zero, 0, 255, torch.uint8)
    return op("dequantize_per_tensor", "tensor")(codes, scale, zero, 0, 255, torch.uint8)


def half_output(x: Tensor, weight: Tensor) -> Tensor:
    codes = op("quantize_per_tensor")(x, 0.03, 12, 0, 255, torch.uint8)
    return op("dequantize_per_tensor")(codes, 0.03, 12, 0, 255, torch.uint8, out_dtype=torch.float16)


FUNCTIONS = (
    per_tensor,
    per_tensor_stored_scales,
    per_channel,
    per_channel_without_zero_points,
    per_group,
    per_token,
    dynamic,
)


def example() -> tuple[Tensor, Tensor]:
    # Not on a tie between two codes of any scale here: there the two may round differently.
    values = torch.linspace(-1.237, 1.119, 16).reshape(2, 8)
    return values, torch.linspace(-0.7123, 0.8311, 24).reshape(3, 8)


def traced(function) -> tuple[nn.Module, Program]:  # type: ignore[no-untyped-def]
    x, weight = example()
    model = Uses(function, weight)
    return model, sqcompile.trace(torch.export.export(model, (x,)))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_operators_become_ours_with_the_same_numbers(function) -> None:  # type: ignore[no-untyped-def]
    model, program = traced(function)
    x, _ = example()
    assert "quantized_decomposed" not in {node.target.namespace for node in operators(program)}
    assert program.level is Level.QDQ
    # Only float32 rounding of scales: no code differs.
    torch.testing.assert_close(program(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_result_is_a_valid_program(function) -> None:  # type: ignore[no-untyped-def]
    _, program = traced(function)
    check_structure(program)
    check_level(program)
    check_quantization(program)


def test_types_of_results_are_kept() -> None:
    model, program = traced(half_output)
    x, _ = example()
    assert program(x).dtype is torch.float16
    torch.testing.assert_close(program(x), model(x), rtol=0, atol=0)


def test_stored_scales_are_named_after_what_they_scale() -> None:
    _, program = traced(per_tensor)
    names = [name for name, _ in program.tensors()]
    assert "weight_scale" in names
    assert program.tensor("weight_scale").shape == ()
    assert program.tensor("weight_zero_point").dtype is torch.int32


def test_graph_modules_and_modules_are_taken_too() -> None:
    x, weight = example()
    model = Uses(per_tensor, weight).eval()
    for given in (model, torch.export.export(model, (x,)).module()):
        program = sqcompile.trace(given, (x,))
        assert program.level is Level.QDQ


def test_the_level_of_a_float_model_stays() -> None:
    assert sqcompile.trace(nn.ReLU(), (torch.ones(2),)).level is Level.ATEN


def unknown_operator(x: Tensor, weight: Tensor) -> Tensor:
    return op("fake_quant_per_channel")(weight, torch.ones(3), torch.zeros(3).int(), 0, -128, 127) @ x.T


def odd_storage(x: Tensor, weight: Tensor) -> Tensor:
    return op("quantize_per_tensor")(x, 0.1, 0, -8, 7, torch.int32)


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        (unknown_operator, "quantized_decomposed::fake_quant_per_channel"),
        (odd_storage, "codes -8..7 stored as torch.int32"),
    ],
)
def test_what_has_no_counterpart_is_named(function, seen: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TraceError, match="no counterpart here") as caught:
        traced(function)
    assert caught.value.seen == seen
    assert "test_quantized_decomposed.py" in str(caught.value.where)


def operators(program: Program) -> list[torch.fx.Node]:
    return [node for node in program.compute_nodes() if isinstance(node.target, torch._ops.OpOverload)]
