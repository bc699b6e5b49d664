"""Quantized programs in ONNX Runtime: the same numbers, from the integer kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from sqcompile.backends.onnxruntime.artifact import OnnxArtifact
from sqcompile.backends.onnxruntime.session import OnnxSession
from sqcompile.passes import QuantizeWeights
from sqcompile.pipeline import PassContext, PassManager
from sqcompile.program import Program
from sqcompile.quantization import Format
from sqcompile.tracing import trace

Lower = Callable[[Program], OnnxArtifact]
Load = Callable[[OnnxArtifact], OnnxSession]
Optimized = Callable[[OnnxArtifact], Counter[str]]
Steps = Callable[[Any, Any], float]

LAYERS = ["linear", "conv1d", "conv2d", "add", "mul", "cat", "avg_pool", "mean", "sigmoid"]


class Layers(nn.Module):
    """A module of one function, with the layers that it uses."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def _make(function: Callable[..., Any], **layers: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Layers(function, **{name: make() for name, make in layers.items()}).eval()


def _image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# What ONNX Runtime must run: only these, and exactly as many; layout changes aside.
CALIBRATED = {
    "conv": (
        lambda: _make(lambda m, x: m.a(x), a=lambda: nn.Conv2d(3, 8, 3, padding=1)),
        (2, 3, 8, 8),
        {"QLinearConv": 1},
    ),
    "conv without bias": (
        lambda: _make(lambda m, x: m.a(x), a=lambda: nn.Conv2d(3, 8, 3, stride=2, bias=False)),
        (1, 3, 9, 9),
        {"QLinearConv": 1},
    ),
    "conv relu": (
        lambda: _make(lambda m, x: torch.relu(m.a(x)), a=lambda: nn.Conv2d(3, 8, 1)),
        (1, 3, 8, 8),
        {"QLinearConv": 1},
    ),
    "conv relu6": (
        lambda: _make(lambda m, x: functional.relu6(m.a(x)), a=lambda: nn.Conv2d(3, 8, 3)),
        (1, 3, 8, 8),
        {"QLinearConv": 1},
    ),
    "depthwise": (
        lambda: _make(lambda m, x: m.a(x), a=lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        (1, 8, 8, 8),
        {"QLinearConv": 1},
    ),
    "grouped": (
        lambda: _make(lambda m, x: m.a(x), a=lambda: nn.Conv2d(8, 16, 3, groups=4)),
        (1, 8, 8, 8),
        {"QLinearConv": 1},
    ),
    "conv1d": (
        lambda: _make(lambda m, x: m.a(x), a=lambda: nn.Conv1d(4, 8, 3)),
        (2, 4, 12),
        {"QLinearConv": 1},
    ),
    "residual": (
        lambda: _make(
            lambda m, x: torch.relu(m.b(torch.relu(m.a(x))) + m.c(x)),
            a=lambda: nn.Conv2d(4, 4, 3, padding=1),
            b=lambda: nn.Conv2d(4, 4, 3, padding=1),
            c=lambda: nn.Conv2d(4, 4, 1),
        ),
        (1, 4, 8, 8),
        {"QLinearConv": 3, "QLinearAdd": 1},
    ),
    "concatenation": (
        lambda: _make(
            lambda m, x: m.b(torch.cat([m.a(x), x], 1)),
            a=lambda: nn.Conv2d(4, 4, 1),
            b=lambda: nn.Conv2d(8, 4, 1),
        ),
        (1, 4, 8, 8),
        {"QLinearConv": 2, "QLinearConcat": 1},
    ),
    "pooling": (
        lambda: _make(
            lambda m, x: m.b(functional.avg_pool2d(functional.max_pool2d(m.a(x), 2), 2).mean((2, 3))),
            a=lambda: nn.Conv2d(4, 8, 3),
            b=lambda: nn.Linear(8, 5),
        ),
        (2, 4, 14, 14),
        {"QLinearConv": 1, "QLinearAveragePool": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    ),
    "gate": (
        lambda: _make(
            lambda m, x: m.a(x) * torch.sigmoid(m.b(x)),
            a=lambda: nn.Conv2d(4, 4, 1),
            b=lambda: nn.Conv2d(4, 4, 1),
        ),
        (1, 4, 8, 8),
        {"QLinearConv": 2, "QLinearSigmoid": 1, "QLinearMul": 1},
    ),
    "linear": (
        lambda: _make(lambda m, x: torch.relu(m.a(x)), a=lambda: nn.Linear(16, 8)),
        (4, 16),
        {"QGemm": 1},
    ),
    "linear without bias": (
        lambda: _make(lambda m, x: m.a(x), a=lambda: nn.Linear(16, 8, bias=False)),
        (4, 16),
        {"QGemm": 1},
    ),
    "linear over a batch of matrices": (
        lambda: _make(
            lambda m, x: m.b(m.a(x)), a=lambda: nn.Linear(16, 8, bias=False), b=lambda: nn.Linear(8, 4)
        ),
        (2, 3, 16),
        {"QLinearMatMul": 1, "QGemm": 1},
    ),
    "transposed convolution": (  # no integer kernel exists: floating point between the codes
        lambda: _make(
            lambda m, x: m.a(m.b(x)),
            a=lambda: nn.Conv2d(4, 4, 1),
            b=lambda: nn.ConvTranspose2d(4, 4, 2, stride=2),
        ),
        (1, 4, 4, 4),
        {"QLinearConv": 1, "ConvTranspose": 1},
    ),
}

_MAY_APPEAR = {"QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "MaxPool", "NhwcMaxPool", "Clip"}


@pytest.mark.parametrize("activation", ["uint8:affine", "int8"])
@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_layers_run_on_integers(
    name: str,
    activation: str,
    quantizer: Any,
    lower: Lower,
    load: Load,
    optimized: Optimized,
    worst_step: Steps,
) -> None:
    make, shape, expected = CALIBRATED[name]
    x = _image(*shape)
    program = quantizer.weights(trace(make(), (x,)), "int8:channel=0")
    quantizer.activations(program, activation, [x], kinds=LAYERS, outputs=True)
    artifact = lower(program)
    found = optimized(artifact)
    assert {operator: count for operator, count in found.items() if operator not in _MAY_APPEAR} == expected
    # Every output is a code: none is off by more than one.
    assert worst_step(load(artifact).run([x]), program.run([x])) <= 1.01 * _range_ratio(program, x)


def _range_ratio(program: Program, x: torch.Tensor) -> float:
    """Return how many 1/255 of the output's range the last scale is."""
    scales = [tensor for name, tensor in program.tensors() if name.endswith("_scale") and tensor.dim() == 0]
    output = program.run([x])[0]
    return max(float(scale) for scale in scales) / float((output.max() - output.min()) / 255)


DYNAMIC = ["uint8:affine:dynamic", "int8:affine:dynamic"]


class Mlp(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64, bias=bias)
        self.down = nn.Linear(64, 32, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.gelu(self.up(x)))


def _mlp(bias: bool, shape: tuple[int, ...]) -> tuple[Program, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape)
    dynamic = {"x": {0: Dim("rows", max=64)}}
    return trace(Mlp(bias).eval(), (x,), dynamic_shapes=dynamic), x


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(4, 32), (2, 3, 32)], ids=str)
@pytest.mark.parametrize("activation", DYNAMIC)
def test_dynamic_layers_run_on_integers(
    activation: str,
    shape: tuple[int, ...],
    bias: bool,
    quantizer: Any,
    lower: Lower,
    load: Load,
    optimized: Optimized,
) -> None:
    program, x = _mlp(bias, shape)
    quantizer.weights(program, "int8:channel=0")
    quantizer.activations(program, activation, [x], kinds=["linear"])
    artifact = lower(program)
    assert optimized(artifact) == {"DynamicQuantizeMatMul": 2, "Gelu": 1}
    torch.testing.assert_close(load(artifact)(x), program(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["int8:token:dynamic", "uint8:token:affine:dynamic", "int8:dynamic"])
@pytest.mark.parametrize("shape", [(4, 32), (2, 3, 32)], ids=str)
def test_other_dynamic_scales_run_on_integers(
    activation: str, shape: tuple[int, ...], quantizer: Any, lower: Lower, load: Load, optimized: Optimized
) -> None:
    program, x = _mlp(True, shape)
    quantizer.weights(program, "int8:channel=0")
    quantizer.activations(program, activation, [x], kinds=["linear"])
    artifact = lower(program)
    found = optimized(artifact)
    assert found["MatMulInteger"] + found["MatMulIntegerToFloat"] == 2 and not found["MatMul"] + found["Gemm"]
    torch.testing.assert_close(load(artifact)(x), program(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 32), (2, 3, 32)], ids=str)
@pytest.mark.parametrize(
    "weight",
    [
        "int4:group=32",
        "uint4:affine:group=16",
        "int8:group=32",
        "int8:channel=0",
        "int2:group=32",
        "int3:group=16",
    ],
)
def test_weight_only_layers_read_packed_weights(
    weight: str, shape: tuple[int, ...], quantizer: Any, lower: Lower, load: Load, optimized: Optimized
) -> None:
    program, x = _mlp(True, shape)
    quantizer.weights(program, weight)
    artifact = lower(program)
    assert optimized(artifact) == {"MatMulNBits": 2, "Gelu": 1}
    nodes = [node for node in artifact.model.graph if node.op_type == "MatMulNBits"]
    assert all(node.attributes["accuracy_level"].as_int() == 4 for node in nodes)
    # activations are rounded to 8 bits, block by block: 1/254 of a block's largest value at most
    expected = program(x).detach()
    error = (load(artifact)(x) - expected).pow(2).mean().sqrt() / expected.std()
    assert float(error) < 0.015


@pytest.mark.parametrize(
    "text", ["int8:channel=0", "int8", "uint4:affine:group=16", "int8:group=32", "int4:group=6"]
)
def test_embeddings(text: str, quantizer: Any, lower: Lower, load: Load) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[3, 0, 11], [7, 7, 1]])
    program = trace(nn.Embedding(12, 64).eval(), (ids,))
    floats = lower(program).size_bytes
    quantizer.weights(program, text)
    artifact = lower(program)
    torch.testing.assert_close(load(artifact)(ids), program(ids).detach(), rtol=0, atol=0)
    assert artifact.size_bytes < floats
    tables = [
        value for value in artifact.model.graph.initializers.values() if value.const_value.size >= 12 * 16
    ]
    assert {str(value.dtype) for value in tables} <= {"INT8", "UINT8", "INT4"}


class Kernels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 64, 3)
        self.up = nn.ConvTranspose2d(64, 16, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(torch.relu(self.conv(x)))


@pytest.mark.parametrize(
    "text", ["int8:channel=0", "uint8:affine:channel=0", "int4:channel=0", "int8", "int4:group=16@1"]
)
def test_weights_of_float_kernels_are_dequantized_once(
    text: str, quantizer: Any, lower: Lower, load: Load, optimized: Optimized
) -> None:
    """Nothing but the float kernels runs at a call, and yet the file holds codes."""
    torch.manual_seed(0)
    x = torch.randn(1, 32, 6, 6)
    program = trace(Kernels().eval(), (x,))
    floats = lower(program).size_bytes
    quantizer.weights(program, text)
    artifact = lower(program)
    assert not {"DequantizeLinear", "Cast", "Mul", "Sub", "Gather"} & set(optimized(artifact))
    torch.testing.assert_close(load(artifact)(x), program(x).detach(), rtol=1e-5, atol=1e-6)
    assert artifact.size_bytes < floats * (0.45 if "int8" in text else 0.35)


def test_four_bits_of_integer_kernels_take_half_a_byte(
    quantizer: Any, lower: Lower, load: Load, optimized: Optimized
) -> None:
    x = _image(1, 16, 8, 8)
    sizes, found, results = [], [], []
    for text in ("int8:channel=0", "int4:channel=0"):
        program = trace(_make(lambda m, x: m.a(x), a=lambda: nn.Conv2d(16, 64, 3)), (x,))
        quantizer.weights(program, text)
        quantizer.activations(program, "uint8:affine", [x], kinds=["conv2d"], outputs=True)
        artifact = lower(program)
        sizes.append(artifact.size_bytes)
        found.append(optimized(artifact))
        results.append(
            float((load(artifact)(x) - program(x).detach()).abs().max() / program.tensor("conv2d_scale"))
        )
    assert found[0] == found[1] and found[0]["QLinearConv"] == 1
    assert sizes[0] - sizes[1] > 0.45 * 16 * 64 * 9
    assert max(results) < 1.01, "in steps: biases are rounded to int32"


def test_sixteen_bit_activations(quantizer: Any, lower: Lower, load: Load) -> None:
    program, x = _mlp(True, (4, 32))
    quantizer.weights(program, "int8:channel=0")
    quantizer.activations(program, "uint16:affine", [x], kinds=["linear"])
    torch.testing.assert_close(load(lower(program))(x), program(x).detach(), rtol=1e-4, atol=1e-4)


def test_codes_flow_through_moves(quantizer: Any, lower: Lower, load: Load, optimized: Optimized) -> None:
    """Between integer operators, a program holds codes only; the runtime does too."""
    sq = torch.ops.sqcompile

    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 8, 3), nn.Linear(8 * 9, 4)
            self.register_buffer("scale", torch.tensor(0.05))
            self.register_buffer("zero", torch.tensor(3, dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale, zero = self.scale, self.zero
            codes = sq.quantize(torch.relu(self.first(x)), scale, zero, None, None, -128, 127)
            codes = functional.max_pool2d(codes, 2).flatten(1)
            return self.second(sq.dequantize(codes, scale, zero, None, None, -128, 127))

    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    program = quantizer.weights(trace(Moves().eval(), (x,)), "int8:channel=0")
    quantizer.activations(program, "uint8:affine", [x], kinds=["conv2d"])
    artifact = lower(program)
    found = optimized(artifact)
    assert found["QLinearConv"] == found["QGemm"] == 1 and not found["DequantizeLinear"]
    torch.testing.assert_close(load(artifact)(x), program(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mapping", ["nf", "codebook"])
@pytest.mark.parametrize("granularity", ["group=32", "channel=0"])
def test_tables_are_looked_up_at_load(mapping: str, granularity: str, lower: Lower, load: Load) -> None:
    """Half a byte a weight in the file, and floating-point products at run time: equal to the reference."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    ids = torch.tensor([[3, 0, 11], [7, 7, 1]])
    program = trace(model, (ids,))
    item = QuantizeWeights(weight=Format.parse(f"int4:{granularity}:mapping={mapping}"))
    PassManager([item]).run(program, PassContext())
    artifact = lower(program)
    kinds = [node.op_type for node in artifact.model.graph]
    assert kinds.count("MatMul") == 2 and "Lookup" not in kinds
    dtypes = {
        value.dtype for name, value in artifact.model.graph.initializers.items() if name.endswith("codes")
    }
    assert dtypes == {ir.DataType.UINT4}
    assert set(artifact.model.opset_imports) <= {"", "com.microsoft"}
    # float32 in another order of operations
    torch.testing.assert_close(load(artifact)(ids), program(ids).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    ["int4:token:dynamic:mapping=nf", "int4:dynamic:mapping=tanh@2", "int3:token:dynamic:mapping=log2"],
)
def test_values_are_looked_up(text: str, lower: Lower, load: Load) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 24)
    program = trace(nn.Sequential(nn.Linear(24, 8)).eval(), (x,))
    PassManager([QuantizeWeights(activation=Format.parse(text))]).run(program, PassContext())
    artifact = lower(program)
    gathers = [node for node in artifact.model.graph if node.op_type == "Gather"]
    (table, _) = gathers[0].inputs
    assert len(gathers) == 1 and table is not None and table.dtype == ir.DataType.UINT8
    torch.testing.assert_close(load(artifact)(x), program(x).detach(), rtol=1e-5, atol=1e-5)


def test_scales_in_another_shape_are_stored_once(quantizer: Any, lower: Lower) -> None:
    """A scale that became a factor beside its weight is not left in the file as well."""
    torch.manual_seed(0)
    program = trace(nn.Embedding(64, 64).eval(), (torch.tensor([1, 2]),))
    quantizer.weights(program, "int8:group=6")
    graph = lower(program).model.graph
    assert all(value.uses() or value.is_graph_output() for value in graph.initializers.values())
